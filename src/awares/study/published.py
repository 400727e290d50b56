"""The published numbers of AwaRes (arXiv 2603.16932), one CSV per table in data/paper, next to ours.

Cells are as printed; an empty cell is lost. The column ``note`` lists cells that contradict other cells or the text, as
"column: reason", separated by " | ". The numbers are of a 7B model on the real benchmarks: never in a column with ours.
"""

import html
from pathlib import Path

import pandas as pd
from IPython.display import HTML

from awares.config import find_file
from awares.errors import AwaresValueError
from awares.study.display import show_table

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
