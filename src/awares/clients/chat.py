"""Chat requests to an OpenAI-compatible server: in threads, retried by the openai client, each reply kept in a file.

Every reply is appended, raw, to a JSONL file as soon as it arrives, under a hash of its whole request. The same call
after a kill or an outage continues from that file. Judges, oracles and `clients.engine.RemoteEngine` use this client.
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import openai
from pydantic import AliasPath, BaseModel, Field, ValidationError
from pydantic_core import from_json
from tqdm import tqdm

from awares.engine.jsonl import append_records, drop_torn_line, exclusive_lock, read_records, refuse_foreign
from awares.errors import AwaresRequestError, AwaresValueError, Failure, first_fault

T = TypeVar("T")
HEAD = b'{"reply_key": '  # the first bytes of every line of a reply file
REFUSES_ALL = (401, 403, 404)  # key, rights, address or model: the next request would fail the same way


class RowFailed(Exception):
    """A row without a result; raised in a ``talk`` it stops no other row.

    ``silent``: the server gave no reply, so a later run asks again. ``refused``: it gave a 4xx status.
    """

    def __init__(self, reason: str, silent: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.silent, self.refused = silent, refused


class Server(BaseModel, extra="forbid", frozen=True):
    """An OpenAI-compatible endpoint and its limits; AwaresValueError names a wrong one.

    ``url`` ends in /v1. The key is read from the environment variable ``key_variable`` only; unset = no key. At most
    ``concurrency`` rows run at once. A request is tried ``attempts`` times, each time for ``timeout`` seconds.
    """

    url: str = Field(pattern="^https?://")
    model: str
    key_variable: str = "AWARES_API_KEY"
    concurrency: int = Field(16, gt=0)
    timeout: float = Field(300.0, gt=0)
    attempts: int = Field(12, gt=0)
    stop_after: int = Field(16, gt=0)  # rows in a row without a reply that end the call

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise AwaresValueError(f"server: {first_fault(error)}") from error

    def connect(self) -> openai.OpenAI:
        """The library's client: it waits between attempts and follows Retry-After headers of up to two minutes."""
        key = os.environ.get(self.key_variable) or "none"  # the library requires a key
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=self.attempts - 1, timeout=self.timeout)

    def without_key(self, content: bytes) -> bytes:
        """``content`` with the key masked: some servers echo the request."""
        key = os.environ.get(self.key_variable)
        return content.replace(key.encode(), b"***") if key else content


class Reply(BaseModel):
    """First choice (``text``; ``finish``: stop, length, ...) and token counts, if any, of the body ``raw``.

    ``seconds``: duration of the attempt that succeeded.
    """

    raw: dict[str, Any]
    seconds: float
    text: str | None = Field(validation_alias=AliasPath("raw", "choices", 0, "message", "content"))
    finish: str | None = Field(None, validation_alias=AliasPath("raw", "choices", 0, "finish_reason"))
    prompt_tokens: int | None = Field(None, validation_alias=AliasPath("raw", "usage", "prompt_tokens"))
    completion_tokens: int | None = Field(None, validation_alias=AliasPath("raw", "usage", "completion_tokens"))


@dataclass(frozen=True)
class Request:
    """One chat completion; ``messages`` and ``settings`` (temperature, max_tokens, extra_body, ...) as in the API.

    The same request always gets the same recorded reply; another ``seed`` setting makes it another request. ``check``
    sees a fresh reply before it is recorded and may raise. ``record=False``: always sent.
    """

    row_id: str
    messages: Sequence[dict[str, Any]]
    settings: dict[str, Any]
    check: Callable[[Reply], None] = lambda reply: None
    record: bool = True

    def key(self, model: str) -> str:
        """Hash of everything that decides the reply: model, messages with image bytes, settings."""
        whole = {"model": model, "messages": self.messages, "settings": self.settings}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


Send = Callable[[Request], Reply]


class ChatClient:
    """Sends requests to ``server``; ``path`` is the JSONL file of replies (None: they are kept in memory only)."""

    def __init__(self, server: Server, path: str | Path | None, progress: bool = False) -> None:
        self.server, self.path, self.progress = server, None if path is None else Path(path), progress
        self.replies: dict[str, Reply] = {}  # by the key of the request
        self._silent = 0  # failed rows since the last reply
        self._lock, self._sending = Lock(), defaultdict[str, Lock](Lock)

    def converse(
        self,
        row_ids: Sequence[str],
        talk: Callable[[int, Send], T],
        on_failure: Callable[[Failure], T] | None = None,
    ) -> list[T]:
        """The results of ``talk(index, send)`` for all rows, in their order; it runs in threads.

        ``send(request)`` returns a reply, recorded or fresh. A failed row does not stop the others: ``on_failure``
        gives its result; without it, an AwaresRequestError lists all failures at the end. A refused key, address or
        model and a server that stopped replying raise AwaresRequestError at once.
        """
        results: list[Any] = [None] * len(row_ids)
        self._silent, self._sending = 0, defaultdict(Lock)  # threads of an aborted call may hold the former locks
        bar = tqdm(total=len(row_ids), desc=self.server.model, unit="row", disable=not self.progress)
        with self.opened(), self.server.connect() as api, bar:

            def run_row(index: int) -> tuple[int, T | Failure]:
                try:
                    return index, talk(index, lambda request: self._send(api, request))
                except RowFailed as error:
                    return index, self._failure(row_ids[index], error)

            # Daemon threads: an error or an interrupt ends the call without waiting for the requests under way.
            with ThreadPool(max(1, min(self.server.concurrency, len(row_ids)))) as pool:
                for index, result in pool.imap_unordered(run_row, range(len(row_ids))):
                    results[index] = result
                    bar.update()
        failures = [result for result in results if isinstance(result, Failure)]
        if failures and on_failure is None:
            shown = "".join(f"\n  row {failure.row_id}: {failure.reason}" for failure in failures[:20])
            count = f"{len(failures)} of {len(results)} rows have no reply; run again for them"
            raise AwaresRequestError(f"{self.server.url}: {count}. The first:{shown}", failures)
        return [on_failure(result) if on_failure and isinstance(result, Failure) else result for result in results]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock and read the file; AwaresError if another process holds it or if it contains something else."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.path):
            refuse_foreign(self.path, HEAD, "replies")
            drop_torn_line(self.path)  # else the next record would follow half a record on one line
            self.replies = {one["reply_key"]: Reply.model_validate(one) for one in read_records(self.path)}
            yield

    def _send(self, api: openai.OpenAI, request: Request) -> Reply:
        key = request.key(self.server.model)
        with self._lock:
            sending = self._sending[key]
        with sending:  # the same request of two rows is sent once
            if key in self.replies and request.record:
                return self.replies[key]
            reply = self._fetch(api, request)
            request.check(reply)
            with self._lock:
                self._silent = 0
                if request.record and not api.is_closed():  # after an abort the file is no longer ours
                    self.replies[key] = reply
                    about = {"reply_key": key, "id": request.row_id, "model": self.server.model}
                    if self.path:
                        append_records(self.path, [{**about, "seconds": reply.seconds, "raw": reply.raw}])
        return reply

    def _fetch(self, api: openai.OpenAI, request: Request) -> Reply:
        create: Any = api.chat.completions.with_raw_response.create
        for attempt in range(self.server.attempts):
            try:
                response = create(model=self.server.model, messages=request.messages, **request.settings)
            except openai.APIConnectionError as error:  # or a timeout
                raise RowFailed(f"{error} ({error.__cause__})", silent=True) from error
            except openai.APIStatusError as error:
                raise self._refusal(error) from error
            content = self.server.without_key(response.content)
            try:
                reply = Reply.model_validate({"raw": from_json(content), "seconds": response.elapsed.total_seconds()})
            except ValueError:  # a torn body with status 200, which the library does not request again
                time.sleep(min(8.0, 0.5 * 2.0**attempt))
                continue
            if reply.text is None:
                raise RowFailed(f"a reply without text (finish_reason {reply.finish!r})")
            return reply
        raise RowFailed(f"the body is no chat completion: {content[:200]!r}")

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        """The exception for an error status: of this row, or (AwaresRequestError) of the whole call."""
        body = self.server.without_key(error.response.content)[:300].decode(errors="replace").strip()
        reason = f"status {error.status_code}: {body}"
        if error.status_code not in REFUSES_ALL:
            return RowFailed(reason, silent=True, refused=error.status_code < 500 and error.status_code != 429)
        return AwaresRequestError(
            f"{self.server.url} refuses every request, {reason}. Check server.url (ends in /v1), server.model "
            f"{self.server.model!r} and the key in the environment variable {self.server.key_variable}"
        )

    def _failure(self, row_id: str, error: RowFailed) -> Failure:
        """The row's result; AwaresRequestError for one too many. After a first reply a 4xx is the row's own fault."""
        with self._lock:
            self._silent += error.silent and not (error.refused and self.replies)
            silent = self._silent
        if silent >= self.server.stop_after:
            reason = f"no reply for {silent} rows in a row, the last for row {row_id}: {error}"
            raise AwaresRequestError(f"{self.server.url}: {reason}. When it is back, run again") from error
        return Failure(row_id, str(error), error.silent)
