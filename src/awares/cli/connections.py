"""The connections and requests of ``awares serve``, with limits that slow and greedy clients cannot exhaust."""

import asyncio
import os
import resource
import socket
from collections import Counter
from typing import Any

import uvicorn
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from awares.cli.openai_api import ApiError
from awares.cli.options import Limits

Clock = asyncio.Timeout  # that of a request is its key
PIECE = 2**18  # bytes of a body that must arrive within `Limits.patience`
ALL_BODIES = 2**27  # bytes of all bodies that wait
FULL = (429, "the server is full, most of it with this client's requests: try again later", "queue_full")
SPARE_FILES = 32  # file descriptors that connections leave to the rest of the process


def limit(most: int) -> int:
    """At most ``most`` connections, and no more than this process can open files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = files - len(os.listdir("/dev/fd")) - SPARE_FILES
    return most if files == resource.RLIM_INFINITY else max(16, min(most, left))


def serve(app: Any, listener: socket.socket, most: int, limits: Limits) -> None:
    """Serves ``app`` until SIGTERM or SIGINT, with at most ``most`` connections at a time."""
    config = uvicorn.Config(app, loop="asyncio", http=Connection, ws="none", log_level="error", access_log=False)
    config.backlog, config.limit_concurrency = 1, most
    config.timeout_keep_alive, config.timeout_graceful_shutdown = limits.patience, int(limits.shutdown)
    uvicorn.Server(config).run([Listener(fileno=listener.detach())])


class Listener(socket.socket):
    """Out of file descriptors, asyncio logs as many errors a second as its backlog, which is 1 here."""

    def listen(self, _: int = 1) -> None:
        super().listen(1024)


class Connection(H11Protocol):
    """Ends when a head takes too long. Near the limit of connections, each new one ends the oldest idle one."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.begun = self.loop.time()
        self._watch()
        if self.limit_concurrency and 10 * len(self.connections) > 9 * self.limit_concurrency:
            idle: list[Any] = [one for one in self.connections if isinstance(one, Connection) and one._is_idle()]
            min(idle, key=lambda one: one.begun).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _is_idle(self) -> bool:  # also a client that reads no answers
        waits = self.cycle and not (self.cycle.more_body or self.cycle.response_complete or self.flow.write_paused)
        return not (waits or self.transport.is_closing())

    def _watch(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.timer = self.timer or self.loop.call_later(self.timeout_keep_alive, self.transport.abort)
        elif self.timer:
            self.timer.cancel()
            self.timer = None


async def body(request: Request, clock: Clock, held: dict[Clock, int], limits: Limits) -> bytearray:
    """The body. ``held`` has the bytes of all requests that wait: above the limit, the largest request is ended."""
    held[clock], content, now = 0, bytearray(), asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(limits.patience) as patience:
            async for piece in request.stream():
                if len(content) // PIECE < (len(content) + len(piece)) // PIECE:
                    patience.reschedule(now() + limits.patience)
                content += piece
                if len(content) > limits.body_bytes:
                    raise ApiError(413, f"the request has more than {limits.body_bytes} bytes", "request_too_large")
                held[clock] = len(content)
                while sum(held.values()) > max(ALL_BODIES, limits.body_bytes):
                    _end(max(held, key=held.__getitem__), held, clock)
    except TimeoutError:
        raise ApiError(408, f"{PIECE // 1024} KiB of a body may take {limits.patience} s", "timeout") from None
    return content


def make_room(waiting: dict[Clock, str], held: dict[Clock, int], own: Clock, most: int) -> None:
    """If more than ``most`` requests wait, ends the newest one of the client that has most of them."""
    if len(waiting) > most:
        counts = Counter(waiting.values())
        busiest = max(counts, key=lambda client: (counts[client], client == waiting[own]))
        _end([own, *(one for one in waiting if waiting[one] == busiest and held.get(one))][-1], held, own)


def _end(ended: Clock, held: dict[Clock, int], own: Clock) -> None:
    """Ends a request for which there is no room; ApiError if it is ``own``."""
    del held[ended]
    if ended is own:
        raise ApiError(*FULL)
    if not ended.expired():
        ended.reschedule(asyncio.get_running_loop().time())
