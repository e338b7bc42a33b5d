"""One cluster of two prefill and two decode replicas for all tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

# isort: split
from tests.cluster.serving import Serving, client_of, oracle, serving

# isort: split
from services.client import AsyncClient
from services.local import LocalPipeline


@pytest.fixture(scope="package")
def local() -> LocalPipeline:
    """The same model in this process: what every reply is compared with."""
    return oracle()


@pytest.fixture(scope="package")
def two_by_two(ray_cluster: None) -> Iterator[Serving]:
    """Runs until the last test of this folder."""
    with serving(2, 2) as started:
        yield started


@pytest.fixture
async def cluster(two_by_two: Serving) -> AsyncIterator[tuple[Serving, AsyncClient]]:
    """Whole and idle, and a client of it."""
    await two_by_two.is_whole()
    async with client_of(two_by_two) as client:
        yield two_by_two, client
