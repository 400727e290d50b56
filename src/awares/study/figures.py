"""Figures: what notebooks show and reports/<profile>/figures keeps (the paper's Figs. 3, 5, 8-15 and ours).

Functions take plain data frames and rows, so that a figure can be redrawn from its table. Colours are seaborn's
colour-blind palette; every axis says its quantity and unit; intervals are drawn where a table has them.
"""

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import datasets
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Image as Picture
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from PIL import Image

from awares.method.crops import crop_box, cut, low_resolution
from awares.study.diagnostics import OUTCOMES, outcome
from awares.study.tables import AVERAGE

if TYPE_CHECKING:
    from awares.method.rollout import Trajectory

SYSTEM_NAMES = {"full": "full", "half": "half", "no_image": "no image", "sft": "SFT only", "awares": "AwaRes"}
SYSTEM_NAMES |= {"escalate_full": "whole image on a call", "awares_naive": "AwaRes, naive re-prefill"}
RATIO_MARKERS = {
    "50": "o",
    "70": "s",
    "awares": "D",
}  # of a pruner's name: percent of tokens kept, or as many as AwaRes
COLOURS = dict(zip(SYSTEM_NAMES, sns.color_palette("colorblind"), strict=False))
MARKERS = dict(zip(SYSTEM_NAMES, "svX^oDP", strict=True))
# Of OUTCOMES; a darker grey than the palette's, which a deuteranope would take for its green
OUTCOME_COLOURS = [
    *sns.color_palette("colorblind", 7),
    (0.3, 0.3, 0.3),
    *sns.color_palette("colorblind", 10)[8:],
    *sns.color_palette("dark", 3),
]
# Where a point's name may stand: points away from it, and the direction (right, up)
PLACES = [(1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)]
DISTANCES = list(itertools.product((7, 20, 34, 48, 62), PLACES))
CURVE_POINTS = 24  # of a training curve, above which it is smoothed


def style(dpi: int) -> None:
    """One look for all figures of a notebook."""
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook", font_scale=0.85)
    plt.rcParams.update(
        {"figure.dpi": dpi, "savefig.dpi": dpi, "savefig.bbox": "tight", "figure.constrained_layout.use": True}
    )


def show(figure: Figure) -> Picture:
    """``figure`` as a png for the notebook, the same bytes for the same content; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return Picture(data=buffer.getvalue())


def save_figure(figure: Figure, path: Path) -> Picture:
    """Write ``figure`` as png, and return it for the notebook."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = show(figure)
    path.write_bytes(picture.data)
    return picture


def flow_figure(policies: Mapping[str, Sequence[Sequence[str]]], rows: str) -> Figure:
    """Fig. 5: a column per policy (oracle, SFT, GRPO), ribbons show where the rows of an outcome go at the next one.

    ``policies``: name -> crops requested row by row, the same rows in the same order. ``rows``: what rows they are, for the title.
    """
    figure, axes = plt.subplots(figsize=(8, 5))
    colours = dict(zip(OUTCOMES, OUTCOME_COLOURS, strict=True))
    found = {name: [outcome(crops) for crops in requests] for name, requests in policies.items()}
    names = list(found)
    for column, name in enumerate(names):
        _flow_column(axes, column, found[name], colours)
    for column, (left, right) in enumerate(zip(names, names[1:], strict=False)):
        _flow_ribbons(axes, column, found[left], found[right], colours)
    axes.set(
        xlim=(-0.3, len(names) - 0.7), ylim=(102, -2), ylabel="rows (%)", title=f"{len(found[names[0]])} {rows} rows"
    )
    axes.set_xticks(range(len(names)), names)
    axes.grid(False)
    used = [name for name in OUTCOMES if any(name in rows for rows in found.values())]
    handles = [Patch(color=colours[name], label=name) for name in used]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


_BAR = 0.08  # half the width of a column of the flow figure


def _tops(rows: Sequence[str]) -> dict[str, tuple[float, float]]:
    """outcome -> (top, height) in percent, stacked in the order of OUTCOMES."""
    tops, top = {}, 0.0
    for name in OUTCOMES:
        height = 100 * rows.count(name) / len(rows)
        tops[name] = (top, height)
        top += height
    return tops


def _flow_column(axes: Axes, column: int, rows: Sequence[str], colours: Mapping[str, Any]) -> None:
    for name, (top, height) in _tops(rows).items():
        axes.add_patch(Rectangle((column - _BAR, top), 2 * _BAR, height, color=colours[name], linewidth=0))
        if height >= 4:
            ink = "black" if _luminance(colours[name]) > 0.5 else "white"
            axes.text(column, top + height / 2, f"{height:.0f}", ha="center", va="center", color=ink, weight="bold")


def _luminance(colour: tuple[float, float, float]) -> float:
    return sum(share * part for share, part in zip((0.299, 0.587, 0.114), colour, strict=True))


def _flow_ribbons(
    axes: Axes, column: int, left: Sequence[str], right: Sequence[str], colours: Mapping[str, Any]
) -> None:
    pairs = pd.Series(list(zip(left, right, strict=True))).value_counts()
    starts = {name: top for name, (top, _) in _tops(left).items()}
    ends = {name: top for name, (top, _) in _tops(right).items()}
    x1, x2 = column + _BAR, column + 1 - _BAR
    middle = (x1 + x2) / 2
    for source in OUTCOMES:
        for target in OUTCOMES:
            height = 100 * pairs.get((source, target), 0) / len(left)
            y1, y2 = starts[source], ends[target]
            starts[source], ends[target] = y1 + height, y2 + height
            corners = [(x1, y1), (middle, y1), (middle, y2), (x2, y2), (x2, y2 + height), (middle, y2 + height)]
            corners += [(middle, y1 + height), (x1, y1 + height), (x1, y1)]
            curve, line = Outline.CURVE4, Outline.LINETO
            codes = [Outline.MOVETO, curve, curve, curve, line, curve, curve, curve, line]
            if height:
                axes.add_patch(PathPatch(Outline(corners, codes), color=colours[source], alpha=0.3, linewidth=0))


def accuracy_rtr_figure(table: pd.DataFrame) -> Figure:
    """Accuracy (percent, with intervals) against RTR: the average large, every benchmark a small panel beside it.

    ``table`` has the columns of table1_main.csv.
    """
    benchmarks = [name for name in table.benchmark.unique() if name != AVERAGE]
    cells = benchmarks + ["."] * (len(benchmarks) % 2)
    rows = [[AVERAGE, AVERAGE, *cells[: len(cells) // 2]], [AVERAGE, AVERAGE, *cells[len(cells) // 2 :]]]
    figure, panels = plt.subplot_mosaic(rows, figsize=(13, 5.5), sharex=True)
    for benchmark, axes in panels.items():
        for row in table[table.benchmark == benchmark].itertuples():
            error = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
            name, colour = SYSTEM_NAMES.get(row.system, row.system), COLOURS.get(row.system)
            axes.errorbar(
                row.rtr, row.accuracy, error, fmt=MARKERS.get(row.system, "o"), capsize=3, color=colour, label=name
            )
        axes.set(title=benchmark, xlim=(-0.05, 1.2))
    figure.legend(*panels[AVERAGE].get_legend_handles_labels(), loc="outside right upper")
    figure.supxlabel("retain token ratio (visual tokens / tokens of the full image)")
    figure.supylabel("accuracy (%)")
    return figure


def systems_figure(table: pd.DataFrame) -> Figure:
    """Average accuracy (percent, with intervals) against RTR of many systems: a pruner's name is its colour, its ratio the marker.

    ``table`` has the columns of table1_systems.csv. Systems without a ratio are named beside their points; ``no_image`` is left out.
    """
    figure, axes = plt.subplots(figsize=(9.5, 5.5))
    average = table[(table.benchmark == AVERAGE) & (table.system != "no_image")]
    stems = [name.rpartition("_") for name in average.system]
    ratios = {f"{stem}_{ratio}": (stem, ratio) for stem, _, ratio in stems if stem and ratio in RATIO_MARKERS}
    pruners = list(dict.fromkeys(stem for stem, _ in ratios.values()))
    colours = dict(zip(pruners, sns.color_palette("colorblind", len(pruners)), strict=True))
    for row in average.itertuples():
        error = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
        stem, ratio = ratios.get(row.system, ("", ""))
        look = {"color": colours[stem], "marker": RATIO_MARKERS[ratio]} if stem else {"color": "black", "marker": "*"}
        axes.errorbar(row.rtr, row.accuracy, error, capsize=2, elinewidth=0.8, markersize=7, **look)
    entries: list[Any] = [Patch(color=colours[name], label=name) for name in pruners]
    used = [ratio for ratio in RATIO_MARKERS if any(ratio == one for _, one in ratios.values())]
    names = {ratio: "at AwaRes' RTR" if ratio == "awares" else f"{ratio} % kept" for ratio in used}
    entries += [Line2D([], [], color="grey", marker=RATIO_MARKERS[r], linestyle="", label=names[r]) for r in used]
    if entries:
        axes.legend(handles=entries, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.margins(0.08)
    axes.set(xlabel="retain token ratio (visual tokens / tokens of the full image)")
    axes.set_ylabel("accuracy (%), mean of the tasks")
    named = average[~average.system.isin(ratios)]
    name_points(axes, average, {row.system: SYSTEM_NAMES.get(row.system, row.system) for row in named.itertuples()})
    return figure


def name_points(axes: Any, table: pd.DataFrame, names: Mapping[str, str]) -> None:
    """Write ``names`` (system -> name) beside their points, each at the first of `DISTANCES` that covers no point, whisker or name.

    ``table``: system, rtr, accuracy, accuracy_low, accuracy_high of every point that is drawn.
    """
    axes.figure.draw_without_rendering()  # from here on the limits stand
    taken = []
    for row in table.itertuples():
        (x, low), (_, high) = axes.transData.transform([(row.rtr, row.accuracy_low), (row.rtr, row.accuracy_high)])
        taken.append(Bbox([[x - 5, low], [x + 5, high]]))
    for row in table[table.system.isin(names)].itertuples():
        for away, (right, up) in DISTANCES:
            side = {1: "left", 0: "center", -1: "right"}[right], {1: "bottom", 0: "center", -1: "top"}[up]
            line = {"arrowstyle": "-", "color": "grey", "linewidth": 0.6} if away > 7 else None
            text = axes.annotate(
                names[row.system], (row.rtr, row.accuracy), (right * away, up * away), textcoords="offset points",
                ha=side[0], va=side[1], fontsize="small", arrowprops=line,
            )  # fmt: skip
            text.set_in_layout(False)  # or the axes would move away under it
            text.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(text)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            free = inside and not any(box.overlaps(other) for other in taken)
            if free or (away, (right, up)) == DISTANCES[-1]:
                break
            text.remove()
        taken.append(box)


def accuracy_time_figure(table: pd.DataFrame) -> Figure:
    """Accuracy (percent, with intervals) against milliseconds a row (with quartiles), a panel for each ``batch``.

    ``table`` has system, batch, ms and accuracy, both with columns ``_low`` and ``_high``.
    """
    batches = list(table.batch.unique())
    figure, grid = plt.subplots(1, len(batches), figsize=(4.5 * len(batches), 3.8), sharey=True, squeeze=False)
    for axes, batch in zip(grid.flat, batches, strict=True):
        for row in table[table.batch == batch].itertuples():
            aside = [[row.ms - row.ms_low], [row.ms_high - row.ms]]
            height = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
            name, colour = SYSTEM_NAMES[row.system], COLOURS[row.system]
            axes.errorbar(
                row.ms, row.accuracy, height, aside, fmt=MARKERS[row.system], capsize=3, color=colour, label=name
            )
        axes.set(title=f"batch: {batch}", xlabel="time a row (ms)", xlim=(0, None))
    grid[0, 0].set_ylabel("accuracy (%), mean of the tasks")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def stacked_figure(table: pd.DataFrame, x: str, parts: Mapping[str, str], ylabel: str) -> Figure:
    """A column for each value of ``x``, stacked from the columns ``parts`` (column -> name in the legend)."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    bottom = [0.0] * len(table)
    for column, name in parts.items():
        axes.bar(table[x], table[column], bottom=bottom, label=name)
        bottom = [below + value for below, value in zip(bottom, table[column], strict=True)]
    axes.set(ylabel=ylabel)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def dial_figure(dial: pd.DataFrame, frontier: pd.DataFrame, main: pd.DataFrame) -> Figure:
    """The dial: accuracy against RTR as the call bias grows, the trained policy (bias 0) ringed.

    ``dial`` has the columns of dial.csv, drawn with intervals: left its rows "all" and Table 1's (``main``) full and half, right
    its rows "frontier" under the oracle frontier of the same policies (frontier_curve.csv).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True, sharey=True)
    for axes, part in ((left, "all"), (right, "frontier")):
        for system, rows in dial[dial.rows == part].groupby("system", sort=False):
            _dial_curve(axes, rows, SYSTEM_NAMES.get(system, system), COLOURS.get(system))
        axes.set(xlabel="retain token ratio (visual tokens / tokens of the full image)")
    for row in main[(main.benchmark == AVERAGE) & main.system.isin(["full", "half"])].itertuples():
        error = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
        name, colour = SYSTEM_NAMES[row.system], COLOURS[row.system]
        left.errorbar(row.rtr, row.accuracy, error, fmt=MARKERS[row.system], capsize=3, color=colour, label=name)
    for place, (system, rows) in enumerate(frontier.groupby("system", sort=False)):
        name = f"{SYSTEM_NAMES.get(system, system)}: oracle frontier"
        dashes = (4 * place, (4, 4))  # where two frontiers coincide, the dashes of one fill the gaps of the other
        right.plot(rows.rtr, rows.accuracy, linestyle=dashes, color=COLOURS.get(system), label=name)
    counts = dial.groupby("rows").n.first()
    left.set(ylabel="accuracy (%), average over tasks", title=f"the dial, {counts['all']} rows (ring: as trained)")
    right.set(title=f"under the oracle frontier, {counts['frontier']} rows")
    for axes in (left, right):
        axes.legend(loc="best")
    return figure


def _dial_curve(axes: Axes, rows: pd.DataFrame, name: str, colour: Any) -> None:
    axes.plot(rows.rtr, rows.accuracy, marker="o", markersize=4, color=colour, label=name)
    axes.fill_between(rows.rtr, rows.accuracy_low, rows.accuracy_high, color=colour, alpha=0.12, linewidth=0)
    trained = rows[rows.call_bias == 0]
    axes.plot(trained.rtr, trained.accuracy, "o", markersize=10, markerfacecolor="none", color=colour)


def curves_figure(log: pd.DataFrame, labels: Mapping[str, str], x: str = "step") -> Figure:
    """Training curves: one small panel per column of ``labels`` (column -> axis label, with unit) that was logged.

    A long log is shown as points under its running mean over an eighth of it.
    """
    columns = [name for name in labels if name in log and log[name].notna().any()]
    width = min(3, max(1, len(columns)))
    rows = max(1, -(-len(columns) // width))
    figure, grid = plt.subplots(rows, width, figsize=(3.6 * width, 2.6 * rows), squeeze=False)
    for axes, name in zip(grid.flat, columns, strict=False):
        points = log.dropna(subset=[name])
        window = len(points) // 8 if len(points) > CURVE_POINTS else 1
        axes.plot(points[x], points[name], "o", markersize=4 if window == 1 else 3, alpha=1 if window == 1 else 0.3)
        mean = points[name].rolling(window, center=True, min_periods=1).mean()
        axes.plot(points[x], mean, color="C0", linewidth=1.5 if window == 1 else 2)
        axes.set(xlabel=x, ylabel=labels[name])
    for axes in list(grid.flat)[len(columns) :]:
        axes.set_axis_off()
    return figure


def sweep_figure(table: pd.DataFrame) -> Figure:
    """One column of panels a swept parameter: accuracy (percent, with its interval) above, RTR below, over the values in order.

    ``table``: parameter, value, accuracy, accuracy_low, accuracy_high, rtr.
    """
    parameters = list(table.parameter.unique())
    figure, grid = plt.subplots(
        2, len(parameters), figsize=(2.0 * len(parameters), 4.0), sharex="col", sharey="row", squeeze=False
    )
    for (above, below), (parameter, rows) in zip(grid.T, table.groupby("parameter", sort=False), strict=True):
        places = range(len(rows))
        above.vlines(places, rows.accuracy_low, rows.accuracy_high, color="black", linewidth=1)
        above.plot(places, rows.accuracy, marker="o")
        below.plot(places, rows.rtr, marker="o")
        below.set_xticks(list(places), [f"{value:g}" for value in rows.value])
        below.set_xlabel(str(parameter))
    grid[0][0].set_ylabel("accuracy (%)")
    grid[1][0].set_ylabel("RTR")
    return figure


def effects_figure(table: pd.DataFrame) -> Figure:
    """Each variant less the main line, with intervals: points of accuracy on the left, RTR on the right.

    ``table``: `comparison.effects` against the main line. One colour per system; a filled dot is a difference that its interval tells
    from zero.
    """
    rows = table.iloc[::-1].reset_index(drop=True)
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.8 + 0.26 * len(rows)), sharey=True, width_ratios=(3, 2))
    shown = (
        ("difference", "low", "high", "accuracy difference (points)"),
        ("rtr", "rtr_low", "rtr_high", "RTR difference"),
    )
    for axes, (value, low, high, label) in zip(panels, shown, strict=True):
        for name in dict.fromkeys(table.system):
            part, colour = rows[rows.system == name], COLOURS[name]
            told = (part[low] > 0) | (part[high] < 0)
            axes.hlines(part.index, part[low], part[high], color=colour, linewidth=1.4, label=SYSTEM_NAMES[name])
            inside = [colour if sure else "white" for sure in told]
            axes.scatter(part[value], part.index, color=inside, edgecolor=colour, zorder=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(label)
    panels[0].set_yticks(rows.index, rows.variant)
    handles = panels[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(handles[0]), frameon=False)
    return figure


def bars_figure(table: pd.DataFrame, x: str, y: str, hue: str | None, labels: tuple[str, str]) -> Figure:
    """Grouped bars of ``y`` over ``x``; whiskers where ``table`` has columns ``<y>_low`` and ``<y>_high``.

    ``labels``: of the x and of the y axis.
    """
    figure, axes = plt.subplots(figsize=(9, 3.6))
    sns.barplot(table, x=x, y=y, hue=hue, ax=axes, errorbar=None, saturation=1)
    if {f"{y}_low", f"{y}_high"} <= set(table):
        _whiskers(axes, table, x, y, hue)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.tick_params(axis="x", rotation=20 if table[x].nunique() > 4 else 0)
    if hue and axes.get_legend():
        sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _whiskers(axes: Axes, table: pd.DataFrame, x: str, y: str, hue: str | None) -> None:
    """seaborn draws one container of bars per hue, each in the order of x: find each bar's row by its place in both."""
    places = list(table[x].unique())
    hues = list(table[hue].unique()) if hue else [None]
    for container, value in zip(axes.containers, hues, strict=False):
        rows = table if value is None else table[table[hue] == value]
        for bar, row in zip(container, sorted(rows.to_dict("records"), key=lambda r: places.index(r[x])), strict=True):
            middle = bar.get_x() + bar.get_width() / 2
            axes.vlines(middle, row[f"{y}_low"], row[f"{y}_high"], color="black", linewidth=1)


def histogram_figure(table: pd.DataFrame, x: str, hue: str | None, labels: tuple[str, str]) -> Figure:
    """Distribution of ``x``, one colour per ``hue``. ``labels``: x, y axis."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    sns.histplot(table, x=x, hue=hue, ax=axes, bins=30, element="step", stat="count")
    axes.set(xlabel=labels[0], ylabel=labels[1])
    return figure


def scatter_figure(table: pd.DataFrame, x: str, y: str, hue: str, labels: tuple[str, str]) -> Figure:
    """Where the rows lie, one panel per ``hue``, rows at one place as one larger dot (the paper's Fig. 8). ``labels``: x, y axis."""
    names = list(dict.fromkeys(table[hue]))
    columns = min(3, len(names))
    height = -(-len(names) // columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(3 * columns, 2.7 * height), sharex=True, sharey=True, squeeze=False
    )
    places = table.groupby([hue, x, y], sort=False, observed=True).size().rename("rows").reset_index()
    scale = (places["rows"].min(), max(places["rows"].max(), places["rows"].min() + 1))
    for axes, name in zip(grid.flat, names, strict=False):
        dots = places[places[hue] == name]
        sns.scatterplot(
            dots, x=x, y=y, size="rows", sizes=(15, 120), size_norm=scale, ax=axes, alpha=0.7, linewidth=0, legend=False
        )
        axes.set(title=name, xlabel="", ylabel="")
    for axes in grid.flat[len(names) - columns : len(names)]:
        axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel(labels[0], fontsize="medium")
    figure.supylabel(labels[1], fontsize="medium")
    return figure


def cards(
    rows: datasets.Dataset, trajectories: Sequence["Trajectory"] | None = None, notes: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Rows as cards for :func:`gallery`: what a policy did, or without ``trajectories`` what the row itself holds.

    A curated row shows its target crops; boxes are the row's own.
    """
    found = []
    for index, row in enumerate(rows):
        done = trajectories[index] if trajectories is not None else None
        crops = done.crops if done else row.get("target_crops") or ()
        card = {key: row[key] for key in ("image", "question", "answers", "question_boxes", "answer_boxes")}
        found.append(
            {**card, "crops": crops, "answer": done.answer if done else None, "note": notes[index] if notes else ""}
        )
    return found


def pictures(captioned: Sequence[tuple[Image.Image, str]], columns: int = 3) -> Figure:
    """Pictures in a grid, each under its caption."""
    lines = -(-len(captioned) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(3.4 * columns, 3.4 * lines), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (image, caption) in zip(grid.flat, captioned, strict=False):
        _picture(axes, image, caption)
    return figure


def gallery(cards: Iterable[Mapping[str, Any]]) -> Figure:
    """One line per interaction: the low-resolution view with boxes and requested crops, then the crops themselves.

    Where no card requests any crop, the views stand three to a line. A card has image (PIL, full size), question,
    crops (names requested), and may have answers, answer, question_boxes, answer_boxes (0-1000) and note.
    Boxes: question dashed, answer solid; requested crops are shaded.
    """
    cards = list(cards)
    most = max((len(card["crops"]) for card in cards), default=0)
    width = 1 + most if most else min(3, max(1, len(cards)))
    lines = max(1, len(cards) if most else -(-len(cards) // width))
    figure, grid = plt.subplots(lines, width, figsize=(3.4 * width, 3.4 * lines), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    if not cards:
        grid[0, 0].text(0.5, 0.5, "no such rows", ha="center", va="center")
    places = grid[:, 0] if most else grid.flat
    for number, (axes, card) in enumerate(zip(places, cards, strict=False)):
        _low_view(axes, card)
        for beside, name in zip(grid[number, 1:] if most else (), card["crops"], strict=False):
            _picture(beside, cut(card["image"], name), f"crop: {name}")
    return figure


def _picture(axes: Axes, image: Image.Image, title: str) -> None:
    axes.imshow(image.convert("RGB"), interpolation="nearest")
    # A policy may write anything: dollars are no formulas, and control characters have no glyph
    printable = "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in title)
    lines = [shorten(line, 120, placeholder=" ...") for line in printable.split("\n")]
    title = "\n".join(fill(line, 48) for line in lines)
    axes.set_title(title, fontsize=8, loc="left", parse_math=False)
    axes.set_axis_off()


def _low_view(axes: Axes, card: Mapping[str, Any]) -> None:
    low = low_resolution(card["image"])
    answer = "" if card.get("answer") is None else f"answer: {card['answer']}"
    truth = f"truth: {card['answers'][0]}" if card.get("answers") else ""
    found = f"\n{answer} ({truth})" if answer and truth else f"\n{answer or truth}"
    note = f"\n{card['note']}" if card.get("note") else ""
    _picture(axes, low, f"{card['question']}{found}{note}")
    palette = sns.color_palette("colorblind")
    for name in card["crops"]:
        _outline(axes, low, crop_box(name), palette[2], shade=True)
    for box in card.get("question_boxes") or []:
        _outline(axes, low, box, palette[0], linestyle="--")
    for box in card.get("answer_boxes") or []:
        _outline(axes, low, box, palette[3])


def _outline(
    axes: Axes, image: Image.Image, box: Sequence[float], colour: Any, linestyle: str = "-", shade: bool = False
) -> None:
    left, top, right, bottom = (edge / 1000 * side for edge, side in zip(box, image.size * 2, strict=True))
    shape = Rectangle(
        (left - 0.5, top - 0.5), right - left, bottom - top, fill=shade, linewidth=1.5, linestyle=linestyle
    )
    shape.set(edgecolor=colour, facecolor=(*colour, 0.15) if shade else "none")
    axes.add_patch(shape)
