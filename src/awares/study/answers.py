"""Measures of policies and their differences, from published answers: the rows of every system, seed by seed.

A measure is the mean of one number per training and row; a ratio sum(a) / sum(b) = r of r + (a - r * b) / mean(b), the
delta method. So differences are taken row by row between trainings of the same seed, and have both errors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd

from awares.config import Params
from awares.errors import AwaresFileError
from awares.method.evaluation import CALL_STATUSES, decision_parts
from awares.method.judges import HR, LR
from awares.study.diagnostics import outcome
from awares.study.verdicts import Effect

EVALUATION, VALIDATION = "evaluation", "validation"
ORACLE = "oracle"  # the "policy" that requests the target crops, in first_turns.parquet
WEIGHTED = ("accuracy", "rtr", "characters")  # the mean over benchmarks
PLUS = 4  # "plus four" (Agresti and Coull): the variance over rows as if four more rows differed by the whole range
_Names = tuple[str, ...]
Trainings = Mapping[str, _Names]

# measure -> (kind of rows, its range: 100 for percent)
MEASURES: dict[str, tuple[str, float]] = {
    "accuracy": (EVALUATION, 100.0),  # the benchmark's own metric
    "rtr": (EVALUATION, 1.0),
    "characters": (EVALUATION, 1.0),  # of the answer, without calls (Table 6)
    "valid": (EVALUATION, 100.0),  # attempted calls that parse as written
    **dict.fromkeys(("call_rate", "precision", "recall", "f1", "fpr", "exact", "relaxed"), (VALIDATION, 100.0)),
    "area": (VALIDATION, 1.0),  # requested per call, share of the image
    "whole_of_calls": (VALIDATION, 100.0),  # calls that request the whole image
    "hr": (VALIDATION, 100.0),  # rows labelled HR
}


class MissingRows(AwaresFileError):
    """Answers that no stage has published yet."""


@dataclass(frozen=True)
class Estimate:
    """A statistic: the mean of ``rows`` (S trainings, N rows) over trainings and, equally weighted, ``groups`` (N,).

    ``row``: weight of one row times the range of the measure. ``noise``: training -> weight with which it enters.
    """

    rows: np.ndarray
    groups: np.ndarray
    row: float
    noise: Mapping[str, float]

    @property
    def by_training(self) -> np.ndarray:
        return np.mean([self.rows[:, self.groups == name].mean(axis=1) for name in np.unique(self.groups)], axis=0)

    @property
    def value(self) -> float:
        return float(self.by_training.mean())

    def __mul__(self, factor: float) -> "Estimate":
        noise = {name: weight * factor for name, weight in self.noise.items()}
        return replace(self, rows=self.rows * factor, row=self.row * abs(factor), noise=noise)

    def __sub__(self, other: "Estimate") -> "Estimate":
        names = {**self.noise, **other.noise}
        noise = {name: self.noise.get(name, 0.0) - other.noise.get(name, 0.0) for name in names}
        return replace(self, rows=self.rows - other.rows, row=max(self.row, other.row), noise=noise)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        if not other.value:
            raise MissingRows("the divisor is 0")
        ratio = self.value / other.value
        rest = (self - other * ratio) * (1 / other.value)
        return replace(rest, rows=ratio + rest.rows)

    def effect(self) -> Effect:
        """Value and errors over rows and over trainings (0 for one); their interaction counts once, with the latter."""
        count, names, over_rows, shared = len(self.rows), np.unique(self.groups), 0.0, 0.0
        for name in names:
            part = self.rows[:, self.groups == name]
            rest = part - part.mean(axis=0) - part.mean(axis=1, keepdims=True) + part.mean()
            size = part.shape[1] * max(part.shape[1] - 1, 1) * len(names) ** 2
            over_rows += ((part.mean(axis=0) - part.mean()) ** 2).sum() / size
            shared += (rest**2).sum() / (count * max(count - 1, 1)) / size
        trainings = float(self.by_training.var(ddof=1)) / count if count > 1 else 0.0
        variance = max(over_rows - shared, 0.0) + PLUS * self.row**2
        return Effect(self.value, math.sqrt(variance), math.sqrt(trainings), count - 1, count)


class Answers:
    """The published answers of all systems.

    ``answers``: system, seed, benchmark, row_id, score, rtr, answer, call_status, crops, of several evaluation seeds.
    ``turns``: system, seed, row_id, crops, label of the validation rows, ORACLE included. ``trainings``: system -> its
    trainings, some shared with others: "sft" and "grpo" are the main line's; "sft:x", "grpo:x" and "all:x" are those of
    variant x and spread as the main line's SFT, its GRPO after one SFT, and both. ``alone``: effects are about these
    policies, not about other trainings of their kind.
    """

    def __init__(
        self, params: Params, answers: pd.DataFrame, turns: pd.DataFrame, trainings: Trainings, alone: bool = False
    ) -> None:
        self.params, self.trainings, self.alone = params, trainings, alone
        self.tables = {
            (kind, system, int(seed)): part.drop_duplicates("row_id").set_index("row_id")
            for kind, table in ((EVALUATION, answers), (VALIDATION, turns))
            for (system, seed), part in table.groupby(["system", "seed"], sort=False)
        }
        self._parts, self._turns = cache(self._parts_of), cache(self._turns_of)

    def seeds(self, policy: str, kind: str = EVALUATION) -> tuple[int, ...]:
        """The training seeds at which ``policy`` has rows; one of them if it was not trained."""
        found = sorted(seed for one, system, seed in self.tables if (one, system) == (kind, policy))
        return tuple(found if policy in self.trainings else found[:1])

    def common(self, policies: Sequence[str], kind: str = EVALUATION) -> tuple[tuple[int, ...], pd.Index]:
        """The training seeds and the rows that all ``policies`` have; MissingRows if there are none."""
        seeds = {policy: self.seeds(policy, kind) for policy in policies}
        if missing := [policy for policy, found in seeds.items() if not found]:
            raise MissingRows(f"no {kind} rows of {', '.join(missing)} are published")
        trained = [policy for policy in seeds if policy in self.trainings] or [*policies][:1]
        shared = sorted(set.intersection(*({*seeds[policy]} for policy in trained)))
        if not shared:
            raise MissingRows(f"{', '.join(policies)} have no training seed in common")
        used = [(policy, seed) for policy in seeds for seed in (shared if policy in trained else seeds[policy])]
        first, *others = (self.tables[kind, *place].index for place in used)
        rows = first[np.all([first.isin(other) for other in others], axis=0)] if others else first
        if not len(rows):
            raise MissingRows(f"{', '.join(policies)} have no {kind} rows in common")
        return tuple(shared), rows

    def estimate(self, measure: str, policy: str, among: Sequence[str] = (), benchmarks: _Names = ()) -> Estimate:
        """``measure`` of ``policy``, at the seeds and on the rows that it has in common with the policies ``among``.

        Over evaluation rows it is the mean over ``benchmarks`` (all by default). MissingRows for what is not published.
        """
        kind, scale = MEASURES[measure]
        seeds, index = self.common((policy, *among, *((ORACLE,) if kind == VALIDATION else ())), kind)
        found, sizes = [], []
        for seed in seeds if policy in self.trainings else self.seeds(policy, kind):
            parts = self._parts(measure, policy, seed).loc[index]
            if lacking := {*benchmarks} - {*parts.group}:
                raise MissingRows(f"no rows of {', '.join(sorted(lacking))} are published")
            parts = parts[parts.group.isin(benchmarks)] if benchmarks else parts
            whole = parts.whole.sum()
            if not whole:
                raise MissingRows(f"{measure} of {policy} is undefined: it counts none of the {len(parts)} rows")
            ratio = parts.value.sum() / whole
            found.append(scale * (ratio + (parts.value - ratio * parts.whole).to_numpy() / parts.whole.mean()))
            sizes.append(whole)
        noise = dict.fromkeys(self.trainings.get(policy, ()), 1.0)
        return Estimate(np.stack(found), parts.group.to_numpy(), scale / float(np.mean(sizes)), noise)

    def effect(self, found: Estimate, measure: str, benchmarks: _Names = ()) -> Effect:
        """``found`` with its errors. One training per arm varies as much as the main line's ``measure`` over seeds."""
        effect, noise = found.effect(), {name: weight for name, weight in found.noise.items() if weight}
        if effect.seeds > 1 or not noise or self.alone:
            return effect
        spreads = {name: self._spread(name.partition(":")[0], measure, benchmarks) for name in noise}
        trainings = math.sqrt(sum(weight**2 * spreads[name][0] for name, weight in noise.items()))
        return replace(effect, trainings=trainings, free=min(degrees for _, degrees in spreads.values()))

    def _spread(self, training: str, measure: str, benchmarks: _Names) -> tuple[float, int]:
        """Variance of ``measure`` from one training of the main line to the next; (1, 0) while there is only one."""
        pair = ("sft",) if training == "sft" else ("awares", "sft")
        if any(len(self.seeds(policy, MEASURES[measure][0])) < 2 for policy in pair):
            return 1.0, 0
        parts = [self.estimate(measure, policy, pair, benchmarks) for policy in pair]
        found = parts[0] - parts[1] if training == "grpo" else parts[0]
        return float(found.by_training.var(ddof=1)), len(found.rows) - 1

    def _parts_of(self, measure: str, policy: str, seed: int) -> pd.DataFrame:
        """Numerator (value), denominator (whole) and group of each row."""
        kind = MEASURES[measure][0]
        table = self.tables[kind, policy, seed]
        if kind == VALIDATION:
            value, whole = self._turns(policy, seed)[measure]
        elif measure == "valid":
            value, whole = table.call_status == "valid", table.call_status.isin(CALL_STATUSES)
        else:
            columns = {"accuracy": table.score, "rtr": table.rtr, "characters": table.answer.map(len)}
            value, whole = columns[measure], np.ones(len(table))
        parts = pd.DataFrame({"value": value, "whole": whole}, table.index).astype(float)
        return parts.assign(group=table.benchmark if measure in WEIGHTED else "all")

    def _turns_of(self, policy: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Terms of every ratio over validation rows: `decision_parts` against the labels and target crops."""
        table = self.tables[VALIDATION, policy, seed]
        (oracle,) = (self.tables[VALIDATION, ORACLE, one] for one in self.seeds(ORACLE, VALIDATION))
        oracle = oracle.reindex(table.index)  # a row that only the variant's curation has counts nowhere
        crops, target = ([list(one) if np.ndim(one) else [] for one in part.crops] for part in (table, oracle))
        labels = oracle.label.fillna(LR).tolist()
        parts = decision_parts(labels, crops, target, self.params.evaluation.relaxed_iou)
        whole = np.array([outcome(one) == "all" for one in crops], float)
        parts |= {"whole_of_calls": (whole, parts["call_rate"][0])}
        return parts | {"hr": ((oracle.label == HR).to_numpy(float), np.ones(len(table)))}
