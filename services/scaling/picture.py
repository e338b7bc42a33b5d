"""From what replicas report to the snapshot that is decided on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from services.scaling.snapshot import HelperLoad, Kind, Snapshot, WorkerLoad
from services.sessions.registry import ReplicaRecord, Role

_DEMAND_WINDOW_S = 10.0
_REFUSED_WINDOW_S = 5.0


class Lately:
    """Of counters that replicas report since their start: by how much they grew within a window."""

    def __init__(self, window_s: float, value: Callable[[ReplicaRecord], int]) -> None:
        self._window_s = window_s
        self._value = value
        self._counted: dict[str, int] = {}  # incarnation -> its counter at the last look
        self._looks: deque[tuple[float, list[int]]] = deque()  # time, growth of each counter since the look before

    def look(self, now_s: float, records: Sequence[ReplicaRecord]) -> None:
        """One more report. A replica that is new counts from its start; at the first look of all nothing counts."""
        grown = []
        for record in records:
            value = self._value(record)
            grown.append(max(value - self._counted.get(record.incarnation, 0 if self._looks else value), 0))
        self._counted = {record.incarnation: self._value(record) for record in records}
        self._looks.append((now_s, grown))
        while len(self._looks) > 1 and self._looks[0][0] < now_s - self._window_s:
            self._looks.popleft()

    def per_s(self) -> float:
        """Of all counters, a second (of less than the window, as long as less is known)."""
        elapsed_s = self._looks[-1][0] - self._looks[0][0]
        # The first entry grew before its time.
        return sum(sum(grown) for _, grown in list(self._looks)[1:]) / elapsed_s if elapsed_s else 0.0

    def of_one(self) -> int:
        """Where the same event may be counted by each replica, one after another: the most of one, look by look."""
        return sum(max(grown, default=0) for _, grown in self._looks)


class Picture:
    """Takes in one report after another; remembers what was computed and what was refused lately."""

    def __init__(self) -> None:
        self._computed = Lately(_DEMAND_WINDOW_S, lambda record: record.num_prefilled_tokens)
        self._refused = Lately(_REFUSED_WINDOW_S, lambda record: record.num_refused_blocks)

    def snapshot(
        self,
        now_s: float,
        targets: Mapping[Kind, int],
        records: Sequence[ReplicaRecord],
        helpers: Mapping[Kind, Sequence[HelperLoad]],
    ) -> Snapshot:
        """The cluster now. helpers: of gateways and tokenizers."""
        prefill = [each for each in records if each.role is Role.PREFILL]
        decode = [each for each in records if each.role is Role.DECODE]
        self._computed.look(now_s, prefill)
        self._refused.look(now_s, decode)
        return Snapshot(
            now_s=now_s,
            targets=targets,
            prefill=[worker_load(each) for each in prefill],
            decode=[worker_load(each) for each in decode],
            gateway=helpers.get(Kind.GATEWAY, ()),
            tokenizer=helpers.get(Kind.TOKENIZER, ()),
            prefill_demand_tokens_per_s=self._computed.per_s(),
            num_refused_blocks=self._refused.of_one(),
        )


def worker_load(record: ReplicaRecord) -> WorkerLoad:
    """What a decision needs of a registered replica."""
    return WorkerLoad(
        replica_id=record.replica_id,
        num_blocks=record.num_blocks,
        num_free_blocks=record.num_free_blocks,
        block_size=record.block_size,
        block_bytes=record.block_bytes,
        num_running=record.num_running,
        num_waiting=record.num_waiting,
        num_waiting_tokens=record.num_waiting_tokens,
        prefill_tokens_per_s=record.prefill_tokens_per_s,
        decode_tokens_per_s=record.decode_tokens_per_s,
        transfer_bytes_per_s=record.transfer_bytes_per_s,
        num_session_blocks=record.num_session_blocks,
        num_idle_sessions=record.num_idle_sessions,
        is_draining=record.is_draining,
    )
