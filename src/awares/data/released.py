"""The released AwaRes dataset as curated rows, in place of `method.curation` (PAPER §7).

``curation.released`` names it. Its schema is assumed: see the reader `trajectory` in `sources` and section ``curated``
of data/sources.yaml.
"""

from collections.abc import Sequence
from pathlib import Path

import datasets

from awares.config import Params
from awares.data.rows import validate_rows
from awares.data.sampling import all_hashes, benchmark_hashes, build_rows, collect, far_from, ranked
from awares.data.sources import OpenSource, open_source
from awares.engine.jsonl import Record
from awares.engine.rows import load_rows, save_rows
from awares.errors import AwaresValueError
from awares.method import curation, protocol

RELEASED_JUDGE = "released"  # name of the verdict columns


def curate_released(params: Params, out_dir: str | Path) -> dict[str, datasets.Dataset]:
    """Write the curated rows of both splits to ``out_dir``, as `curation.curate` does, and return them.

    A trajectory with a call is HR with its crops as target (verdict 2), one that answers at once is LR (verdict 0).
    Answers of the base model and boxes were not released and stay empty. Rows with a benchmark's image are dropped.
    Validation has as many rows as stage `data` would hold out; training has all rows that share no image with it.
    Raises AwaresError as `sampling.collect` does, for too few rows, and for an unreadable call.
    """
    data, limit = params.data, params.data.duplicate_distance
    opened = open_source(params, "curated", params.curation.released)
    clean = far_from(collect(params, opened), benchmark_hashes(params), limit)
    held = ranked(clean, data.validation_seed)[: data.validation_rows * len(data.sources)]
    train = ranked(far_from(clean, all_hashes(held), limit), data.train_seed)
    if not train:
        raise AwaresValueError(
            f"{opened.source.place}: {len(clean)} usable rows in {opened.source.hub}, and data.validation_rows takes "
            f"{len(held)}: none is left to train on, lower it"
        )
    splits = {}
    for split, records in {"train": train, "validation": held}.items():
        folder = Path(out_dir) / split / curation.ROWS_FOLDER
        rows = _curated(opened, records, split, params)
        save_rows(validate_rows(rows, f"{opened.source.place}, {split}", pixels=False), folder)
        splits[split] = load_rows(folder)
    return splits


def _curated(opened: OpenSource, records: Sequence[Record], split: str, params: Params) -> datasets.Dataset:
    targets = [_target(record, opened.source.place) for record in records]
    ids = [record["id"] for record in records]
    answers = [{"id": row_id, "low": {"answer": ""}, "high": {"answer": ""}} for row_id in ids]
    blank: Record = {"low": None, "high": None, "both_wrong": False}
    verdicts = [
        {"id": row_id, RELEASED_JUDGE: {"value": 2 if crops else 0, **blank}}
        for row_id, crops in zip(ids, targets, strict=True)
    ]
    rows = curation.assemble(build_rows(params, opened, records, split), answers, verdicts, [], params, RELEASED_JUDGE)
    feature = rows.features["target_crops"]
    return rows.remove_columns("target_crops").add_column("target_crops", targets, feature=feature)


def _target(record: Record, place: str) -> list[str]:
    """The crops that a trajectory calls for; none if it answers at once."""
    call = protocol.parse_call(record["call"], protocol.RELEASED)
    skip = f"write skip: [{record['row']}]"
    if record["call"] and not call.crops:
        raise AwaresValueError(f"{place}, row {record['row']}: unreadable call {record['call'][:80]!r}: {skip}")
    if not record["call"] and protocol.parse_call(record["answers"][0], protocol.RELEASED).status != "none":
        raise AwaresValueError(f"{place}, row {record['row']}: the trajectory ends with its call: {skip}")
    return list(call.crops)
