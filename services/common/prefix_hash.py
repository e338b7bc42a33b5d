"""Names for full KV blocks: a keyed hash, chained over the token ids of the block and of all blocks before it.

Equal hashes mean equal tokens under equal settings, so whoever finds a block by its hash may use it as it is.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from services.common.errors import InvalidRequest

PREFIX_HASH_BYTES = 16


class PrefixHasher:
    """Hashes the full blocks of token sequences of one model layout and one tenant.

    fingerprint: model, weights and cache layout; everything that changes the numbers in a block belongs in it.
    tenant_salt: keeps tenants apart; a secret makes the hashes useless to anybody who lacks it.
    Hashers that differ in fingerprint, block size or salt never give the same hash.
    """

    def __init__(self, fingerprint: bytes, block_size: int, tenant_salt: bytes = b"") -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        # Lengths go in front, or ("ab", "c") and ("a", "bc") would give one key.
        sizes = struct.pack("<QQQ", block_size, len(fingerprint), len(tenant_salt))
        key = hashlib.blake2b(sizes + fingerprint + tenant_salt, digest_size=32, person=b"antiphon.prefix").digest()
        self._keyed = hashlib.blake2b(key=key, digest_size=PREFIX_HASH_BYTES)
        self._root = self._keyed.digest()
        self._packer = struct.Struct(f"<{block_size}I")

    def extend(self, hashes: list[bytes], token_ids: Sequence[int]) -> None:
        """Appends the hashes of the full blocks of `token_ids` that `hashes` does not cover yet.

        `hashes` must come from this hasher and from the same tokens; a last block that is not full gets no hash.
        Raises InvalidRequest for a token id that is not an unsigned 32-bit number; `hashes` keeps what was right.
        """
        size = self.block_size
        parent = hashes[-1] if hashes else self._root
        for start in range(len(hashes) * size, len(token_ids) // size * size, size):
            try:
                packed = self._packer.pack(*token_ids[start : start + size])
            except struct.error:
                raise InvalidRequest("token_ids", "every token id must be a whole number from 0 to 2**32 - 1") from None
            keyed = self._keyed.copy()
            keyed.update(parent + packed)
            parent = keyed.digest()
            hashes.append(parent)

    def hashes(self, token_ids: Sequence[int]) -> list[bytes]:
        """The hashes of all full blocks of `token_ids`, first block first."""
        result: list[bytes] = []
        self.extend(result, token_ids)
        return result
