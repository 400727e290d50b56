"""Tables for people: CSV files have short names and one number per cell; pages show words and intervals."""

import pandas as pd
from IPython.display import HTML

SYSTEM_WORDS = {"full": "full resolution", "half": "half resolution", "no_image": "no image", "sft": "SFT",
                "awares": "AwaRes", "grpo": "GRPO", "escalate_full": "whole image on a call",
                "awares_naive": "AwaRes, naive re-prefill"}  # fmt: skip
TASK_WORDS = {"chartqa": "mini-chart", "docvqa": "mini-doc", "ocrbench": "mini-ocr", "pope": "mini-pope",
              "realworldqa": "mini-real", "vstar": "mini-vstar", "textvqa": "mini-text", "llava_multi": "mini-multi",
              "visionthink_smart": "mini-smart"}  # the generated tasks are no benchmarks of that name  # fmt: skip
SHOWN_NAMES = dict(SYSTEM_WORDS)  # what pages show for a name; `name_tasks` adds the tasks
HEADS = {"rtr": "RTR", "n": "rows", "lr": "LR", "hr": "HR", "f1": "F1", "fpr": "false positive rate", "p": "p value",
         "a": "system", "b": "minus system", "ms": "time (ms)", "gflops": "GFLOPs", "anls": "ANLS",
         "kappa": "Cohen's κ", "exact": "exact match", "relaxed": "relaxed match", "lr_lr": "both LR",
         "lr_hr": "LR, then HR", "hr_lr": "HR, then LR", "hr_hr": "both HR", "low_better": "half better",
         "high_better": "full better", "peak_memory_mb": "peak memory (MB)", "cache_mb": "cache (MB)",
         "rtr_at_accuracy": "RTR at equal accuracy", "prefill_2": "second prefill",
         "prefill_2_gflops": "second prefill (GFLOPs)", "seconds": "time (s)"}  # fmt: skip


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
    ends = _interval_columns(list(frame.columns))
    for column in [name for name in frame.columns if name not in {end for pair in ends.values() for end in pair}]:
        head = HEADS.get(column) or SHOWN_NAMES.get(column) or str(column).replace("_", " ")
        texts = _texts(frame[column], column, digits)
        if column in ends:
            head += " [95 % interval]"
            cells = zip(texts, *(_texts(frame[name], column, digits) for name in ends[column]), strict=True)
            texts = [one if low == "-" else f"{one} [{low}, {high}]" for one, low, high in cells]
        shown[head] = texts
    return HTML(pd.DataFrame(shown).to_html(index=False, border=0))


def _interval_columns(columns: list[str]) -> dict[str, tuple[str, str]]:
    """Column -> the columns of its interval's ends: ``x_low``, ``x_high``, or ``low``, ``high`` right after it."""
    found = {name: (f"{name}_low", f"{name}_high") for name in columns if {f"{name}_low", f"{name}_high"} <= {*columns}}
    plain = [name for place, name in enumerate(columns) if columns[place + 1 : place + 3] == ["low", "high"]]
    return found | {name: ("low", "high") for name in plain}


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
