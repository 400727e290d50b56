"""The paper's claims, decided by our runs.

data/paper/claims.csv has a line per claim: its section and tables in the paper, the wording, the quantity with its unit
and the ``expression`` that computes it, the side of the ``margin`` on which it ``holds`` (above, below, or within plus
and minus it; 0 where the paper claims only a direction), how we read the margin, and why the claim fails here.
A claim *holds* if the whole interval is on that side, *does not hold* if it is wholly on the other side, and is
*undecided* otherwise, also without its runs.
"""

import math
import re
from collections.abc import Sequence
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


def verdict(low: float, high: float, side: str, margin: float) -> str:
    """HOLDS, FAILS or UNDECIDED from an interval; nan is undecided."""
    floor = {"above": margin, "within": -margin}.get(side, -math.inf)
    ceiling = math.inf if side == "above" else margin
    return HOLDS if floor < low and high < ceiling else FAILS if high < floor or low > ceiling else UNDECIDED


def evaluate(expression: str, runs: Runs) -> tuple[list[Estimate], int]:
    """The estimates of an expression of claims.csv, and the number of training seeds that all of its policies have.

    A Python expression of measures (scores.MEASURES) of policies and benchmarks, which are bare words; it may use
    - / abs, ``correlation(policy, "x", "y")`` and ``time_ratio(system, over)``. A list is of several quantities.
    Raises MissingRows without its runs, AwaresValueError if it cannot be read.
    """
    words = re.findall(r"[a-z]\w*", expression)
    kinds = [MEASURES[word][0] for word in words if word in MEASURES]
    lists = {"pruners": PRUNERS, "pruners_at_half": [name for name in PRUNERS if name.endswith("50")]}
    policies = [name for word in words for name in lists.get(word, [word]) if name in runs.policies] if kinds else []
    seeds = runs.seeds(tuple(dict.fromkeys(policies)), kinds[0] if kinds else "")
    names: dict[str, Any] = {**{word: word for word in words}, **lists, "abs": abs}
    names |= {"time_ratio": lambda system, over: _time_ratio(runs.params, system, over)}
    names |= {"correlation": lambda policy, x, y: runs.correlation(x, y, policy, seeds)}
    for measure in MEASURES:
        names[measure] = lambda policy, *tasks, of=measure: runs.estimate(of, policy, seeds, tasks)
    try:  # text of a file of this repository, without Python's builtins
        found = eval(expression, {"__builtins__": {}, **names})
    except (SyntaxError, NameError, TypeError, ZeroDivisionError) as error:
        raise AwaresValueError(f"{CLAIMS_FILE}: {expression!r} cannot be computed ({error})") from error
    return found if isinstance(found, list) else [found], len(seeds)


def hardest(estimates: Sequence[Estimate], side: str, level: float) -> tuple[float, float, float]:
    """Effect, low and high of the estimate that is hardest for a claim on this ``side`` of a margin.

    The end that any of several estimates could reach has the level 1 - (1 - level) / their number (Bonferroni).
    """
    worst, stricter = (max if side == "below" else min), 1 - (1 - level) / len(estimates)
    effect = worst(one.value for one in estimates)
    near, far = ([one.interval(level) for one in estimates], [one.interval(stricter) for one in estimates])
    lows, highs = (far, near) if side == "below" else (near, far)
    low = max(min(effect, worst(low for low, _ in lows)), estimates[0].least)
    high = min(max(effect, worst(high for _, high in highs)), estimates[0].most)
    return effect, low, high


def decide(expression: str, side: str, margin: float, runs: Runs) -> dict[str, Any]:
    """Effect, interval, seeds, verdict and note (what is missing) of a claim.

    Raises AwaresError for existing inputs that are wrong.
    """
    found = dict.fromkeys(("effect", "low", "high"), math.nan) | {"seeds": 0, "verdict": UNDECIDED, "note": ""}
    try:
        estimates, found["seeds"] = evaluate(expression, runs)
    except MissingRows as missing:
        return found | {"note": str(missing)}
    if not np.isfinite([draw for one in estimates for draw in (one.value, *one.draws)]).all():
        effect = (max if side == "below" else min)(one.value for one in estimates)
        return found | {"effect": effect, "note": "too few rows decide it: some resamples hold none"}
    effect, low, high = hardest(estimates, side, runs.params.evaluation.level)
    return found | {"effect": effect, "low": low, "high": high, "verdict": verdict(low, high, side, margin)}


def read_claims() -> pd.DataFrame:
    """data/paper/claims.csv, everything but the margin as text."""
    return pd.read_csv(find_file(CLAIMS_FILE), dtype=str, keep_default_na=False).astype({"margin": float})


def save_claims(params: Params, folder: Path) -> pd.DataFrame:
    """One line per claim: CLAIM_COLUMNS, then id, tables (of the paper), holds (side), margin, note.

    Writes claims.csv (CLAIM_COLUMNS) and claims_notes.csv (how each is decided and why it fails) into ``folder``.
    """
    claims, runs = read_claims(), Runs(params, CLAIMED_POLICIES)
    found = [decide(one.expression, one.holds, one.margin, runs) for one in claims.itertuples()]
    table = claims.join(pd.DataFrame(found))
    table["note"] = table.note.where(table.verdict != FAILS, table.reason)
    save_table(table[["id", "claim", "tables", "holds", "margin", "verdict", "note"]], folder / "claims_notes.csv")
    save_table(table[CLAIM_COLUMNS], folder / "claims.csv")
    return table[[*CLAIM_COLUMNS, "id", "tables", "holds", "margin", "note"]]


def _time_ratio(params: Params, system: str, over: str) -> Estimate:
    """Time of a system over that of another at batch 1, from latency/ratios.csv below reports/<profile>."""
    file = params.report_dir() / "latency" / "ratios.csv"
    if not file.is_file():
        raise MissingRows("latency/ratios.csv is not there")
    table = pd.read_csv(file, dtype={"batch": str}).query("system == @system and over == @over and batch == '1'")
    if table.empty:
        raise MissingRows(f"latency/ratios.csv has no {system} over {over} at batch 1")
    value, low, high = table[["ratio", "ratio_low", "ratio_high"]].iloc[0]
    return Estimate(value, np.repeat([low, high], 50))  # its percentile interval is [low, high]
