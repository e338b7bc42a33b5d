"""One Ray for all tests of the session that want one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.ray_session import local_ray


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray is running, on loopback, with 2 CPUs."""
    with local_ray():
        yield
