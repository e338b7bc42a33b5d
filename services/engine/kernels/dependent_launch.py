# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Programmatic dependent launch: a kernel is launched while the one before it still runs, and waits on the card.

A step of few tokens is hundreds of kernels of a few microseconds, and between two of them the card would drain and
launch. Since Hopper a kernel may be launched as soon as every program of the one before has begun. The order is kept
by the kernel itself, which is why each one that is launched so calls `begin_after_earlier` in every program, before it
reads or writes what its step computes: the call ends once the kernel before is through, which has waited for its own.
What was there before the step may be read ahead of the call, past the first-level cache where it changes from step to
step: weights above all, which are then on their way while the kernel before still computes what they are to meet.
Kernels launched in the ordinary way, in between or after a fork or a join of streams, need not know about any of this.

A captured graph keeps it, as edges of a kind of their own, across forks and joins too. Sampling, a few kernels in a
graph by themselves, gains nothing by it and does without.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@cache
def dependent(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch on a device: IS_DEPENDENT is the kernel's, the other one is Triton's."""
    can = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"IS_DEPENDENT": True, "launch_pdl": True} if can else {"IS_DEPENDENT": False}


@triton.jit
def begin_after_earlier(IS_DEPENDENT: tl.constexpr):
    """Lets the next kernel be launched, and waits until all before are through and what they wrote can be read."""
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
