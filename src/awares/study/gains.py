"""What GRPO gains: the reward (Eq. 5) of a variant less that of the SFT policy it starts from, row by row."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from datasets import Dataset, concatenate_datasets

from awares.data.rows import evaluation_rows
from awares.method import evaluation
from awares.plus.estimators import rewards_of
from awares.settings import Params
from awares.study import comparison
from awares.study.answers import Estimate
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
        found = defaultdict[tuple[str, int], list[float]](list)
        for unseen, part in parts.items():
            at = params.on_unseen_rows() if unseen else params
            for system, seed, path in [*comparison.trajectories(at), *comparison.trajectories(at, {name: one})]:
                if system in ("sft", name):
                    found[system, seed] += rewards_of(one, part, evaluation.load_trajectories(path))[0]
        seeds = sorted(seed for system, seed in found if system == name and ("sft", seed) in found)
        before, after = (np.array([found[system, seed] for seed in seeds]) for system in ("sft", name))
        most = one.grpo.alpha_ans + one.grpo.alpha_miss + one.grpo.alpha_use + one.grpo.lambda_area  # range of Eq. 5
        gain = Estimate(after - before, groups, most / len(groups), {})
        old, new = replace(gain, rows=before), replace(gain, rows=after)
        over_rows, trainings = gain.errors()
        effect = Effect(gain.value, math.sqrt(over_rows), math.sqrt(trainings), len(seeds) - 1, len(seeds))
        ends = effect.interval(params.evaluation.level)
        records.append((name, len(seeds), len(groups), old.value, new.value, effect.value, *ends, effect.p(0.0)))
    return pd.DataFrame(records, columns=COLUMNS)
