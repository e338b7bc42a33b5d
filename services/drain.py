"""What a pod does before it ends (Kubernetes' preStop hook), so that nobody who is served there notices.

    python -m services.drain --timeout 600              a gateway: waits until no turn runs
    python -m services.drain --replica --timeout 300    prefill or decode: Serve moves the replica to another machine

With --replica Ray hears that this machine ends: Serve starts the replica elsewhere, then stops this one, whose turns
end and whose idle sessions are handed over; a minute before the time is up it is stopped in any case. Where Ray does
not answer (its head has ended already), the turns that run may end.

Exit status 0: idle, or there is nothing here to wait for. 1: not yet after `--timeout` seconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

RUNNING = "antiphon_num_requests_running"
_RAY_ANSWERS_S = 60.0


def running_turns(url: str) -> int | None:
    """Turns that run, by the /metrics of a gateway or replica; None if nobody answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None
    families = text_string_to_metric_families(text)
    return int(sum(sample.value for family in families for sample in family.samples if sample.name == RUNNING))


def wait(url: str, timeout_s: float, settle_s: float, interval_s: float, *, until_gone: bool = False) -> bool:
    """True once no turn runs (until_gone: once nobody answers any more); False if that takes longer than timeout_s.

    settle_s: before the first look, for what was on its way when the pod left the Service.
    """
    deadline_s = time.monotonic() + timeout_s
    time.sleep(min(settle_s, timeout_s))
    while (number := running_turns(url)) is not None and (until_gone or number):
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(interval_s)
    return True


def tell_ray(timeout_s: float) -> bool:
    """Ray hears that this machine ends in timeout_s; whether it has. Its address and token are in the environment."""
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node", "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=the pod ends", f"--deadline-remaining-seconds={timeout_s:.0f}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=min(_RAY_ANSWERS_S, timeout_s))
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replica", action="store_true", help="of prefill or decode, not a gateway")
    parser.add_argument("--url", default="http://127.0.0.1:9100/metrics", help="metrics of the gateway or replica")
    parser.add_argument("--timeout", type=float, default=600.0, help="longest wait, in seconds")
    parser.add_argument("--settle", type=float, default=5.0, help="wait before the first look, in seconds")
    parser.add_argument("--interval", type=float, default=1.0, help="time between two looks, in seconds")
    given = parser.parse_args(arguments)
    if given.replica and running_turns(given.url) is None:
        return 0
    started_s = time.monotonic()
    is_told = given.replica and tell_ray(given.timeout)
    left_s = max(given.timeout - (time.monotonic() - started_s), 0.0)
    return 0 if wait(given.url, left_s, given.settle, given.interval, until_gone=is_told) else 1


if __name__ == "__main__":
    raise SystemExit(main())
