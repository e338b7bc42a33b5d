"""The engine on a thread of its own, for asyncio: streams of outputs, and calls between steps."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from services.common.errors import Unavailable
from services.engine.engine import Engine, EngineOutput, EngineRequest
from services.engine.scheduler import Reservation

T = TypeVar("T")

# How long a step may go on once the loop is to stop. One that hangs ends with the process.
_STOP_S = 10.0

# A step with nothing to do while blocks are held outside: look again after this long, or at the next call.
_IDLE_WAIT_S = 0.01


class EngineLoop:
    """Steps one engine on one thread. Everything that touches the engine happens there, between steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[EngineOutput | BaseException]]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._is_stopped = False
        self._is_closed = False  # nobody takes calls any more
        self._closing = threading.Lock()
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread; streams still open raise Unavailable."""
        if not self._is_stopped:
            self._is_stopped = True
            self._calls.put(None)
            await asyncio.to_thread(self._thread.join, _STOP_S)

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and self.failure is None and not self._is_closed

    async def call(self, fn: Callable[[Engine], T]) -> T:
        """fn(engine), run on the engine's thread between two steps. Raises what fn raises."""
        if not self.is_healthy:
            raise Unavailable("the engine is not running")
        future: Future[T] = Future()

        def run() -> None:
            # A caller that was cancelled still gets its call: it may have to be undone, and only the caller knows.
            try:
                result = fn(self._engine)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._closing:
            if self._is_closed:
                raise Unavailable("the engine is not running")
            self._calls.put(run)
        return await asyncio.shield(asyncio.wrap_future(future))

    async def generate(
        self, request: EngineRequest, reservation: Reservation | None = None
    ) -> AsyncGenerator[EngineOutput]:
        """The outputs of a request. Closing the generator, or cancelling it, aborts the sequence between steps."""
        outputs: asyncio.Queue[EngineOutput | BaseException] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def add(engine: Engine) -> None:
            engine.add(request, reservation)
            self._streams[request.request_id] = (loop, outputs)

        is_over = False
        try:
            await self.call(add)
            while not is_over:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    is_over = True
                    raise output
                is_over = output.finish_reason is not None
                yield output
        finally:
            if not is_over and self.is_healthy:
                self._calls.put(lambda: self._abort(request.request_id, outputs))

    def _abort(self, request_id: str, outputs: Any) -> None:
        stream = self._streams.get(request_id)
        if stream is not None and stream[1] is outputs:  # not another's with the same id, whose add was refused
            del self._streams[request_id]
            self._engine.abort(request_id)

    def _run(self) -> None:
        try:
            while self._take_calls():
                self._step()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._close(self.failure)

    def _take_calls(self) -> bool:
        """Runs what is queued; waits if there is nothing else to do. False: stop."""
        is_idle = not self._engine.has_work
        while True:
            try:
                call = self._calls.get(block=is_idle)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()
            is_idle = not self._engine.has_work and self._calls.empty()

    def _step(self) -> None:
        outputs = self._engine.step()
        if not outputs and self._engine.is_stuck:
            self._wait_for_call()
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._streams[output.request_id]
            _put(*stream, output)

    def _wait_for_call(self) -> None:
        """All blocks are held outside: only a call can free them (or time, for those in quarantine)."""
        try:
            call = self._calls.get(timeout=_IDLE_WAIT_S)
        except queue.Empty:
            return
        if call is None:
            self._calls.put(None)
        else:
            call()

    def _close(self, failure: BaseException | None) -> None:
        error = Unavailable("the engine has stopped")
        error.__cause__ = failure
        for stream in self._streams.values():
            _put(*stream, error)
        self._streams.clear()
        with self._closing:
            self._is_closed = True
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call()


def _put(loop: asyncio.AbstractEventLoop, outputs: asyncio.Queue[Any], item: object) -> None:
    """Hands over to the stream's event loop; one that has closed meanwhile needs it no more."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(outputs.put_nowait, item)
