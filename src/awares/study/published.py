"""The published numbers (data/paper/tables.yaml), and how a report shows them: beside ours, never in one column with them."""

import html
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from IPython.display import HTML

from awares.config import find_file
from awares.errors import AwaresFileError, AwaresValueError
from awares.study.tables import table as shown

FILE = "data/paper/tables.yaml"
SLIPS = ("average", "floor", "conflict")  # the kinds that tables.yaml explains
LOST = ("null", "~", "")


def _text(cell: str) -> str:
    if not cell:
        raise ValueError
    return cell


def _number(low: float, high: float) -> Callable[[str], float]:
    def read(cell: str) -> float:
        value = float(cell)
        if not low <= value <= high:  # nan fails too
            raise ValueError
        return value

    return read


def _count(cell: str) -> int:
    if not cell.isdecimal():
        raise ValueError
    return int(cell)


_FLAGS = {"true": True, "false": False}
_LARGE = 1e9

# unit -> reads a printed cell, ValueError if it is none of that unit. An RTR may exceed 1: two turns, each with an image.
UNITS: dict[str, tuple[Callable[[str], Any], str]] = {
    "name": (_text, "a name"),
    "value": (_text, "a value as printed"),
    "flag": (lambda cell: _FLAGS[cell], "true or false"),
    "count": (_count, "a whole number"),
    "percent": (_number(0, 100), "a number from 0 to 100"),
    "share": (_number(0, 2), "a number from 0 to 2"),
    "seconds": (_number(0, _LARGE), "a number of seconds"),
    "characters": (_number(0, _LARGE), "a number of characters"),
    "number": (_number(-_LARGE, _LARGE), "a number"),
}


@dataclass(frozen=True)
class Slip:
    """A published cell that contradicts others; ``row`` as in `Table.rows`, ``column`` one of `Table.columns`."""

    row: str
    column: str
    kind: str
    note: str


@dataclass(frozen=True)
class Table:
    """One published table, figure or set of numbers.

    ``names`` and ``columns``: name -> unit, a column of a benchmark table is "<benchmark> <measure>". ``rows``: name of
    the row (its name columns, joined by " / ") -> cells as printed, names first, None where a cell is lost.
    """

    key: str
    source: str
    caption: str
    section: str
    names: Mapping[str, str]
    columns: Mapping[str, str]
    benchmarks: tuple[str, ...]
    measures: tuple[str, ...]
    rows: Mapping[str, tuple[str | None, ...]]
    notes: tuple[str, ...]
    slips: tuple[Slip, ...]


@dataclass(frozen=True)
class Paper:
    """All of tables.yaml: the paper's arXiv number and model size, its section numbers, its tables by key."""

    arxiv: str
    model: str
    sections: tuple[str, ...]
    tables: Mapping[str, Table]


def load_paper(path: str | Path = FILE) -> Paper:
    """Read and check tables.yaml; a relative ``path`` is looked for upwards from the working folder, as params.yaml is.

    Raises AwaresError naming table, row and column for a cell that is missing, too many or not of its unit, and for a
    slip or a count of lost cells that does not fit the cells.
    """
    file = find_file(Path(path))
    return _parsed(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _parsed(file: Path, _changed: int) -> Paper:
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # text as printed: 79.70, not 79.7
    except yaml.YAMLError as error:
        raise AwaresFileError(f"{file.name} is not YAML: {error}") from error
    found = _fields(file.name, raw, {"paper": dict, "sections": list, "tables": dict})
    about = _fields(f"{file.name}, paper", found["paper"], {"arxiv": str, "model": str})
    sections = tuple(found["sections"])
    tables = {key: _table(f"{file.name}, {key}", key, raw, sections) for key, raw in found["tables"].items()}
    return Paper(about["arxiv"], about["model"], sections, tables)


_KEYS = {"source": str, "caption": str, "section": str, "names": dict, "cells": list, "lost": str}
_OPTIONAL = {"columns": dict, "benchmarks": list, "measures": dict, "notes": list, "slips": list}


def _table(place: str, key: str, raw: Any, sections: tuple[str, ...]) -> Table:
    found = _fields(place, raw, _KEYS, _OPTIONAL)
    if ("columns" in found) == ("benchmarks" in found) or ("benchmarks" in found) != ("measures" in found):
        raise AwaresValueError(f"{place}: give either columns, or benchmarks and measures")
    if found["section"] not in sections:
        raise AwaresValueError(f"{place}: the paper has no section {found['section']!r}; sections lists them")
    benchmarks, measures = tuple(found.get("benchmarks", ())), found.get("measures", {})
    columns = found.get("columns") or {f"{b} {m}": measures[m] for b, m in product(benchmarks, measures)}
    for name, unit in {**found["names"], **columns}.items():
        if unit not in UNITS:
            raise AwaresValueError(f"{place}, column {name}: unknown unit {unit!r}, choose from {', '.join(UNITS)}")
    rows = _rows(place, found, {**found["names"], **columns})
    lost = sum(cell is None for cells in rows.values() for cell in cells)
    if found["lost"] != str(lost):
        raise AwaresValueError(f"{place}: lost says {found['lost']}, but {lost} cells are null")
    slips = tuple(_slip(place, slip, rows, columns) for slip in found.get("slips", []))
    head = (key, found["source"], found["caption"], found["section"], found["names"], columns)
    return Table(*head, benchmarks, tuple(measures), rows, tuple(found.get("notes", ())), slips)


def _rows(place: str, found: Mapping[str, Any], units: Mapping[str, str]) -> dict[str, tuple[str | None, ...]]:
    """Row name -> printed cells, every one checked against its unit."""
    rows: dict[str, tuple[str | None, ...]] = {}
    keys = [index for index, unit in enumerate(units.values()) if unit == "name"]
    for number, cells in enumerate(found["cells"], start=1):
        if not isinstance(cells, list) or len(cells) != len(units):
            raise AwaresValueError(
                f"{place}, row {number} ({_start(cells)}): {len(units)} cells wanted, {_size(cells)}"
            )
        printed = tuple(None if cell in LOST else cell for cell in cells)
        name = " / ".join(str(printed[index]) for index in keys)
        for column, cell in zip(units, printed, strict=True):
            _read(f"{place}, row {name}, column {column}", cell, units[column])
        if name in rows:
            raise AwaresValueError(f"{place}: row {name} stands twice")
        rows[name] = printed
    return rows


def _start(cells: Any) -> str:
    return str(cells[0]) if isinstance(cells, list) and cells else str(cells)


def _size(cells: Any) -> str:
    return f"{len(cells)} found" if isinstance(cells, list) else "no list found"


def _read(place: str, cell: str | None, unit: str) -> Any:
    """The typed value of a printed cell; nan for a lost one, but a name or a flag cannot be lost."""
    read, wanted = UNITS[unit]
    if cell is None and unit not in ("name", "flag"):
        return math.nan
    try:
        return read(cell)  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AwaresValueError(f"{place}: {cell!r} is not {wanted}") from error


def _slip(place: str, raw: Any, rows: Mapping[str, Any], columns: Mapping[str, str]) -> Slip:
    slip = Slip(**_fields(f"{place}, slips", raw, {"row": str, "column": str, "kind": str, "note": str}))
    if slip.row not in rows or slip.column not in columns:
        raise AwaresValueError(f"{place}, slips: there is no cell {slip.row!r}, {slip.column!r}")
    if slip.kind not in SLIPS:
        raise AwaresValueError(f"{place}, slips: unknown kind {slip.kind!r}, choose from {', '.join(SLIPS)}")
    return slip


def _fields(
    place: str, raw: Any, wanted: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """``raw`` as a mapping with all of ``wanted`` and some of ``optional``, each of its type."""
    kinds = {**wanted, **(optional or {})}
    if not isinstance(raw, dict):
        raise AwaresValueError(f"{place} must be a mapping with the keys {', '.join(kinds)}")
    if missing := [key for key in wanted if key not in raw]:
        raise AwaresValueError(f"{place}: {', '.join(missing)} missing")
    for key, value in raw.items():
        if key not in kinds or not isinstance(value, kinds[key]):
            wish = f"must be a {kinds[key].__name__}" if key in kinds else f"is unknown: known are {', '.join(kinds)}"
            raise AwaresValueError(f"{place}: key {key} {wish}")
    return raw


# What a report takes


def published(table: str, path: str | Path = FILE) -> pd.DataFrame:
    """The numbers of one published table, typed; lost cells are nan.

    A table over benchmarks comes in long form, as ours do: its name columns, benchmark, one column per measure. Raises
    AwaresError for an unknown ``table``.
    """
    found = _choose(table, load_paper(path))
    columns = {**found.names, **found.columns}.items()
    wide = pd.DataFrame(
        {
            name: [_read(table, cells[index], unit) for cells in found.rows.values()]
            for index, (name, unit) in enumerate(columns)
        }
    )
    if not found.benchmarks:
        return wide
    parts = [
        wide[list(found.names)].assign(
            row=range(len(wide)), benchmark=name, **{m: wide[f"{name} {m}"] for m in found.measures}
        )
        for name in found.benchmarks
    ]
    long = pd.concat(parts).sort_values("row", kind="stable").drop(columns="row")
    return long.reset_index(drop=True)


def printed(table: str, path: str | Path = FILE) -> pd.DataFrame:
    """One published table as it is printed: text, one row per row, "" where a cell is lost, [n] behind its nth slip."""
    found = _choose(table, load_paper(path))
    columns = [*found.names, *found.columns]
    wide = pd.DataFrame(
        [[cell or "" for cell in cells] for cells in found.rows.values()], columns=columns, index=list(found.rows)
    )
    for number, slip in enumerate(found.slips, start=1):
        wide.loc[slip.row, slip.column] += f" [{number}]"
    return wide.reset_index(drop=True)


def side_by_side(
    measured: pd.DataFrame, table: str, profile: str = "mini", digits: int = 2, path: str | Path = FILE
) -> HTML:
    """Two blocks, ``measured`` above and the published ``table`` below with its source, notes and slips.

    They share no column: another model, other rows. A published table over benchmarks is turned, so that
    it fits a page: a line each benchmark and measure. Raises AwaresError for an unknown ``table``.
    """
    paper = load_paper(path)
    found = _choose(table, paper)
    remarks = [*found.notes, *(f"[{n}] {slip.note}" for n, slip in enumerate(found.slips, start=1))]
    text = printed(table, path)
    if found.benchmarks:
        text = text.set_index(next(iter(found.names))).T.rename_axis(columns=None).reset_index(names="")
    source = f"{found.caption} arXiv {paper.arxiv}, {found.source}, section {found.section}."
    blocks = [
        _block(f"measured here (profile {profile})", shown(measured, digits).data, []),
        _block(f"published ({paper.model})", text.to_html(index=False, border=0), [source, *remarks]),
    ]
    return HTML("\n".join(blocks))


def _block(heading: str, body: Any, remarks: list[str]) -> str:
    below = "".join(f"<p><small>{html.escape(remark)}</small></p>\n" for remark in remarks)
    return f"<section>\n<h4>{html.escape(heading)}</h4>\n{body}\n{below}</section>"


def _choose(table: str, paper: Paper) -> Table:
    if table not in paper.tables:
        raise AwaresValueError(f"the paper has no {table!r}: known are {', '.join(paper.tables)}")
    return paper.tables[table]
