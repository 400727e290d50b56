"""The exceptions of user mistakes and of lost rows."""

from collections.abc import Sequence
from dataclasses import dataclass


class AwaresError(Exception):
    """A mistake that the user can mend: the message names the file, row or parameter and what to write instead."""


class AwaresValueError(AwaresError, ValueError):
    """A value that cannot be used."""


class AwaresFileError(AwaresError, FileNotFoundError):
    """A file or folder that is missing or cannot be read."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@dataclass(frozen=True)
class Failure:
    """A row without a reply, and why. ``silent``: the server may have been gone or set up wrongly, and may answer another time."""

    row_id: str
    reason: str
    silent: bool = False


class AwaresRequestError(AwaresError, RuntimeError):
    """A server has not answered; ``failures`` names the rows lost, unless the whole call was given up."""

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)
