"""How busy this process keeps the machine."""

from __future__ import annotations

import time


class ProcessLoad:
    """CPU time of this process between two looks."""

    def __init__(self) -> None:
        self._looked_s, self._cpu_s = time.monotonic(), time.process_time()

    def num_cpus(self) -> float:
        """Cores kept busy since the last call (or since the start)."""
        now_s, cpu_s = time.monotonic(), time.process_time()
        busy = (cpu_s - self._cpu_s) / max(now_s - self._looked_s, 1e-3)
        self._looked_s, self._cpu_s = now_s, cpu_s
        return busy
