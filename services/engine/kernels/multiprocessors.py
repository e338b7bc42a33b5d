"""What work is shared out by."""

from __future__ import annotations

import torch


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
