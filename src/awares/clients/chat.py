"""Chat requests to an OpenAI-compatible server: bounded, timed, retried, and no recorded reply asked for again.

Every reply is appended, raw, to a JSONL file as soon as it is there, under a hash of its whole request. A call that was
killed, or that lost requests to errors, goes on from that file when it is made again. Judges, oracles and
`remote.RemoteEngine` stand on this.
"""

import asyncio
import os
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import openai
from tqdm import tqdm

from awares.clients.replies import Again, Lost, Reply, ReplyFile, Request, read_json, read_reply
from awares.errors import AwaresRequestError, AwaresValueError, Failure

T = TypeVar("T")
WHOLE_JOB = (401, 403, 404)  # key, rights, address or model: no other request would fare better
RETRYABLE = (408, 409, 425, 429)  # and everything from 500 up


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible endpoint and how hard to press it. Times in seconds.

    ``url`` ends in /v1. The key is read from the environment variable ``key_variable`` and from nowhere else; unset
    means that the server wants none. A request is tried ``attempts`` times, each within ``timeout`` from connecting to
    the last byte. Attempt n + 1 waits ``first_wait`` · 2^(n-1), at most ``longest_wait``, shortened by up to a half at
    random (``seed``), or longer if the server's Retry-After says so. ``stop_after`` rows lost one after the other to a
    server that is silent or overloaded end the whole call.
    """

    url: str
    model: str
    key_variable: str = "AWARES_API_KEY"
    concurrency: int = 16
    timeout: float = 300.0
    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0
    stop_after: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not self.model:
            raise AwaresValueError(
                f"server.url {self.url!r}, server.model {self.model!r}: give http://host:port/v1 and a model's name"
            )
        for name in ("concurrency", "timeout", "attempts", "stop_after"):
            if getattr(self, name) <= 0:
                raise AwaresValueError(f"server.{name} must be above 0, not {getattr(self, name)!r}")

    def api_key(self) -> str:
        """The key from the environment, or a word that is none (the library insists on one)."""
        return os.environ.get(self.key_variable) or "none"

    def wait(self, attempt: int, request_key: str) -> float:
        """Back-off after the failed ``attempt`` (from 1); the jitter is the request's own, whatever runs beside it."""
        jitter = random.Random(f"{self.seed}:{request_key}:{attempt}").uniform(0.5, 1.0)
        return jitter * min(self.longest_wait, self.first_wait * 2.0 ** min(attempt - 1, 60))


Send = Callable[[Request], Awaitable[Reply]]
Talk = Callable[[int, Send], Awaitable[T]]


class ChatClient:
    """Sends requests to ``server``; ``cache`` is the JSONL file of replies (None: nothing is kept).

    Works in a script and inside a running event loop (Jupyter). Results come in the order of the rows.
    """

    def __init__(self, server: Server, cache: str | Path | None, progress: bool = False) -> None:
        self.server = server
        self.replies = ReplyFile(cache)
        self.progress = progress

    def ask(self, requests: Sequence[Request], return_failures: bool = False) -> list[Any]:
        """One `Reply` for each request; errors and ``return_failures`` as in `converse`."""

        async def talk(index: int, send: Send) -> Reply:
            return await send(requests[index])

        return self.converse([request.row_id for request in requests], talk, return_failures)

    def holds(self, request: Request) -> bool:
        """Whether the reply to ``request`` is recorded, as far as the last call of `converse` has read."""
        return self.replies.get(request.key(self.server.model)) is not None

    def converse(self, row_ids: Sequence[str], talk: Talk[T], return_failures: bool = False) -> list[Any]:
        """The result of ``talk(index, send)`` for each row, at most ``server.concurrency`` of them at a time.

        ``send(request)`` awaits a reply, recorded or fresh. A row whose request fails for good does not stop the
        others: with ``return_failures`` a `Failure` stands in its place, else AwaresRequestError lists all of them at
        the end. It comes at once for a refused key, address or model, and for a server that is gone.
        """
        with self.replies.opened():
            results = _run(self._all(row_ids, talk))
        lost = [result for result in results if isinstance(result, Failure)]
        if lost and not return_failures:
            raise AwaresRequestError(_summary(self.server, lost, len(results), self.replies.path), lost)
        return results

    async def _all(self, row_ids: Sequence[str], talk: Talk[T]) -> list[Any]:
        results: list[Any] = [None] * len(row_ids)
        rows = iter(range(len(row_ids)))
        # Retries are ours: the library's jitter has no seed, and it does not retry a torn body.
        api = openai.AsyncOpenAI(
            base_url=self.server.url, api_key=self.server.api_key(), max_retries=0, timeout=self.server.timeout
        )
        bar = tqdm(total=len(row_ids), desc=self.server.model, unit="row", disable=not self.progress)
        session = _Session(self.server, api, self.replies)

        async def worker() -> None:
            for index in rows:
                results[index] = await session.row(row_ids[index], talk(index, session.send))
                bar.set_postfix(asked=session.asked, retried=session.retried, lost=session.lost, refresh=False)
                bar.update()

        with bar:
            async with api:
                await _together([worker() for _ in range(min(self.server.concurrency, len(row_ids)))])
        return results


class _Session:
    """The requests of one call of `ChatClient.converse`."""

    def __init__(self, server: Server, api: openai.AsyncOpenAI, replies: "ReplyFile") -> None:
        self.server, self.api, self.replies = server, api, replies
        self.asked = self.retried = self.lost = 0
        self.silent = 0  # rows lost since the server last answered
        self.proven = replies.known > 0  # it has answered before: a refusal is then about the row
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def row(self, row_id: str, talk: Awaitable[T]) -> T | Failure:
        try:
            return await talk
        except Lost as error:
            self.lost += 1
            self.silent += error.silent and not (error.refused and self.proven)
            if self.silent >= self.server.stop_after:
                kept = "" if self.replies.path is None else ": it goes on from the replies so far, which are kept"
                raise AwaresRequestError(
                    f"{self.server.url}: gave up after {self.silent} rows without an answer, the last for: {error}. "
                    f"When the server is back, run again{kept}"
                ) from error
            return Failure(row_id, str(error), error.silent)

    async def send(self, request: Request) -> Reply:
        key = request.key(self.server.model)
        async with self.locks[key]:  # the same request of two rows is asked once
            reply = self.replies.get(key)
            if reply is None or not request.record:
                attempts, reply = await self._fetch(request, key)
                if request.check:
                    request.check(reply)
                if request.record:
                    self.replies.add(key, reply, request, self.server.model, attempts)
                self.silent, self.proven = 0, True
        return reply

    async def _fetch(self, request: Request, key: str) -> tuple[int, Reply]:
        """The reply and the number of attempts that it took."""
        for attempt in range(1, self.server.attempts + 1):
            self.asked += 1
            try:
                return attempt, await self._attempt(request)
            except Again as error:
                if attempt == self.server.attempts:
                    raise Lost(f"{error} ({attempt} attempts)", error.silent) from error
                self.retried += 1
                await asyncio.sleep(max(self.server.wait(attempt, key), error.wait))
        raise AssertionError("unreachable: at least one attempt is made")

    async def _attempt(self, request: Request) -> Reply:
        begun, messages = (
            time.perf_counter(),
            cast(Any, request.messages),
        )  # plain dicts: the library wants its own types
        try:
            async with asyncio.timeout(self.server.timeout):  # the library's own limit starts anew with every byte
                raw = await self.api.chat.completions.with_raw_response.create(
                    model=self.server.model, messages=messages, **request.settings
                )
        except (TimeoutError, openai.APITimeoutError) as error:
            raise Again(f"no answer within {self.server.timeout:g} s", silent=True) from error
        except openai.APIConnectionError as error:
            raise Again(f"connection failed: {error.__cause__ or error}", silent=True) from error
        except openai.APIStatusError as error:
            raise self._refusal(error) from error
        secret = os.environ.get(self.server.key_variable)
        content = (
            raw.content.replace(secret.encode(), b"***") if secret else raw.content
        )  # some servers echo the request
        return read_reply(read_json(content), time.perf_counter() - begun)

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        """What an error status means: try again, this row is lost, or (AwaresRequestError) everything is."""
        status = error.status_code
        said = f"status {status}: {error.response.text[:300].strip()}"
        if secret := os.environ.get(self.server.key_variable):
            said = said.replace(secret, "***")
        if status in WHOLE_JOB:
            return AwaresRequestError(
                f"{self.server.url} refuses every request, {said}. Check server.url (ends in /v1), server.model "
                f"{self.server.model!r} and the key in the environment variable {self.server.key_variable}"
            )
        if status not in RETRYABLE and status < 500:
            # Of this row, or of a server that is set up wrongly: many before any answer are the latter
            return Lost(said, silent=True, refused=True)
        wait = _retry_after(error.response.headers.get("retry-after"))
        if wait > 10 * self.server.longest_wait:
            return Lost(f"{said}, and asks to wait {wait:.0f} s", silent=True)
        return Again(said, wait, silent=True)


def _retry_after(header: str | None) -> float:
    """Seconds to wait by a Retry-After header, in seconds or as a date; 0 without a readable one."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(str(header)) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return 0.0


def _summary(server: Server, lost: Sequence[Failure], rows: int, cache: Path | None) -> str:
    shown = "".join(f"\n  row {failure.row_id}: {failure.reason}" for failure in lost[:20])
    more = f"\n  and {len(lost) - 20} more" if len(lost) > 20 else ""
    kept = (
        "the others are kept: run again and it goes on from there"
        if cache
        else "the others are not kept: no file was named for them"
    )
    return f"{server.url}: {len(lost)} of {rows} rows have no reply; {kept}.{shown}{more}"


# Event loops


async def _together(workers: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run ``workers`` side by side; the first error ends all of them and is raised as it is, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__


def _run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end, in a thread of its own where this one has a running event loop (Jupyter)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []

    async def watched() -> T:
        started.append((asyncio.get_running_loop(), asyncio.current_task()))  # type: ignore[arg-type]
        return await main

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(asyncio.run, watched())
        try:
            return future.result()
        except BaseException:  # an interrupt reaches this thread only: hand it on, or leaving `with` would wait for all
            if started and not future.done():
                started[0][0].call_soon_threadsafe(started[0][1].cancel)
            raise
