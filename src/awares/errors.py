"""The exceptions for user mistakes and for rows without a reply."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

_Reply = TypeVar("_Reply")
_Model = TypeVar("_Model")


class AwaresError(Exception):
    """Base class of user errors: the message names the file, row or parameter and how to fix it."""


class AwaresValueError(AwaresError, ValueError):
    """A value that cannot be used."""


class AwaresLengthError(AwaresValueError):
    """A prompt that is longer than the context."""


class AwaresFileError(AwaresError, FileNotFoundError):
    """A file or folder that is missing or cannot be read."""


@dataclass(frozen=True)
class Failure:
    """A row without a reply."""

    row_id: str
    reason: str
    silent: bool = False  # the server did not answer at all and may answer another time


class AwaresRequestError(AwaresError, RuntimeError):
    """A server did not answer. ``failures``: the rows without a reply; none if the whole call was given up."""

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = failures


@contextmanager
def faults_of(place: str) -> Iterator[None]:
    """Turn any exception inside (image and JSON libraries raise many types) into an AwaresError naming ``place``."""
    try:
        yield
    except AwaresError:
        raise
    except Exception as error:
        fault = re.sub(r" <\S+ object at \w+>", "", str(error))  # an address in memory
        raise AwaresValueError(f"{place}: {type(error).__name__}: {fault[:200]}") from error


def with_failures(row_ids: Sequence[str], ask: Callable[[list[int]], Sequence[_Reply]]) -> list[_Reply | Failure]:
    """``ask`` for the indices of all rows; a `Failure` for each that its AwaresRequestError lists, then ask again."""
    found: dict[int, _Reply | Failure] = {}
    while left := [place for place in range(len(row_ids)) if place not in found]:
        try:
            found |= dict(zip(left, ask(left), strict=True))
        except AwaresRequestError as error:
            lost = {failure.row_id: failure for failure in error.failures}
            if not lost.keys() & {row_ids[place] for place in left}:
                raise
            found |= {place: lost[row_ids[place]] for place in left if row_ids[place] in lost}
    return [found[place] for place in range(len(row_ids))]


def validated(model: type[_Model], values: Any, place: str) -> _Model:
    """``values`` as ``model``; AwaresValueError with ``place`` and the first fault."""
    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        unknown = ("extra_forbidden", "unexpected_keyword_argument")
        fault = min(error.errors(), key=lambda one: one["type"] not in unknown)  # a misspelt key is missing, too
        key = ".".join(map(str, fault["loc"]))
        wrong = f"{key}: {fault['msg'].removeprefix('Value error, ')}, not {str(fault['input'])[:100]!r}"
        wrong = f"{key} is missing" if fault["type"] == "missing" else wrong
        raise AwaresValueError(f"{place}: {f'unknown key {key}' if fault['type'] in unknown else wrong}") from error
