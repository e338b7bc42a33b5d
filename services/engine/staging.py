"""Many small arrays to the device in one copy, from pinned memory that is used again and again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# A buffer is written again this many sends later; its copy is long done by then.
_NUM_BUFFERS = 4
_ALIGNMENT = 16  # bytes: what vector loads want


class Staging:
    """Sends named arrays. Sends and whatever reads what they sent are in order on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [_Buffer(device) for _ in range(_NUM_BUFFERS)]
        self._next = 0

    def send(self, arrays: Mapping[str, np.ndarray], into: Tensor | None = None) -> dict[str, Tensor]:
        """The arrays on the device, same shapes. into: a uint8 tensor there that takes them all, else a new one.

        The same sizes in the same order always land in the same places of `into`.
        """
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % _NUM_BUFFERS
        end = sum(_padded(array.nbytes) for array in arrays.values())
        host, host_bytes = buffer.for_writing(end)
        at = 0
        for array in arrays.values():
            host_bytes[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
            at += _padded(array.nbytes)
        target = torch.empty(end, dtype=torch.uint8, device=self._device) if into is None else into[:end]
        target.copy_(host[:end], non_blocking=True)
        buffer.is_sent()
        return views(arrays, target)


def num_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """What `send` needs for them."""
    return sum(_padded(array.nbytes) for array in arrays.values())


def views(arrays: Mapping[str, np.ndarray], target: Tensor) -> dict[str, Tensor]:
    """Where `send` puts the arrays in `target`."""
    result, at = {}, 0
    for name, array in arrays.items():
        part = target[at : at + array.nbytes].view(_TORCH_DTYPES[array.dtype.name])
        result[name] = part.view(array.shape)
        at += _padded(array.nbytes)
    return result


def fill(arrays: Mapping[str, np.ndarray], target: Tensor) -> dict[str, Tensor]:
    """Puts the arrays where `send` would, and waits for it; `views` of them."""
    result = views(arrays, target)
    for name, array in arrays.items():
        result[name].copy_(torch.from_numpy(array))
    return result


_TORCH_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Buffer:
    """Pinned memory of one send, and the event after its copy."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._host = torch.empty(0, dtype=torch.uint8)
        self._bytes = self._host.numpy()
        self._sent = torch.cuda.Event() if self._is_cuda else None

    def for_writing(self, size: int) -> tuple[Tensor, np.ndarray]:
        if self._sent is not None:
            self._sent.synchronize()
        if len(self._host) < size:
            self._host = torch.empty(max(4096, 2 * size), dtype=torch.uint8, pin_memory=self._is_cuda)
            self._bytes = self._host.numpy()
        return self._host, self._bytes

    def is_sent(self) -> None:
        if self._sent is not None:
            self._sent.record()
