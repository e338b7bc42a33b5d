"""Logs, metrics and trace context: one JSON line an event, one table of metrics, W3C traceparent.

Neither prompt text nor a tenant's or session's name goes into a log or a label: sessions appear as keyed digests.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import secrets
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

LOG_FIELDS = ("request_id", "trace_id", "session", "turn", "role", "replica", "duration_ms", "reason", "details")

_LATENCY_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric: its stem (antiphon_ comes before it, _total after a counter), what it counts, its own labels.

    buckets: upper bounds, for a histogram only.
    """

    kind: type[Counter] | type[Gauge] | type[Histogram]
    stem: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec(Histogram, "time_to_first_token_seconds", "From a turn's arrival to its first token", (), _LATENCY_S),
    MetricSpec(Histogram, "inter_token_latency_seconds", "Between two tokens of a reply", (), _TOKEN_S),
    MetricSpec(Histogram, "e2e_request_latency_seconds", "From a turn's arrival to its end", (), _LATENCY_S),
    MetricSpec(Histogram, "request_queue_time_seconds", "From a turn's arrival to its first step", (), _LATENCY_S),
    MetricSpec(Histogram, "request_prefill_time_seconds", "Computing a prompt", (), _LATENCY_S),
    MetricSpec(Histogram, "request_decode_time_seconds", "From the first token to the last", (), _LATENCY_S),
    MetricSpec(Gauge, "num_requests_running", "Sequences that run"),
    MetricSpec(Gauge, "num_requests_waiting", "Sequences that wait"),
    MetricSpec(Gauge, "kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1"),
    MetricSpec(Gauge, "kv_blocks", "KV blocks by state: free, cached, used, published, quarantined", ("state",)),
    MetricSpec(Counter, "num_preemptions", "Sequences put back to free their blocks"),
    MetricSpec(Counter, "prompt_tokens", "Prompt tokens"),
    MetricSpec(Counter, "generation_tokens", "Reply tokens"),
    MetricSpec(Counter, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    MetricSpec(Counter, "prefix_cache_hits", "Prompt tokens found there"),
    MetricSpec(Counter, "request_success", "Turns that ended well", ("finished_reason",)),
    MetricSpec(Counter, "request_failures", "Calls that ended in an error, by its reason", ("reason",)),
    MetricSpec(Histogram, "kv_transfer_seconds", "Receiving KV blocks", (), _LATENCY_S),
    MetricSpec(Counter, "kv_transfer_bytes", "KV bytes received"),
    MetricSpec(Counter, "kv_transfer_failures", "Fetches of KV blocks that failed, by cause", ("reason",)),
    MetricSpec(Counter, "affinity_hits", "Later turns that went to a holder of their history and found it there"),
    MetricSpec(Counter, "affinity_misses", "Later turns that did not, or found nothing"),
    MetricSpec(Counter, "migrations", "Turns that went on at another replica", ("from", "outcome")),
    MetricSpec(Counter, "session_handovers", "Idle sessions of a replica that stopped, by outcome", ("outcome",)),
    MetricSpec(Counter, "fence_rejections", "Writes refused because their lease had been overtaken"),
    MetricSpec(Gauge, "sessions_active", "Sessions with a turn running"),
    MetricSpec(Gauge, "redis_up", "1 while the store of sessions answers"),
    MetricSpec(Gauge, "degraded_mode", "1 while turns are routed without the store"),
)


_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)


class Metrics:
    """The metrics of one process, in a registry of its own; every one carries model_name and role.

    A stem is as in METRICS; an unknown one is a KeyError, a missing label a ValueError.
    """

    def __init__(self, role: str, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._fixed = {"model_name": model_name, "role": role}
        self._collectors = {spec.stem: self._register(spec) for spec in METRICS}

    def increment(self, stem: str, amount: float = 1.0, **labels: str) -> None:
        """Adds to a counter."""
        collector = self._find(Counter, stem)
        collector.labels(**self._fixed, **labels).inc(amount)

    def set(self, stem: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        collector = self._find(Gauge, stem)
        collector.labels(**self._fixed, **labels).set(value)

    def observe(self, stem: str, value: float, **labels: str) -> None:
        """Adds an observation to a histogram."""
        collector = self._find(Histogram, stem)
        collector.labels(**self._fixed, **labels).observe(value)

    def _register(self, spec: MetricSpec) -> Counter | Gauge | Histogram:
        options: dict[str, Any] = {"buckets": spec.buckets} if spec.buckets else {}
        labels = (*self._fixed, *spec.labels)
        return spec.kind(f"antiphon_{spec.stem}", spec.help, labels, registry=self.registry, **options)

    def _find(self, kind: type[_Kind], stem: str) -> _Kind:
        collector = self._collectors[stem]
        if not isinstance(collector, kind):
            raise TypeError(f"{stem} is a {type(collector).__name__}")
        return collector


class MetricsServer:
    """Serves /metrics of one process on host:port (0: any free port) until close()."""

    def __init__(self, metrics: Metrics, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stops serving; returns when the port is free."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, event, the fixed fields, and the ones of LOG_FIELDS given in `extra`.

    Of an exception it keeps the type and the lines of code, not the message, which may quote a prompt.
    """

    def __init__(self, fixed: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._fixed = dict(fixed or {})

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {"ts": moment.isoformat(timespec="milliseconds"), "level": record.levelname}
        line |= {"event": record.getMessage(), "logger": record.name} | self._fixed
        line |= {name: value for name in LOG_FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["stack"] = _code_lines(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(level: str, role: str, replica: str = "", stream: TextIO | None = None) -> None:
    """Sends the logs of `services` as JSON lines to `stream` (stderr if None), and nowhere else.

    The process's own stderr: Serve puts a stream in its place that turns each line into a record of Serve's, and whose
    handlers NIXL closes when it is imported.
    """
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(JsonFormatter({"role": role} | ({"replica": replica} if replica else {})))
    logger = logging.getLogger("services")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def _code_lines(exc_info: Any) -> list[str]:
    lines = []
    trace = exc_info[2]
    while trace is not None:
        code = trace.tb_frame.f_code
        lines.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return lines


_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Position in a distributed trace, as W3C traceparent carries it.

    trace_id: 32, span_id: 16 lower-case hex digits.
    """

    trace_id: str
    span_id: str
    is_sampled: bool = False

    @classmethod
    def new(cls, *, is_sampled: bool = False) -> TraceContext:
        """The root of a new trace."""
        return cls(secrets.token_hex(16), secrets.token_hex(8), is_sampled)

    @classmethod
    def parse(cls, header: str | None) -> TraceContext | None:
        """The context a traceparent header carries; None if there is none or it is malformed (start a new one then)."""
        match = _TRACEPARENT.fullmatch(header or "")
        if match is None:
            return None
        version, trace_id, span_id, flags, rest = match.groups()
        if version == "ff" or (version == "00" and rest) or not (int(trace_id, 16) and int(span_id, 16)):
            return None
        return cls(trace_id, span_id, bool(int(flags, 16) & 1))

    def child(self) -> TraceContext:
        """A new span of the same trace."""
        return TraceContext(self.trace_id, secrets.token_hex(8), self.is_sampled)

    def header(self) -> str:
        """The traceparent header to send on."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"
