"""Waits until the gateway of this machine runs no turn. A pod does this before it ends (Kubernetes' preStop hook).

    python -m services.drain --timeout 600

Exit status 0: idle, or there is no gateway here. 1: turns still run after `--timeout` seconds.
"""

from __future__ import annotations

import argparse
import time
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

RUNNING = "antiphon_num_requests_running"


def running_turns(url: str) -> int:
    """Turns that run, by a gateway's /metrics; 0 if nobody answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return 0
    families = text_string_to_metric_families(text)
    return int(sum(sample.value for family in families for sample in family.samples if sample.name == RUNNING))


def wait(url: str, timeout_s: float, settle_s: float, interval_s: float) -> bool:
    """True once no turn runs; False if some still do after timeout_s.

    settle_s: before the first look, for what was on its way when the pod left the Service.
    """
    deadline_s = time.monotonic() + timeout_s
    time.sleep(min(settle_s, timeout_s))
    while running_turns(url):
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(interval_s)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:9100/metrics", help="the gateway's metrics")
    parser.add_argument("--timeout", type=float, default=600.0, help="longest wait, in seconds")
    parser.add_argument("--settle", type=float, default=5.0, help="wait before the first look, in seconds")
    parser.add_argument("--interval", type=float, default=1.0, help="time between two looks, in seconds")
    given = parser.parse_args(arguments)
    return 0 if wait(given.url, given.timeout, given.settle, given.interval) else 1


if __name__ == "__main__":
    raise SystemExit(main())
