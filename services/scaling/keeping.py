"""Whether a decode replica may go, by what becomes of the KV of its idle sessions.

Serve chooses which replica stops, so the dearest choice is assumed. A replica that stops hands its sessions over to one
other: that takes room there, and time to transfer them, which must be less than the time to compute them again.
Otherwise it is waited until the sessions have been idle for so long that they are not worth keeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.settings import AutoscalingSettings
from services.scaling.need import median_rate
from services.scaling.snapshot import WorkerLoad

ASSUMED_PREFILL_TOKENS_PER_S = 2000.0
ASSUMED_TRANSFER_BYTES_PER_S = 1e9
HANDOVER_S_A_SESSION = 0.03  # two calls between replicas, and the transfer's fixed cost


@dataclass(frozen=True, slots=True)
class Leaving:
    """What it would cost that replica_id stops. has_room: another replica can take what it holds for its sessions."""

    replica_id: str
    num_sessions: int
    num_tokens: int
    handover_s: float
    recompute_s: float
    has_room: bool

    @property
    def is_allowed(self) -> bool:
        """Nothing is lost, or it is handed over at a lower cost than that of computing it again."""
        return not self.num_tokens or (self.has_room and self.handover_s < self.recompute_s)


def dearest_to_leave(replicas: Sequence[WorkerLoad], settings: AutoscalingSettings) -> Leaving | None:
    """Of the replicas that Serve may stop: first one that may not go, then the one that takes longest. None of none."""
    staying = [each for each in replicas if not each.is_draining]
    costs = [leaving(each, [other for other in staying if other is not each], settings) for each in staying]
    return max(costs, key=lambda cost: (not cost.is_allowed, cost.recompute_s), default=None)


def leaving(replica: WorkerLoad, others: Sequence[WorkerLoad], settings: AutoscalingSettings) -> Leaving:
    """What it would cost that this replica stops and the others stay."""
    num_tokens = replica.num_session_blocks * replica.block_size
    everybody = (replica, *others)
    prefill_rate = median_rate([each.prefill_tokens_per_s for each in everybody]) or ASSUMED_PREFILL_TOKENS_PER_S
    transfer_rate = median_rate([each.transfer_bytes_per_s for each in everybody]) or ASSUMED_TRANSFER_BYTES_PER_S
    num_bytes = replica.num_session_blocks * replica.block_bytes
    return Leaving(
        replica_id=replica.replica_id,
        num_sessions=replica.num_idle_sessions,
        num_tokens=num_tokens,
        handover_s=num_bytes / transfer_rate + replica.num_idle_sessions * HANDOVER_S_A_SESSION,
        recompute_s=num_tokens / prefill_rate,
        has_room=replica.num_session_blocks <= max((_room(each, settings) for each in others), default=0),
    )


def _room(replica: WorkerLoad, settings: AutoscalingSettings) -> float:
    """Blocks that it can take for sessions of another without giving up its own, or what its turns will need."""
    after_scaling_down = settings.max_kv_usage * settings.down_margin * replica.num_blocks
    return replica.num_blocks - max(replica.num_used_blocks, after_scaling_down) - replica.num_session_blocks
