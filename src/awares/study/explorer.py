"""The data of the policy explorer: what every system did with each evaluation row, at every recorded call bias.

The page itself is site/pages/explorer.md; it shows rows.js without a server.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from awares.config import Params
from awares.engine.rows import picture
from awares.method.crops import CROPS, low_resolution
from awares.method.evaluation import scored
from awares.method.rollout import Trajectory
from awares.study.diagnostics import evidence_boxes, shows
from awares.study.tables import SYSTEM_WORDS, TASK_WORDS

MOST_ROWS = 1200  # at most: the file stays below 8 MB
Sweep = Mapping[float, Sequence[Trajectory]]  # bias -> a trajectory per row


def write_explorer(
    params: Params, rows: Dataset, done: Mapping[str, Sequence[Trajectory]], sweeps: Mapping[str, Sweep], folder: Path
) -> None:
    """Write ``folder``/rows.js about the first MOST_ROWS of ``rows``, which `evaluation.label_rows` has labelled.

    ``done``: the trajectories of Table 1 by system; ``sweeps``: those of `sweep_call_bias` by policy. A row has the
    answers of full and half, and of each policy its call gap with up to two trajectories, ``direct`` and ``call``. Only
    pictures that were generated here are included.
    """
    rows = rows.select(range(min(MOST_ROWS, len(rows))))
    found = [_about(params, row, boxes) for row, boxes in zip(rows, evidence_boxes(rows), strict=True)]
    for system in ("full", "half"):
        for record, answer in zip(found, _answers(params, system, rows, done[system]), strict=True):
            record[system] = answer
    for system, sweep in sweeps.items():
        for record, own in zip(found, done[system], strict=False):
            record[system] = {"gap": own.call_gap}
        for bias in (min(sweep), max(sweep)):  # every row's direct and called trajectory is at one of them, if anywhere
            for record, answer in zip(found, _answers(params, system, rows, sweep[bias]), strict=True):
                record[system]["call" if record[system]["gap"] + bias > 0 else "direct"] = answer
    tasks = {name: TASK_WORDS.get(name, name) if params.data.origin == "suite" else name for name in params.data.tasks}
    about = {"tasks": tasks, "systems": {name: SYSTEM_WORDS[name] for name in ("full", "half", *sweeps)}}
    about |= {"biases": sorted(next(iter(sweeps.values()))), "call_bias": params.evaluation.call_bias, "crops": CROPS}
    text = json.dumps({**about, "rows": found}, ensure_ascii=False, separators=(",", ":"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.js").write_text(f"const EXPLORER = {text};\n", encoding="utf-8")


def _about(params: Params, row: dict[str, Any], boxes: Sequence[Sequence[float]]) -> dict[str, Any]:
    full = picture(row, params.crops.max_side)
    view, file = low_resolution(full, params.crops.geometry), io.BytesIO()
    view.save(file, "WEBP", quality=70, method=6)
    lowest = min((box[3] - box[1] for box in boxes), default=math.nan) * full.height / 1000
    about = {name: row[name] for name in ("id", "question", "answers", "label", "question_boxes", "answer_boxes")}
    about |= {"task": row["source"], "size": view.size, "evidence": None if math.isnan(lowest) else round(lowest, 1)}
    if params.data.origin == "suite":
        about["view"] = base64.b64encode(file.getvalue()).decode()
    return about


def _answers(params: Params, system: str, rows: Dataset, trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """Score, tokens and turns of each row; ``seen``: whether the crops show the evidence (`diagnostics.shows`)."""
    known, evidence = trajectories[: len(rows)], evidence_boxes(rows)
    scores = scored(system, rows, known).score
    return [
        {"answer": one.answer, "score": round(score, 6), "tokens": one.visual_tokens, "of": one.full_visual_tokens}
        | {"crops": one.crops, "seen": shows(one.crops, boxes, params.crops.coverage_threshold)}
        | {"turns": [(turn.role, turn.text, turn.visual_tokens) for turn in one.turns[1:]]}
        for one, score, boxes in zip(known, scores, evidence, strict=True)
    ]
