"""The released AwaRes dataset as curated rows: a ready-made alternative to running `curation` (PAPER §7).

    rows = released.curated(params)
    data.save_rows(rows, params.run_dir("curation") / "train" / curation.ROWS)

and both trainings go on from there. Its published schema could not be read when this was written: what is assumed of it
stands in `sources.READERS` (trajectory) and under ``curated`` in data/sources.yaml, which is where to correct it.
"""

from dataclasses import replace

import datasets

from awares import curation, protocol, sampling
from awares.config import AwaresValueError, Params
from awares.records import Record

JUDGE = "released"  # name of the verdict columns: whoever labelled the release


def curated(params: Params, name: str = "awares") -> datasets.Dataset:
    """The rows of `curation.curate`, from the trajectories of ``name`` under ``curated`` in the sources file.

    A trajectory that calls is HR with the crops it asks for as target, one that answers at once is LR. Answers of a base model
    and boxes were not released and stay empty; the verdict is 2 for HR and 0 for LR. Rows with an image of a benchmark
    are left out. Raises AwaresError as `sampling.collect` does, and for a call that cannot be read.
    """
    one = sampling.collect(params, "curated", name)
    good = [record for record in one.records if record["state"] == "row"]
    kept = sampling.apart(good, sampling.benchmark_hashes(params), params.data.duplicate_distance)
    if not kept:
        raise AwaresValueError(f"{one.source.place}: no usable row in {one.source.hub}")
    targets = [_target(record, one.source.place) for record in kept]
    base = sampling.build(one, kept, "train")
    blank: Record = {"answer": ""}
    answers = [{"id": record["id"], "low": blank, "high": blank} for record in kept]
    verdicts = [{"id": record["id"], JUDGE: _verdict(crops)} for record, crops in zip(kept, targets, strict=True)]
    section = replace(params.curation, judge=JUDGE, drop_both_wrong=False)
    rows = curation.assemble(base, answers, verdicts, [], replace(params, curation=section))
    column = datasets.Dataset.from_dict(
        {"target_crops": targets}, features=rows.select_columns("target_crops").features
    )
    found = datasets.concatenate_datasets([rows.remove_columns("target_crops"), column], axis=1)
    return found


def _target(record: Record, place: str) -> list[str]:
    """The crops that a trajectory asks for; none where it answers at once."""
    call = protocol.parse_call(record["call"], protocol.RELEASED)
    if record["call"] and not call.crops:
        raise AwaresValueError(
            f"{place}, row {record['row']}: the first turn {record['call'][:80]!r} is no readable call: write skip: [{record['row']}]"
        )
    return list(call.crops)


def _verdict(crops: list[str]) -> Record:
    return {"value": 2 if crops else 0, "low": None, "high": None, "both_wrong": False}
