"""The published numbers of AwaRes (arXiv 2603.16932), one CSV per table in data/paper, next to ours.

Cells are as printed: trailing zeros stay, a dash is a dash, an empty cell is lost. The column ``note`` lists cells that
contradict other cells or the text, as "column: reason", separated by " | ". The numbers are of a 7B model on the
real benchmarks, so that they never share a column with ours.
"""

import html
from pathlib import Path

import pandas as pd
from IPython.display import HTML

from awares.config import find_file
from awares.errors import AwaresValueError
from awares.study.display import show_table

FOLDER = Path("data/paper")
ARXIV, MODEL = "2603.16932", "7B"


def published(table: str) -> pd.DataFrame:
    """The numbers of a published table, nan where lost. A table over benchmarks has columns "<benchmark> <measure>"."""
    return pd.read_csv(find_file(FOLDER / f"{_about(table).name}.csv")).drop(columns="note")


def printed(table: str) -> tuple[pd.DataFrame, list[str]]:
    """A published table as text, [n] behind a cell with the nth note, and the notes."""
    cells = pd.read_csv(find_file(FOLDER / f"{_about(table).name}.csv"), dtype=str, keep_default_na=False)
    reasons: list[str] = []
    for row, notes in cells.pop("note").items():
        for note in filter(None, notes.split(" | ")):
            column, reason = note.split(": ", 1)
            reasons.append(f"[{len(reasons) + 1}] {reason}")
            cells.loc[row, column] += f" [{len(reasons)}]"
    return cells, reasons


def side_by_side(measured: pd.DataFrame, table: str, profile: str = "mini", digits: int = 2) -> HTML:
    """Two blocks: ``measured``, and below it the published ``table`` with its source and notes.

    A published table over benchmarks is transposed to fit a page. Raises AwaresValueError for an unknown ``table``.
    """
    about = _about(table)
    text, reasons = printed(table)
    if "average accuracy" in text:
        text = text.set_index(text.columns[0]).T.rename_axis(columns=None).reset_index(names="")
    source = f"{about.caption} arXiv {ARXIV}, {about.source}, section {about.section}."
    remarks = [source, *filter(None, about.notes.split(" | ")), *reasons]
    blocks = [
        _block(f"measured here (profile {profile})", show_table(measured, digits).data, []),
        _block(f"published ({MODEL})", text.to_html(index=False, border=0), remarks),
    ]
    return HTML("\n".join(blocks))


def _block(heading: str, body: str, remarks: list[str]) -> str:
    below = "".join(f"<p><small>{html.escape(remark)}</small></p>\n" for remark in remarks)
    return f"<section>\n<h4>{html.escape(heading)}</h4>\n{body}\n{below}</section>"


def _about(table: str) -> pd.Series:
    """Source, section, caption and notes of a published table."""
    known = pd.read_csv(find_file(FOLDER / "tables.csv"), dtype=str, keep_default_na=False).set_index("table")
    if table not in known.index:
        raise AwaresValueError(f"the paper has no {table!r}: known are {', '.join(known.index)}")
    return known.loc[table]
