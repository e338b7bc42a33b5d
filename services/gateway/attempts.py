"""The replicas that one turn has tried: which of them failed it, and how often it may go on elsewhere."""

from __future__ import annotations

from services.common.errors import Exhausted, Unavailable
from services.gateway.router import Route


class Attempts:
    """Attributes: excluded (replica id -> why it is not tried again), num_resumes, last_error, is_running.

    is_running: the present attempt was admitted. A turn may be refused by every replica once; once it has been admitted
    it is a turn that was lost, and goes on elsewhere at most max_resumes times.
    """

    def __init__(self, max_resumes: int) -> None:
        self._max_resumes = max_resumes
        self._has_started = False
        self.excluded: dict[str, str] = {}
        self.num_resumes = 0
        self.last_error: Unavailable | Exhausted | None = None
        self.is_running = False

    @property
    def may_resume(self) -> bool:
        """Another loss would not be the end."""
        return self.num_resumes < self._max_resumes

    def admitted(self) -> bool:
        """A replica has taken the turn. True the first time."""
        is_first, self._has_started, self.is_running = not self._has_started, True, True
        return is_first

    def failed(self, route: Route, error: Unavailable | Exhausted) -> None:
        """The replica is left out from now on. Raises the error if the turn has been resumed as often as it may be."""
        self.excluded[route.record.replica_id] = "was lost" if isinstance(error, Unavailable) else "is full"
        self.last_error = error
        # A first attempt that nobody admitted has no reply to go on with: trying elsewhere costs nothing.
        if self.is_running:
            if not self.may_resume:
                raise error
            self.num_resumes += 1
        self.is_running = False
