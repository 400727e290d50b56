"""Row-by-row measures of a policy, read from the runs, and their bootstrap samples; they decide the claims.

Kinds of rows: ``evaluation`` (answers to the benchmark rows), ``validation`` (first turns on curated validation rows,
compared with labels and oracle crops), ``curation`` (labels of the training rows).

Intervals cover rows and training. Rows are resampled inside each benchmark, the same ones for every policy. The few
training seeds follow Student's t. At n > 1 seeds a resample of their mean moves by the policy's deviations from it,
with the same random numbers for every policy (paired by seed). At one seed it moves by the standard deviation over
seeds of the main line's policy that it is ``like``, drawn independently: rather too wide than too narrow.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from awares.config import Params
from awares.engine.rows import load_rows
from awares.errors import AwaresFileError
from awares.method.evaluation import CALL_STATUSES, decision_parts, load_trajectories, scored
from awares.method.judges import label
from awares.method.metrics import percentiles, resampled_means
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

PolicyFiles = Mapping[str, str]  # kind -> file or folder below runs/<profile>; "judge"; "like"
Parts = tuple[np.ndarray, np.ndarray | None]  # numerator and denominator per row (N,); None: a mean over rows


class MissingRows(AwaresFileError):
    """Rows that no stage has written yet."""


@dataclass(frozen=True)
class Estimate:
    """A statistic over rows and seeds, and its resamples ``draws`` (n,). Draw k has the same rows for every policy.

    ``least``, ``most``: its range; Student's noise may exceed it.
    """

    value: float
    draws: np.ndarray
    least: float = -math.inf
    most: float = math.inf

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = self.draws / other.draws
        return Estimate(self.value / other.value if other.value else math.nan, draws, least=0.0)

    def __abs__(self) -> "Estimate":
        return Estimate(abs(self.value), np.abs(self.draws), least=0.0)

    def interval(self, level: float) -> tuple[float, float]:
        return percentiles(self.draws, level)


@dataclass(frozen=True)
class RowSet:
    """One policy on N rows of one kind. ``groups``: benchmark or source of each row."""

    place: str
    groups: tuple[str, ...]
    parts: Mapping[str, Parts]

    def of(self, measure: str) -> Parts:
        if measure not in self.parts:
            raise MissingRows(f"{self.place} has no {measure}")
        return self.parts[measure]


def trained(variant: str, stage: str, like: str = "") -> PolicyFiles:
    """The policy that ``stage`` (sft or grpo) of a variant trains; ``like``: the main line's policy of that stage."""
    system = {"sft": "sft", "grpo": "awares"}[stage]
    answers = f"evaluation/{variant}-s{{seed}}/trajectories/{system}.jsonl"
    return {EVALUATION: answers, VALIDATION: f"{stage}/{variant}-s{{seed}}/validation.jsonl", "like": like}


class Runs:
    """The rows and resamples of ``policies``, each computed once. Paths have "{seed}", a training seed, or "{main}".

    Raises `MissingRows` for what has not been run yet, another AwaresError for existing files that are wrong.
    """

    def __init__(self, params: Params, policies: Mapping[str, PolicyFiles]) -> None:
        self.params, self.policies, self.settings = params, policies, params.evaluation
        self.root = params.path(params.paths.runs) / params.profile
        self.rows, self._resample, self._dataset = cache(self._load), cache(self._bootstrap), cache(load_rows)

    def seeds(self, policies: Sequence[str], kind: str) -> tuple[int, ...]:
        """The training seeds for which all ``policies`` have rows; the main seed if none of them was trained."""
        common = (self.params.seed, *self.params.seeds)
        for policy in policies:
            there = self._seeds_of(policy, kind)
            if not there:
                raise MissingRows(f"{self._name(self._path(policy, kind, self.params.seed))} is not there")
            common = tuple(seed for seed in common if seed in there) if self._trained(policy, kind) else common
        if not common:
            raise MissingRows(f"{', '.join(policies)} have no training seed in common")
        return common if any(self._trained(policy, kind) for policy in policies) else common[:1]

    def estimate(self, measure: str, policy: str, seeds: Sequence[int], benchmarks: tuple[str, ...] = ()) -> Estimate:
        """``measure`` of ``policy``, its mean over ``seeds``, with the variance of rows and training.

        On evaluation rows it is the mean over ``benchmarks`` (all of them by default), elsewhere the mean over rows.
        """
        factor = MEASURES[measure][1]
        pooled = self._pool([self._resample(policy, seed, measure, benchmarks) for seed in seeds])
        draws = factor * pooled.draws
        if len(seeds) == 1:
            deviation, count = self._seed_deviation(measure, policy, benchmarks)
            noise = self._stream("training", policy, measure).standard_normal(len(draws)) * self._student(count)
            draws = draws + deviation * noise
        return Estimate(factor * pooled.value, draws, 0.0, 100.0 if factor == 100 else math.inf)

    def correlation(self, x: str, y: str, policy: str, seeds: Sequence[int]) -> Estimate:
        """Pearson correlation over all rows of two measures in which every row counts, its mean over ``seeds``."""
        found = self._pool([self._correlate(self.rows(policy, MEASURES[x][0], seed), x, y) for seed in seeds])
        return replace(found, least=-1.0, most=1.0)

    # Statistics

    def _seed_deviation(self, measure: str, policy: str, benchmarks: tuple[str, ...]) -> tuple[float, int]:
        """Standard deviation over the seeds of the policy that it is ``like``, and their number; (0, 1) if untrained.

        A share that is equal at every seed is known to half a row: its deviation is that of rounding.
        """
        (kind, factor), like = MEASURES[measure], self.policies[policy].get("like") or policy
        seeds = self._seeds_of(like, kind)
        if not self._trained(policy, kind) or len(seeds) < 2:
            return 0.0, 1
        values = [self._resample(like, seed, measure, benchmarks)[0] for seed in seeds]
        wholes = self.rows(like, kind, seeds[0]).of(measure)[1]
        floor = 1 / (12**0.5 * wholes.sum()) if wholes is not None and len(set(values)) == 1 and wholes.any() else 0.0
        return float(factor * max(np.std(values, ddof=1), floor)), len(seeds)

    def _pool(self, found: Sequence[tuple[float, np.ndarray]]) -> Estimate:
        """Mean of v_k over n seeds; draws move by Student's factor times sum_k (v_k - mean) z_k / sqrt(n (n - 1))."""
        values, draws = np.array([value for value, _ in found]), np.mean([draws for _, draws in found], axis=0)
        if (count := len(found)) == 1:
            return Estimate(float(values[0]), draws)
        normal = self._stream("seeds").standard_normal((self.settings.bootstrap, count))
        moved = normal @ (values - values.mean()) / (count * (count - 1)) ** 0.5
        return Estimate(float(values.mean()), draws + moved * self._student(count))

    def _student(self, seeds: int) -> np.ndarray:
        """Factors that turn normal noise into Student's t with seeds - 1 degrees of freedom, for every policy."""
        free = max(seeds - 1, 1)
        return np.sqrt(free / self._stream("student").chisquare(free, self.settings.bootstrap))

    def _stream(self, *names: str) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, zlib.crc32("/".join(names).encode())])

    def _bootstrap(self, policy: str, seed: int, measure: str, benchmarks: tuple[str, ...]) -> tuple[float, np.ndarray]:
        rows = self.rows(policy, MEASURES[measure][0], seed)
        (values, wholes), groups = rows.of(measure), np.array(rows.groups)
        if benchmarks:
            if lacking := sorted(set(benchmarks) - set(rows.groups)):
                raise MissingRows(f"{rows.place} has no rows of {', '.join(lacking)}")
            kept = np.isin(groups, benchmarks)
            values, groups = values[kept], groups[kept]
        by_group = groups.tolist() if wholes is None else None
        mean, draws = resampled_means(values, self.settings.seed, self.settings.bootstrap, by_group, wholes)
        if wholes is not None and measure != "area" and set(np.unique(wholes)) <= {0.0, 1.0}:
            number, hits = wholes.sum(), values.sum()
            if number and hits in (0, number):  # 0 or 1 in every draw: the posterior under Jeffreys' prior instead
                beta = self._stream(rows.place, measure).beta(hits + 0.5, number - hits + 0.5, len(draws))
                draws = np.where(np.isfinite(draws), beta, draws)
        return mean, draws

    def _correlate(self, rows: RowSet, x: str, y: str) -> tuple[float, np.ndarray]:
        """From the means of x, y, x*y, x*x, y*y; nan where one of the two does not vary."""
        a, b = rows.of(x)[0], rows.of(y)[0]
        drawn = (resampled_means(z, self.settings.seed, self.settings.bootstrap) for z in (a, b, a * b, a * a, b * b))
        of_x, of_y, xy, xx, yy = (np.concatenate([[mean], draws]) for mean, draws in drawn)
        spread = (xx - of_x * of_x).clip(0) * (yy - of_y * of_y).clip(0)
        both = np.where(spread > 1e-12, (xy - of_x * of_y) / np.sqrt(np.maximum(spread, 1e-12)), np.nan)
        return float(both[0]), both[1:]

    # Files

    def _trained(self, policy: str, kind: str) -> bool:
        return "{seed}" in self.policies[policy][kind]

    def _path(self, policy: str, kind: str, seed: int) -> Path:
        return self.root / self.policies[policy][kind].format(seed=seed, main=self.params.seed)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.params.root) if path.is_relative_to(self.params.root) else path)

    def _seeds_of(self, policy: str, kind: str) -> tuple[int, ...]:
        """The training seeds for which ``policy`` has rows; the main seed if it was not trained."""
        seeds = (self.params.seed, *self.params.seeds) if self._trained(policy, kind) else (self.params.seed,)
        paths = {seed: self._path(policy, kind, seed) for seed in seeds}
        return tuple(seed for seed, path in paths.items() if path.is_file() or (path / "state.json").is_file())

    def _load(self, policy: str, kind: str, seed: int) -> RowSet:
        path = self._path(policy, kind, seed)
        place, read = self._name(path), {EVALUATION: self._scores, VALIDATION: self._decisions, CURATION: self._labels}
        try:
            return read[kind](place, path, self.policies[policy].get("judge", ""))
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # no table, no trajectory, or of other rows
            raise AwaresFileError(f"{place}: {error or repr(error)}; run its stage again") from error

    def _scores(self, place: str, path: Path, _: str) -> RowSet:
        """From scores.csv of a system, or from trajectories."""
        rows = self._dataset(self.root / "data" / "main" / "evaluation")
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype={"row_id": str, "benchmark": str})
        else:
            done = load_trajectories(path)
            table = scored(path.stem, rows, done).assign(characters=[len(one.answer) for one in done])
        if table.row_id.tolist() != rows["id"][:]:
            raise ValueError("its rows are not the evaluation rows")
        columns = {"accuracy": "score", "rtr": "rtr"} | ({"characters": "characters"} if "characters" in table else {})
        parts: dict[str, Parts] = {name: (table[column].to_numpy(float), None) for name, column in columns.items()}
        wrong = ~((parts["accuracy"][0] >= 0) & (parts["accuracy"][0] <= 1) & (parts["rtr"][0] >= 0))
        if wrong.any():
            raise ValueError(f"row {table.row_id[wrong].iloc[0]} has a score outside 0 to 1 or no RTR")
        return RowSet(place, tuple(table.benchmark), parts)

    def _decisions(self, place: str, path: Path, _: str) -> RowSet:
        """First turns of trajectories, or the oracle's requests if ``path`` is the curated rows."""
        rows = self._dataset(self.root / "curation" / "main" / "validation" / "dataset")
        labels, target = rows["label"][:], rows["target_crops"][:]
        done = [] if path.is_dir() else load_trajectories(path)
        if done and [one.row_id for one in done] != rows["id"][:]:
            raise ValueError("its rows are not the curated ones")
        requests = [one.crops for one in done] or target
        every, whole = np.ones(len(rows)), np.array([outcome(crops) == "all" for crops in requests], float)
        parts: dict[str, Parts] = dict(decision_parts(labels, requests, target, self.settings.relaxed_iou))
        parts |= {"whole_image": (whole, every), "whole_of_calls": (whole, parts["call_rate"][0])}
        parts["hr"] = np.array([name == "HR" for name in labels], float), every
        if done:
            tried = np.array([one.call_status in CALL_STATUSES for one in done], float)
            parts["valid"] = np.array([one.call_status == "valid" for one in done], float), tried
        return RowSet(place, tuple(rows["source"][:]), parts)

    def _labels(self, place: str, path: Path, judge: str) -> RowSet:
        """Whether ``judge`` gives each curated row the label that the deciding judge gives it."""
        rows = self._dataset(path)
        if f"verdict_{judge}" not in rows.column_names:
            raise MissingRows(f"{place}: the rows have no verdicts of judge {judge}")
        verdicts = zip(rows[f"verdict_{judge}"][:], rows["verdict"][:], strict=True)
        same = np.array([label(its) == label(deciding) for its, deciding in verdicts], float)
        return RowSet(f"{place} (judge {judge})", tuple(rows["source"][:]), {"agreement": (same, np.ones(len(rows)))})
