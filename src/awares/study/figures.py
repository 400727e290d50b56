"""Figures of several notebooks, from data frames and rows. A figure of one notebook is a seaborn cell there."""

import io
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Image as Picture
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from awares.method.crops import crop_box, cut, low_resolution
from awares.method.evaluation import AVERAGE
from awares.method.rollout import Trajectory
from awares.study.diagnostics import OUTCOMES, outcome
from awares.study.tables import SHOWN_NAMES, SYSTEM_WORDS, TASK_WORDS, shown

PALETTE = sns.color_palette("colorblind")
SYSTEM_COLOURS = dict(zip(SYSTEM_WORDS.values(), PALETTE, strict=False))
MARKERS = dict(zip(SYSTEM_WORDS.values(), "svX^oP*D", strict=True))
RTR = "retain token ratio (visual tokens / tokens of the full image)"
OUTSIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}  # a legend on the right


def style(dpi: int, origin: str = "") -> None:
    """One look for all figures of a notebook. ``origin`` of the rows: generated tasks and sources have own names."""
    SHOWN_NAMES.clear()
    SHOWN_NAMES.update(SYSTEM_WORDS | (TASK_WORDS if origin == "suite" else {}))
    rc = {"figure.dpi": dpi, "savefig.dpi": dpi, "savefig.bbox": "tight", "figure.constrained_layout.use": True}
    warnings.filterwarnings("ignore", "The figure layout has changed")  # seaborn's grids lay themselves out
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook", font_scale=0.85, rc=rc)


def show(figure: Figure, alt: str | None = None, path: Path | None = None) -> Picture:
    """``figure`` as a PNG of stable bytes, also in the file ``path``. ``alt``: by default its titles, axes, legend."""
    seen = list[str]()
    for axes in figure.axes:
        seen += [axes.get_title() or axes.get_title("left"), axes.get_ylabel(), axes.get_xlabel()]
    for legend in filter(None, (*figure.legends, *(axes.get_legend() for axes in figure.axes))):
        seen += [text.get_text() for text in legend.get_texts()]
    described = ", ".join(dict.fromkeys(filter(None, seen))).replace("\n", " ")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return Picture(data=buffer.getvalue(), alt=alt or described)


def whiskers(x: str, y: str = "accuracy", *, data: pd.DataFrame, axes: Axes | None = None, **_: Any) -> None:
    """Intervals of points of ``data`` with columns ``_low`` and ``_high``; in a grid by ``grid.map_dataframe``."""
    ends: Any = {}
    for axis, name in (("xerr", x), ("yerr", y)):
        if f"{name}_low" in data:
            ends[axis] = data[name] - data[f"{name}_low"], data[f"{name}_high"] - data[name]
    (axes or plt.gca()).errorbar(data[x], data[y], **ends, fmt="none", ecolor="0.6", capsize=2, zorder=0)


def accuracy_figure(table: pd.DataFrame, panel: str = "benchmark", x: str = "rtr", label: str = RTR) -> Figure:
    """Accuracy (percent) over ``x`` with intervals, a line of ``table`` per system and ``panel``, the average first."""
    table = shown(table.reset_index(drop=True))
    names = sorted(table[panel].unique(), key=lambda name: name != AVERAGE)
    look = {"hue": "system", "palette": SYSTEM_COLOURS, "style": "system", "markers": MARKERS, "s": 60}
    panels = {"col": panel, "col_order": names, "col_wrap": min(4, len(names)), "height": 2.8}
    grid = sns.relplot(table, x=x, y="accuracy", **look, **panels, facet_kws={"sharex": panel == "benchmark"})
    grid.map_dataframe(whiskers, x).set(xlim=(-0.05 * table[x].max(), None)).set_axis_labels("", "accuracy (%)")
    grid.set_titles("{col_name}").figure.supxlabel(label)
    return grid.figure


def dial_figure(dial: pd.DataFrame, frontier: pd.DataFrame, main: pd.DataFrame) -> Figure:
    """Operating curves: accuracy against RTR as the call bias grows, with intervals; bias 0 (as trained) is ringed.

    Left the rows "all" of ``dial`` with full and half of ``main``, right its rows "frontier" with ``frontier``, dashed.
    """
    dial, frontier, main = map(shown, (dial, frontier, main))
    look = {"x": "rtr", "y": "accuracy", "hue": "system", "palette": SYSTEM_COLOURS}
    ends = main[(main.benchmark == AVERAGE) & main.system.str.contains("resolution")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True, sharey=True)
    titles = {"all": "the dial, {} rows (ring: as trained)", "frontier": "under the oracle frontier, {} rows"}
    for axes, (part, title) in zip((left, right), titles.items(), strict=True):
        curve = dial[dial.rows == part]
        trained = curve[curve.call_bias == 0]
        sns.lineplot(curve, **look, marker="o", ax=axes)
        whiskers("rtr", data=curve, axes=axes)
        axes.plot(trained.rtr, trained.accuracy, "o", color="black", markersize=11, markerfacecolor="none")
        axes.set(xlabel=RTR, ylabel="accuracy (%), average over tasks", title=title.format(curve.n.iloc[0]))
    sns.scatterplot(ends, **look, marker="s", s=60, ax=left)
    whiskers("rtr", data=ends, axes=left)
    # The frontiers almost coincide: the dashes of the second one fall into the gaps of the first
    sns.lineplot(frontier, **look, style="system", dashes=[(2, 2), (1, 3)], linewidth=2.5, legend=False, ax=right)
    return figure


def interaction_figure(row: Mapping[str, Any], done: Trajectory) -> Figure:
    """One interaction: the view, the crops, the answer and the visual tokens. ``row``: image, question and answers."""
    pictures = [low_resolution(row["image"]), *(cut(row["image"], name) for name in done.crops)]
    widths = [picture.width for picture in pictures]
    scale = 6.5 / max(sum(widths), 400)  # inches per px: the crops show that they are finer
    sizes = {"width_ratios": [*widths, 2.6 / scale], "wspace": 0.06}
    height = scale * max(picture.height for picture in pictures) + 1.1
    figure, grid = plt.subplots(1, len(widths) + 1, figsize=(scale * sum(widths) + 2.9, height), gridspec_kw=sizes)
    heads = ["1. It sees half resolution", *(f"2. Crop {name} at full resolution" for name in done.crops)]
    for axes, picture, head in zip(grid, pictures, heads, strict=False):
        crops = done.crops if picture is pictures[0] else ()
        _picture(axes, picture, f"{head}\n{picture.width} x {picture.height} px", crops)
        axes.set(xticks=[], yticks=[], anchor="N")
        axes.grid(False)
    grid[0].set_xlabel(f"and requests {', '.join(done.crops)}" if done.crops else "and answers at once", loc="left")
    figure.suptitle(shorten(row["question"], 90), x=0.01, ha="left", fontweight="bold", parse_math=False)
    truth = f" (truth: {row['answers'][0]})" if row.get("answers") else ""
    last, most = grid[-1], done.full_visual_tokens
    said = fill(f"{3 if done.crops else 2}. It answers {shorten(done.answer, 60)}{truth}", 34)
    last.set_title(said, loc="left", fontsize=9, parse_math=False)
    bars = last.barh(["full image", "AwaRes"], [most, done.visual_tokens], color=["0.75", PALETTE[2]])
    last.bar_label(bars, padding=2)
    last.set(xlim=(0, 1.25 * most), box_aspect=0.4, anchor="N", xlabel="visual tokens", xticks=[])
    last.grid(False)
    sns.despine(ax=last, left=True, bottom=True)
    return figure


def flow_figure(policies: Mapping[str, Sequence[Sequence[str]]], rows: str) -> Figure:
    """Fig. 5: how rows go from policy to policy (%). ``policies``: name -> crops a row; ``rows``: for the title."""
    table = pd.DataFrame({name: [outcome(crops) for crops in requests] for name, requests in policies.items()})
    kinds = [name for name in OUTCOMES if (table == name).any(axis=None)]
    steps = list(itertools.pairwise(table))
    figure, grid = plt.subplots(1, len(steps), figsize=(6 * len(steps), 5), squeeze=False)
    for axes, (before, after) in zip(grid.flat, steps, strict=True):
        shares = 100 * pd.crosstab(table[before], table[after], normalize="all")
        shares = shares.reindex(index=kinds, columns=kinds, fill_value=0)
        sns.heatmap(shares, mask=shares == 0, annot=True, fmt=".1f", cmap="Blues", cbar=False, square=True, ax=axes)
    figure.suptitle(f"{len(table)} {rows} rows (%)")
    return figure


def curves_figure(log: pd.DataFrame, labels: Mapping[str, str], x: str = "step") -> Figure:
    """Training curves: a panel per column of ``labels`` (column -> axis label); running mean above 24 points."""
    columns = [name for name in labels if name in log and log[name].notna().any()]
    figure, grid = _panels(len(columns), 3.6, 2.6)
    for axes, name in zip(grid, columns, strict=False):
        points = log.dropna(subset=[name])
        long = len(points) > 24
        mean = points[name].rolling(len(points) // 8 if long else 1, center=True, min_periods=1).mean()
        axes.set_axis_on()
        axes.plot(points[x], points[name], "o", markersize=3 if long else 4, alpha=0.3 if long else 1)
        axes.plot(points[x], mean, color="C0")
        axes.set(xlabel=x, ylabel=labels[name])
    return figure


def gallery(rows: Iterable[Mapping[str, Any]], done: Sequence[Trajectory] = (), notes: Sequence[str] = ()) -> Figure:
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
        _picture(view, low, "\n".join(filter(None, [*lines, notes[number] if notes else ""])), names)
        for boxes, colour, line in (("question_boxes", PALETTE[0], "--"), ("answer_boxes", PALETTE[3], "-")):
            for box in row.get(boxes) or ():
                _outline(view, low, box, edgecolor=colour, linestyle=line, fill=False)
        for axes, name in zip(others, names, strict=False):
            _picture(axes, cut(row["image"], name), f"crop: {name}")
    return figure


def _panels(count: int, width: float, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A grid of ``count`` panels of that size (inches), at least one; their axes are off until something is drawn."""
    columns = min(columns, max(1, count))
    lines = max(1, -(-count // columns))
    figure, grid = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, list(grid.flat)


def _picture(axes: Axes, image: Image.Image, title: str, crops: Sequence[str] = ()) -> None:
    """``image`` with the places of ``crops`` in it."""
    axes.imshow(image.convert("RGB"), interpolation="nearest")
    for name in crops:
        _outline(axes, image, crop_box(name), edgecolor=PALETTE[2], facecolor=(*PALETTE[2], 0.15))
    # A policy may write anything: dollars are no formulas, and control characters have no glyph
    printable = "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in title)
    lines = [fill(shorten(line, 120, placeholder=" ..."), 48) for line in printable.split("\n")]
    axes.set_title("\n".join(lines), fontsize=8, loc="left", parse_math=False)


def _outline(axes: Axes, image: Image.Image, box: Sequence[float], **look: Any) -> None:
    left, top, right, bottom = (edge / 1000 * side for edge, side in zip(box, image.size * 2, strict=True))
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, linewidth=1.5, **look))
