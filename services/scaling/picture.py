"""From what replicas report to the snapshot that is decided on."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from services.scaling.snapshot import HelperLoad, Kind, Snapshot, WorkerLoad
from services.sessions.registry import ReplicaRecord, Role

_DEMAND_WINDOW_S = 10.0


class Picture:
    """Takes in one report after another; remembers how much prefill replicas have computed lately."""

    def __init__(self) -> None:
        self._counted: dict[str, int] = {}  # incarnation -> prompt tokens since its start
        self._computed: deque[tuple[float, int]] = deque()  # time, prompt tokens since the look before

    def snapshot(
        self,
        now_s: float,
        targets: Mapping[Kind, int],
        records: Sequence[ReplicaRecord],
        helpers: Mapping[Kind, Sequence[HelperLoad]],
    ) -> Snapshot:
        """The cluster now. helpers: of gateways and tokenizers."""
        prefill = [each for each in records if each.role is Role.PREFILL]
        return Snapshot(
            now_s=now_s,
            targets=targets,
            prefill=[worker_load(each) for each in prefill],
            decode=[worker_load(each) for each in records if each.role is Role.DECODE],
            gateway=helpers.get(Kind.GATEWAY, ()),
            tokenizer=helpers.get(Kind.TOKENIZER, ()),
            prefill_demand_tokens_per_s=self._demand(now_s, prefill),
        )

    def _demand(self, now_s: float, prefill: Sequence[ReplicaRecord]) -> float:
        """Prompt tokens a second, of the last ten seconds (of less, as long as less is known)."""
        computed = 0
        for record in prefill:
            before = self._counted.get(record.incarnation, record.num_prefilled_tokens if not self._computed else 0)
            computed += max(record.num_prefilled_tokens - before, 0)
        self._counted = {record.incarnation: record.num_prefilled_tokens for record in prefill}
        self._computed.append((now_s, computed))
        while len(self._computed) > 1 and self._computed[0][0] < now_s - _DEMAND_WINDOW_S:
            self._computed.popleft()
        elapsed_s = now_s - self._computed[0][0]
        # The first entry's tokens were computed before its time.
        return sum(tokens for _, tokens in list(self._computed)[1:]) / elapsed_s if elapsed_s else 0.0


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
