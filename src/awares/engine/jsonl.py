"""JSON Lines files of records: written in chunks, resumable after a kill at any moment."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from awares.errors import AwaresFileError, AwaresValueError

Record = dict[str, Any]
_Work = Callable[[list[str]], list[Record]]


def in_chunks(
    path: Path, ids: Sequence[str], size: int, work: _Work, again: Callable[[Record], bool] = lambda record: False
) -> list[Record]:
    """Run ``work`` on chunks of ``size`` of ``ids``, keep its records in the file ``path``, return all in that order.

    ``work`` gets the ids of a chunk and returns one record with that ``id`` for each. Complete chunks of the file are
    not run again, unless ``again`` is true for one of their records. A chunk that a kill tore is run again completely:
    a row's batch must not depend on the kill. AwaresError if the file has other rows or another process writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(path):
        records = read_records(path)
        if [record["id"] for record in records] != list(ids[: len(records)]):
            raise AwaresFileError(f"{path}: has other rows than this step: delete its folder and run again")
        held = len(records) if len(records) == len(ids) else len(records) // size * size
        records = records[:held]
        write_records(path, records)  # without a torn chunk
        starts = [at for at in range(0, len(ids), size) if at >= held or any(map(again, records[at : at + size]))]
        for start in tqdm(starts, desc=path.stem, unit="chunk", disable=not starts, leave=False):
            chunk = list(ids[start : start + size])
            fresh = work(chunk)
            if [record["id"] for record in fresh] != chunk:
                raise AwaresValueError(f"{path.name}: a step must return one record for each row, in their order")
            records[start : start + size] = fresh
            if start < held:
                write_records(path, records)
            else:
                append_records(path, fresh)
    return records


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSONL file, [] if it is missing, without a torn last line. AwaresError names a broken one."""
    file = Path(path)
    if not file.is_file():
        return []
    *lines, _ = file.read_bytes().split(b"\n")  # the rest is torn or empty
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise AwaresFileError(f"{file}, line {number}: not JSON ({error}): delete the file, run again") from error
    return records


def append_records(path: str | Path, records: Sequence[Record]) -> None:
    """Append ``records`` in one write; they are on the disk when this returns."""
    with Path(path).open("ab") as file:
        file.write(_lines(records))
        file.flush()
        os.fsync(file.fileno())


def drop_torn_line(path: str | Path, head: bytes, kind: str) -> None:
    """Cut off the incomplete last line that a kill left in a JSONL file. A missing file is no error.

    AwaresFileError, and no change, if a line does not begin with ``head``: the file is not ours.
    """
    *lines, torn = Path(path).read_bytes().split(b"\n") if Path(path).is_file() else [b""]
    if any(not line.startswith(head) for line in lines) or not torn.startswith(head[: len(torn)]):
        raise AwaresFileError(f"{path}: contains something other than {kind}: give another file to write to")
    if torn:
        os.truncate(path, Path(path).stat().st_size - len(torn))


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Replace the file by ``records``, completely or not at all."""
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(_lines(records))
    partial.replace(path)


def _lines(records: Sequence[Record]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Lock ``path``: a killed `dvc` may leave its stage running, and a second process must not write the same file."""
    try:
        lock = FileLock(path.with_name(f".{path.name}.lock")).acquire(timeout=0)
    except Timeout as error:
        raise AwaresFileError(f"{path}: another process is writing it: wait for it, or end it") from error
    with lock:
        yield
