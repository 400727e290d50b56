"""Row-by-row measures of a policy, read from what the stages wrote, and their resamples: what claims are decided by.

A policy has up to three sets of rows: ``evaluation`` (answers to the benchmarks' rows), ``validation`` (first turns on
the curated validation rows, against label and oracle crops) and ``curation`` (labels of the training rows). Where one
of them lies is told by a path below runs/<profile>; "{seed}" in it stands for the training seeds, "{main}" for the main
one, where nothing was trained.

Training has its own scatter, and few seeds tell little of it: what it adds to a resample of the rows follows Student's distribution
for as many seeds as it was estimated from. Where policies are compared at several seeds, a resample's mean over them moves by
their deviations from it, the same way for every policy, so that a difference moves by the deviations of the differences. Where
one of them was trained at a single seed, every trained one's resamples move by the scatter over seeds of the main line's policy
that it is ``like`` (itself, if it has the seeds): independent draws, so that the interval of a difference is rather too wide than
too narrow where two policies share a cold start.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from awares.config import Params
from awares.data import rows as data
from awares.errors import AwaresFileError, AwaresValueError
from awares.method.evaluation import load_trajectories, scored
from awares.method.judges import label
from awares.method.metrics import resampled_means
from awares.method.rollout import Trajectory
from awares.study.diagnostics import decision_parts, outcome

EVALUATION, VALIDATION, CURATION = KINDS = ("evaluation", "validation", "curation")

# measure -> (rows it needs, factor: 100 for percent)
MEASURES: dict[str, tuple[str, float]] = {
    "accuracy": (EVALUATION, 100.0),  # the benchmark's own metric
    "rtr": (EVALUATION, 1.0),
    "characters": (EVALUATION, 1.0),  # of the answer, as in Table 6: calls are not counted
    "call_rate": (VALIDATION, 100.0),  # this and the next seven: diagnostics.CdpDiagnostics
    "precision": (VALIDATION, 100.0),
    "recall": (VALIDATION, 100.0),
    "f1": (VALIDATION, 100.0),
    "fpr": (VALIDATION, 100.0),
    "exact": (VALIDATION, 100.0),
    "relaxed": (VALIDATION, 100.0),
    "area": (VALIDATION, 1.0),  # the one that is no share of rows
    "whole_image": (VALIDATION, 100.0),  # rows that ask for the whole image
    "whole_of_calls": (VALIDATION, 100.0),  # calls that do
    "valid": (VALIDATION, 100.0),  # attempted calls that parse as written
    "hr": (VALIDATION, 100.0),  # rows labelled HR
    "agreement": (CURATION, 100.0),  # rows on which a judge gives the label of the deciding judge
}
SCORES = ("benchmark", "row_id", "score", "rtr")  # what scores.csv must have; "characters" may stand beside

Parts = tuple[np.ndarray, np.ndarray | None]


class MissingRows(AwaresFileError):
    """Rows that no stage has written yet."""


@dataclass(frozen=True)
class Sample:
    """A statistic over rows and training seeds, and its resamples (n,); the same resample is the same rows and seeds
    for every policy, so that differences of samples are paired.
    """

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
        """Whether value and every resample are finite: not so where hardly a row counts."""
        return bool(np.isfinite(self.value) and np.isfinite(self.draws).all())

    def interval(self, level: float) -> tuple[float, float]:
        """The ``level`` percentile interval."""
        low, high = np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def worst(samples: Sequence[Sample], smallest: bool, level: float) -> tuple[float, float, float]:
    """The smallest (or largest) of several values, and its interval.

    That all of them are above a margin takes every interval to be above it; that one of them is below may be found in any of them, so
    that end takes intervals at 1 - (1 - level) / their number (Bonferroni). A single one has its own interval.
    """
    pick, stricter = (min if smallest else max), 1 - (1 - level) / len(samples)
    near, far = ([one.interval(level) for one in samples], [one.interval(stricter) for one in samples])
    lows, highs = (near, far) if smallest else (far, near)
    return pick(one.value for one in samples), pick(low for low, _ in lows), pick(high for _, high in highs)


@dataclass(frozen=True)
class RowSet:
    """One policy on N rows of one kind. ``parts``: measure -> what each row adds to numerator and denominator (N,)."""

    place: str
    ids: tuple[str, ...]
    groups: tuple[str, ...]  # benchmark or source of each row
    parts: Mapping[str, Parts]


class Runs:
    """Row sets below runs/<profile>, loaded when asked for. ``policies``: name -> kind -> path; ``judge`` for curation;
    ``like``: the main line's policy whose scatter over training seeds stands for that of a policy with one seed.

    Raises `MissingRows` for what has not been run yet, another AwaresError for files that are there and are wrong.
    """

    def __init__(self, params: Params, policies: Mapping[str, Mapping[str, str]]) -> None:
        self.params, self.policies = params, policies
        self.root = params.path(params.paths.runs) / params.profile
        self._sets: dict[tuple[str, str, int], RowSet] = {}
        self._first: dict[str, RowSet] = {}
        self._resampled: dict[Any, tuple[float, np.ndarray]] = {}

    # Where

    def path(self, policy: str, kind: str, seed: int) -> Path:
        """The file or folder of a policy's rows."""
        found = self.policies[policy]
        if kind not in found:
            raise AwaresValueError(f"policy {policy} has no {kind} rows: its path is to be told under policies")
        return self.root / found[kind].format(seed=seed, main=self.params.seed)

    def seeds(self, policies: Sequence[str], kind: str) -> tuple[int, ...]:
        """The training seeds for which every one of ``policies`` has rows; the main one if none of them was trained."""
        common = every = (self.params.seed, *self.params.seeds)
        for policy in policies:
            there = self._there(policy, kind)
            if not there:
                raise MissingRows(f"{self._name(self.path(policy, kind, every[0]))} is not there")
            common = tuple(seed for seed in common if seed in there) if self._trained(policy, kind) else common
        if not common:
            raise MissingRows(f"{', '.join(policies)} have no training seed in common")
        return common if any(self._trained(policy, kind) for policy in policies) else common[:1]

    def _trained(self, policy: str, kind: str) -> bool:
        return "{seed}" in self.policies[policy].get(kind, "")

    def _there(self, policy: str, kind: str) -> tuple[int, ...]:
        """The training seeds for which ``policy`` has rows; the main one for what was not trained."""
        asked = (self.params.seed, *self.params.seeds) if self._trained(policy, kind) else (self.params.seed,)
        return tuple(seed for seed in asked if _exists(self.path(policy, kind, seed)))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.params.root)) if path.is_relative_to(self.params.root) else str(path)

    # What

    def sample(self, measure: str, policy: str, seeds: Sequence[int], benchmarks: Sequence[str] = ()) -> Sample:
        """``measure`` of ``policy``, the mean over ``seeds``; rows are resampled inside each benchmark, and training's scatter added.

        On evaluation rows it is the mean over ``benchmarks``, all of them by default; elsewhere over all rows. At a single seed the
        scatter is that of `scatter`.
        """
        kind, factor = MEASURES[measure]
        found = [self._resample(self.rows(policy, kind, seed), measure, tuple(benchmarks)) for seed in seeds]
        pooled = self._pool(found)
        if len(seeds) > 1:
            return Sample(factor * pooled.value, factor * pooled.draws)
        spread, count = self.scatter(measure, policy, benchmarks)
        noise = self._stream("training", policy, measure).standard_normal(len(pooled.draws)) * self._student(count)
        return Sample(factor * pooled.value, factor * pooled.draws + spread * noise)

    def scatter(self, measure: str, policy: str, benchmarks: Sequence[str] = ()) -> tuple[float, int]:
        """Standard deviation of ``measure`` over training seeds of the policy that ``policy`` is like, and their number; 0 for one.

        A share that came out alike at every seed is known to half a row either way: its scatter is that of the rounding.
        """
        kind, factor = MEASURES[measure]
        kin = self.policies[policy].get("like", policy)
        there = self._there(kin, kind)
        if not self._trained(policy, kind) or len(there) < 2:
            return 0.0, 1
        found = [self.rows(kin, kind, seed) for seed in there]
        values = [self._resample(rows, measure, tuple(benchmarks))[0] for rows in found]
        wholes = _parts(found[0], measure)[1]
        floor = 1 / (12**0.5 * wholes.sum()) if wholes is not None and len(set(values)) == 1 and wholes.any() else 0.0
        return float(factor * max(np.std(values, ddof=1), floor)), len(there)

    def _student(self, seeds: int) -> np.ndarray:
        """What turns normal noise of a scatter estimated from ``seeds`` into Student's: the same for every policy, resample by resample."""
        free = max(seeds - 1, 1)
        return np.sqrt(free / self._stream("student").chisquare(free, self.params.evaluation.bootstrap))

    def _stream(self, *names: str) -> np.random.Generator:
        """Random numbers of their own for ``names``."""
        return np.random.default_rng([self.params.evaluation.seed, zlib.crc32("/".join(names).encode())])

    def correlation(self, x: str, y: str, policy: str, seeds: Sequence[int]) -> Sample:
        """Pearson correlation, over all rows, of two measures in which every row counts; the mean over ``seeds``."""
        return self._pool([self._correlate(self.rows(policy, MEASURES[x][0], seed), x, y) for seed in seeds])

    def _pool(self, found: Sequence[tuple[float, np.ndarray]]) -> Sample:
        """Mean over n seeds of (value, resamples), moved by sum_k (v_k - mean) z_k / sqrt(n (n - 1)) and Student's factor; z is every policy's."""
        values, draws = np.array([value for value, _ in found]), np.mean([draws for _, draws in found], axis=0)
        if (count := len(found)) == 1:
            return Sample(float(values[0]), draws)
        normal = self._stream("seeds").standard_normal((self.params.evaluation.bootstrap, count))
        moved = normal @ (values - values.mean()) / (count * (count - 1)) ** 0.5
        return Sample(float(values.mean()), draws + moved * self._student(count))

    def _resample(self, rows: RowSet, measure: str, benchmarks: tuple[str, ...]) -> tuple[float, np.ndarray]:
        key = (rows.place, measure, benchmarks)
        if key not in self._resampled:
            values, wholes = _parts(rows, measure)
            groups = rows.groups if wholes is None else None
            if benchmarks:
                if lacking := sorted(set(benchmarks) - set(rows.groups)):
                    raise MissingRows(f"{rows.place} has no rows of {', '.join(lacking)}")
                kept = np.isin(rows.groups, benchmarks)
                values, groups = values[kept], tuple(name for name in rows.groups if name in benchmarks)
            settings = self.params.evaluation
            mean, draws = resampled_means(values, settings.seed, settings.bootstrap, groups, wholes=wholes)
            if measure != "area" and (alike := _alike(values, wholes)) is not None:
                drawn = self._stream(rows.place, measure).beta(*alike, settings.bootstrap)
                draws = np.where(np.isfinite(draws), drawn, draws)
            self._resampled[key] = mean, draws
        return self._resampled[key]

    def _correlate(self, rows: RowSet, x: str, y: str) -> tuple[float, np.ndarray]:
        a, b = (_parts(rows, name)[0] for name in (x, y))
        settings = self.params.evaluation
        moments = [resampled_means(v, settings.seed, settings.bootstrap) for v in (a, b, a * b, a * a, b * b)]
        draws = _pearson(*(drawn for _, drawn in moments))
        return float(_pearson(*(np.array(mean) for mean, _ in moments))), draws

    def rows(self, policy: str, kind: str, seed: int) -> RowSet:
        """The rows of one policy, loaded once; all policies must have the same rows in the same order."""
        key = (policy, kind, seed)
        if key not in self._sets:
            found = self._load(policy, kind, self.path(policy, kind, seed))
            first = self._first.setdefault(kind, found)
            if found.ids != first.ids:
                raise AwaresValueError(f"{found.place} and {first.place} hold different rows: run both stages again")
            self._sets[key] = found
        return self._sets[key]

    def _load(self, policy: str, kind: str, path: Path) -> RowSet:
        if not _exists(path):
            raise MissingRows(f"{self._name(path)} is not there")
        place = self._name(path)
        if kind == EVALUATION:
            return _scores(place, path) if path.suffix == ".csv" else self._scored(place, path)
        if kind == CURATION:
            judge = self.policies[policy].get("judge", "")
            return _agreement(f"{place} (judge {judge})", data.load_rows(path), judge)
        return self._decisions(place, path)

    @cached_property
    def _benchmark_rows(self) -> datasets.Dataset:
        return self._dataset(self.root / "data" / "evaluation")

    @cached_property
    def _validation_rows(self) -> datasets.Dataset:
        return self._dataset(self.root / "curation" / "validation" / "dataset")

    def _dataset(self, path: Path) -> datasets.Dataset:
        if not _exists(path):
            raise MissingRows(f"{self._name(path)} is not there")
        return data.load_rows(path)

    def _scored(self, place: str, path: Path) -> RowSet:
        rows, done = self._benchmark_rows, _trajectories(place, path)
        _check_ids(place, done, rows["id"][:])
        table = scored(place, rows, done).assign(characters=[len(one.answer) for one in done])
        return _row_set(place, table)

    def _decisions(self, place: str, path: Path) -> RowSet:
        """First turns of trajectories, or, for a dataset of curated rows, the oracle's requests."""
        rows = self._validation_rows
        if path.is_dir():
            requests, statuses = rows["target_crops"][:], None
        else:
            done = _trajectories(place, path)
            _check_ids(place, done, rows["id"][:])
            requests, statuses = [one.crops for one in done], [one.call_status for one in done]
        relaxed = self.params.evaluation.relaxed_iou
        parts: dict[str, Parts] = dict(decision_parts(rows["label"][:], requests, rows["target_crops"][:], relaxed))
        every, whole = np.ones(len(rows)), np.array([outcome(crops) == "all" for crops in requests], float)
        parts |= {"whole_image": (whole, every), "whole_of_calls": (whole, parts["call_rate"][0])}
        parts["hr"] = (np.array([name == "HR" for name in rows["label"][:]], float), every)
        if statuses is not None:
            tried = np.array([name in ("valid", "recovered", "malformed") for name in statuses], float)
            parts["valid"] = (np.array([name == "valid" for name in statuses], float), tried)
        return RowSet(place, tuple(rows["id"][:]), tuple(rows["source"][:]), parts)


def _exists(path: Path) -> bool:
    return path.is_file() or (path / "state.json").is_file()


def _trajectories(place: str, path: Path) -> list[Trajectory]:
    try:
        return load_trajectories(path)
    except (KeyError, TypeError, AttributeError) as error:
        raise AwaresFileError(f"{place}: a line is no trajectory ({error!r}): run its stage again") from error


def _check_ids(place: str, done: Sequence[Trajectory], ids: Sequence[str]) -> None:
    if [one.row_id for one in done] != list(ids):
        raise AwaresValueError(
            f"{place}: its trajectories are not those of the rows that are there: run its stage again"
        )


def _parts(rows: RowSet, measure: str) -> Parts:
    if measure not in rows.parts:
        raise MissingRows(f"{rows.place} does not tell {measure}")
    return rows.parts[measure]


def _alike(values: np.ndarray, wholes: np.ndarray | None) -> tuple[float, float] | None:
    """For a share that every row has, or none, whose resamples would all be the same: Jeffreys' distribution of it, Beta(a, b)."""
    if wholes is None or not set(np.unique(wholes)) <= {0.0, 1.0}:
        return None
    number, hits = wholes.sum(), values.sum()
    return (hits + 0.5, number - hits + 0.5) if number and hits in (0, number) else None


def _pearson(x: Any, y: Any, xy: Any, xx: Any, yy: Any) -> Any:
    """From the means of x, y, x*y, x*x, y*y; nan where one of the two does not vary."""
    spread = (xx - x * x).clip(0) * (yy - y * y).clip(0)
    return np.where(spread > 1e-12, (xy - x * y) / np.sqrt(np.maximum(spread, 1e-12)), np.nan)


def _scores(place: str, path: Path) -> RowSet:
    """scores.csv of a system, as `evaluation.scored` tables it."""
    try:
        table = pd.read_csv(path, dtype={"row_id": str, "benchmark": str})
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise AwaresFileError(f"{place} is not a table: {error}") from error
    if missing := [name for name in SCORES if name not in table]:
        raise AwaresValueError(f"{place}: column {', '.join(missing)} missing; scores have {', '.join(SCORES)}")
    return _row_set(place, table)


def _row_set(place: str, table: pd.DataFrame) -> RowSet:
    """Scores in 0 to 1, RTRs and characters from 0 up, no row twice, or AwaresError naming the row."""
    for name, high in (("score", 1.0), ("rtr", np.inf), ("characters", np.inf)):
        values = pd.to_numeric(table[name], errors="coerce") if name in table else pd.Series(dtype=float)
        if len(wrong := np.flatnonzero(~(values.between(0, high) & np.isfinite(values)))):
            row = table.iloc[wrong[0]]
            raise AwaresValueError(f"{place}, row {row.row_id}: {name} is {row[name]}, not a number from 0 to {high:g}")
    if table.row_id.duplicated().any():
        raise AwaresValueError(f"{place}: row {table.row_id[table.row_id.duplicated()].iloc[0]} stands twice")
    columns = {"accuracy": "score", "rtr": "rtr", "characters": "characters"}
    parts = {name: (table[column].to_numpy(float), None) for name, column in columns.items() if column in table}
    return RowSet(place, tuple(table.row_id), tuple(table.benchmark), parts)


def _agreement(place: str, rows: datasets.Dataset, judge: str) -> RowSet:
    """Whether ``judge`` gives each curated row the label that the deciding judge gives it."""
    column = f"verdict_{judge}"
    if column not in rows.column_names:
        raise MissingRows(f"{place}: the rows have no verdicts of this judge")
    same = [label(one) == label(deciding) for one, deciding in zip(rows[column][:], rows["verdict"][:], strict=True)]
    parts: dict[str, Parts] = {"agreement": (np.array(same, float), np.ones(len(rows)))}
    return RowSet(place, tuple(rows["id"][:]), tuple(rows["source"][:]), parts)
