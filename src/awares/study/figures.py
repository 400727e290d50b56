"""Figures of the notebooks and of reports/<profile>/figures (the paper's Figs. 3, 5, 8-15 and ours).

Functions take data frames and rows, so that a figure can be redrawn from its table.
"""

import html
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from IPython.display import Image as Picture
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from awares.method.crops import crop_box, cut, low_resolution
from awares.method.evaluation import AVERAGE
from awares.study.diagnostics import OUTCOMES, outcome
from awares.study.display import SYSTEM_WORDS

if TYPE_CHECKING:
    from awares.method.rollout import Trajectory

PALETTE = sns.color_palette("colorblind")
SYSTEM_COLOURS = dict(zip(SYSTEM_WORDS, PALETTE, strict=False))
MARKERS = dict(zip(SYSTEM_WORDS, "svX^oP*D", strict=True))
RATIO_MARKERS = {"50": "o", "70": "s", "awares": "D"}  # by percent of tokens that a pruner keeps, or as many as AwaRes
# By outcome; grey is darker than the palette's, which looks green to a deuteranope
OUTCOME_COLOURS = [*PALETTE[:7], (0.3, 0.3, 0.3), *PALETTE[8:], *sns.color_palette("dark", 3)]
CURVE_POINTS = 24  # a longer training curve is smoothed
RTR = "retain token ratio (visual tokens / tokens of the full image)"
OUTSIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}  # a legend on the right


def style(dpi: int) -> None:
    """One look for all figures of a notebook."""
    rc = {"figure.dpi": dpi, "savefig.dpi": dpi, "savefig.bbox": "tight", "figure.constrained_layout.use": True}
    warnings.filterwarnings("ignore", "The figure layout has changed")  # seaborn's grids lay themselves out
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook", font_scale=0.85, rc=rc)


def show(figure: Figure, alt: str | None = None) -> Picture:
    """``figure`` as a PNG for the notebook, the same bytes for the same content; the figure is closed.

    ``alt``: the alternative text of the picture in HTML.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return Picture(data=buffer.getvalue(), alt=alt)


def save_figure(figure: Figure, path: Path, alt: str | None = None) -> Picture:
    """Write ``figure`` as PNG to ``path`` and `show` it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = show(figure, alt)
    path.write_bytes(picture.data)
    return picture


# Systems


def _points(axes: Axes, table: pd.DataFrame, x: str = "rtr", **look: Any) -> None:
    """Accuracy against ``x`` for every row (system) of a table, with the intervals that it has."""
    for row in table.to_dict("records"):
        name, bars = row["system"], {}
        for axis, column in (("xerr", x), ("yerr", "accuracy")):
            if f"{column}_low" in row:
                bars[axis] = [[row[column] - row[f"{column}_low"]], [row[f"{column}_high"] - row[column]]]
        system = {"fmt": MARKERS.get(name, "o"), "color": SYSTEM_COLOURS.get(name), "capsize": 3}
        axes.errorbar(row[x], row["accuracy"], label=SYSTEM_WORDS.get(name, name), **{**bars, **system, **look})


def accuracy_figure(table: pd.DataFrame, panel: str = "benchmark", x: str = "rtr", label: str = RTR) -> Figure:
    """Accuracy (percent) of systems against ``x``, a panel for each value of the column ``panel``, the average first.

    ``table``: system, accuracy, ``x`` and ``panel``; intervals in columns with ``_low`` and ``_high``.
    """
    names = sorted(table[panel].unique(), key=lambda name: name != AVERAGE)
    figure, grid = _panels(len(names), 3.5, 2.8, columns=4, sharex=panel == "benchmark")
    for axes, name in zip(grid, names, strict=False):
        axes.set_axis_on()
        _points(axes, table[table[panel] == name], x)
        axes.set(title=f"{panel}: {name}", xlim=(-0.05 * table[x].max(), None))
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper")
    figure.supxlabel(label)
    figure.supylabel("accuracy (%)")
    return figure


def systems_figure(table: pd.DataFrame) -> Figure:
    """Mean accuracy (percent, with intervals) against RTR of many systems, without ``no_image``.

    A pruner's colour is its name, its marker the ratio. ``table``: columns of table1_systems.csv.
    """
    figure, axes = plt.subplots(figsize=(9.5, 5.5))
    rows = table[(table.benchmark == AVERAGE) & (table.system != "no_image")]
    named = [(stem, ratio) for stem, _, ratio in rows.system.str.rpartition("_", expand=False)]
    pruners = dict.fromkeys(stem for stem, ratio in named if stem and ratio in RATIO_MARKERS)
    colours = dict(zip(pruners, sns.color_palette("colorblind", len(pruners)), strict=True))
    markers = iter("PXv*^<>dph8H1234|_x+" * 3)
    for place, (stem, ratio) in enumerate(named):
        look: dict[str, Any] = {"fmt": RATIO_MARKERS.get(ratio), "color": colours.get(stem)}
        if None in look.values():
            look = {"fmt": next(markers), "color": "black", "markersize": 9}
        _points(axes, rows.iloc[[place]], elinewidth=0.8, capsize=2, **look)
    axes.legend(fontsize="small", ncols=1 + (len(rows) > 18), **OUTSIDE)
    axes.set(xlabel=RTR, ylabel="accuracy (%), mean of the tasks")
    return figure


def dial_figure(dial: pd.DataFrame, frontier: pd.DataFrame, main: pd.DataFrame) -> Figure:
    """Operating curves: accuracy against RTR as the call bias grows, with intervals; bias 0 (as trained) is ringed.

    Left the rows "all" of ``dial`` (dial.csv) with full and half of ``main`` (table1_main.csv), right its rows
    "frontier" with the oracle frontier of the same policies (``frontier``, frontier_curve.csv).
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True, sharey=True)
    titles = {"all": "the dial, {} rows (ring: as trained)", "frontier": "under the oracle frontier, {} rows"}
    for axes, (part, title) in zip(panels, titles.items(), strict=True):
        shown = dial[dial.rows == part]
        for system, rows in shown.groupby("system", sort=False):
            look, trained = {"color": SYSTEM_COLOURS.get(system)}, rows[rows.call_bias == 0]
            axes.plot(rows.rtr, rows.accuracy, marker="o", markersize=4, label=SYSTEM_WORDS.get(system, system), **look)
            axes.fill_between(rows.rtr, rows.accuracy_low, rows.accuracy_high, alpha=0.12, linewidth=0, **look)
            axes.plot(trained.rtr, trained.accuracy, "o", markersize=10, markerfacecolor="none", **look)
        axes.set(xlabel=RTR, title=title.format(shown.n.iloc[0]))
    _points(panels[0], main[(main.benchmark == AVERAGE) & main.system.isin(["full", "half"])])
    for line, width, (system, rows) in zip(("-", ":"), (4, 2), frontier.groupby("system", sort=False), strict=False):
        # the frontiers almost coincide: dots on a wide pale line show both
        look = {"color": SYSTEM_COLOURS.get(system), "linestyle": line, "linewidth": width, "alpha": 2 / width}
        panels[1].plot(rows.rtr, rows.accuracy, label=f"{SYSTEM_WORDS.get(system, system)}: oracle frontier", **look)
    panels[0].set_ylabel("accuracy (%), average over tasks")
    for axes in panels:
        axes.legend(loc="best", handlelength=3)
    return figure


# Policies and trainings


def flow_figure(policies: Mapping[str, Sequence[Sequence[str]]], rows: str) -> Figure:
    """Fig. 5: a column per policy (oracle, SFT, GRPO); ribbons show where the rows of an outcome go at the next policy.

    ``policies``: name -> crops requested row by row, the same rows in the same order. ``rows``: their name.
    """
    figure, axes = plt.subplots(figsize=(8, 5))
    colours = dict(zip(OUTCOMES, OUTCOME_COLOURS, strict=True))
    table = pd.DataFrame({name: [outcome(crops) for crops in requests] for name, requests in policies.items()})
    shares = 100 * table.apply(pd.Series.value_counts, normalize=True).reindex(OUTCOMES).dropna(how="all").fillna(0)
    tops = shares.cumsum() - shares
    for column, name in enumerate(table):
        for kind, height in shares[name].items():
            axes.bar(column, height, 0.16, tops[name][kind], color=colours[kind], linewidth=0)
            if height >= 4:
                ink = "black" if np.dot(colours[kind], (0.299, 0.587, 0.114)) > 0.5 else "white"
                place = column, tops[name][kind] + height / 2
                axes.text(*place, f"{height:.0f}", color=ink, ha="center", va="center", weight="bold")
    steps = np.linspace(0, 1, 50)
    for column, (left, right) in enumerate(zip(table, list(table)[1:], strict=False)):
        counts = 100 * pd.crosstab(table[left], table[right], normalize="all")
        starts, ends = tops[left].copy(), tops[right].copy()
        for (source, target), height in counts.reindex(index=shares.index, columns=shares.index).stack().items():
            low = starts[source] + (3 * steps**2 - 2 * steps**3) * (ends[target] - starts[source])
            across = column + 0.08 + 0.84 * steps
            axes.fill_between(across, low, low + height, color=colours[source], alpha=0.3, linewidth=0)
            starts[source] += height
            ends[target] += height
    axes.set(xlim=(-0.3, len(policies) - 0.7), ylim=(102, -2), ylabel="rows (%)", title=f"{len(table)} {rows} rows")
    axes.set_xticks(range(len(policies)), list(policies))
    axes.grid(False)
    axes.legend(handles=[Patch(color=colours[name], label=name) for name in shares.index], **OUTSIDE)
    return figure


def curves_figure(log: pd.DataFrame, labels: Mapping[str, str], x: str = "step") -> Figure:
    """Training curves: one small panel per logged column of ``labels`` (column -> axis label, with unit).

    A long log is shown as points under its running mean over an eighth of it.
    """
    columns = [name for name in labels if name in log and log[name].notna().any()]
    figure, grid = _panels(len(columns), 3.6, 2.6)
    for axes, name in zip(grid, columns, strict=False):
        points = log.dropna(subset=[name])
        long = len(points) > CURVE_POINTS
        mean = points[name].rolling(len(points) // 8 if long else 1, center=True, min_periods=1).mean()
        axes.set_axis_on()
        axes.plot(points[x], points[name], "o", markersize=3 if long else 4, alpha=0.3 if long else 1)
        axes.plot(points[x], mean, color="C0")
        axes.set(xlabel=x, ylabel=labels[name])
    return figure


def sweep_figure(table: pd.DataFrame) -> Figure:
    """A column of panels per swept parameter: accuracy (percent, with its interval) above, RTR below, over the values.

    ``table``: parameter, value, accuracy, accuracy_low, accuracy_high, rtr.
    """
    groups = list(table.groupby("parameter", sort=False))
    size = (2.0 * len(groups), 4.0)
    figure, grid = plt.subplots(2, len(groups), figsize=size, sharex="col", sharey="row", squeeze=False)
    for (above, below), (parameter, rows) in zip(grid.T, groups, strict=True):
        values = [f"{value:g}" for value in rows.value]
        above.errorbar(
            values, rows.accuracy, [rows.accuracy - rows.accuracy_low, rows.accuracy_high - rows.accuracy], fmt="o-"
        )
        below.plot(values, rows.rtr, marker="o")
        below.set_xlabel(str(parameter))
    grid[0][0].set_ylabel("accuracy (%)")
    grid[1][0].set_ylabel("RTR")
    return figure


def effects_figure(table: pd.DataFrame) -> Figure:
    """Each variant less the main line, with intervals: points of accuracy on the left, RTR on the right.

    ``table``: `comparison.effects` against the main line. One colour per system; hollow: the interval includes zero.
    """
    rows = table.iloc[::-1].reset_index(drop=True)
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.8 + 0.26 * len(rows)), sharey=True, width_ratios=(3, 2))
    columns = [("difference", "low", "high"), ("rtr", "rtr_low", "rtr_high")]
    for axes, (value, low, high) in zip(panels, columns, strict=True):
        for name, part in rows.groupby("system"):
            colour, significant = SYSTEM_COLOURS[name], (part[low] > 0) | (part[high] < 0)
            axes.hlines(part.index, part[low], part[high], color=colour, linewidth=1.4, label=SYSTEM_WORDS[name])
            inside = [colour if sure else "white" for sure in significant]
            axes.scatter(part[value], part.index, color=inside, edgecolor=colour, zorder=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel({"difference": "accuracy difference (points)", "rtr": "RTR difference"}[value])
    panels[0].set_yticks(rows.index, rows.variant)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


# Any table


def bars_figure(
    table: pd.DataFrame, x: str, y: str, hue: str | None, labels: tuple[str, str], stacked: bool = False
) -> Figure:
    """Bars of ``y`` over ``x``, grouped or stacked by ``hue``. ``labels``: x, y axis.

    Grouped bars have whiskers from the columns ``<y>_low`` and ``<y>_high``.
    """
    figure, axes = plt.subplots(figsize=(9, 3.6))
    long, series = (table, hue) if hue else (table.assign(all=y), "all")
    ends = [] if stacked else [column for column in (f"{y}_low", f"{y}_high") if column in long]
    wide = {
        column: long.pivot(index=x, columns=series, values=column).loc[long[x].unique(), long[series].unique()]
        for column in (y, *ends)
    }
    whiskers = np.abs([(wide[end] - wide[y]).to_numpy().T for end in ends]).swapaxes(0, 1) if ends else None
    look = {"error_kw": {"linewidth": 1}, "width": 0.8, "linewidth": 0, "rot": 20 if len(wide[y]) > 4 else 0}
    wide[y].plot.bar(ax=axes, yerr=whiskers, stacked=stacked, xlabel=labels[0], ylabel=labels[1], **look)
    axes.grid(False, axis="x")
    axes.legend(title=hue, **OUTSIDE).set_visible(bool(hue))
    return figure


def weighted_tokens(tokens: Sequence[str], weights: Sequence[float]) -> HTML:
    """The text of ``tokens``, coloured by weight: none for 0, darkest for the largest. Repeated tokens are counted."""
    most, parts = max(*weights, 1e-9), []
    for (token, weight), run in groupby(zip(tokens, weights, strict=True)):
        count = len(list(run))
        text = html.escape(token if count == 1 else f"{token} x {count} ").replace("\n", "↵<br>")
        look = f"background: rgba(222, 143, 5, {0.15 + 0.65 * weight / most:.2f})" if weight else "color: #666"
        parts.append(f'<span style="{look}" title="weight {weight:g}">{text}</span>')
    return HTML(f'<div style="font-family: monospace; line-height: 1.6; max-width: 100ch">{"".join(parts)}</div>')


# Rows


def pictures(captioned: Sequence[tuple[Image.Image, str]], columns: int = 3) -> Figure:
    """Pictures in a grid, each under its caption."""
    figure, grid = _panels(len(captioned), 3.4, 3.4, columns)
    for axes, (image, caption) in zip(grid, captioned, strict=False):
        _picture(axes, image, caption)
    return figure


def gallery(
    rows: Iterable[Mapping[str, Any]], done: Sequence["Trajectory"] = (), notes: Sequence[str] | None = None
) -> Figure:
    """One line per row: low-resolution view with boxes, then the crops. Without any crops three views to a line.

    ``done``: a policy's trajectories, with its crops and answers; without them the target crops of curated rows.
    Boxes: question dashed, answer solid; requested crops are shaded.
    """
    rows = list(rows)
    crops = [one.crops for one in done] or [row.get("target_crops") or () for row in rows]
    width = 1 + max(map(len, crops), default=0)
    figure, grid = _panels(len(rows) * width, 3.4, 3.4, width if width > 1 else 3)
    if not rows:
        grid[0].text(0.5, 0.5, "no such rows", ha="center", va="center")
    for number, (row, names) in enumerate(zip(rows, crops, strict=True)):
        view, *others = grid[number * width : (number + 1) * width]
        truth = f"truth: {row['answers'][0]}" if row.get("answers") else "truth unknown"
        lines = [row["question"], f"answer: {done[number].answer} ({truth})" if done else truth]
        low = low_resolution(row["image"])
        _picture(view, low, "\n".join(filter(None, [*lines, notes[number] if notes else ""])))
        for name in names:
            _outline(view, low, crop_box(name), edgecolor=PALETTE[2], facecolor=(*PALETTE[2], 0.15))
        for boxes, colour, line in (("question_boxes", PALETTE[0], "--"), ("answer_boxes", PALETTE[3], "-")):
            for box in row.get(boxes) or ():
                _outline(view, low, box, edgecolor=colour, linestyle=line, fill=False)
        for axes, name in zip(others, names, strict=False):
            _picture(axes, cut(row["image"], name), f"crop: {name}")
    return figure


def _panels(count: int, width: float, height: float, columns: int = 3, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A grid of ``count`` panels of that size (inches), at least one; their axes are off until something is drawn."""
    columns = min(columns, max(1, count))
    lines = max(1, -(-count // columns))
    figure, grid = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False, **shared)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, list(grid.flat)


def _picture(axes: Axes, image: Image.Image, title: str) -> None:
    axes.imshow(image.convert("RGB"), interpolation="nearest")
    # A policy may write anything: dollars are no formulas, and control characters have no glyph
    printable = "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in title)
    lines = [fill(shorten(line, 120, placeholder=" ..."), 48) for line in printable.split("\n")]
    axes.set_title("\n".join(lines), fontsize=8, loc="left", parse_math=False)


def _outline(axes: Axes, image: Image.Image, box: Sequence[float], **look: Any) -> None:
    left, top, right, bottom = (edge / 1000 * side for edge, side in zip(box, image.size * 2, strict=True))
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, linewidth=1.5, **look))
