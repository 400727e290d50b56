"""Tables: how they are saved (reports/<profile>/tables), shaped, checked, and shown next to the published ones.

CSV files have short names and one number per cell; pages show words and intervals. data/paper has the numbers of AwaRes
(arXiv 2603.16932), a CSV per table. Cells are as printed; an empty cell is lost; the column ``note`` lists cells that
contradict other cells or the text, as "column: reason", separated by " | ".
"""

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from IPython.display import HTML

from awares.config import find_file, read_yaml


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


def wide(long: pd.DataFrame, value: str) -> pd.DataFrame:
    """A long table (its first two columns are names) with one line per second name and one column per first name."""
    columns, index = long.columns[:2]
    table = long.pivot(index=index, columns=columns, values=value).loc[long[index].unique(), long[columns].unique()]
    return table.rename_axis(columns=None).reset_index()


def first_rows(rows: datasets.Dataset, n: int, **wanted: Any) -> datasets.Dataset:
    """The first ``n`` rows whose columns have the ``wanted`` values."""
    columns = rows.select_columns(list(wanted)).to_pandas()
    return rows.select(np.flatnonzero((columns == pd.Series(wanted)).all(axis=1))[:n])


SYSTEM_WORDS, TASK_WORDS, HEADS = read_yaml(Path(__file__).with_name("words.yaml")).values()
SHOWN_NAMES = dict(SYSTEM_WORDS)  # what pages show for a name; `figures.style` adds the tasks


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with the names of systems, tasks and sources as pages show them, for a figure."""
    return frame.replace({column: SHOWN_NAMES for column in ("system", "benchmark", "source") if column in frame})


def show_table(frame: pd.DataFrame, digits: int = 2, ends: str = "95 % interval") -> HTML:
    """``frame`` as HTML, for reading: words as column heads, names of systems, and no index.

    Three columns ``x``, ``x_low``, ``x_high`` (or ``x``, ``low``, ``high``) become one, ``x [95 % interval]``, or as
    ``ends`` names them. Numbers have ``digits`` decimals, RTR and p values three.
    """
    names = list(frame.columns)
    pairs = {name: (f"{name}_low", f"{name}_high") for name in names if {f"{name}_low", f"{name}_high"} <= {*names}}
    pairs |= {name: ("low", "high") for at, name in enumerate(names) if names[at + 1 : at + 3] == ["low", "high"]}
    texts = pd.DataFrame({name: [_text(cell, name, digits) for cell in frame[name]] for name in names}, dtype=str)
    heads = {name: HEADS.get(name) or SHOWN_NAMES.get(name) or str(name).replace("_", " ") for name in names}
    for name, (low, high) in pairs.items():
        heads[name] += f" [{ends}]"
        texts.loc[texts[low] != "-", name] += " [" + texts[low] + ", " + texts[high] + "]"
    texts = texts.drop(columns=[end for pair in pairs.values() for end in pair])
    return HTML(texts.rename(columns=heads).to_html(index=False, border=0))


def _text(cell: object, column: str, digits: int) -> str:
    if isinstance(cell, str | list | tuple | dict):
        return SHOWN_NAMES.get(cell, cell) if isinstance(cell, str) else str(cell)
    if pd.isna(cell):
        return "-"
    if pd.api.types.is_bool(cell):
        yes, no = ("holds", "does not hold") if column == "holds" else ("yes", "no")
        return yes if cell else no
    decimals = max(digits, 3) if "rtr" in column or column == "p" else digits
    return f"{cell:.{decimals}f}" if pd.api.types.is_float(cell) else str(cell)


def side_by_side(measured: pd.DataFrame, table: str, profile: str = "mini", **look: Any) -> HTML:
    """``measured`` as `show_table` with ``look`` has it, below it the published ``table`` with its source and notes."""
    text, known = (
        pd.read_csv(find_file(Path(f"data/paper/{name}.csv")), dtype=str, keep_default_na=False)
        for name in (table, "tables")
    )
    about = known.set_index("table").loc[table]
    notes = zip(text.iloc[:, 0], text.pop("note").str.split(" | ", regex=False), strict=True)
    remarks = [f"{about.caption} arXiv 2603.16932, {about.source}, section {about.section}.", *about.notes.split(" | ")]
    remarks += [f"{name}, {note}" for name, each in notes for note in each if note]
    if "average accuracy" in text:
        text = text.set_index(text.columns[0]).T.rename_axis(columns=None).reset_index(names="")
    below = "".join(f"<p><small>{html.escape(remark)}</small></p>\n" for remark in filter(None, remarks))
    ours = f"<section>\n<h4>measured here (profile {profile})</h4>\n{show_table(measured, **look).data}\n</section>"
    theirs = f"<section>\n<h4>published (7B)</h4>\n{text.to_html(index=False, border=0)}\n{below}</section>"
    return HTML(f"{ours}\n{theirs}")
