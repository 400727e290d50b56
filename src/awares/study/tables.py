"""Tables: how they are saved, shaped and checked (reports/<profile>/tables)."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from awares.config import Params, read_yaml


def save_table(table: pd.DataFrame, path: Path, digits: int = 4) -> pd.DataFrame:
    """Write ``table`` as CSV, numbers rounded to ``digits``, and return it as written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = table.round(digits)
    rounded.to_csv(path, index=False, lineterminator="\n")
    return rounded


def save_metrics(values: Mapping[str, Any], path: Path, digits: int = 6) -> dict[str, Any]:
    """Write (nested) numbers as JSON for ``dvc metrics``, nan as null, and return them as plain rounded numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(values, digits, None), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return _plain(values, digits, math.nan)


def _plain(value: Any, digits: int, nothing: float | None) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, digits, nothing) for key, inner in value.items()}
    if value is None or math.isnan(value):
        return nothing
    return int(value) if isinstance(value, int | np.integer) else round(float(value), digits)


def load_metrics(folder: Path) -> dict[str, Any]:
    """The numbers that :func:`save_metrics` wrote to ``folder``/metrics.json; nan comes back as None."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def wide(long: pd.DataFrame, value: str) -> pd.DataFrame:
    """A long table (its first two columns are names) with one line per second name and one column per first name."""
    columns, index = long.columns[:2]
    table = long.pivot(index=index, columns=columns, values=value).loc[long[index].unique(), long[columns].unique()]
    return table.rename_axis(columns=None).reset_index()


def first_rows(rows: datasets.Dataset, n: int, **wanted: Any) -> datasets.Dataset:
    """The first ``n`` rows whose columns have the ``wanted`` values."""
    columns = rows.select_columns(list(wanted)).to_pandas()
    return rows.select(np.flatnonzero((columns == pd.Series(wanted)).all(axis=1))[:n])


def hyperparameters(params: Params) -> pd.DataFrame:
    """Table 11 for this profile, in the order of params.yaml. Columns parameter, sft, grpo."""
    values, written = params.as_dict(), read_yaml(params.path("params.yaml"))
    sections = [part[stage] for stage in ("sft", "grpo") for part in (written, written["profiles"][params.profile])]
    names = [name for name in dict.fromkeys(name for section in sections for name in section) if name != "launch"]
    cells = {stage: [str(values[stage].get(name, "")) for name in names] for stage in ("sft", "grpo")}
    return pd.DataFrame({"parameter": names, **cells})


def check_table(checks: Sequence[tuple[str, float | None, str, float]]) -> pd.DataFrame:
    """Acceptance checks (name, value, sense ">=" or "<=", bound), with a column holds (False for nan)."""
    table = pd.DataFrame(checks, columns=["check", "value", "sense", "bound"]).astype({"value": float})
    return table.assign(holds=np.where(table.sense == ">=", table.value >= table.bound, table.value <= table.bound))
