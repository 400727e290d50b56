"""Raw outputs: one JSON line per row, written in chunks, resumable after a kill at any moment."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from awares.errors import AwaresFileError, AwaresValueError

Record = dict[str, Any]


def in_chunks(
    path: Path,
    ids: Sequence[str],
    size: int,
    work: Callable[[list[str]], list[Record]],
    again: Callable[[Record], bool] = lambda record: False,
) -> list[Record]:
    """Run ``work`` on chunks of ``size`` of ``ids`` and keep its records in the file ``path``; return all, in that
    order.

    ``work`` gets the ids of a chunk and returns one record for each, with that ``id``. Chunks that the file holds
    whole are not run again, unless a record is to be made ``again``; one that a kill has torn is, from its first row on, because
    what shares a batch must not depend on the kill. Raises AwaresError when the file holds other rows, or when another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path):
        records = _whole_chunks(path, list(ids), size)
        held = len(records)
        starts = [at for at in range(0, len(ids), size) if at >= held or any(map(again, records[at : at + size]))]
        for start in tqdm(starts, desc=path.stem, unit="chunk", disable=not starts, leave=False):
            chunk = list(ids[start : start + size])
            fresh = work(chunk)
            if [record["id"] for record in fresh] != chunk:
                raise AwaresValueError(
                    f"{path.name}: a step must give one record for each row, in the order of the rows"
                )
            records[start : start + size] = fresh
            if start < held:
                write_records(path, records)
            else:
                append_records(path, fresh)
    return records


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSONL file, [] if there is none. A last line that a kill has torn is left out.

    Raises AwaresError naming file and line for a broken line elsewhere.
    """
    file = Path(path)
    if not file.is_file():
        return []
    *lines, _ = file.read_bytes().split(b"\n")  # what follows the last line break was torn, or is empty
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise AwaresFileError(f"{file}, line {number}: not JSON ({error}): delete the file, run again") from error
    return records


def append_records(path: str | Path, records: Sequence[Record]) -> None:
    """Add ``records`` in one write; they are on the disk when this returns."""
    with Path(path).open("ab") as file:
        file.write(_lines(records))
        file.flush()
        os.fsync(file.fileno())


def drop_torn_line(path: str | Path) -> None:
    """Cut off what follows the last line break of a JSONL file: a kill has torn it. No file is no error."""
    file = Path(path)
    if file.is_file():
        whole = file.read_bytes().rfind(b"\n") + 1
        os.truncate(file, whole)


def refuse_foreign(path: str | Path, head: bytes, kind: str) -> None:
    """AwaresFileError for a file of which a line does not begin with ``head``: it is not ours, and would be cut or mixed up."""
    lines = Path(path).read_bytes().split(b"\n") if Path(path).is_file() else [b""]
    if any(not line.startswith(head) for line in lines[:-1]) or not lines[-1].startswith(head[: len(lines[-1])]):
        raise AwaresFileError(f"{path}: holds something else than {kind}: give another file to write to")


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Replace the file by ``records``, whole or not at all."""
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(_lines(records))
    partial.replace(path)


def _whole_chunks(path: Path, ids: list[str], size: int) -> list[Record]:
    """The records of the chunks that are whole; the file is cut back to them. The last chunk may be a short one."""
    records = read_records(path)
    if [record["id"] for record in records] != ids[: len(records)]:
        raise AwaresFileError(f"{path}: holds other rows than this step's: delete its folder and run again")
    whole = len(records) if len(records) == len(ids) else len(records) // size * size
    if path.is_file():
        write_records(path, records[:whole])
    return records[:whole]


def _lines(records: Sequence[Record]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold ``path``: a killed `dvc` may leave its stage running, and a second one must not write beside it."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AwaresFileError(f"{path}: another process is writing it: wait for it, or end it") from error
        yield
