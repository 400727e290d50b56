"""The paper's claims (data/paper/claims.yaml) against our runs: one quantity each, its interval, and what follows from it.

A claim names a measure, the policies it contrasts, a side and a margin. Its verdict is read off the interval and nothing
else: it *holds* where the whole interval lies on the claimed side of the margin, *does not hold* where it lies wholly on
the other, and is *undecided* else, also where a stage that it needs has not been run.

Kinds, with S(p) the measure of policy p (awares.measures):

    level        S(a)
    difference   S(a) - S(b); of several b the one that is hardest for the claim
    ratio        S(a) / S(b); likewise
    order        the smallest step S(of[i]) - S(of[i+1]) down the list
    closer       |S(b) - S(to)| - |S(a) - S(to)|: how much nearer a is to `to` than b is
    correlation  of measures x and y over the rows of a
    cell         one cell of a csv below reports/<profile>, with the interval that stands beside it
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import pandas as pd
import yaml

from awares.config import TASKS, Params, find_file
from awares.errors import AwaresFileError, AwaresValueError
from awares.study import published as paper
from awares.study.scores import EVALUATION, KINDS, MEASURES, MissingRows, Runs, Sample, worst
from awares.study.tables import save_table

FILE = "data/paper/claims.yaml"
REASONS = "reasons.yaml"  # beside it
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
COLUMNS = ["claim", "section", "quantity", "effect", "low", "high", "seeds", "verdict"]
SIDES = ("above", "below", "within")  # of the margin; within: between -margin and margin


@dataclass(frozen=True)
class Claim:
    """One entry of claims.yaml; what a kind does not use is empty."""

    id: str
    claim: str
    section: str
    tables: tuple[str, ...]
    quantity: str
    kind: str
    holds: str
    margin: float
    measure: str = ""
    a: str = ""
    b: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    to: str = ""
    x: str = ""
    y: str = ""
    benchmarks: tuple[str, ...] = ()
    table: str = ""
    column: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def policies(self) -> tuple[str, ...]:
        """Every policy that the claim is about, once."""
        return tuple(dict.fromkeys(name for name in (self.a, *self.b, *self.of, self.to) if name))


@dataclass(frozen=True)
class Finding:
    """What came out: nan where nothing did, and then why in ``note``. ``seeds``: training seeds behind it."""

    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 0
    note: str = ""


def verdict(low: float, high: float, holds: str, margin: float) -> str:
    """From an interval and the claimed side of a margin; nan is undecided."""
    if holds == "within":
        right, wrong = -margin < low and high < margin, low > margin or high < -margin
    elif holds == "above":
        right, wrong = low > margin, high < margin
    else:
        right, wrong = high < margin, low > margin
    return HOLDS if right else FAILS if wrong else UNDECIDED


# What decides a claim

Take = Callable[[str], Sample]


def _level(claim: Claim, take: Take) -> list[Sample]:
    return [take(claim.a)]


def _difference(claim: Claim, take: Take) -> list[Sample]:
    return [take(claim.a) - take(name) for name in claim.b]


def _ratio(claim: Claim, take: Take) -> list[Sample]:
    return [take(claim.a) / take(name) for name in claim.b]


def _order(claim: Claim, take: Take) -> list[Sample]:
    found = [take(name) for name in claim.of]
    return [high - low for high, low in zip(found, found[1:], strict=False)]


def _closer(claim: Claim, take: Take) -> list[Sample]:
    to, a = take(claim.to), take(claim.a)
    return [abs(take(name) - to) - abs(a - to) for name in claim.b]


_FROM_ROWS: dict[str, tuple[tuple[str, ...], Callable[[Claim, Take], list[Sample]]]] = {
    "level": (("measure", "a"), _level),
    "difference": (("measure", "a", "b"), _difference),
    "ratio": (("measure", "a", "b"), _ratio),
    "order": (("measure", "of"), _order),
    "closer": (("measure", "a", "b", "to"), _closer),
}
# kind -> the keys that it needs beside those that every claim has
NEEDS = {kind: needs for kind, (needs, _) in _FROM_ROWS.items()}
NEEDS |= {"correlation": ("a", "x", "y"), "cell": ("table", "column", "row")}


def decide(claim: Claim, runs: Runs) -> Finding:
    """Effect and interval of one claim; without its inputs, or with too few rows that count, a finding with a note.

    Raises AwaresError for inputs that are there and are wrong.
    """
    try:
        if claim.kind == "cell":
            return _from_cell(claim, runs.params)
        kind = MEASURES[claim.measure or claim.x][0]
        seeds = runs.seeds(claim.policies, kind)
        if claim.kind == "correlation":
            samples = [runs.correlation(claim.x, claim.y, claim.a, seeds)]
        else:
            contrast = _FROM_ROWS[claim.kind][1]
            samples = contrast(claim, lambda name: runs.sample(claim.measure, name, seeds, claim.benchmarks))
    except MissingRows as missing:
        return Finding(note=str(missing))
    effect, low, high = worst(samples, claim.holds != "below", runs.params.evaluation.level)
    if not all(sample.defined for sample in samples):
        return Finding(effect, seeds=len(seeds), note="too few rows decide it: some resamples hold none")
    least, most = _range(claim)
    return Finding(effect, max(min(low, effect), least), min(max(high, effect), most), len(seeds))


def _range(claim: Claim) -> tuple[float, float]:
    """What a claim's quantity can be at all, where noise of a Student's distribution may go beyond."""
    if claim.kind == "correlation":
        return -1.0, 1.0
    share = claim.kind == "level" and MEASURES[claim.measure][1] == 100
    return (0.0 if claim.kind in ("level", "ratio") else -math.inf), (100.0 if share else math.inf)


def _from_cell(claim: Claim, params: Params) -> Finding:
    """From a csv below reports/<profile>; the interval of column c stands in c_low and c_high."""
    file = params.report_dir() / claim.table
    if not file.is_file():
        raise MissingRows(f"{file.relative_to(params.root) if file.is_relative_to(params.root) else file} is not there")
    table = pd.read_csv(file)
    value, low, high = _cell(file.name, table, claim.row, claim.column)
    return Finding(value, low, high, seeds=1)


def _cell(name: str, table: pd.DataFrame, row: Mapping[str, Any], column: str) -> tuple[float, float, float]:
    columns = [column, f"{column}_low", f"{column}_high"]
    if missing := [one for one in (*row, *columns) if one not in table]:
        raise AwaresValueError(f"{name}: column {', '.join(missing)} missing; it has {', '.join(table.columns)}")
    found = table[(table[list(row)].astype(str) == pd.Series(row).astype(str)).all(axis=1)]
    asked = ", ".join(f"{key} {value}" for key, value in row.items())
    if found.empty or found[columns].isna().any(axis=None):
        raise MissingRows(f"{name} has no {column} for {asked}")
    if len(found) > 1:
        raise AwaresValueError(f"{name}: {len(found)} rows for {asked}, one wanted")
    value, low, high = (float(number) for number in found[columns].iloc[0])
    return value, low, high


# The table


def claims_table(params: Params, path: str | Path = FILE) -> pd.DataFrame:
    """One line per claim: COLUMNS, then id, tables (of the paper), holds, margin and note.

    ``effect`` in the unit that ``quantity`` tells, ``seeds`` 0 where nothing could be computed.
    """
    policies, claims = load_claims(path)
    runs = Runs(params, policies)
    records = []
    for claim in claims:
        found = decide(claim, runs)
        said = verdict(found.low, found.high, claim.holds, claim.margin)
        row = (claim.claim, claim.section, claim.quantity, found.effect, found.low, found.high, found.seeds, said)
        records.append((*row, claim.id, " ".join(claim.tables), claim.holds, claim.margin, found.note))
    return pd.DataFrame(records, columns=[*COLUMNS, "id", "tables", "holds", "margin", "note"])


def save_claims(params: Params, folder: Path, path: str | Path = FILE) -> pd.DataFrame:
    """Write claims.csv (COLUMNS) and claims_notes.csv (id, how it is decided, why it is undecided or does not hold); return both as one."""
    table = claims_table(params, path)
    reasons = load_reasons(table.id.tolist(), Path(path).with_name(REASONS))
    failing = table.verdict == FAILS
    table["note"] = table.note.where(~failing, table.id.map(lambda key: reasons.get(key, "")))
    save_table(table[["id", "claim", "tables", "holds", "margin", "verdict", "note"]], folder / "claims_notes.csv")
    save_table(table[COLUMNS], folder / "claims.csv")
    return table


def load_reasons(ids: Sequence[str], path: str | Path) -> dict[str, str]:
    """Why a claim does not hold here, by its id: what we have found out about it. Shown where it fails, and nowhere else.

    Raises AwaresError naming an id that is no claim's, or text that is none.
    """
    file = find_file(Path(path))
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise AwaresFileError(f"{file.name} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise AwaresValueError(f"{file.name} must map ids of claims to text")
    for key, text in raw.items():
        _one_of(file.name, "claim", key, ids)
        if not isinstance(text, str) or not text.strip():
            raise AwaresValueError(f"{file.name}: {key} must be text, not {text!r}")
    return {key: " ".join(text.split()) for key, text in raw.items()}


# claims.yaml


def load_claims(path: str | Path = FILE) -> tuple[dict[str, dict[str, str]], list[Claim]]:
    """The policies (where their rows lie) and the claims, checked against what measures, tables and sections there are.

    Raises AwaresError naming the claim and the key.
    """
    file = find_file(Path(path))
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise AwaresFileError(f"{file.name} is not YAML: {error}") from error
    if not isinstance(raw, dict) or set(raw) != {"policies", "claims"} or not isinstance(raw["claims"], list):
        raise AwaresValueError(f"{file.name} must hold policies (a mapping) and claims (a list)")
    policies = _policies(file.name, raw["policies"])
    published = paper.load_paper()
    claims = [_claim(f"{file.name}, claim {n}", one, policies, published) for n, one in enumerate(raw["claims"], 1)]
    for key in ("id", "claim"):
        values = [getattr(claim, key) for claim in claims]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise AwaresValueError(f"{file.name}: {key} {twice[0]!r} stands twice")
    return policies, claims


def _policies(name: str, raw: Any) -> dict[str, dict[str, str]]:
    for policy, paths in raw.items() if isinstance(raw, dict) else [(name, None)]:
        if not isinstance(paths, dict) or not paths or not all(isinstance(path, str) for path in paths.values()):
            raise AwaresValueError(f"{name}, policy {policy}: a mapping of {', '.join(KINDS)} to paths is wanted")
        if unknown := set(paths) - {*KINDS, "judge", "like"}:
            raise AwaresValueError(f"{name}, policy {policy}: unknown key {', '.join(sorted(unknown))}")
        if (kin := paths.get("like", policy)) not in raw or not (set(paths) & set(KINDS)) <= set(raw[kin]):
            raise AwaresValueError(
                f"{name}, policy {policy}: like must name a policy with the same kinds of rows, not {kin!r}"
            )
        for path in paths.values():
            if unknown := {part for _, part, _, _ in Formatter().parse(path) if part} - {"seed", "main"}:
                raise AwaresValueError(f"{name}, policy {policy}: unknown part {{{unknown.pop()}}} in {path}")
    return raw


_EVERY = ("id", "claim", "section", "tables", "quantity", "kind", "holds", "margin")
_LISTS = ("tables", "b", "of", "benchmarks")


def _claim(place: str, raw: Any, policies: Mapping[str, Mapping[str, str]], published: paper.Paper) -> Claim:
    if not isinstance(raw, dict):
        raise AwaresValueError(f"{place} must be a mapping with {', '.join(_EVERY)}")
    place = f"{place} ({raw.get('id')})"
    _one_of(place, "kind", raw.get("kind"), tuple(NEEDS))
    wanted = {*_EVERY, *NEEDS[raw["kind"]]}
    optional = {"benchmarks"} if MEASURES.get(str(raw.get("measure", "")), ("",))[0] == EVALUATION else set()
    if wrong := sorted((wanted - set(raw)) | (set(raw) - wanted - optional)):
        raise AwaresValueError(f"{place}: {', '.join(wrong)} missing or unknown; a {raw['kind']} has {sorted(wanted)}")
    claim = Claim(**{key: _typed(place, key, value) for key, value in raw.items()})
    _one_of(place, "holds", claim.holds, SIDES)
    _one_of(place, "section", claim.section, published.sections)
    for key, names, known in (
        ("tables", claim.tables, tuple(published.tables)),
        ("benchmarks", claim.benchmarks, TASKS),
        ("policy", claim.policies, tuple(policies)),
        ("measure", tuple(name for name in (claim.measure, claim.x, claim.y) if name), tuple(MEASURES)),
    ):
        for name in names:
            _one_of(place, key, name, known)
    _check_whole(place, claim, policies)
    return claim


def _typed(place: str, key: str, value: Any) -> Any:
    if key == "margin":
        if type(value) not in (int, float) or not math.isfinite(value):
            raise AwaresValueError(f"{place}: margin must be a number, not {value!r}")
        return float(value)
    if key == "row":
        if not isinstance(value, dict) or not value:
            raise AwaresValueError(f"{place}: {key} must map columns to values, not {value!r}")
        return value
    names = [value] if key == "b" and isinstance(value, str) else value
    if key in _LISTS:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AwaresValueError(f"{place}: {key} must be a list of names, not {value!r}")
        return tuple(names)
    if not isinstance(value, str) or not value.strip():
        raise AwaresValueError(f"{place}: {key} must be text, not {value!r}")
    return value


def _check_whole(place: str, claim: Claim, policies: Mapping[str, Mapping[str, str]]) -> None:
    """Conditions that bind several keys."""
    if claim.holds == "within" and (claim.margin <= 0 or len(claim.b) > 1):
        raise AwaresValueError(f"{place}: within needs a margin above 0 and at most one b")
    if claim.kind in ("order", "closer") and claim.holds != "above":
        raise AwaresValueError(f"{place}: a claim of kind {claim.kind} holds above its margin")
    if "b" in NEEDS[claim.kind] and not claim.b or claim.kind == "order" and len(claim.of) < 2:
        raise AwaresValueError(f"{place}: there is nothing to compare with")
    if claim.kind == "cell":
        return
    kinds = {MEASURES[name][0] for name in (claim.measure, claim.x, claim.y) if name}
    for policy in claim.policies:
        if len(kinds) > 1 or not kinds <= set(policies[policy]):
            raise AwaresValueError(f"{place}: policy {policy} has no path for {' and '.join(sorted(kinds))} rows")


def _one_of(place: str, key: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise AwaresValueError(f"{place}: unknown {key} {value!r}, choose from {', '.join(known)}")
