"""The paper's claims, decided by our runs: one predicate per claim, on a quantity with an interval.

A claim *holds* if the whole interval is on the claimed side of the margin, *does not hold* if it is wholly on the other
side, and is *undecided* otherwise, also without its runs. data/paper/claims.csv has a line per claim: section and tables
of the paper, wording, quantity with its unit, predicate, how we read its margin (0 where the paper claims no more than a
direction), and the reason why the claim fails here (if known).
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awares.config import Params, find_file
from awares.errors import AwaresValueError
from awares.study.scores import MEASURES, Estimate, MissingRows, PolicyFiles, Runs, trained
from awares.study.tables import save_table

CLAIMS_FILE = Path("data/paper/claims.csv")
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
CLAIM_COLUMNS = ["claim", "section", "quantity", "effect", "low", "high", "seeds", "verdict"]
SFT_VARIANTS = "turn weight_1 upsampled phased labels_anls".split()
GRPO_VARIANTS = "grpo_only no_tool_cost no_area_cost reward_anls reward_judge no_miss_cost visionthink".split()
PRUNERS = tuple(f"{name}_{kept}" for name in ("visionzip", "holov", "sparsevlm") for kept in (50, 70))
CLAIMED_POLICIES: dict[str, PolicyFiles] = {
    **{name: {"evaluation": f"evaluation/main-s{{main}}/trajectories/{name}.jsonl"} for name in ("full", "half")},
    "sft": trained("main", "sft"),
    "awares": trained("main", "grpo"),
    **{name: trained(name, "sft", like="sft") for name in SFT_VARIANTS},
    **{name: trained(name, "grpo", like="awares") for name in GRPO_VARIANTS},
    **{name: {"evaluation": f"systems/{name}/scores.csv"} for name in PRUNERS},
    "oracle": {"validation": "curation/main/validation/dataset"},
    **{f"judge_{name}": {"curation": "curation/main/train/dataset", "judge": name} for name in ("embedding", "anls")},
}


@dataclass(frozen=True)
class Quantity:
    """A number of several policies, computed once it is known which training seeds all of them have."""

    policies: tuple[str, ...]
    kind: str  # of rows
    estimate: Callable[[Runs, Sequence[int]], Estimate]
    least: float = -math.inf  # what it can be at all; Student's noise may go beyond
    most: float = math.inf

    def __sub__(self, other: "Quantity") -> "Quantity":
        return self._with(other, operator.sub)

    def __truediv__(self, other: "Quantity") -> "Quantity":
        return self._with(other, operator.truediv, least=0.0)

    def __abs__(self) -> "Quantity":
        return Quantity(self.policies, self.kind, lambda runs, seeds: abs(self.estimate(runs, seeds)), least=0.0)

    def __gt__(self, margin: float) -> "Predicate":
        return Predicate((self,), "above", float(margin))

    def __lt__(self, margin: float) -> "Predicate":
        return Predicate((self,), "below", float(margin))

    def within(self, margin: float) -> "Predicate":
        """Between -``margin`` and ``margin``."""
        return Predicate((self,), "within", float(margin))

    def _with(self, other: "Quantity", join: Callable[[Any, Any], Estimate], least: float = -math.inf) -> "Quantity":
        def both(runs: Runs, seeds: Sequence[int]) -> Estimate:
            return join(self.estimate(runs, seeds), other.estimate(runs, seeds))

        return Quantity(tuple(dict.fromkeys(self.policies + other.policies)), self.kind, both, least)


@dataclass(frozen=True)
class Predicate:
    """All ``quantities`` are on one ``side`` of ``margin``: above, below, or within plus and minus it."""

    quantities: tuple[Quantity, ...]
    side: str
    margin: float

    def verdict(self, low: float, high: float) -> str:
        """From an interval; nan is undecided."""
        floor = {"above": self.margin, "within": -self.margin}.get(self.side, -math.inf)
        ceiling = math.inf if self.side == "above" else self.margin
        return HOLDS if floor < low and high < ceiling else FAILS if high < floor or low > ceiling else UNDECIDED


def measured(name: str, policy: str, *benchmarks: str) -> Quantity:
    """A measure of scores.MEASURES; ``benchmarks``: all by default."""
    kind, factor = MEASURES[name]
    most = 100.0 if factor == 100 else math.inf
    return Quantity((policy,), kind, lambda runs, seeds: runs.estimate(name, policy, seeds, benchmarks), 0.0, most)


def correlation(policy: str, x: str, y: str) -> Quantity:
    """Of two measures, over the rows of a policy."""
    return Quantity((policy,), MEASURES[x][0], lambda runs, seeds: runs.correlation(x, y, policy, seeds), -1.0, 1.0)


def time_ratio(system: str, over: str) -> Quantity:
    """Time of a system over that of another at batch 1, from latency/ratios.csv below reports/<profile>."""

    def estimate(runs: Runs, _: Sequence[int]) -> Estimate:
        file = runs.params.report_dir() / "latency" / "ratios.csv"
        if not file.is_file():
            raise MissingRows("latency/ratios.csv is not there")
        table = pd.read_csv(file, dtype={"batch": str}).query("system == @system and over == @over and batch == '1'")
        if table.empty:
            raise MissingRows(f"latency/ratios.csv has no {system} over {over} at batch 1")
        value, low, high = table[["ratio", "ratio_low", "ratio_high"]].iloc[0]
        return Estimate(value, np.repeat([low, high], 50))  # its percentile interval is [low, high]

    return Quantity((), "", estimate)


def every(predicates: Iterable[Predicate]) -> Predicate:
    """All of several predicates with one side and margin."""
    found = list(predicates)
    return Predicate(tuple(quantity for one in found for quantity in one.quantities), found[0].side, found[0].margin)


def read_predicate(text: str) -> Predicate:
    """The predicate of a line of claims.csv, a Python expression: quantities of policies, joined by - / abs < > within.

    Policies and benchmarks are bare words. Raises AwaresValueError for another expression.
    """
    words: dict[str, Any] = {word: word for word in re.findall(r"[a-z]\w*", text)}
    words |= {name: partial(measured, name) for name in MEASURES}
    words |= {"pruners": PRUNERS, "pruners_at_half": [name for name in PRUNERS if name.endswith("50")]}
    words |= {"abs": abs, "every": every, "correlation": correlation, "time_ratio": time_ratio}
    try:
        return eval(text, {"__builtins__": {}, **words})  # a file of this repository, without Python's own functions
    except Exception as error:
        raise AwaresValueError(f"{CLAIMS_FILE}: no predicate: {text} ({error})") from error


def read_claims() -> pd.DataFrame:
    """data/paper/claims.csv, the column predicate as `Predicate` objects."""
    texts = pd.read_csv(find_file(CLAIMS_FILE), dtype=str, keep_default_na=False)
    return texts.assign(predicate=[read_predicate(text) for text in texts.predicate])


def decide(claim: Predicate, runs: Runs) -> dict[str, Any]:
    """Effect, interval, seeds, verdict and note (what is missing) of the quantity that is hardest for the claim.

    The end that any of several quantities could reach uses the level 1 - (1 - level) / their number (Bonferroni).
    Raises AwaresError for inputs that are there and are wrong.
    """
    parts, level = claim.quantities, runs.params.evaluation.level
    nothing = dict.fromkeys(("effect", "low", "high"), math.nan) | {"seeds": 0, "verdict": UNDECIDED, "note": ""}
    try:
        seeds = runs.seeds(tuple(dict.fromkeys(name for one in parts for name in one.policies)), parts[0].kind)
        estimates = [one.estimate(runs, seeds) for one in parts]
    except MissingRows as missing:
        return nothing | {"note": str(missing)}
    hardest, stricter = (max if claim.side == "below" else min), 1 - (1 - level) / len(estimates)
    effect = hardest(one.value for one in estimates)
    found = nothing | {"effect": effect, "seeds": len(seeds)}
    if not all(one.defined for one in estimates):
        return found | {"note": "too few rows decide it: some resamples hold none"}
    near, far = ([one.interval(level) for one in estimates], [one.interval(stricter) for one in estimates])
    lows, highs = (far, near) if claim.side == "below" else (near, far)
    low = max(min(effect, hardest(low for low, _ in lows)), parts[0].least)
    high = min(max(effect, hardest(high for _, high in highs)), parts[0].most)
    return found | {"low": low, "high": high, "verdict": claim.verdict(low, high)}


def claims_table(params: Params) -> pd.DataFrame:
    """One line per claim: CLAIM_COLUMNS, then id, tables (of the paper), holds (side), margin, note."""
    claims, runs = read_claims(), Runs(params, CLAIMED_POLICIES)
    table = claims.join(pd.DataFrame([decide(one, runs) for one in claims.predicate]))
    table["note"] = table.note.where(table.verdict != FAILS, table.reason)
    table["holds"] = [one.side for one in claims.predicate]
    table["margin"] = [one.margin for one in claims.predicate]
    return table[[*CLAIM_COLUMNS, "id", "tables", "holds", "margin", "note"]]


def save_claims(params: Params, folder: Path) -> pd.DataFrame:
    """Write claims.csv (CLAIM_COLUMNS) and claims_notes.csv (how each is decided and why it fails); return both."""
    table = claims_table(params)
    save_table(table[["id", "claim", "tables", "holds", "margin", "verdict", "note"]], folder / "claims_notes.csv")
    save_table(table[CLAIM_COLUMNS], folder / "claims.csv")
    return table
