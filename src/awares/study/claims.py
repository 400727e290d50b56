"""The paper's claims, decided by our runs: one predicate per claim, on a quantity with an interval.

A claim *holds* if the whole interval is on the claimed side of the margin, *does not hold* if it is wholly on the other
side, and is *undecided* otherwise, also without its runs. data/paper/claims.csv has the wording under the same id:
section and tables of the paper, the quantity with its unit, and the reason why a claim fails here (if known).
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awares.config import Params, find_file
from awares.errors import AwaresValueError
from awares.study.scores import MEASURES, MissingRows, Policy, Runs, Sample, trained
from awares.study.tables import save_table

FILE = Path("data/paper/claims.csv")
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
COLUMNS = ["claim", "section", "quantity", "effect", "low", "high", "seeds", "verdict"]
SFT_VARIANTS = "turn weight_1 upsampled phased labels_anls".split()
GRPO_VARIANTS = "grpo_only no_tool_cost no_area_cost reward_anls reward_judge no_miss_cost visionthink".split()
PRUNERS = tuple(f"{name}_{kept}" for name in ("visionzip", "holov", "sparsevlm") for kept in (50, 70))
POLICIES: dict[str, Policy] = {
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
    sample: Callable[[Runs, Sequence[int]], Sample]
    least: float = -math.inf  # what it can be at all; Student's noise may go beyond
    most: float = math.inf

    def __sub__(self, other: "Quantity") -> "Quantity":
        return self._with(other, operator.sub)

    def __truediv__(self, other: "Quantity") -> "Quantity":
        return self._with(other, operator.truediv, least=0.0)

    def __abs__(self) -> "Quantity":
        return Quantity(self.policies, self.kind, lambda runs, seeds: abs(self.sample(runs, seeds)), least=0.0)

    def __gt__(self, margin: float) -> "Predicate":
        return Predicate((self,), "above", float(margin))

    def __lt__(self, margin: float) -> "Predicate":
        return Predicate((self,), "below", float(margin))

    def within(self, margin: float) -> "Predicate":
        """Between -``margin`` and ``margin``."""
        return Predicate((self,), "within", float(margin))

    def _with(self, other: "Quantity", join: Callable[[Any, Any], Sample], least: float = -math.inf) -> "Quantity":
        def both(runs: Runs, seeds: Sequence[int]) -> Sample:
            return join(self.sample(runs, seeds), other.sample(runs, seeds))

        return Quantity(tuple(dict.fromkeys(self.policies + other.policies)), self.kind, both, least)


@dataclass(frozen=True)
class Predicate:
    """All ``quantities`` are on one ``side`` of ``margin``: above, below, or within plus and minus it."""

    quantities: tuple[Quantity, ...]
    side: str
    margin: float

    def verdict(self, low: float, high: float) -> str:
        """From an interval; nan is undecided."""
        if self.side == "within":
            right, wrong = -self.margin < low and high < self.margin, low > self.margin or high < -self.margin
        elif self.side == "above":
            right, wrong = low > self.margin, high < self.margin
        else:
            right, wrong = high < self.margin, low > self.margin
        return HOLDS if right else FAILS if wrong else UNDECIDED


def measure(name: str, policy: str, *benchmarks: str) -> Quantity:
    """A measure of scores.MEASURES; ``benchmarks``: all by default."""
    kind, factor = MEASURES[name]
    most = 100.0 if factor == 100 else math.inf
    return Quantity((policy,), kind, lambda runs, seeds: runs.sample(name, policy, seeds, benchmarks), 0.0, most)


def correlation(policy: str, x: str, y: str) -> Quantity:
    """Of two measures, over the rows of a policy."""
    return Quantity((policy,), MEASURES[x][0], lambda runs, seeds: runs.correlation(x, y, policy, seeds), -1.0, 1.0)


def time_ratio(system: str, over: str) -> Quantity:
    """Time of a system over that of another at batch 1, from latency/ratios.csv below reports/<profile>."""

    def sample(runs: Runs, _: Sequence[int]) -> Sample:
        file = runs.params.report_dir() / "latency" / "ratios.csv"
        if not file.is_file():
            raise MissingRows("latency/ratios.csv is not there")
        table = pd.read_csv(file, dtype=str).set_index(["system", "over", "batch"])
        if (system, over, "1") not in table.index:
            raise MissingRows(f"latency/ratios.csv has no {system} over {over} at batch 1")
        value, low, high = table.loc[(system, over, "1"), ["ratio", "ratio_low", "ratio_high"]].astype(float)
        return Sample(value, np.repeat([low, high], 50))  # its percentile interval is [low, high]

    return Quantity((), "", sample)


def every(predicates: Iterable[Predicate]) -> Predicate:
    """All of several predicates with one side and margin."""
    found = list(predicates)
    return Predicate(tuple(quantity for one in found for quantity in one.quantities), found[0].side, found[0].margin)


accuracy, rtr, characters, call_rate, recall, f1, fpr, exact, relaxed, area, whole_image, valid, agreement = (
    partial(measure, name)
    for name in ("accuracy", "rtr", "characters", "call_rate", "recall", "f1", "fpr", "exact", "relaxed", "area")
    + ("whole_image", "valid", "agreement")
)
DOCUMENTS = ("chartqa", "docvqa", "ocrbench")

# The margin is 0 where the paper claims no more than a direction; where it claims a size, a comment says how we read it
# fmt: off
CLAIMS: dict[str, Predicate] = {
    # Accuracy and tokens
    "matches_full": accuracy("awares") - accuracy("full") > -0.5,  # 0.16 behind in Table 1; we allow half a point
    "fraction_of_tokens": rtr("awares") < 0.5,  # 0.36 in Table 1; "a fraction" has to mean under half
    "exceeds_full_on_documents": accuracy("awares", *DOCUMENTS) - accuracy("full", *DOCUMENTS) > 0,
    "exceeds_full_on_charts": accuracy("awares", "chartqa") - accuracy("full", "chartqa") > 0,
    "half_loses_detail": accuracy("full") - accuracy("half") > 0,
    "exceeds_half": accuracy("awares") - accuracy("half") > 0,
    # Token pruning
    "beats_pruners": every(accuracy("awares") - accuracy(name) > 0 for name in PRUNERS),
    "beats_pruners_at_half": every(accuracy("awares") - accuracy(name) > 0 for name in PRUNERS if name.endswith("50")),
    "fewer_tokens_than_pruners": every(rtr("awares") - rtr(name) < 0 for name in PRUNERS),
    "beats_visionzip_70": accuracy("awares") - accuracy("visionzip_70") > 0,
    # Escalation to the whole image
    "beats_visionthink": accuracy("awares") - accuracy("visionthink") > 0,
    "fewer_tokens_than_visionthink": rtr("awares") - rtr("visionthink") < 0,
    "visionthink_overspends_on_charts": rtr("visionthink", "chartqa") > 1,
    "shorter_responses": characters("visionthink") / characters("awares") > 2,  # 6 to 29 in Table 6
    "faster_than_escalation": time_ratio("escalate_full", "awares") > 1,
    "reuse_saves_time": time_ratio("awares_naive", "awares") > 1,
    # Labels
    "detail_is_rarely_needed": measure("hr", "oracle") < 50,  # 19.2 in Fig. 5; "most" is more than half
    "detail_is_local": measure("whole_of_calls", "oracle") < 50,  # 3.4 of 19.2 in Fig. 5; "seldom" is less than half
    "judges_agree": agreement("judge_embedding") > 95,  # 96.88 between two language models
    "anls_agrees_less": agreement("judge_anls") - agreement("judge_embedding") < 0,
    "anls_labels_cost_accuracy": accuracy("labels_anls") - accuracy("sft") < 0,  # 3.8 in Table 10
    "anls_labels_save_tokens": rtr("labels_anls") - rtr("sft") < 0,
    # Policy flow
    "sft_overcalls": call_rate("sft") - call_rate("oracle") > 0,
    "sft_overasks": whole_image("sft") - whole_image("oracle") > 0,
    "grpo_calls_less": call_rate("awares") - call_rate("sft") < 0,
    "grpo_asks_less": whole_image("awares") - whole_image("sft") < 0,
    "grpo_nears_the_oracle":
        abs(call_rate("sft") - call_rate("oracle")) - abs(call_rate("awares") - call_rate("oracle")) > 0,
    "calls_where_needed": correlation("awares", "call_rate", "hr") > 0,
    # SFT. Turns, up-sampled rows and phases take more updates per epoch: a difference is one of the whole recipe
    "trajectories_beat_turns": accuracy("weight_1") - accuracy("turn") > 0,
    "trajectories_find_more": recall("weight_1") - recall("turn") > 0,
    "trajectories_decide_better": f1("weight_1") - f1("turn") > 0,
    "trajectories_point_better": relaxed("weight_1") - relaxed("turn") > 0,
    "trajectories_ask_for_less": area("weight_1") - area("turn") < 0,
    "trajectories_parse_better": valid("weight_1") - valid("turn") > 0,
    "weight_raises_accuracy": accuracy("sft") - accuracy("weight_1") > 0,
    "weight_costs_tokens": rtr("sft") - rtr("weight_1") > 0,
    "weight_raises_calls": call_rate("sft") - call_rate("weight_1") > 0,
    "weight_raises_f1": f1("sft") - f1("weight_1") > 0,
    "weight_lowers_needless_calls": fpr("sft") - fpr("weight_1") < 0,  # Table 7 contradicts Table 8 there
    "weight_raises_exact_match": exact("sft") - exact("weight_1") > 0,
    "weight_points_better": relaxed("sft") - relaxed("weight_1") > 0,
    "weight_makes_calls_parse": valid("sft") > 99,  # 100 in Table 9; 99 leaves room for one call in a hundred
    "upsampling_saves_tokens": rtr("upsampled") - rtr("weight_1") < 0,
    "upsampling_costs_accuracy": accuracy("upsampled") - accuracy("weight_1") < 0,
    "phases_do_not_pay": accuracy("phased") - accuracy("weight_1") < 0,
    # GRPO
    "grpo_saves_tokens": rtr("awares") - rtr("sft") < 0,
    "grpo_keeps_accuracy": accuracy("awares") - accuracy("sft") > -0.5,  # 0.6 ahead in Table 4; as in matches_full
    "area_cost_saves_tokens": rtr("no_area_cost") - rtr("awares") > 0,
    "tool_costs_save_tokens":
        every([rtr("no_tool_cost") - rtr("no_area_cost") > 0, rtr("no_area_cost") - rtr("awares") > 0]),
    "area_cost_shrinks_requests": area("awares") - area("no_area_cost") < 0,
    "miss_cost_raises_recall": recall("awares") - recall("no_miss_cost") > 0,
    "reference_holds_tokens":  # 0.02 against 0.13 in Table 4
        abs(rtr("awares") - rtr("sft")) - abs(rtr("no_tool_cost") - rtr("sft")) > 0,
    "anls_reward_is_as_good": (accuracy("reward_anls") - accuracy("awares")).within(0.5),  # 0.34 apart in Table 4
    "judge_reward_is_as_good": (accuracy("reward_judge") - accuracy("awares")).within(0.5),  # 0.40 apart in Table 4
    "grpo_only_hardly_calls": call_rate("grpo_only") / call_rate("awares") < 0.5,  # "hardly": less than half as often
    "grpo_only_is_less_accurate": accuracy("grpo_only") - accuracy("awares") < 0,
}
# fmt: on


def decide(claim: Predicate, runs: Runs) -> dict[str, Any]:
    """Effect, interval, seeds, verdict and note (what is missing) of the quantity that is hardest for the claim.

    The end that any of several quantities could reach uses the level 1 - (1 - level) / their number (Bonferroni).
    Raises AwaresError for inputs that are there and are wrong.
    """
    parts, level = claim.quantities, runs.params.evaluation.level
    found: dict[str, Any] = {
        "effect": math.nan,
        "low": math.nan,
        "high": math.nan,
        "seeds": 0,
        "verdict": UNDECIDED,
        "note": "",
    }
    try:
        seeds = runs.seeds(tuple(dict.fromkeys(name for one in parts for name in one.policies)), parts[0].kind)
        samples = [one.sample(runs, seeds) for one in parts]
    except MissingRows as missing:
        return found | {"note": str(missing)}
    hardest, stricter = (max if claim.side == "below" else min), 1 - (1 - level) / len(samples)
    found |= {"effect": hardest(one.value for one in samples), "seeds": len(seeds)}
    if not all(one.defined for one in samples):
        return found | {"note": "too few rows decide it: some resamples hold none"}
    near, far = ([one.interval(level) for one in samples], [one.interval(stricter) for one in samples])
    lows, highs = (far, near) if claim.side == "below" else (near, far)
    low = max(min(found["effect"], hardest(low for low, _ in lows)), parts[0].least)
    high = min(max(found["effect"], hardest(high for _, high in highs)), parts[0].most)
    return found | {"low": low, "high": high, "verdict": claim.verdict(low, high)}


def claims_table(params: Params) -> pd.DataFrame:
    """One line per claim: COLUMNS, then id, tables (of the paper), holds (side), margin, note."""
    texts = pd.read_csv(find_file(FILE), dtype=str, keep_default_na=False)
    if wrong := set(texts.id) ^ set(CLAIMS):
        raise AwaresValueError(
            f"{FILE}: {', '.join(sorted(wrong))} must have a line here and a predicate in study/claims.py"
        )
    runs = Runs(params, POLICIES)
    found = pd.DataFrame([decide(CLAIMS[name], runs) for name in texts.id])
    found["note"] = found.note.where(found.verdict != FAILS, texts.reason)
    sides = {"holds": [CLAIMS[name].side for name in texts.id], "margin": [CLAIMS[name].margin for name in texts.id]}
    return texts.join(found).assign(**sides)[[*COLUMNS, "id", "tables", "holds", "margin", "note"]]


def save_claims(params: Params, folder: Path) -> pd.DataFrame:
    """Write claims.csv (COLUMNS) and claims_notes.csv (how each is decided and why it fails); return both."""
    table = claims_table(params)
    save_table(table[["id", "claim", "tables", "holds", "margin", "verdict", "note"]], folder / "claims_notes.csv")
    save_table(table[COLUMNS], folder / "claims.csv")
    return table
