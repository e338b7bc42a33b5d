"""What all GPU tests have in common."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in whichever order tests run."""
    torch.manual_seed(11)
