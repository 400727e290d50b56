"""Chat requests and their replies, and the file that keeps them: one JSON line per reply, safe against a kill."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awares.engine.jsonl import append_records, drop_torn_line, exclusive_lock, read_records, refuse_foreign
from awares.errors import AwaresFileError


@dataclass(frozen=True)
class Request:
    """One chat completion; ``messages`` and ``settings`` (temperature, max_tokens, extra_body, ...) as in the API.

    ``version`` names the prompt, so that replies to an older wording are told apart in the file. The same request
    always gets the same recorded reply: a caller that cannot use it asks again with, say, another ``seed`` setting.
    ``check`` sees a fresh reply before it is recorded and may raise: for what is the server's fault, not the reply's.
    ``record=False``: asked each time, and not kept.
    """

    row_id: str
    messages: Sequence[dict[str, Any]]
    settings: dict[str, Any]
    version: str = ""
    check: "Callable[[Reply], None] | None" = None
    record: bool = True

    def key(self, model: str) -> str:
        """Hash of all that decides the reply: model, messages with image bytes, settings, prompt version."""
        whole = {"model": model, "messages": self.messages, "settings": self.settings, "version": self.version}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """``text`` of the first choice; ``finish``: stop, length, ...; the token counts are None if the server tells none.

    ``raw``: the whole body. ``seconds``: of the attempt that succeeded; a recorded reply keeps its own.
    """

    text: str
    finish: str
    prompt_tokens: int | None
    completion_tokens: int | None
    raw: dict[str, Any]
    seconds: float


class Again(Exception):
    """An attempt that another may mend. ``wait``: seconds the server asks for; ``silent``: it may be gone."""

    def __init__(self, reason: str, wait: float = 0.0, silent: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.silent = wait, silent


class Lost(Exception):
    """A row given up, for this reason; raised in `ChatClient.converse`'s ``talk`` it costs no other row.

    ``silent``: the server gave no reply to it; ``refused``: it said that it will not.
    """

    def __init__(self, reason: str, silent: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.silent, self.refused = silent, refused


_HEAD = b'{"key": '  # how every line of a reply file begins


class ReplyFile:
    """Replies by the key of their request, in memory and in the JSONL file ``path`` (None: in neither)."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._replies: dict[str, Reply] = {}
        self._size = -1  # bytes of the file when last seen: it is read again only when another process has written

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the file, so that no second process asks the same; AwaresError if one does, or if it is no such file."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.path):
            self._load(self.path)
            try:
                yield
            finally:
                self._size = _size(self.path)

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    @property
    def known(self) -> int:
        """How many replies there are."""
        return len(self._replies)

    def add(self, key: str, reply: Reply, request: Request, model: str, attempts: int) -> None:
        """Record a reply; it is on the disk when this returns."""
        if self.path is None:
            return
        about = {"key": key, "id": request.row_id, "model": model, "version": request.version, "attempts": attempts}
        append_records(self.path, [{**about, "seconds": reply.seconds, "reply": reply.raw}])
        self._replies[key] = reply

    def _load(self, path: Path) -> None:
        refuse_foreign(path, _HEAD, "replies")
        drop_torn_line(path)  # else the next record would be glued to what a kill has half written
        if _size(path) == self._size:
            return
        self._replies.clear()
        for number, record in enumerate(read_records(path), start=1):
            try:
                self._replies[record["key"]] = read_reply(record["reply"], record["seconds"])
            except (KeyError, TypeError, Again, Lost) as error:
                raise AwaresFileError(
                    f"{path}, line {number}: no recorded reply: give the cache its own file"
                ) from error


def read_reply(body: Any, seconds: float) -> Reply:
    """The reply in the body of a chat completion."""
    try:
        choice = body["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        usage = body.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Again(f"the body is no chat completion: {str(body)[:200]}") from error
    if not isinstance(text, str):
        raise Lost(f"a reply without text (finish_reason {finish!r})")
    return Reply(text, str(finish), *counts, body, seconds)


def read_json(content: bytes) -> Any:
    """The JSON of a body; Again when a server has torn or garbled it."""
    try:
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair could not be recorded
        return body
    except (ValueError, RecursionError) as error:
        raise Again(f"the body is not JSON: {content[:200]!r}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
