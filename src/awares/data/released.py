"""The released AwaRes dataset as curated rows: a ready-made alternative to `curation` (PAPER §7), which ``curation.released`` chooses.

Its published schema could not be read when this was written: what is assumed of it stands in `sources.READERS` (trajectory)
and under ``curated`` in data/sources.yaml, which is where to correct it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets

from awares.config import Params
from awares.data import rows as data
from awares.data import sampling
from awares.data.sampling import Collected
from awares.engine.jsonl import Record
from awares.errors import AwaresValueError
from awares.method import curation, protocol

JUDGE = "released"  # name of the verdict columns: whoever labelled the release


def curate(params: Params, out_dir: str | Path) -> dict[str, datasets.Dataset]:
    """Write the curated rows of both splits to ``out_dir``, where `curation.curate` would, and return them.

    A trajectory that calls is HR with the crops it asks for as target, one that answers at once is LR. Answers of a base model
    and boxes were not released and stay empty; the verdict is 2 for HR and 0 for LR. Rows with an image of a benchmark
    are left out. Validation rows are as many as `data` would hold out of all sources; training rows are all others but those that
    share an image with one of them. Raises AwaresError as `sampling.collect` does, for too few rows, and for a call that
    cannot be read.
    """
    one = sampling.collect(params, "curated", params.curation.released)
    limit = params.data.duplicate_distance
    clean = sampling.apart(sampling.good(one), sampling.benchmark_hashes(params), limit)
    count = params.data.validation_rows * len(params.data.sources)
    held = sampling.ranked(clean, params.data.validation_seed)[:count]
    train = sampling.ranked(sampling.apart(clean, sampling.phashes(held), limit), params.data.train_seed)
    if not train:
        raise AwaresValueError(
            f"{one.source.place}: {len(clean)} usable rows in {one.source.hub} leave none to train on beside the {count} of "
            "data.validation_rows: lower it"
        )
    for split, records in {"train": train, "validation": held}.items():
        rows = data.validate(_curated(one, records, split, params), f"released rows, {split}", pixels=False)
        data.save_rows(rows, Path(out_dir) / split / curation.ROWS)
    return {split: data.load_rows(Path(out_dir) / split / curation.ROWS) for split in ("train", "validation")}


def _curated(one: Collected, records: Sequence[Record], split: str, params: Params) -> datasets.Dataset:
    targets = [_target(record, one.source.place) for record in records]
    base = sampling.build(one, records, split)
    blank: Record = {"answer": ""}
    answers = [{"id": record["id"], "low": blank, "high": blank} for record in records]
    verdicts = [{"id": record["id"], JUDGE: _verdict(crops)} for record, crops in zip(records, targets, strict=True)]
    section = replace(params.curation, judge=JUDGE, drop_both_wrong=False)
    rows = curation.assemble(base, answers, verdicts, [], replace(params, curation=section))
    column = datasets.Dataset.from_dict(
        {"target_crops": targets}, features=rows.select_columns("target_crops").features
    )
    return datasets.concatenate_datasets([rows.remove_columns("target_crops"), column], axis=1)


def _target(record: Record, place: str) -> list[str]:
    """The crops that a trajectory asks for; none where it answers at once."""
    call = protocol.parse_call(record["call"], protocol.RELEASED)
    if record["call"] and not call.crops:
        raise AwaresValueError(
            f"{place}, row {record['row']}: the first turn {record['call'][:80]!r} is no readable call: write skip: [{record['row']}]"
        )
    if not record["call"] and protocol.parse_call(record["answers"][0], protocol.RELEASED).status != "none":
        raise AwaresValueError(
            f"{place}, row {record['row']}: the trajectory ends with its call: write skip: [{record['row']}]"
        )
    return list(call.crops)


def _verdict(crops: list[str]) -> Record:
    return {"value": 2 if crops else 0, "low": None, "high": None, "both_wrong": False}
