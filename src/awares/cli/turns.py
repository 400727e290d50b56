"""Which requests ``awares serve`` holds, and which is next: no client takes the places of others. It is an address."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from awares.cli.openai_api import ApiError

PACE = 50_000  # work that a request may have more than an older one of its client, per second of its wait, to be next


def full() -> ApiError:
    """The refusal of a request for which there is no room."""
    return ApiError(429, "the server is full, most of it with this client's requests: try again later", "queue_full")


@dataclass(eq=False)
class Waiter:
    """A request that waits for its turn; ``due`` orders those of one client."""

    client: str
    work: float
    due: float
    place: asyncio.Future[None]


class Turns:
    """At most ``places`` requests at a time.

    The next one is of the client that has had least work since it came (start-time fair queueing). Of its requests,
    small ones are first, until the others have waited long.
    """

    def __init__(self, places: int) -> None:
        self.free, self.waiting = places, list[Waiter]()
        self.had = dict[str, float]()  # by client: its share so far; a client that is not there begins at `now`
        self.now = 0.0

    @asynccontextmanager
    async def turn(self, client: str, work: float) -> AsyncIterator[None]:
        """Waits for a place, and frees it at the end."""
        loop = asyncio.get_running_loop()
        self.waiting.append(own := Waiter(client, work, loop.time() + work / PACE, loop.create_future()))
        try:
            self._admit()
            await own.place
            yield
        finally:
            if own in self.waiting:
                self.waiting.remove(own)
            else:
                self.free += 1
            self._admit()

    def _admit(self) -> None:
        while self.free and (ready := [one for one in self.waiting if not one.place.done()]):
            own = min(ready, key=lambda one: (self.had.get(one.client, self.now), one.due))
            self.now = self.had.get(own.client, self.now)
            self.had = {client: share for client, share in self.had.items() if share > self.now}
            self.had[own.client] = self.now + own.work
            self.waiting.remove(own)
            self.free -= 1
            own.place.set_result(None)


class Room:
    """The requests that the server holds, each known by its time limit: at most ``places``, and ``most`` bytes in all.

    Above ``most`` the largest one is ended, above ``places`` the newest one of the client that has most of them.
    """

    def __init__(self, places: int, most: int) -> None:
        self.places, self.most = places, most
        self.sizes = dict[asyncio.Timeout, int]()  # bytes of bodies; 0 for a request that has its turn
        self.clients = dict[asyncio.Timeout, str]()  # of the requests whose body is there

    def hold(self, request: asyncio.Timeout, size: int) -> None:
        """``request`` has ``size`` bytes so far. ApiError if it is ended for that."""
        self.sizes[request] = size
        while sum(self.sizes.values()) > self.most:
            self._end(max(self.sizes, key=self.sizes.__getitem__), request)

    def enter(self, request: asyncio.Timeout, client: str) -> None:
        """The body of ``request`` is there. ApiError if ``client`` has too many."""
        held = {**self.clients, request: client}
        if len(held) > self.places:
            counts = Counter(held.values())
            busiest = max(counts, key=lambda one: (counts[one], one == client))
            self._end([one for one in held if held[one] == busiest and self.sizes.get(one)][-1], request)
        self.clients[request] = client

    def leave(self, request: asyncio.Timeout) -> None:
        """The end of ``request``."""
        self.sizes.pop(request, None)
        self.clients.pop(request, None)

    def _end(self, ended: asyncio.Timeout, own: asyncio.Timeout) -> None:
        del self.sizes[ended]
        if ended is own:
            raise full()
        if not ended.expired():
            ended.reschedule(asyncio.get_running_loop().time())
