"""Chat requests to an OpenAI-compatible server, in threads; each raw reply is kept in a JSONL file when it arrives."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import openai
from pydantic import AliasPath, BaseModel, Field
from pydantic_core import from_json
from tqdm import tqdm

from awares.clients import launch
from awares.engine.jsonl import append_records, drop_torn_line, exclusive_lock, read_records
from awares.errors import AwaresRequestError, Failure

_Result = TypeVar("_Result")


class RowFailed(Exception):
    """A row without a result; raised in a ``talk`` it stops no other row. ``silent``: a later run retries it."""

    def __init__(self, reason: str, silent: bool = False) -> None:
        super().__init__(reason)
        self.silent = silent


class Server(BaseModel, extra="forbid", frozen=True):
    """An OpenAI-compatible endpoint and its limits.

    ``url`` ends in /v1. ``key_variable``: name in the environment, unset = no key. ``concurrency`` rows run at once. A
    request is tried ``attempts`` times, each time for ``timeout`` seconds.
    """

    url: str = Field(pattern="^https?://")
    model: str
    key_variable: str = "AWARES_API_KEY"
    concurrency: int = Field(16, gt=0)
    timeout: float = Field(300.0, gt=0)
    attempts: int = Field(12, gt=0)
    stop_after: int = Field(16, gt=0)  # consecutive rows without a reply that end the call
    started_by: launch.Launch | None = None  # how our server is started, in place of ``url``

    def connect(self) -> openai.OpenAI:
        """The library's client: it waits between attempts and follows Retry-After headers of up to two minutes."""
        key = os.environ.get(self.key_variable) or "none"  # the library requires a key
        options: Any = {"max_retries": self.attempts - 1, "timeout": self.timeout, "base_url": self.url}
        if self.started_by:  # waits for it, and passes by proxies
            options["base_url"] = launch.running.address(self.started_by)
            options["http_client"] = openai.DefaultHttpxClient(trust_env=False)
        return openai.OpenAI(api_key=key, **options)

    def without_key(self, content: bytes) -> bytes:
        """``content`` with the key masked: some servers echo the request."""
        key = os.environ.get(self.key_variable)
        return content.replace(key.encode(), b"***") if key else content


class Reply(BaseModel):
    """First choice (``finish``: stop, length, ...) and token counts of the body ``raw``; seconds of its attempt."""

    raw: dict[str, Any]
    seconds: float
    text: str | None = Field(validation_alias=AliasPath("raw", "choices", 0, "message", "content"))
    finish: str | None = Field(None, validation_alias=AliasPath("raw", "choices", 0, "finish_reason"))
    prompt_tokens: int | None = Field(None, validation_alias=AliasPath("raw", "usage", "prompt_tokens"))
    completion_tokens: int | None = Field(None, validation_alias=AliasPath("raw", "usage", "completion_tokens"))


@dataclass(frozen=True)
class Request:
    """One chat completion; ``messages`` and ``settings`` (temperature, max_tokens, extra_body, ...) as in the API.

    The same request gets its recorded reply. ``check`` gets a fresh one and may raise, or change ``raw``. ``unsent``:
    anything else that decides the reply.
    """

    row_id: str
    messages: Sequence[dict[str, Any]]
    settings: dict[str, Any]
    check: Callable[[Reply], None] = lambda reply: None
    unsent: str = ""

    def key(self, model: str) -> str:
        """Hash of everything that decides the reply: model, messages with image bytes, settings."""
        whole = {"model": model, "messages": self.messages, "settings": self.settings, "unsent": self.unsent}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


Send = Callable[[Request], Reply]


class ChatClient:
    """Sends requests to ``server``. ``path``: the JSONL file of replies; None keeps them during one call only."""

    def __init__(self, server: Server, path: str | Path | None, progress: bool = False) -> None:
        self.server, self.path, self.progress = server, None if path is None else Path(path), progress
        self.replies: dict[str, Reply] = {}  # by the key of the request
        self._lock, self._connecting, self._silent = Lock(), Lock(), 0  # failed rows since the last reply

    def converse(
        self,
        row_ids: Sequence[str],
        talk: Callable[[int, Send], _Result],
        on_failure: Callable[[Failure], _Result] | None = None,
    ) -> list[_Result]:
        """The results of ``talk(index, send)`` for all rows, in their order; it runs in threads.

        A failed row does not stop the others: ``on_failure`` gives its result; without it, an AwaresRequestError lists
        all failures at the end. It is raised at once for a refused key, address or model and a server gone silent.
        """
        results: list[Any] = [None] * len(row_ids)
        self._silent = 0
        bar = tqdm(total=len(row_ids), desc=self.server.model, unit="row", disable=not self.progress)
        with self.opened(), ExitStack() as ending, bar:
            # By the first request that is sent: a server may have to start for it
            connect = cache(lambda: ending.enter_context(self.server.connect()))

            def run_row(index: int) -> None:
                try:
                    results[index] = talk(index, partial(self._send, connect))
                except RowFailed as error:
                    results[index] = self._failure(row_ids[index], error)

            # Daemon threads: an error or an interrupt ends the call without waiting for the requests under way.
            with ThreadPool(max(1, min(self.server.concurrency, len(row_ids)))) as pool:
                for _ in pool.imap_unordered(run_row, range(len(row_ids))):
                    bar.update()
        failures = [result for result in results if isinstance(result, Failure)]
        if failures and not on_failure:
            shown = "".join(f"\n  row {failure.row_id}: {failure.reason}" for failure in failures[:20])
            count = f"{len(failures)} of {len(results)} rows have no reply; run again to retry them"
            raise AwaresRequestError(f"{self.server.url}: {count}. The first:{shown}", failures)
        return [on_failure(result) if on_failure and isinstance(result, Failure) else result for result in results]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the file, read it once; AwaresError if another process holds it or if it contains something else."""
        if self.path is None:
            self.replies = {}
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.path):
            drop_torn_line(self.path, b'{"reply_key": ', "replies")  # the next record would follow it on the same line
            if not self.replies:
                self.replies = {one["reply_key"]: Reply.model_validate(one) for one in read_records(self.path)}
            yield

    def _send(self, connect: Callable[[], openai.OpenAI], request: Request) -> Reply:
        key = request.key(self.server.model)
        if key in self.replies:
            return self.replies[key]
        with self._connecting:
            api = connect()
        reply = self._fetch(api, request)
        request.check(reply)
        with self._lock:
            self._silent = 0
            if api.is_closed():  # after an abort the file is no longer ours
                return reply
            if self.path and key not in self.replies:  # another row may have made the same request
                about = {"reply_key": key, "id": request.row_id, "model": self.server.model}
                append_records(self.path, [{**about, "seconds": reply.seconds, "raw": reply.raw}])
            return self.replies.setdefault(key, reply)

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
        if error.status_code not in (401, 403, 404):  # key, rights, address or model
            return RowFailed(reason, silent=True)
        fix = f"server.url (ends in /v1), server.model {self.server.model!r} and the key in {self.server.key_variable}"
        return AwaresRequestError(f"{self.server.url} refuses every request, {reason}. Check {fix}")

    def _failure(self, row_id: str, error: RowFailed) -> Failure:
        """The row's result; AwaresRequestError for one too many. After a first reply a 4xx concerns its row only."""
        status = getattr(error.__cause__, "status_code", 500)
        with self._lock:
            self._silent += error.silent and (status >= 500 or status == 429 or not self.replies)
        if error.silent and (fault := launch.running.fault(self.server.started_by)):
            raise AwaresRequestError(fault) from error
        if self._silent >= self.server.stop_after:
            reason = f"no reply for {self._silent} rows in a row, the last for row {row_id}: {error}"
            raise AwaresRequestError(f"{self.server.url}: {reason}. When it is back, run again") from error
        return Failure(row_id, str(error), error.silent)
