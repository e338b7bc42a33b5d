"""A turn as bytes.

    u8 version = 1 | 16 bytes mark | u32 header length | header: JSON | u32 x prompt tokens | u32 x generated tokens

All numbers are little-endian. The mark stands at a fixed place because the acquire script compares it.
"""

from __future__ import annotations

import json
import struct

import numpy as np

from services.common.errors import InvalidRequest, Unavailable
from services.common.sampling import FinishReason
from services.sessions.base import TurnRecord

VERSION = 1
_PREFIX = struct.Struct("<B16sI")
_TOKEN = np.dtype("<u4")


def pack_turn(turn: TurnRecord, mark: bytes) -> bytes:
    """The journal entry of a turn. Raises InvalidRequest if a token id does not fit in 32 bits."""
    header = json.dumps(
        {
            "prompt": len(turn.prompt_token_ids),
            "generated": len(turn.generated_token_ids),
            "finish": turn.finish_reason.value,
            "template": turn.template_digest,
        },
        separators=(",", ":"),
    ).encode()
    tokens = np.array(turn.prompt_token_ids + turn.generated_token_ids, dtype=np.int64)
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**32:
        raise InvalidRequest("token_ids", "must be whole numbers from 0 to 4294967295")
    return _PREFIX.pack(VERSION, mark, len(header)) + header + tokens.astype(_TOKEN).tobytes()


def unpack_turn(entry: bytes) -> tuple[TurnRecord, bytes]:
    """The turn of an entry, and its mark. Raises Unavailable if a newer release wrote it: its gateways can read it."""
    version, mark, header_bytes = _PREFIX.unpack_from(entry)
    if version != VERSION:
        raise Unavailable(f"a journal entry has schema version {version}; this release reads {VERSION}")
    header = json.loads(entry[_PREFIX.size : _PREFIX.size + header_bytes])
    tokens = np.frombuffer(entry, dtype=_TOKEN, offset=_PREFIX.size + header_bytes).tolist()
    num_prompt = header["prompt"]
    if len(tokens) != num_prompt + header["generated"]:
        raise Unavailable("a journal entry is damaged: it has fewer or more tokens than it says")
    turn = TurnRecord(
        prompt_token_ids=tuple(tokens[:num_prompt]),
        generated_token_ids=tuple(tokens[num_prompt:]),
        finish_reason=FinishReason(header["finish"]),
        template_digest=header["template"],
    )
    return turn, mark
