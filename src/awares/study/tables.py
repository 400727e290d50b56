"""Tables: how they are saved (reports/<profile>/tables), shaped, checked, and shown next to the published ones.

CSV files have short names and one number per cell; pages show words and intervals. data/paper has the numbers of AwaRes
(arXiv 2603.16932), a CSV per table. Cells are as printed; an empty cell is lost; the column ``note`` lists cells that
contradict other cells or the text, as "column: reason", separated by " | ".
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from IPython.display import HTML

from awares.config import find_file, read_yaml
from awares.errors import AwaresValueError


def save_table(table: pd.DataFrame, path: Path, digits: int = 4) -> pd.DataFrame:
    """Write ``table`` as CSV, numbers rounded to ``digits``, and return it as written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = table.round(digits)
    rounded.to_csv(path, index=False, lineterminator="\n")
    return rounded


def save_metrics(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Write (nested) numbers as JSON for ``dvc metrics``, nan as null, and return them as plain rounded numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(values, None), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return _plain(values, math.nan)


def _plain(value: Any, nothing: float | None) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, nothing) for key, inner in value.items()}
    if value is None or math.isnan(value):
        return nothing
    return int(value) if isinstance(value, int | np.integer) else round(float(value), 6)


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


def check_table(checks: Sequence[tuple[str, float | None, str, float]]) -> pd.DataFrame:
    """Acceptance checks (name, value, sense ">=" or "<=", bound), with a column holds (False for nan)."""
    table = pd.DataFrame(checks, columns=["check", "value", "sense", "bound"]).astype({"value": float})
    return table.assign(holds=np.where(table.sense == ">=", table.value >= table.bound, table.value <= table.bound))


SYSTEM_WORDS, TASK_WORDS, HEADS = read_yaml(Path(__file__).with_name("words.yaml")).values()
SHOWN_NAMES = dict(SYSTEM_WORDS)  # what pages show for a name; `name_tasks` adds the tasks


def name_tasks(origin: str) -> None:
    """From now on pages show the tasks and sources of rows of this ``origin``; generated ones have their own names."""
    SHOWN_NAMES.clear()
    SHOWN_NAMES.update(SYSTEM_WORDS | (TASK_WORDS if origin == "suite" else {}))


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with the names of systems, tasks and sources as pages show them, for a figure."""
    return frame.replace({column: SHOWN_NAMES for column in ("system", "benchmark", "source") if column in frame})


def show_table(frame: pd.DataFrame, digits: int = 2) -> HTML:
    """``frame`` as HTML, for reading: words as column heads, names of systems, and no index.

    Three columns ``x``, ``x_low``, ``x_high`` (or ``x``, ``low``, ``high``) become one, ``x [95 % interval]``. Numbers
    have ``digits`` decimals, RTR and p values three.
    """
    shown: dict[str, list[str]] = {}
    names = list(frame.columns)
    ends = {name: (f"{name}_low", f"{name}_high") for name in names if {f"{name}_low", f"{name}_high"} <= {*names}}
    ends |= {name: ("low", "high") for at, name in enumerate(names) if names[at + 1 : at + 3] == ["low", "high"]}
    for column in [name for name in names if name not in {end for pair in ends.values() for end in pair}]:
        head = HEADS.get(column) or SHOWN_NAMES.get(column) or str(column).replace("_", " ")
        texts = _texts(frame[column], column, digits)
        if column in ends:
            head += " [95 % interval]"
            cells = zip(texts, *(_texts(frame[name], column, digits) for name in ends[column]), strict=True)
            texts = [one if low == "-" else f"{one} [{low}, {high}]" for one, low, high in cells]
        shown[head] = texts
    return HTML(pd.DataFrame(shown).to_html(index=False, border=0))


def _texts(cells: pd.Series, column: str, digits: int) -> list[str]:
    decimals = max(digits, 3) if "rtr" in column or column == "p" else digits
    yes, no = ("holds", "does not hold") if column == "holds" else ("yes", "no")

    def text(cell: object) -> str:
        if isinstance(cell, str | list | tuple | dict):
            return SHOWN_NAMES.get(cell, cell) if isinstance(cell, str) else str(cell)
        if pd.isna(cell):
            return "-"
        if pd.api.types.is_bool(cell):
            return yes if cell else no
        return f"{cell:.{decimals}f}" if pd.api.types.is_float(cell) else str(cell)

    return [text(cell) for cell in cells]


PAPER = Path("data/paper")


def printed(table: str) -> tuple[pd.DataFrame, list[str]]:
    """A published table as text, [n] behind a cell with the nth note, and the notes."""
    cells = pd.read_csv(find_file(PAPER / f"{_about(table).name}.csv"), dtype=str, keep_default_na=False)
    reasons: list[str] = []
    for row, notes in cells.pop("note").items():
        for note in filter(None, notes.split(" | ")):
            column, reason = note.split(": ", 1)
            reasons.append(f"[{len(reasons) + 1}] {reason}")
            cells.loc[row, column] += f" [{len(reasons)}]"
    return cells, reasons


def side_by_side(measured: pd.DataFrame, table: str, profile: str = "mini", digits: int = 2) -> HTML:
    """``measured``, below it the published ``table`` with source and notes; AwaresValueError for an unknown one."""
    about, (text, reasons) = _about(table), printed(table)
    if "average accuracy" in text:
        text = text.set_index(text.columns[0]).T.rename_axis(columns=None).reset_index(names="")
    source = f"{about.caption} arXiv 2603.16932, {about.source}, section {about.section}."
    remarks = [source, *filter(None, about.notes.split(" | ")), *reasons]
    below = "".join(f"<p><small>{html.escape(remark)}</small></p>\n" for remark in remarks)
    ours = f"<section>\n<h4>measured here (profile {profile})</h4>\n{show_table(measured, digits).data}\n</section>"
    theirs = f"<section>\n<h4>published (7B)</h4>\n{text.to_html(index=False, border=0)}\n{below}</section>"
    return HTML(f"{ours}\n{theirs}")


def _about(table: str) -> pd.Series:
    """Source, section, caption and notes of a published table."""
    known = pd.read_csv(find_file(PAPER / "tables.csv"), dtype=str, keep_default_na=False).set_index("table")
    if table not in known.index:
        raise AwaresValueError(f"the paper has no {table!r}: known are {', '.join(known.index)}")
    return known.loc[table]
