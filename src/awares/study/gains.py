"""What GRPO gains: the reward (Eq. 5) of a variant less that of the SFT policy it starts from, row by row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, concatenate_datasets

from awares.data.rows import evaluation_rows
from awares.method import evaluation
from awares.plus.estimators import HELD_OUT, rewards_of
from awares.settings import Params
from awares.study import comparison
from awares.study.answers import Answers, Estimate
from awares.study.verdicts import Effect

COLUMNS = ["variant", "seeds", "n", "reward_sft", "reward", "gain", "low", "high", "p"]


def labelled_rows(params: Params, unseen: bool) -> Dataset:
    """The evaluation rows, or the unseen ones, with labels from the base model's answers (`evaluation.label_rows`)."""
    one = params.on_unseen_rows() if unseen else params
    folder = one.run_dir("evaluation") / "trajectories"
    half, full = (evaluation.load_trajectories(folder / f"{name}.jsonl") for name in ("half", "full"))
    return evaluation.label_rows(evaluation_rows(one), half, full, params)


def gain_table(params: Params, runs: Mapping[str, Params]) -> pd.DataFrame:
    """`COLUMNS` of each variant of ``runs``, at its own prices: means over seeds and, equally weighted, over tasks.

    On the evaluation rows and the unseen ones together. The interval covers rows and trainings; variant and SFT policy
    have the same training seed.
    """
    parts = {unseen: labelled_rows(params, unseen) for unseen in (False, True)}
    rows, records = concatenate_datasets([*parts.values()]), []
    groups = np.array(rows["source"][:])
    for name, one in runs.items():
        found: dict[str, dict[int, list[float]]] = {}
        for system, shown in (("sft", "sft"), ("variant", name)):
            for unseen in parts:
                at = params.on_unseen_rows() if unseen else params
                files = comparison.trajectories(at, {name: one} if shown == name else None)
                for _, seed, path in (file for file in files if file[0] == shown):
                    done = evaluation.load_trajectories(path)
                    values = rewards_of(one, parts[unseen], done)[0]
                    found.setdefault(system, {}).setdefault(seed, []).extend(values)
        seeds = sorted(found["sft"].keys() & found["variant"].keys())
        before, after = (np.array([found[system][seed] for seed in seeds]) for system in ("sft", "variant"))
        most = one.grpo.alpha_ans + one.grpo.alpha_miss + one.grpo.alpha_use + one.grpo.lambda_area  # range of Eq. 5
        gain = Estimate(after - before, groups, most / len(groups), {})
        old, new = replace(gain, rows=before), replace(gain, rows=after)
        over_rows, trainings = gain.errors()
        effect = Effect(gain.value, math.sqrt(over_rows), math.sqrt(trainings), len(seeds) - 1, len(seeds))
        ends = effect.interval(params.evaluation.level)
        records.append((name, len(seeds), len(groups), old.value, new.value, effect.value, *ends, effect.p(0.0)))
    return pd.DataFrame(records, columns=COLUMNS)


def held_out_curves(runs: Mapping[str, Params]) -> pd.DataFrame:
    """The reward on held-out rows while each of ``runs`` trained, at every seed: `HELD_OUT`, step, progress, gain.

    ``progress``: share of the updates. ``gain``: the reward less that before the first update.
    """
    found = []
    for name, one in runs.items():
        for seed in one.plus_seeds:
            file = replace(one, seed=seed).run_dir("grpo") / "held_out.csv"
            part = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=["step", *HELD_OUT])
            reward = part.held_out_reward
            more = {"progress": part.step / part.step.max(), "gain": reward - reward.head(1).sum()}
            found.append(part.assign(variant=name, seed=seed, **more))
    return pd.concat([part for part in found if len(part)], ignore_index=True)


def curve_points(answers: Answers, names: Sequence[str]) -> pd.DataFrame:
    """Accuracy and RTR of each system with intervals over rows and trainings: variant, seeds, x, x_low, x_high."""
    level, records = answers.params.evaluation.level, []
    for name in names:
        one: dict[str, Any] = {"variant": name, "seeds": len(answers.seeds(name))}
        for measure in ("accuracy", "rtr"):
            effect = answers.effect(answers.estimate(measure, name), measure)
            low, high = effect.interval(level)
            one |= {measure: effect.value, f"{measure}_low": low, f"{measure}_high": high}
        records.append(one)
    return pd.DataFrame(records)
