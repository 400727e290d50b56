"""Systems and variants side by side: Table 1 with every system (PAPER §5, §6), ablations (Tables 3, 4, 7 to 10)."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awares.config import load_params
from awares.data.rows import evaluation_rows
from awares.engine.rows import load_rows
from awares.errors import AwaresValueError
from awares.method import evaluation
from awares.settings import DECIDES, MAIN_SYSTEMS, Evaluation, Params
from awares.study.answers import ORACLE, Answers, MissingRows, Trainings
from awares.study.publish import require
from awares.study.verdicts import adjusted

TRAINED = {"sft": "sft", "awares": "grpo"}  # system -> the stage that trains it

File = tuple[str, int, Path]  # system or variant, training seed, its trajectories


def answered(params: Params, files: Iterable[File]) -> pd.DataFrame:
    """The evaluation rows as every system of ``files`` has answered them, one line per system, seed and row.

    Scores are 0 to 1; ``written``: the text of each assistant turn. AwaresFileError for a system that has not been run.
    """
    rows, found = evaluation_rows(params), []
    for system, seed, path in files:
        done = evaluation.load_trajectories(path)
        table = evaluation.scored(system, rows, done).assign(seed=seed)
        table["written"] = [[turn.text for turn in one.turns if turn.role == "assistant"] for one in done]
        for name in ("layer_rtr", "call_gap", "visual_tokens", "full_visual_tokens"):
            table[name] = [getattr(one, name) for one in done]
        found.append(table)
    columns = "system seed benchmark row_id score rtr layer_rtr answer written crops call_status call_gap".split()
    return pd.concat(found, ignore_index=True)[[*columns, "visual_tokens", "full_visual_tokens"]]


def first_turns(params: Params, files: Iterable[File]) -> pd.DataFrame:
    """Requests on curated validation rows (ORACLE: target crops): system, seed, row_id, crops, call_status, label."""
    rows = load_rows(params.run_dir("curation") / "validation" / "dataset")
    oracle = pd.DataFrame({"row_id": rows["id"][:], "crops": rows["target_crops"][:], "label": rows["label"][:]})
    done = ((system, seed, one) for system, seed, path in files for one in evaluation.load_trajectories(path))
    found = [(system, seed, one.row_id, one.crops, one.call_status) for system, seed, one in done]
    table = pd.DataFrame(found, columns=["system", "seed", "row_id", "crops", "call_status"])
    table["label"] = table.row_id.map(oracle.set_index("row_id").label)
    return pd.concat([table, oracle.assign(system=ORACLE, seed=params.seed, call_status="none")], ignore_index=True)


def published(params: Params) -> Answers:
    """All answers in reports/<profile>: `comparison`, `seeds` (rows that no stage has seen) and `ablations`."""
    folders, tables = [params.report_dir() / name for name in ("comparison", "seeds", "ablations")], []
    for name in ("answers.parquet", "first_turns.parquet"):
        found = [pd.read_parquet(folder / name) for folder in folders if (folder / name).is_file()]
        tables.append(pd.concat([pd.DataFrame(columns=["system", "seed"]), *found]))
    return Answers(params, tables[0], tables[1], trainings(params))


def trainings(params: Params) -> Trainings:
    """How each trained system came about, for `Answers`: the main line's policies and the listed variants."""
    found = {"sft": ("sft",), "awares": ("sft", "grpo")}
    for name in params.variants():
        variant = load_params(params.profile, name, path=params.path("params.yaml"))
        after_sft = variant.changed & DECIDES["grpo"] == {"grpo"} and variant.grpo.cold_start
        own = "sft" if judged_by(variant)[0] == "sft" else "grpo" if after_sft else "all"
        found[name] = (*(("sft",) if after_sft else ()), f"{own}:{name}")
    return found


def trajectories(params: Params, runs: Mapping[str, Params] | None = None, turns: bool = False) -> list[File]:
    """The files of Table 1's systems, or of the variants ``runs`` (name -> settings), at every seed that was run.

    They answer the evaluation rows, or with ``turns`` the validation rows, where only trained systems have some.
    """
    wanted = {name: (params, name, TRAINED.get(name, "")) for name in (TRAINED if turns else MAIN_SYSTEMS)}
    if runs is not None:
        wanted = {name: (one, *judged_by(one)) for name, one in runs.items()}
    folder = "unseen" if runs and params.unseen else "trajectories"  # a variant's notebook answers both sets of rows
    found = []
    for name, (one, system, stage) in wanted.items():
        place = (stage, "validation.jsonl") if turns else ("evaluation", f"{folder}/{system}.jsonl")
        seeds = (params.seed, *(params.seeds if system in TRAINED else ()))
        files = [(name, seed, replace(one, seed=seed).run_dir(place[0]) / place[1]) for seed in seeds]
        found += files[:1] + [file for file in files[1:] if file[2].is_file()]
    return found


def systems_table(scores: pd.DataFrame, settings: Evaluation) -> pd.DataFrame:
    """`evaluation.main_table` of every system, a row's score being its mean over seeds, plus layer_rtr and seeds."""
    seeds, keys = scores.groupby("system", sort=False).seed.nunique(), ["system", "benchmark", "row_id"]
    means = scores.groupby(keys, sort=False)[["score", "rtr", "layer_rtr"]].mean().reset_index()
    table = evaluation.main_table(means, settings)
    inside = evaluation.main_table(means.assign(rtr=means.layer_rtr), settings)
    return table.assign(layer_rtr=inside.rtr, seeds=table.system.map(seeds))


def judged_by(params: Params) -> tuple[str, str]:
    """The system that judges a variant and the stage that trained it; AwaresValueError if it changes no training."""
    touched = params.changed & DECIDES["grpo"]
    if not touched:
        raise AwaresValueError(f"variant {params.variant!r} changes no training: no ablation of params.yaml")
    return ("awares", "grpo") if "grpo" in touched else ("sft", "sft")


def call_bias(params: Params) -> float:
    """The bias to evaluate a trained policy with: ``evaluation.call_bias``, or with ``grpo.choose_bias`` its own."""
    if not params.grpo.choose_bias or "grpo" not in params.changed:
        return params.evaluation.call_bias
    return float(json.loads(require(params.run_dir("grpo") / "metrics.json", "grpo").read_text())["call_bias"])


def measures_table(answers: Answers, systems: Mapping[str, str], measures: Sequence[str]) -> pd.DataFrame:
    """Means over seeds, accuracy with its interval over rows; nan if undefined. ``systems``: shown name -> system."""
    records = []
    for name, system in systems.items():
        one: dict[str, Any] = {"variant": name, "seeds": len(answers.seeds(system))} | dict.fromkeys(measures, math.nan)
        for measure in measures:
            with suppress(MissingRows):
                found = answers.estimate(measure, system)
                one[measure] = found.value
                if measure == "accuracy":
                    rows = replace(found.effect(), trainings=0.0)
                    one["accuracy_low"], one["accuracy_high"] = rows.interval(answers.params.evaluation.level)
        records.append(one)
    return pd.DataFrame(records)


def difference_table(answers: Answers, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Differences a - b of systems: a, b, seeds, n (rows), accuracy (points) and RTR with intervals.

    ``p``: of the difference in accuracy; it is ``significant`` at a false discovery rate of 1 - evaluation.level.
    """
    level, records = answers.params.evaluation.level, []
    for a, b in pairs:
        found: list[float] = []
        for measure in ("accuracy", "rtr"):
            gain = answers.estimate(measure, a, (b,)) - answers.estimate(measure, b, (a,))
            effect = answers.effect(gain, measure)
            found += [effect.value, *effect.interval(level), effect.p(0.0)]
        records.append((a, b, effect.seeds, gain.rows.shape[1], *found[:-1]))
    names = ["a", "b", "seeds", "n", "difference", "low", "high", "p", "rtr", "rtr_low", "rtr_high"]
    table = pd.DataFrame(records, columns=names)
    return table.assign(significant=adjusted(table.p) <= 1 - level)


def gap_table(answers: Answers, policy: str) -> pd.DataFrame:
    """Where ``policy`` loses and regains accuracy against full resolution: part, rows, right, points, low, high.

    ``rows``: per training. ``right``: percent of them that the policy answers right. ``points``: their part of the
    difference in mean accuracy. A row needs a call if full resolution scores higher than half resolution on it.
    """
    level, three = answers.params.evaluation.level, (policy, "full", "half")
    seeds, index = answers.common(three)
    gain = answers.estimate("accuracy", policy, three) - answers.estimate("accuracy", "full", three)
    chosen = [(name, seeds if name == policy else answers.seeds(name)) for name in three]
    tables = [[answers.tables["evaluation", name, seed].loc[index] for seed in used] for name, used in chosen]
    score, full, half = (np.array([table.score for table in each]) for each in tables)
    called = np.array([table.crops.map(len) > 0 for table in tables[0]])
    needed, right = full > half, full >= 0.5
    parts = {
        "call needed, none made (when)": needed & ~called,
        "call needed and made (reading)": needed & called,
        "call made, none needed": ~needed & right & called,
        "none needed or made (drift)": ~needed & right & ~called,
        "full resolution is wrong (regained)": ~needed & ~right & (called | ~called),
        "sum": called | ~called,
    }
    records = []
    for name, mask in parts.items():
        one = answers.effect(replace(gain, rows=gain.rows * mask), "accuracy")
        correct = 100 * float(score[mask].mean()) if mask.any() else float("nan")
        records.append((name, mask.sum() / len(seeds), correct, one.value, *one.interval(level)))
    return pd.DataFrame(records, columns=["part", "rows", "right", "points", "low", "high"])
