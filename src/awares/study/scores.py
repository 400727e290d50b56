"""Row-by-row measures of a policy, read from the runs, and their bootstrap samples: what claims are decided by.

A policy has up to three kinds of rows: ``evaluation`` (answers to the benchmark rows), ``validation`` (first turns on
curated validation rows, compared with labels and oracle crops) and ``curation`` (labels of the training rows).

An interval covers two sources of variance. Rows are resampled inside each benchmark, the same rows for every policy.
Training seeds are few, so their variance follows Student's t. At n > 1 seeds a resample of the mean over seeds moves by
the policy's deviations from it, with the same random numbers for every policy: differences are paired by seed. At one
seed it moves by the standard deviation over seeds of the main line's policy that it is ``like``, drawn independently:
too wide rather than too narrow where two policies share an SFT checkpoint.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from awares.config import Params
from awares.data.rows import load_rows
from awares.errors import AwaresFileError, AwaresValueError
from awares.method.evaluation import decision_parts, load_trajectories, scored
from awares.method.judges import label
from awares.method.metrics import resampled_means
from awares.study.diagnostics import outcome

EVALUATION, VALIDATION, CURATION = "evaluation", "validation", "curation"
SHARES = ("call_rate", "precision", "recall", "f1", "fpr", "exact", "relaxed")  # of Table 7

# measure -> (kind of rows, factor: 100 for percent)
MEASURES: dict[str, tuple[str, float]] = {
    "accuracy": (EVALUATION, 100.0),  # the benchmark's own metric
    "rtr": (EVALUATION, 1.0),
    "characters": (EVALUATION, 1.0),  # of the answer, without calls (Table 6)
    **dict.fromkeys(SHARES, (VALIDATION, 100.0)),
    "area": (VALIDATION, 1.0),  # requested per call, share of the image
    "whole_image": (VALIDATION, 100.0),  # rows that request the whole image
    "whole_of_calls": (VALIDATION, 100.0),  # calls that request the whole image
    "valid": (VALIDATION, 100.0),  # attempted calls that parse as written
    "hr": (VALIDATION, 100.0),  # rows labelled HR
    "agreement": (CURATION, 100.0),  # rows on which a judge gives the label of the deciding judge
}
COLUMNS = {
    "accuracy": ("score", 1.0),
    "rtr": ("rtr", 1e9),
    "characters": ("characters", 1e9),
}  # and their largest values

Policy = Mapping[str, str]  # kind -> file or folder below runs/<profile>; "judge"; "like"
Parts = tuple[
    np.ndarray, np.ndarray | None
]  # numerator and denominator of each row (N,); without denominator a mean over rows


class MissingRows(AwaresFileError):
    """Rows that no stage has written yet."""


@dataclass(frozen=True)
class Sample:
    """A statistic over rows and seeds, and its resamples ``draws`` (n,). Draw k has the same rows for every policy."""

    value: float
    draws: np.ndarray

    def __sub__(self, other: "Sample") -> "Sample":
        return Sample(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, other: "Sample") -> "Sample":
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = self.draws / other.draws
        return Sample(self.value / other.value if other.value else float("nan"), draws)

    def __abs__(self) -> "Sample":
        return Sample(abs(self.value), np.abs(self.draws))

    @property
    def defined(self) -> bool:
        """Whether value and every draw are finite. They are not where too few rows count."""
        return bool(np.isfinite(self.value) and np.isfinite(self.draws).all())

    def interval(self, level: float) -> tuple[float, float]:
        """The ``level`` percentile interval."""
        low, high = np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


@dataclass(frozen=True)
class RowSet:
    """One policy on N rows of one kind. ``groups``: benchmark or source of each row."""

    place: str
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    parts: Mapping[str, Parts]

    def of(self, measure: str) -> Parts:
        """The parts of ``measure``, or MissingRows."""
        if measure not in self.parts:
            raise MissingRows(f"{self.place} has no {measure}")
        return self.parts[measure]


def trained(variant: str, stage: str, like: str = "") -> Policy:
    """The policy that ``stage`` (sft or grpo) of a variant trains; ``like``: the main line's policy of that stage."""
    system = {"sft": "sft", "grpo": "awares"}[stage]
    answers = f"evaluation/{variant}-s{{seed}}/trajectories/{system}.jsonl"
    return {EVALUATION: answers, VALIDATION: f"{stage}/{variant}-s{{seed}}/validation.jsonl", "like": like}


class Runs:
    """The rows and resamples of ``policies``, each computed once. Paths have "{seed}", a training seed, or "{main}".

    Raises `MissingRows` for what has not been run yet, another AwaresError for files that are there and are wrong.
    """

    def __init__(self, params: Params, policies: Mapping[str, Policy]) -> None:
        self.params, self.policies, self.settings = params, policies, params.evaluation
        self.root = params.path(params.paths.runs) / params.profile
        self._first: dict[str, RowSet] = {}
        self.rows, self._resample, self._dataset = cache(self._load), cache(self._bootstrap), cache(load_rows)

    def seeds(self, policies: Sequence[str], kind: str) -> tuple[int, ...]:
        """The training seeds for which all ``policies`` have rows; the main seed if none of them was trained."""
        common = every = (self.params.seed, *self.params.seeds)
        for policy in policies:
            there = self._seeds_of(policy, kind)
            if not there:
                self._place(self._path(policy, kind, every[0]))
            common = tuple(seed for seed in common if seed in there) if self._trained(policy, kind) else common
        if not common:
            raise MissingRows(f"{', '.join(policies)} have no training seed in common")
        return common if any(self._trained(policy, kind) for policy in policies) else common[:1]

    def sample(self, measure: str, policy: str, seeds: Sequence[int], benchmarks: tuple[str, ...] = ()) -> Sample:
        """``measure`` of ``policy``, its mean over ``seeds``, with the variance of rows and training.

        On evaluation rows it is the mean over ``benchmarks`` (all of them by default), elsewhere the mean over rows.
        """
        factor = MEASURES[measure][1]
        pooled = self._pool([self._resample(policy, seed, measure, benchmarks) for seed in seeds])
        if len(seeds) > 1:
            return Sample(factor * pooled.value, factor * pooled.draws)
        deviation, count = self.seed_deviation(measure, policy, benchmarks)
        noise = self._stream("training", policy, measure).standard_normal(len(pooled.draws)) * self._student(count)
        return Sample(factor * pooled.value, factor * pooled.draws + deviation * noise)

    def seed_deviation(self, measure: str, policy: str, benchmarks: tuple[str, ...] = ()) -> tuple[float, int]:
        """Standard deviation over the seeds of the policy that it is ``like``, and their number; (0, 1) if untrained.

        A share that is equal at every seed is known to half a row: its deviation is that of rounding.
        """
        kind, factor = MEASURES[measure]
        like = self.policies[policy].get("like") or policy
        seeds = self._seeds_of(like, kind)
        if not self._trained(policy, kind) or len(seeds) < 2:
            return 0.0, 1
        values = [self._resample(like, seed, measure, benchmarks)[0] for seed in seeds]
        wholes = self.rows(like, kind, seeds[0]).of(measure)[1]
        floor = 1 / (12**0.5 * wholes.sum()) if wholes is not None and len(set(values)) == 1 and wholes.any() else 0.0
        return float(factor * max(np.std(values, ddof=1), floor)), len(seeds)

    def correlation(self, x: str, y: str, policy: str, seeds: Sequence[int]) -> Sample:
        """Pearson correlation over all rows of two measures in which every row counts, its mean over ``seeds``."""
        return self._pool([self._correlate(self.rows(policy, MEASURES[x][0], seed), x, y) for seed in seeds])

    # Statistics

    def _pool(self, found: Sequence[tuple[float, np.ndarray]]) -> Sample:
        """Mean of v_k over n seeds; draws move by Student's factor times sum_k (v_k - mean) z_k / sqrt(n (n - 1))."""
        values, draws = np.array([value for value, _ in found]), np.mean([draws for _, draws in found], axis=0)
        if (count := len(found)) == 1:
            return Sample(float(values[0]), draws)
        normal = self._stream("seeds").standard_normal((self.settings.bootstrap, count))
        moved = normal @ (values - values.mean()) / (count * (count - 1)) ** 0.5
        return Sample(float(values.mean()), draws + moved * self._student(count))

    def _student(self, seeds: int) -> np.ndarray:
        """Factors that turn normal noise into Student's t with seeds - 1 degrees of freedom, for every policy."""
        free = max(seeds - 1, 1)
        return np.sqrt(free / self._stream("student").chisquare(free, self.settings.bootstrap))

    def _stream(self, *names: str) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, zlib.crc32("/".join(names).encode())])

    def _bootstrap(self, policy: str, seed: int, measure: str, benchmarks: tuple[str, ...]) -> tuple[float, np.ndarray]:
        rows = self.rows(policy, MEASURES[measure][0], seed)
        values, wholes = rows.of(measure)
        groups = rows.groups if wholes is None else None
        if benchmarks:
            if lacking := sorted(set(benchmarks) - set(rows.groups)):
                raise MissingRows(f"{rows.place} has no rows of {', '.join(lacking)}")
            kept = np.isin(rows.groups, benchmarks)
            values, groups = values[kept], tuple(name for name in rows.groups if name in benchmarks)
        mean, draws = resampled_means(values, self.settings.seed, self.settings.bootstrap, groups, wholes)
        if measure != "area" and (beta := _jeffreys(values, wholes)) is not None:
            drawn = self._stream(rows.place, measure).beta(*beta, self.settings.bootstrap)
            draws = np.where(np.isfinite(draws), drawn, draws)
        return mean, draws

    def _correlate(self, rows: RowSet, x: str, y: str) -> tuple[float, np.ndarray]:
        a, b = rows.of(x)[0], rows.of(y)[0]
        seed, count = self.settings.seed, self.settings.bootstrap
        moments = [resampled_means(values, seed, count) for values in (a, b, a * b, a * a, b * b)]
        value, draws = (_pearson(*map(np.asarray, column)) for column in zip(*moments, strict=True))
        return float(value), draws

    # Files

    def _trained(self, policy: str, kind: str) -> bool:
        return "{seed}" in self.policies[policy][kind]

    def _path(self, policy: str, kind: str, seed: int) -> Path:
        return self.root / self.policies[policy][kind].format(seed=seed, main=self.params.seed)

    def _place(self, path: Path) -> str:
        """The name of a file or dataset in messages; MissingRows if it is not there."""
        place = str(path.relative_to(self.params.root)) if path.is_relative_to(self.params.root) else str(path)
        if not _exists(path):
            raise MissingRows(f"{place} is not there")
        return place

    def _seeds_of(self, policy: str, kind: str) -> tuple[int, ...]:
        """The training seeds for which ``policy`` has rows; the main seed if it was not trained."""
        seeds = (self.params.seed, *self.params.seeds) if self._trained(policy, kind) else (self.params.seed,)
        return tuple(seed for seed in seeds if _exists(self._path(policy, kind, seed)))

    def _load(self, policy: str, kind: str, seed: int) -> RowSet:
        """The rows of one policy; all policies must have the same rows in the same order."""
        path = self._path(policy, kind, seed)
        place, judge = self._place(path), self.policies[policy].get("judge", "")
        try:
            if kind == CURATION:
                found = _agreement(f"{place} (judge {judge})", self._dataset(path), judge)
            else:
                found = self._scores(place, path) if kind == EVALUATION else self._decisions(place, path)
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # no table, no trajectory, or of other rows
            raise AwaresFileError(f"{place}: {error or repr(error)}; run its stage again") from error
        first = self._first.setdefault(kind, found)
        if found.ids != first.ids:
            raise AwaresValueError(f"{found.place} and {first.place} hold different rows: run both stages again")
        return found

    def _scores(self, place: str, path: Path) -> RowSet:
        """From scores.csv of a system, or from trajectories."""
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype={"row_id": str, "benchmark": str})
        else:
            done = load_trajectories(path)
            table = scored(path.stem, self._dataset(self.root / "data" / "main" / "evaluation"), done)
            table["characters"] = [len(one.answer) for one in done]
        parts: dict[str, Parts] = {}
        for measure, (column, most) in COLUMNS.items():
            if column in table or measure != "characters":
                wrong = table[~pd.to_numeric(table[column], errors="coerce").between(0, most)]
                if len(wrong):
                    raise ValueError(
                        f"row {wrong.row_id.iloc[0]}: {column} is {wrong[column].iloc[0]}, not 0 to {most:g}"
                    )
                parts[measure] = table[column].to_numpy(float), None
        if table.row_id.duplicated().any():
            raise ValueError(f"row {table.row_id[table.row_id.duplicated()].iloc[0]} occurs twice")
        return RowSet(place, tuple(table.row_id), tuple(table.benchmark), parts)

    def _decisions(self, place: str, path: Path) -> RowSet:
        """First turns of trajectories, or the oracle's requests if ``path`` is the curated rows."""
        rows = self._dataset(self.root / "curation" / "main" / "validation" / "dataset")
        ids, labels, target = rows["id"][:], rows["label"][:], rows["target_crops"][:]
        done = [] if path.is_dir() else load_trajectories(path)
        if done and [one.row_id for one in done] != ids:
            raise ValueError("its trajectories are of other rows than the curated ones")
        requests = [one.crops for one in done] or target
        every, whole = np.ones(len(ids)), np.array([outcome(crops) == "all" for crops in requests], float)
        parts: dict[str, Parts] = dict(decision_parts(labels, requests, target, self.settings.relaxed_iou))
        parts |= {"whole_image": (whole, every), "whole_of_calls": (whole, parts["call_rate"][0])}
        parts["hr"] = np.array([name == "HR" for name in labels], float), every
        if done:
            tried = np.array([one.call_status in ("valid", "recovered", "malformed") for one in done], float)
            parts["valid"] = np.array([one.call_status == "valid" for one in done], float), tried
        return RowSet(place, tuple(ids), tuple(rows["source"][:]), parts)


def _exists(path: Path) -> bool:
    return path.is_file() or (path / "state.json").is_file()


def _agreement(place: str, rows: datasets.Dataset, judge: str) -> RowSet:
    """Whether ``judge`` gives each curated row the label that the deciding judge gives it."""
    if f"verdict_{judge}" not in rows.column_names:
        raise MissingRows(f"{place}: the rows have no verdicts of this judge")
    same = [label(a) == label(b) for a, b in zip(rows[f"verdict_{judge}"][:], rows["verdict"][:], strict=True)]
    parts: dict[str, Parts] = {"agreement": (np.array(same, float), np.ones(len(rows)))}
    return RowSet(place, tuple(rows["id"][:]), tuple(rows["source"][:]), parts)


def _jeffreys(values: np.ndarray, wholes: np.ndarray | None) -> tuple[float, float] | None:
    """Beta(a, b) of a share that is 0 or 1 in every draw: its posterior under Jeffreys' prior."""
    if wholes is None or not set(np.unique(wholes)) <= {0.0, 1.0}:
        return None
    number, hits = wholes.sum(), values.sum()
    return (hits + 0.5, number - hits + 0.5) if number and hits in (0, number) else None


def _pearson(x: Any, y: Any, xy: Any, xx: Any, yy: Any) -> Any:
    """From the means of x, y, x*y, x*x, y*y; nan where one of the two does not vary."""
    spread = (xx - x * x).clip(0) * (yy - y * y).clip(0)
    return np.where(spread > 1e-12, (xy - x * y) / np.sqrt(np.maximum(spread, 1e-12)), np.nan)
