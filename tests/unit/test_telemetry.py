import io
import json
import logging
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.common.telemetry import METRICS, JsonFormatter, Metrics, MetricsServer, TraceContext, configure_logging


@pytest.fixture
def log_stream() -> Iterator[io.StringIO]:
    logger = logging.getLogger("services")
    before = (logger.handlers[:], logger.level, logger.propagate)
    stream = io.StringIO()
    configure_logging("INFO", role="gateway", replica="gateway-1", stream=stream)
    yield stream
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_log_line_is_json_with_the_agreed_fields(log_stream: io.StringIO) -> None:
    logging.getLogger("services.x").info("turn_finished", extra={"request_id": "r1", "turn": 2, "duration_ms": 1.5})
    line = json.loads(log_stream.getvalue())
    assert line.pop("ts").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "event": "turn_finished",
        "logger": "services.x",
        "role": "gateway",
        "replica": "gateway-1",
        "request_id": "r1",
        "turn": 2,
        "duration_ms": 1.5,
    }


def test_an_exception_is_logged_without_its_message(log_stream: io.StringIO) -> None:
    try:
        raise RuntimeError("the secret prompt")
    except RuntimeError:
        logging.getLogger("services").exception("turn_failed")
    line = json.loads(log_stream.getvalue())
    assert line["error"] == "RuntimeError"
    assert "test_telemetry.py" in line["stack"][0]
    assert "secret" not in log_stream.getvalue()


def test_fields_that_are_not_agreed_stay_out_of_the_log() -> None:
    record = logging.LogRecord("services", logging.INFO, "", 0, "event", None, None)
    record.prompt = "hello"
    assert "hello" not in JsonFormatter().format(record)


def test_every_metric_can_be_written_and_is_served() -> None:
    metrics = Metrics(role="decode", model_name="demo")
    for spec in METRICS:
        labels = dict.fromkeys(spec.labels, "x")
        verb = {"Counter": metrics.increment, "Gauge": metrics.set, "Histogram": metrics.observe}[spec.kind.__name__]
        verb(spec.stem, 1.0, **labels)
    server = MetricsServer(metrics)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as response:
            families = {each.name: each for each in text_string_to_metric_families(response.read().decode())}
    finally:
        server.close()
    served = {name for name in families if not name.endswith("_created")}
    assert served == {f"antiphon_{spec.stem}" for spec in METRICS}
    for family in families.values():
        assert all(sample.labels["role"] == "decode" for sample in family.samples)


def test_two_processes_metrics_do_not_share_a_registry() -> None:
    Metrics("prefill", "demo")
    Metrics("prefill", "demo")


def test_an_unknown_stem_or_the_wrong_verb_is_refused() -> None:
    metrics = Metrics("gateway", "demo")
    with pytest.raises(KeyError):
        metrics.increment("nonsense")
    with pytest.raises(TypeError):
        metrics.set("prompt_tokens", 1.0)
    with pytest.raises(ValueError):
        metrics.increment("request_success")


def test_traceparent_round_trips_and_a_child_stays_in_the_trace() -> None:
    root = TraceContext.new(is_sampled=True)
    assert TraceContext.parse(root.header()) == root
    child = root.child()
    assert (child.trace_id, child.is_sampled) == (root.trace_id, True)
    assert child.span_id != root.span_id


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00-" + "0" * 32 + "-" + "1" * 16 + "-01",
        "00-" + "1" * 32 + "-" + "0" * 16 + "-01",
        "ff-" + "1" * 32 + "-" + "1" * 16 + "-01",
        "00-" + "1" * 32 + "-" + "1" * 16 + "-01-extra",
        "00-" + "A" * 32 + "-" + "1" * 16 + "-01",
        "00-" + "1" * 31 + "-" + "1" * 16 + "-01",
    ],
)
def test_a_malformed_traceparent_is_ignored(header: str | None) -> None:
    assert TraceContext.parse(header) is None


def test_a_newer_version_of_traceparent_is_read_by_its_first_fields() -> None:
    assert TraceContext.parse("01-" + "1" * 32 + "-" + "2" * 16 + "-00-more") == TraceContext("1" * 32, "2" * 16)
