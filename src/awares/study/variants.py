"""Ablations: variants of params.yaml beside the main line (PAPER §5, Tables 3, 4, 7 to 10).

A variant changes a few parameters, repeats the stages that they decide (`config.DECIDES`), and is answered for by `06_ablations`, which
writes its tables beside those of the main line. This module puts the tables of all variants together.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from awares.config import DECIDES, Params, differences
from awares.errors import AwaresFileError, AwaresValueError
from awares.study.tables import AVERAGE

MAIN = "main"  # the main line's name in the tables of a variant


def judged_by(params: Params) -> tuple[str, str]:
    """Which system a variant is judged by, and the stage that trained it: `awares` after `grpo` where it changes GRPO, else `sft`.

    Raises AwaresValueError for a variant that changes no training.
    """
    touched = params.changed & DECIDES["grpo"]
    if not touched:
        raise AwaresValueError(
            f"variant {params.variant!r} changes no training: ablations are the variants of params.yaml that do"
        )
    return ("awares", "grpo") if "grpo" in touched else ("sft", "sft")


def gather(folders: Mapping[str, Path], name: str) -> pd.DataFrame:
    """The tables ``name`` of all variants, one below the other, with a first column variant.

    ``folders``: variant -> the folder of its tables. Raises AwaresFileError naming the first variant that has not been run.
    """
    found = []
    for variant, folder in folders.items():
        file = folder / f"{name}.csv"
        if not file.is_file():
            raise AwaresFileError(f"{file}: variant {variant} has not been run; run `dvc repro ablations`")
        table = pd.read_csv(file)
        table.insert(0, "variant", variant)
        found.append(table)
    return pd.concat(found, ignore_index=True)


def places(runs: Mapping[str, Params]) -> Iterator[tuple[str, int, Path]]:
    """Variant, training seed, and where its answers to the evaluation rows lie: what `comparison.answered` reads."""
    for name, params in runs.items():
        yield name, params.seed, params.run_dir("evaluation") / "trajectories" / f"{judged_by(params)[0]}.jsonl"


def validation_places(runs: Mapping[str, Params]) -> Iterator[tuple[str, int, Path]]:
    """The same for the curated validation rows: what `comparison.first_turns` reads."""
    for name, params in runs.items():
        yield name, params.seed, params.run_dir(judged_by(params)[1]) / "validation.jsonl"


def pick(tables: pd.DataFrame, column: str, wanted: Sequence[str], main: str) -> pd.DataFrame:
    """Of gathered ``tables``, the rows of the variants ``wanted``, in that order, and of the main line under the name ``main``.

    ``column``: the one that names a policy in a variant's table. Every variant's table holds the main line's row as well, scored
    at the same training seed; the one of the first wanted variant is taken. A variant that has not been run (params.yaml lists
    those that are) has no rows; AwaresValueError when none of them has.
    """
    own = tables[tables[column] == tables.variant]
    ours = [name for name in wanted if name != main and (own.variant == name).any()]
    if not ours:
        raise AwaresValueError(f"none of {', '.join(wanted)} is listed under ablations in params.yaml")
    reference = tables[(tables[column] == MAIN) & (tables.variant == ours[0])].assign(variant=main)
    rows = pd.concat([own, reference])
    return pd.concat([rows[rows.variant == name] for name in wanted], ignore_index=True).drop(columns=column)


def knobs(results: pd.DataFrame, decisions: pd.DataFrame, wanted: Sequence[str], main: str) -> pd.DataFrame:
    """Table 8: variant, accuracy (percent), rtr, call_rate (percent), area (share of the image)."""
    average = results[results.benchmark == AVERAGE]
    scores = pick(average, "system", wanted, main)[["variant", "accuracy", "accuracy_low", "accuracy_high", "rtr"]]
    return scores.merge(pick(decisions, "policy", wanted, main)[["variant", "call_rate", "area"]], on="variant")


def sweeps(main: Params, runs: Mapping[str, Params]) -> dict[str, dict[str, float]]:
    """Parameters that several variants change alone, each to another number: dotted key -> variant -> value, the main line among them."""
    found: dict[str, dict[str, float]] = {}
    for name, params in runs.items():
        changes = differences(main, params)
        if len(changes) == 1 and all(type(value) in (int, float) for value in changes[0][1:]):
            key, before, after = changes[0]
            found.setdefault(key, {MAIN: before})[name] = after
    return {key: dict(sorted(values.items(), key=lambda item: item[1])) for key, values in found.items()}


def sweep_table(
    results: pd.DataFrame, decisions: pd.DataFrame, found: Mapping[str, Mapping[str, float]]
) -> pd.DataFrame:
    """Columns parameter, value, then those of `knobs`; one line per point of every sweep."""
    parts = []
    for parameter, values in found.items():
        table = knobs(results, decisions, list(values), MAIN)
        table.insert(0, "value", table.variant.map(values))
        table.insert(0, "parameter", parameter)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)
