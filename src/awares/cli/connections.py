"""The connections of ``awares serve``: uvicorn's, with limits that slow and greedy clients cannot exhaust."""

import asyncio
import os
import resource
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from awares.cli.options import Limits

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
    """Ends when the head of a request, or bytes that follow an answer, take longer than the keep-alive time.

    Above nine tenths of the limit of connections, each new one ends the oldest one that has sent no whole request.
    """

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
