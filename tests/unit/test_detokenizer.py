"""The incremental detokenizer against decoding everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import services
from services.text.detokenizer import Detokenizer
from services.text.tokenizer import Tokenizer

DEMO = Path(services.__file__).parent / "demo_model"
TOKENIZER = Tokenizer.from_folder(DEMO)
LIBRARY = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
ID_OF_BYTE = {
    TOKENIZER.token_bytes(i)[0]: i
    for i in reversed(range(TOKENIZER.vocab_size))
    if len(TOKENIZER.token_bytes(i)) == 1 and not TOKENIZER.is_special(i)
}

byte_texts = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(str.encode),
    st.sampled_from(["👩‍👩‍👧‍👦 🇨🇳 é", "日本語のテスト、한국어", "العربية", "naïve ½"]).map(str.encode),
    st.sampled_from([b"\xf0\x9f\x98", b"\xe6\x97a", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xf0\x9f"]),
)


def one_token_a_byte(data: bytes) -> list[int]:
    return [ID_OF_BYTE[byte] for byte in data]


@st.composite
def chunked(draw, ids) -> list[list[int]]:
    values = draw(ids)
    cuts = sorted(draw(st.lists(st.integers(0, len(values)), max_size=6)))
    return [values[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]


byte_ids = st.lists(byte_texts, max_size=4).map(b"".join).map(one_token_a_byte)
any_ids = st.one_of(byte_ids, st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))


@settings(max_examples=300, deadline=None)
@given(chunked(any_ids), st.booleans())
def test_pushes_and_finish_join_to_the_library_decoding(chunks: list[list[int]], skip: bool) -> None:
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=skip)
    pieces = [detokenizer.push(chunk) for chunk in chunks]
    text = "".join(pieces) + detokenizer.finish()
    ids = [token_id for chunk in chunks for token_id in chunk]
    assert text == LIBRARY.decode(ids, skip_special_tokens=skip)
    assert detokenizer.num_tokens_used == len(ids)
    assert not detokenizer.stopped


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_valid_text_never_shows_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    shown = ""
    for token_id in one_token_a_byte(text.encode()):
        shown += detokenizer.push([token_id])
        assert text.startswith(shown)
    assert shown == text
    assert detokenizer.finish() == ""


@settings(max_examples=400, deadline=None)
@given(
    st.text(alphabet="abé😀", max_size=40),
    st.lists(st.text(alphabet="abé😀", min_size=1, max_size=6), min_size=1, max_size=4),
    st.data(),
)
def test_stop_strings_cut_where_a_scan_of_the_whole_text_would(text: str, stops: list[str], data) -> None:
    ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
    chunks = data.draw(chunked(st.just(one_token_a_byte(text.encode()))))
    detokenizer = Detokenizer(TOKENIZER, tuple(stops))
    shown = ""
    for chunk in chunks:
        shown += detokenizer.push(chunk)
        assert not any(s in shown for s in stops)
    shown += detokenizer.finish()
    assert detokenizer.stopped == bool(ends)
    if ends:
        end, minus_length = min(ends)
        assert shown == text[: end + minus_length]
        assert detokenizer.num_tokens_used == len(text[:end].encode())
    else:
        assert shown == text


def test_what_may_begin_a_stop_string_is_held_back_and_given_out_when_it_does_not() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("User:",))
    assert detokenizer.push(TOKENIZER.encode("hello Us")) == "hello "
    assert detokenizer.push(TOKENIZER.encode("ed")) == "Used"
    assert detokenizer.push(TOKENIZER.encode("Use")) == ""
    assert detokenizer.finish() == "Use"


def test_stop_string_across_token_borders_ends_the_text() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("\n\nUser:",))
    ids = one_token_a_byte(b"fine\n\n\nUser: more")
    assert detokenizer.push(ids) == "fine\n"
    assert detokenizer.stopped
    assert detokenizer.num_tokens_used == len("fine\n\n\nUser:")
    assert detokenizer.push(ids) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.num_tokens_used == len("fine\n\n\nUser:")


def test_the_longest_of_stop_strings_that_end_together_is_cut() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("c", "abc", "bc"))
    assert detokenizer.push(one_token_a_byte(b"xxabcd")) == "xx"


def test_stop_string_inside_one_token() -> None:
    ids = TOKENIZER.encode("the story")
    assert len(ids) < len("the story")
    detokenizer = Detokenizer(TOKENIZER, ("e s",))
    assert detokenizer.push(ids) == "th"


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [*TOKENIZER.encode("Hi"), 1]
    assert Detokenizer(TOKENIZER).push(ids) == "Hi"
    assert Detokenizer(TOKENIZER, skip_special_tokens=False).push(ids) == "Hi<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("data", [b"ok \xf0\x9f\x98", b"\xe6"])
def test_an_unfinished_character_is_replaced_only_at_the_end(data: bytes) -> None:
    detokenizer = Detokenizer(TOKENIZER, ("zzz",))
    assert detokenizer.push(one_token_a_byte(data)) == data.decode(errors="ignore")
    assert detokenizer.finish() == "\ufffd"


def test_a_replacement_character_can_complete_a_stop_string_at_the_end() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("a\ufffd",))
    assert detokenizer.push(one_token_a_byte(b"xa\xf0")) == "x"
    assert detokenizer.finish() == ""
    assert detokenizer.stopped
