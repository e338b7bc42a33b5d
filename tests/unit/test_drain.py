from collections.abc import Iterator
from threading import Timer

import pytest

from services.common.telemetry import Metrics, MetricsServer
from services.drain import main


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("gateway", "demo")


@pytest.fixture
def url(metrics: Metrics) -> Iterator[str]:
    server = MetricsServer(metrics)
    yield f"http://127.0.0.1:{server.port}/metrics"
    server.close()


def drain(url: str, timeout_s: float) -> int:
    return main(["--url", url, "--timeout", str(timeout_s), "--settle", "0", "--interval", "0.01"])


def test_an_idle_gateway_may_end(metrics: Metrics, url: str) -> None:
    metrics.set("num_requests_running", 0)
    assert drain(url, 30) == 0


def test_waits_for_the_last_turn(metrics: Metrics, url: str) -> None:
    metrics.set("num_requests_running", 2)
    ended = []

    def end() -> None:
        ended.append(True)
        metrics.set("num_requests_running", 0)

    timer = Timer(0.2, end)
    timer.start()
    assert drain(url, 30) == 0
    assert ended
    timer.join()


def test_says_when_turns_outlast_the_wait(metrics: Metrics, url: str) -> None:
    metrics.set("num_requests_running", 1)
    assert drain(url, 0.1) == 1


def test_without_a_gateway_there_is_nothing_to_wait_for(url: str) -> None:
    assert drain("http://127.0.0.1:1/metrics", 30) == 0


def test_without_a_replica_ray_is_not_even_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["--replica", "--url", "http://127.0.0.1:1/metrics", "--timeout", "30"]) == 0


def test_a_replica_whose_ray_has_ended_waits_for_its_turns(
    metrics: Metrics, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody listens there
    metrics.set("num_requests_running", 1)
    replica = ["--replica", "--url", url, "--settle", "0", "--interval", "0.01"]
    assert main([*replica, "--timeout", "1"]) == 1
    metrics.set("num_requests_running", 0)
    assert main([*replica, "--timeout", "1"]) == 0
