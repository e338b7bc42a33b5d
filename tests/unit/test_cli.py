"""The commands of one process, called in this process; everything a user can get wrong is one line and exit code 1."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from services import cli_jsonl, cli_local
from services.cli import app
from services.common.errors import InvalidRequest
from services.common.sampling import SamplingParams
from services.common.settings import EngineSettings, ModelSettings
from services.local import LocalPipeline

V3 = Path(__file__).parents[1] / "data/checkpoints/v3"
SMALL = ("--device", "cpu", "--kv-memory", "16MiB", "--max-seq-len", "512")
GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def demo_pipeline():
    return LocalPipeline.load(ModelSettings(), EngineSettings(device="cpu", kv_cache_bytes=2**24))


def run(command, *arguments, stdin=""):
    result = CliRunner().invoke(app, [command, *SMALL, *map(str, arguments)], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def assert_refused(result, *named):
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for text in named:
        assert text in result.stderr


def jsonl(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def records(text):
    return [json.loads(line) for line in text.splitlines()]


# chat


def test_chat_from_a_pipe_answers_each_line_and_shows_figures():
    result = run("chat", *GREEDY, stdin="Hello there, who are you?\n\nTell me more\r\n/exit\nnever read\n")
    assert result.exit_code == 0
    assert "> Hello there, who are you?\n" in result.output
    figures = [line for line in result.output.splitlines() if "cached tokens" in line]
    assert len(figures) == 2
    assert "new + 0 cached tokens" in figures[0]
    assert "new + 16 cached tokens" in figures[1]
    assert all("first token" in line and "tokens/s" in line and line.endswith("length") for line in figures)
    assert "never read" not in result.output


def test_reset_starts_a_conversation_without_history():
    question = "Hello there, tell me a story about a small cat and a big dog\n"
    again = [line.split(" · ")[0] for line in figures_of(question + question)]
    reset = [line.split(" · ")[0] for line in figures_of(question + "/reset\n" + question)]
    assert reset[0] == again[0]
    new = int(reset[0].split()[0])
    # After a reset the same prompt comes again, and its full blocks are found.
    assert reset[1] == f"{new - 16} new + 16 cached tokens"
    assert again[1] != reset[1]


def figures_of(stdin):
    return [line for line in run("chat", *GREEDY, stdin=stdin).output.splitlines() if "cached tokens" in line]


def test_chat_takes_a_system_message_and_shows_text_as_it_is():
    result = run("chat", *GREEDY, "--system", "You are brief.", stdin="[/b] [red]x[/red] :smile: <｜User｜>\nAgain\n")
    assert result.exit_code == 0
    assert "> [/b] [red]x[/red] :smile: <｜User｜>" in result.output


def test_chat_refuses_invalid_utf8_after_answering_what_came_before():
    result = run("chat", *GREEDY, stdin=b"Hello there\n\xff\xfe\nHello\n")
    assert_refused(result, "not valid UTF-8")
    assert result.stdout.count("cached tokens") == 1


def test_chat_goes_on_after_a_message_that_is_too_long():
    result = run("chat", *GREEDY, stdin="word " * 600 + "\nHello there\n")
    assert result.exit_code == 0
    assert "error: prompt:" in result.output
    assert "Hello! How can I help you" in result.output


def test_chat_needs_a_tokenizer():
    assert_refused(run("chat", "--model", V3, stdin="Hello\n"), "tokenizer.json")


# generate


def test_generate_continues_a_prompt():
    first, second = (run("generate", "--prompt", "Once upon a time", *GREEDY) for _ in range(2))
    assert first.exit_code == 0
    assert len(first.stdout) > 5
    assert first.stdout == second.stdout


def test_generate_seeds_are_reproducible(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", *({"prompt": "Once", "sampling": {"seed": seed}} for seed in (1, 1, 2)))
    result = run("generate", "--input", source, "--temperature", "1", "--max-tokens", "12")
    replies = [record["text"] for record in records(result.stdout)]
    assert replies[0] == replies[1] != replies[2]


def test_generate_answers_lines_of_every_kind_in_their_order(tmp_path):
    source = jsonl(
        tmp_path / "in.jsonl",
        {"prompt": "Once upon a time", "sampling": {"max_tokens": 20}},
        "\n",
        {"token_ids": [0, 300, 301], "sampling": {"max_tokens": 2, "logprobs": 1, "prompt_logprobs": 0}},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]},
        {"token_ids": [0, 5], "sampling": {"logit_bias": {"77": 100}, "stop_token_ids": [77], "ignore_eos": True}},
        {"prompt": "Once upon a time", "sampling": {"max_tokens": 20, "stop": ["e"]}},
    )
    target = tmp_path / "out.jsonl"
    result = run("generate", "--input", source, "--output", target, *GREEDY)
    assert (result.exit_code, result.stdout) == (0, "")
    text, ids, chat, biased, stopped = records(target.read_text("utf-8"))
    assert text["usage"]["num_generated_tokens"] == len(text["token_ids"]) <= 20
    assert len(text["token_ids"]) > 8
    assert len(ids["logprobs"]) == len(ids["token_ids"]) == len(ids["prompt_logprobs"]) == 2
    assert len(ids["logprobs"][0]["top"]) == 1
    assert len(chat["token_ids"]) <= 8
    assert (biased["token_ids"], biased["finish_reason"]) == ([77], "stop")
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text["text"][: text["text"].index("e")]


def test_generate_writes_to_standard_output_and_separates_lines_at_line_feeds_only(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes('{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}'.encode())
    result = run("generate", "--input", source, *GREEDY)
    assert result.exit_code == 0
    assert len(records(result.stdout)) == 2


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{nonsense\n", "not JSON"),
        ("[" * 100_000 + "\n", "not JSON"),
        ([1], "not a JSON object"),
        ({"prompt": "x", "temprature": 1}, "'temprature'"),
        ({}, "needs one of"),
        ({"prompt": "x", "token_ids": [1]}, "needs one of"),
        ({"prompt": 5}, "text is a string"),
        ({"token_ids": "abc"}, "token_ids"),
        ({"token_ids": [True]}, "token_ids"),
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages"),
        ({"prompt": "x", "sampling": 5}, "sampling is an object"),
        ({"prompt": "x", "sampling": {"temp": 1}}, "'temp'"),
        ({"prompt": "x", "sampling": {"temperature": "hot"}}, "sampling.temperature"),
        ({"prompt": "x", "sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"prompt": "x", "sampling": {"temperature": None}}, "sampling.temperature"),
        ({"prompt": "x", "sampling": {"temperature": math.nan}}, "sampling.temperature"),
        ({"prompt": "x", "sampling": {"max_tokens": 1.5}}, "sampling.max_tokens"),
        ({"prompt": "x", "sampling": {"ignore_eos": "yes"}}, "sampling.ignore_eos"),
        ({"prompt": "x", "sampling": {"stop": "a string"}}, "sampling.stop"),
        ({"prompt": "x", "sampling": {"stop": [5]}}, "sampling.stop"),
        ({"prompt": "x", "sampling": {"stop": 5}}, "sampling.stop"),
        ({"prompt": "x", "sampling": {"stop_token_ids": 5}}, "sampling.stop_token_ids"),
        ({"prompt": "x", "sampling": {"stop_token_ids": ["a"]}}, "sampling.stop_token_ids"),
        ({"prompt": "x", "sampling": {"logit_bias": {"word": 1}}}, "sampling.logit_bias"),
        ({"prompt": "x", "sampling": {"logit_bias": {"5": "much"}}}, "sampling.logit_bias"),
        ({"prompt": "x", "sampling": {"logit_bias": [5]}}, "sampling.logit_bias"),
    ],
)
def test_generate_reports_a_bad_line_by_its_number_and_serves_the_others(tmp_path, demo_pipeline, line, named):
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "fine"}, line, {"prompt": "fine"})
    target = tmp_path / "out.jsonl"
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    (problem,) = cli_jsonl.complete_lines(demo_pipeline, source, target, greedy)
    assert problem.startswith("line 2: ")
    assert named in problem
    before, bad, after = records(target.read_text("utf-8"))
    assert before == after
    assert before["usage"]["num_generated_tokens"] == 4
    assert bad == {"error": {"line": 2, "reason": "INVALID_REQUEST", "message": problem}}


def test_generate_goes_on_after_a_line_that_is_too_long_for_the_model(tmp_path, demo_pipeline):
    source = jsonl(tmp_path / "in.jsonl", {"token_ids": [5] * 9000}, {"prompt": "fine"}, {"token_ids": [10**6]})
    target = tmp_path / "out.jsonl"
    problems = cli_jsonl.complete_lines(
        demo_pipeline, source, target, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    )
    assert [problem[:7] for problem in problems] == ["line 1:", "line 3:"]
    first, second, third = records(target.read_text("utf-8"))
    assert first["error"]["reason"] == "PROMPT_TOO_LONG"
    assert third["error"]["line"] == 3
    assert second["usage"]["num_generated_tokens"] == 2


def test_generate_shows_a_bad_line_as_one_line_of_error(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "x", "sampling": {"temperature": "hot"}})
    result = run("generate", "--input", source)
    assert_refused(result, "line 1: sampling.temperature")
    assert records(result.stdout)[0]["error"]["line"] == 1


# score


def test_score_writes_logprobs_perplexity_and_logits_that_agree(tmp_path):
    lines = [{"text": "The cat sat on the mat."}, {"token_ids": [0, 300, 301, 302]}, {"token_ids": [9]}]
    logits_file, target = tmp_path / "logits.safetensors", tmp_path / "out.jsonl"
    source = jsonl(tmp_path / "in.jsonl", *lines)
    result = run("score", "--input", source, "--output", target, "--logits", logits_file)
    assert result.exit_code == 0
    logits, scores = load_file(logits_file), records(target.read_text("utf-8"))
    assert set(logits) == {"logits.0", "logits.1", "logits.2"}
    assert scores[0]["token_ids"][0] == 0  # the begin-of-sentence token
    assert scores[1]["token_ids"] == [0, 300, 301, 302]
    for index, score in enumerate(scores):
        rows, ids = logits[f"logits.{index}"], torch.tensor(score["token_ids"])
        assert rows.dtype is torch.float32
        assert rows.shape == (len(ids), 8192)
        if len(ids) == 1:
            assert (score["logprobs"], score["perplexity"]) == ([None], None)
            continue
        nll = torch.nn.functional.cross_entropy(rows[:-1], ids[1:], reduction="none")
        assert score["logprobs"][0] is None
        torch.testing.assert_close(torch.tensor(score["logprobs"][1:]), -nll)
        assert score["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)


def test_score_without_a_tokenizer_takes_token_ids_and_refuses_text(tmp_path):
    source = jsonl(tmp_path / "ids.jsonl", {"token_ids": [5, 6, 7]})
    result = run("score", "--model", V3, "--input", source)
    assert result.exit_code == 0
    assert len(records(result.stdout)[0]["logprobs"]) == 3
    refused = run("score", "--model", V3, "--input", jsonl(tmp_path / "text.jsonl", {"text": "words"}))
    assert_refused(refused, "tokenizer.json")


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"text": "x", "token_ids": [1]},
        {"text": "x", "more": 1},
        {"text": 5},
        {"token_ids": []},
        {"token_ids": [1.5]},
        {"token_ids": [10**7]},
        {"token_ids": [-1]},
        {"token_ids": [5] * 600},
    ],
)
def test_score_refuses_a_bad_line_by_its_number(tmp_path, line):
    assert_refused(run("score", "--input", jsonl(tmp_path / "in.jsonl", line)), "line 1: ")


# Options and files.


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "tpu"], "--device"),
        (["--dtype", "int4"], "--dtype"),
        (["--cache-mode", "magic"], "--cache-mode"),
        (["--kv-dtype", "fp8", "--cache-mode", "naive"], "kv_dtype fp8 needs cache_mode absorb"),
        (["--load-format", "pickle"], "--load-format"),
        (["--max-seq-len", "0"], "--max-seq-len"),
        (["--kv-memory", "abc"], "--kv-memory"),
        (["--kv-memory", "1B"], "hold no block"),
        (["--temperature", "-1"], "sampling.temperature"),
        (["--top-p", "0"], "sampling.top_p"),
        (["--max-tokens", "0"], "sampling.max_tokens"),
        (["--seed", "-3"], "sampling.seed"),
        (["--model", "/nowhere/[/b]"], "/nowhere/[/b]"),
        (["--input", "also.jsonl"], "--prompt"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(arguments, named):
    assert_refused(run("generate", "--prompt", "x", *arguments), named)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path):
    source, nowhere = jsonl(tmp_path / "in.jsonl", {"token_ids": [1, 2]}), tmp_path / "no" / "file"
    (tmp_path / "latin1.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    assert_refused(run("score", "--input", nowhere), "--input", "No such file")
    assert_refused(run("score", "--input", tmp_path / "latin1.jsonl"), "--input", "UTF-8")
    assert_refused(run("score", "--input", source, "--output", nowhere), "--output", "No such file")
    assert_refused(run("generate", "--input", source, "--output", nowhere), "--output", "No such file")
    assert_refused(run("score", "--input", source, "--output", tmp_path / "o", "--logits", nowhere), "--logits")


def test_every_number_format_runs():
    for options in (["--dtype", "bfloat16"], ["--kv-dtype", "fp8"], ["--cache-mode", "naive"]):
        assert run("generate", "--prompt", "Hello", *options, *GREEDY).exit_code == 0
    dummy = run("generate", "--prompt", "Hello", "--load-format", "dummy", "--temperature", "0", "--max-tokens", "2")
    assert dummy.exit_code == 0


def test_sizes_are_read_with_their_units():
    sizes = {"1000": 1000, "24GiB": 24 * 2**30, "1.5 GB": 1_500_000_000, "512mib": 2**29}
    assert {text: cli_local.parse_bytes(text, "x") for text in sizes} == sizes
    for text in ("", "abc", "-1", "1e9", "24G", "0", "9" * 400):
        with pytest.raises(InvalidRequest, match="is not a size"):
            cli_local.parse_bytes(text, "x")
