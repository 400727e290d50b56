"""The released AwaRes dataset (``curation.released``) as curated rows, in place of `method.curation` (PAPER §7)."""

from collections.abc import Sequence
from pathlib import Path

import datasets

from awares.config import Params
from awares.data import sources
from awares.data.rows import validate_rows
from awares.data.sampling import all_hashes, benchmark_hashes, build_rows, collect, far_from, ranked
from awares.data.sources import OpenSource
from awares.engine.jsonl import Record
from awares.engine.rows import load_rows, save_rows
from awares.errors import AwaresValueError
from awares.method import curation, protocol

RELEASED_JUDGE = "released"  # name of the verdict columns


def curate_released(params: Params, out_dir: str | Path) -> dict[str, datasets.Dataset]:
    """Write rows of ``curation.released`` to ``out_dir``, as `curation.curate` does (PAPER §7), and return both splits.

    A trajectory with a call is HR with its crops as target (verdict 2), one that answers at once is LR (verdict 0).
    Answers of the base model and boxes were not released and stay empty. Rows with a benchmark's image are dropped.
    Validation has as many rows as stage `data` would hold out; training has all rows that share no image with it.
    Raises AwaresError as `sampling.collect` does, for too few rows, and for an unreadable call.
    """
    data, limit = params.data, params.data.duplicate_distance
    opened = sources.open_source(params, "curated", params.curation.released)
    place = opened.source.place
    clean = far_from(collect(params, opened), benchmark_hashes(params), limit)
    held = ranked(clean, data.validation_seed)[: data.validation_rows * len(data.sources)]
    train = ranked(far_from(clean, all_hashes(held), limit), data.train_seed)
    if not train:
        fault = f"{len(clean)} usable rows, and data.validation_rows takes {len(held)}: lower it"
        raise AwaresValueError(f"{place}: no row is left to train on: {fault}")
    folders = {split: Path(out_dir) / split / curation.ROWS_FOLDER for split in ("train", "validation")}
    for (split, folder), records in zip(folders.items(), (train, held), strict=True):
        rows = _curated(opened, records, split, params)
        save_rows(validate_rows(rows, f"{place}, {split}", pixels=False), folder)
    return {split: load_rows(folder) for split, folder in folders.items()}


def _curated(opened: OpenSource, records: Sequence[Record], split: str, params: Params) -> datasets.Dataset:
    targets, answers, verdicts = [target_crops(record, opened.source.place) for record in records], [], []
    for record, crops in zip(records, targets, strict=True):
        verdict = {"value": 2 if crops else 0, "low": None, "high": None, "both_wrong": False}
        answers.append({"id": record["id"], "low": {"answer": ""}, "high": {"answer": ""}})
        verdicts.append({"id": record["id"], RELEASED_JUDGE: verdict})
    rows = curation.assemble(
        build_rows(params, opened, records, split), (answers, verdicts, []), params, RELEASED_JUDGE
    )
    feature = rows.features["target_crops"]
    return rows.remove_columns("target_crops").add_column("target_crops", targets, feature=feature)


def target_crops(record: Record, place: str) -> list[str]:
    """The crops that a released trajectory calls for; none if it answers at once. AwaresValueError if unreadable."""
    call, answer = (protocol.parse_call(text, protocol.RELEASED) for text in (record["call"], record["answers"][0]))
    if (record["call"] and not call.crops) or (not record["call"] and answer.status != "none"):
        fault = f"unreadable call {record['call'][:80]!r}" if record["call"] else "the trajectory ends with its call"
        raise AwaresValueError(f"{place}, row {record['row']}: {fault}: write skip: [{record['row']}]")
    return list(call.crops)
