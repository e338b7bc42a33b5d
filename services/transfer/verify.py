"""What every transport checks, before and after the bytes move. On any doubt: TransferFailed, and recompute."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import torch

from services.common.errors import TransferFailed
from services.transfer.base import Cause, Expected, KVTicket
from services.transfer.digest import DIGEST_BYTES
from services.transfer.runs import are_consecutive


def layout_fingerprint(pool: torch.Tensor, model: str) -> str:
    """What two pools must share for blocks to mean the same in both: model fingerprint, block shape and dtype."""
    text = f"{model}|{tuple(pool.shape[1:])}|{pool.dtype}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_pool(pool: torch.Tensor) -> None:
    """A pool must be one contiguous piece [num_blocks, num_layers, block_size, width]."""
    if pool.dim() != 4 or not pool.is_contiguous() or pool.storage_offset() != 0:
        raise ValueError("a KV pool is a contiguous tensor [num_blocks, num_layers, block_size, width]")


def check_blocks(block_ids: Sequence[int], pool: torch.Tensor) -> None:
    """Block ids must exist and be distinct, and there must be some."""
    if not block_ids or len(set(block_ids)) != len(block_ids):
        raise ValueError(f"one or more distinct block ids are needed, got {list(block_ids)}")
    if min(block_ids) < 0 or max(block_ids) >= len(pool):
        raise ValueError(f"block ids must be from 0 to {len(pool) - 1}, got {list(block_ids)}")


def check_tokens(num_tokens: int, num_blocks: int, block_size: int) -> None:
    """The tokens must need exactly that many blocks."""
    if -(-num_tokens // block_size) != num_blocks:
        raise ValueError(f"{num_tokens} tokens do not fill {num_blocks} blocks of {block_size}")


def check_ticket(
    ticket: KVTicket, into_block_ids: Sequence[int], expected: Expected, *, layout: str, block_size: int
) -> None:
    """Before the transfer: the ticket is what was asked for, and fits. Raises TransferFailed, nothing was written."""
    if ticket.layout != layout or ticket.block_size != block_size:
        raise TransferFailed(Cause.LAYOUT, "the publisher's cache has another layout")
    if expected.incarnation not in (None, ticket.publisher.incarnation):
        raise TransferFailed(Cause.INCARNATION, f"replica {ticket.publisher.replica_id} has been restarted")
    if (ticket.first_token, ticket.num_tokens) != (expected.first_token, expected.num_tokens):
        raise TransferFailed(
            Cause.POSITION,
            f"asked for {expected.num_tokens} tokens from {expected.first_token}, "
            f"offered {ticket.num_tokens} from {ticket.first_token}",
        )
    num_needed = -(-ticket.num_tokens // block_size)
    if not num_needed == ticket.num_blocks == len(into_block_ids) == len(ticket.digests) // DIGEST_BYTES:
        raise TransferFailed(Cause.TRUNCATED, f"{num_needed} blocks are needed, {ticket.num_blocks} offered")
    if min(ticket.run_lengths) < 1 or not are_consecutive(into_block_ids, ticket.run_lengths):
        raise TransferFailed(Cause.LAYOUT, "the target blocks are not split the way the ticket is")
    if time.time() >= ticket.expires_at_s:
        raise TransferFailed(Cause.EXPIRED, "the published blocks are no longer held")


def check_digests(ticket: KVTicket, arrived: bytes) -> None:
    """After the transfer: every block is what was published. Raises TransferFailed with the first that is not."""
    if arrived == ticket.digests:
        return
    num_good = next(i for i in range(ticket.num_blocks) if _digest(arrived, i) != _digest(ticket.digests, i))
    raise TransferFailed(Cause.DIGEST, f"block {num_good} of {ticket.num_blocks} arrived damaged")


def _digest(digests: bytes, i: int) -> bytes:
    return digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]
