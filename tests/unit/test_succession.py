"""Idle sessions of a decode replica that stops: another one takes them over, or they are left, and nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass

from services.common.errors import Unavailable
from services.decode.held_sessions import HeldSessions
from services.decode.succession import Adoption, Estate, HandedOver, Heir, Prefix, choose_successor
from services.sessions.registry import ReplicaRecord, Role
from services.transfer.base import Identity
from tests.unit.replica_group import BLOCK_SIZE, SALT, Group, Replica, prompt, request, running_group

LONG = 5 * BLOCK_SIZE + 3


@dataclass
class DirectSuccessor:
    """SuccessorClient without anything between the replicas. fails_after: adoptions, then it is lost."""

    heir: Heir
    fails_after: int | None = None

    async def inherit(self, successor: Identity, incarnations: tuple[str, ...]) -> bool:
        return self.heir.inherit(successor, incarnations)

    async def num_held(self, successor: Identity, prefix: Prefix) -> int:
        return await self.heir.num_held(prefix)

    async def adopt(self, adoption: Adoption) -> bool:
        if self.fails_after is not None:
            if not self.fails_after:
                raise Unavailable("lost")
            self.fails_after -= 1
        return await self.heir.adopt(adoption)


def heir_of(group: Group, replica: Replica) -> Heir:
    return Heir(replica.loop, replica.exchange, group.held[replica.identity.replica_id], replica.metrics)


def record_of(replica: Replica, **changes: object) -> ReplicaRecord:
    identity, engine = replica.identity, replica.engine
    return ReplicaRecord(
        Role.DECODE, identity.replica_id, identity.incarnation, 0.0, "m", engine.layout.fingerprint,
        BLOCK_SIZE, engine.pool.num_blocks, engine.pool.num_free_blocks, **changes,  # type: ignore[arg-type]
    )  # fmt: skip


async def converse(group: Group, seeds: range, num_tokens: int = LONG) -> None:
    """A first turn of each session, at the first replica."""
    for seed in seeds:
        await group.turn(request(prompt(seed, num_tokens), session_digest=f"session-{seed}", fence=1))


async def hand_over(group: Group, client: DirectSuccessor) -> HandedOver:
    estate = Estate(group.first.exchange, group.held["decode-a"], client)
    return await estate.hand_over(record_of(group.second), ("before",), timeout_s=20)


async def test_sessions_are_found_at_the_heir_and_their_next_turn_computes_only_what_is_new() -> None:
    async with running_group(remote_prefill="never") as group:
        await converse(group, range(3))
        heir = heir_of(group, group.second)
        done = await hand_over(group, DirectSuccessor(heir))
        # 83 tokens of prompt and 10 of reply, the last of them without KV: five full blocks each.
        assert done == HandedOver("decode-b", 3, 3, 3 * 5 * BLOCK_SIZE)
        assert heir.inherits == ("before", "decode-a-1")
        assert group.second.count("session_handovers", outcome="adopted") == 3
        assert [each.digest for each in group.held["decode-b"].recent_first()]
        for seed in range(3):
            reply = await group.turn(request(prompt(seed, LONG)), group.second)
            assert reply.origins[0] == ("local", "decode-b", 5 * BLOCK_SIZE)


async def test_tokens_after_a_hand_over_are_those_of_the_replica_that_stopped() -> None:
    async with running_group(remote_prefill="never") as group:
        first = await group.turn(request(prompt(7, LONG), session_digest="s", fence=1))
        await hand_over(group, DirectSuccessor(heir_of(group, group.second)))
        second_prompt = (*prompt(7, LONG), *first.token_ids, *prompt(8, 20))
        expected = await group.turn(request(second_prompt), group.first)
        assert (await group.turn(request(second_prompt), group.second)).token_ids == expected.token_ids


async def test_only_what_the_heir_lacks_moves() -> None:
    async with running_group(remote_prefill="never") as group:
        shared = prompt(1, 3 * BLOCK_SIZE)
        await group.turn(request(shared), group.second)
        await group.turn(request((*shared, *prompt(2, LONG)), session_digest="s", fence=1))
        done = await hand_over(group, DirectSuccessor(heir_of(group, group.second)))
        assert done.num_moved == 1
        transferred = group.second.metrics.registry.get_sample_value(
            "antiphon_kv_transfer_bytes_total", {"model_name": "tiny", "role": "decode-b"}
        )
        lacked = done.num_tokens - 3 * BLOCK_SIZE
        assert transferred == lacked * group.first.engine.layout.bytes_per_token


async def test_an_heir_without_room_keeps_what_it_has() -> None:
    async with running_group(remote_prefill="never", num_blocks=24) as group:
        for seed in range(10, 13):
            own = request(prompt(seed, LONG), session_digest=f"own-{seed}", fence=1)
            await group.turn(own, group.second)
        await converse(group, range(3))
        done = await hand_over(group, DirectSuccessor(heir_of(group, group.second)))
        # 24 blocks, 15 of them of its own sessions: one more fits, two do not.
        assert done.num_moved == 1
        assert group.second.count("session_handovers", outcome="refused") == 2
        for seed in range(10, 13):
            reply = await group.turn(request(prompt(seed, LONG)), group.second)
            assert reply.origins[0] == ("local", "decode-b", 5 * BLOCK_SIZE)


async def test_an_heir_that_is_lost_half_way_leaves_the_rest_behind() -> None:
    async with running_group(remote_prefill="never") as group:
        await converse(group, range(6))
        done = await hand_over(group, DirectSuccessor(heir_of(group, group.second), fails_after=2))
        assert (done.num_sessions, done.num_moved) == (6, 2)


async def test_a_transfer_that_times_out_leaves_the_session_behind() -> None:
    async with running_group(remote_prefill="never") as group:
        await converse(group, range(2))
        group.second.transfer.num_timeouts = 1
        done = await hand_over(group, DirectSuccessor(heir_of(group, group.second)))
        assert done.num_moved == 1


async def test_another_process_by_the_heirs_name_takes_nothing() -> None:
    async with running_group(remote_prefill="never") as group:
        await converse(group, range(1))
        estate = Estate(group.first.exchange, group.held["decode-a"], DirectSuccessor(heir_of(group, group.second)))
        younger = record_of(group.second)
        older = ReplicaRecord(**{name: getattr(younger, name) for name in younger.__slots__} | {"incarnation": "old"})
        assert (await estate.hand_over(older, (), timeout_s=20)).num_moved == 0


async def test_the_successor_is_the_one_with_most_room_that_stays() -> None:
    async with running_group() as group:
        layout = group.first.engine.layout.fingerprint
        leaving = group.first.identity
        full = record_of(group.second, num_session_blocks=60)
        roomy = record_of(group.prefill_replica)
        assert choose_successor([record_of(group.first), full, roomy], leaving, layout) == roomy
        draining = record_of(group.prefill_replica, is_draining=True)
        assert choose_successor([full, draining], leaving, layout) == full
        assert choose_successor([record_of(group.first)], leaving, layout) is None
        assert choose_successor([roomy], leaving, "another layout") is None


def test_held_sessions_forgets_what_is_old_and_what_no_longer_fits() -> None:
    now_s = 0.0
    held = HeldSessions(keep_s=100.0, max_tokens=100, clock=lambda: now_s)
    for number in range(3):
        now_s = float(number)
        held.ended(f"s{number}", range(48), SALT)
    assert [each.digest for each in held.recent_first()] == ["s2", "s1"]
    assert held.num_blocks(16) == 6
    now_s = 50.0
    held.ended("s1", range(32), SALT)
    assert [(each.digest, len(each.token_ids)) for each in held.recent_first()] == [("s1", 32), ("s2", 48)]
    now_s = 120.0
    assert [each.digest for each in held.recent_first()] == ["s1"]
    held.ended("s1", (), SALT)
    assert len(held) == 0
    assert held.num_blocks(16) == 0
