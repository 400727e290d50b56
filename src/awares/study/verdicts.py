"""One verdict for every question: the claims, the pages and the README decide with these functions.

An effect has a normal error over rows, and one over its few trainings that follows Student's t. The interval adds both
in quadrature, which is never too narrow (Cochran): effect +- sqrt((z * rows)^2 + (t * trainings)^2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special, stats

HOLDS, FAILS, SAME, UNDECIDED = "holds", "does not hold", "equivalent", "not decidable here"
POWER = 0.8  # of the least detectable effect


@dataclass(frozen=True)
class Effect:
    """A quantity with its standard errors over rows and over trainings; ``ends``: the least and the most it can be.

    ``free``: degrees of freedom of ``trainings``; 0: nothing is known about other trainings, the interval is infinite
    (unless ``trainings`` is 0: none takes part). ``seeds``: trainings of each arm.
    """

    value: float
    rows: float
    trainings: float = 0.0
    free: int = 0
    seeds: int = 1
    ends: tuple[float, float] = (-math.inf, math.inf)

    def reach(self, tail: float, and_tail: float = 0.5) -> float:
        """How far a ``tail`` probability reaches on one side, plus that of ``and_tail`` (0.5 adds nothing)."""
        if self.trainings and not self.free:
            return math.inf
        normal = -special.ndtri(tail) - special.ndtri(and_tail)
        student = -special.stdtrit(self.free, tail) - special.stdtrit(self.free, and_tail) if self.trainings else 0.0
        return math.hypot(normal * self.rows, student * self.trainings)

    def interval(self, level: float) -> tuple[float, float]:
        reach = self.reach((1 - level) / 2)
        return max(self.value - reach, self.ends[0]), min(self.value + reach, self.ends[1])

    def p(self, margin: float) -> float:
        """Two-sided p value of the hypothesis that the effect is ``margin``."""
        distance = abs(self.value - margin)
        if self.trainings and not self.free or not distance:
            return 1.0
        tiny = 1e-12
        if self.reach(tiny / 2) <= distance:
            return tiny
        return float(optimize.brentq(lambda p: self.reach(p / 2) - distance, tiny, 1.0, xtol=1e-14))


class Judgement(NamedTuple):
    """What a claim's effects show, or nothing; ``statements``: (verdict, p), the preferred first; ``p``: the least."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: float = math.nan
    detectable: float = math.nan
    statements: tuple[tuple[str, float], ...] = ()
    p: float = math.nan


def weigh(effects: Sequence[Effect], side: str, margin: float, same: float, level: float) -> Judgement:
    """What ``effects`` say about a claim that all of them are ``above`` or ``below`` ``margin``, or ``within`` +- it.

    ``same`` > 0: the claim of a direction is equivalent if the difference is smaller. Of several effects all must be on
    the claimed side (the largest p decides), and one on the other side refutes it (the smallest p, times their number).
    The interval is that of the hardest effect, its far end as strict (Bonferroni). ``detectable``: the least distance
    from a margin (within: the least margin around 0) that is shown with POWER.
    """
    sign = -1 if side == "below" else 1
    hardest = min(effects, key=lambda one: sign * one.value)
    near, far = ([one.interval(at) for one in effects] for at in (level, 1 - (1 - level) / len(effects)))
    worst = max if side == "below" else min
    lows, highs = (far, near) if side == "below" else (near, far)
    ends = worst(low for low, _ in lows), worst(high for _, high in highs)
    if side == "within":
        inside = abs(hardest.value) < margin
        found = [(SAME if inside else FAILS, max(hardest.p(margin), hardest.p(-margin)))]
    else:
        against = [one.p(margin) for one in effects if sign * (one.value - margin) <= 0]
        p = min(1.0, len(effects) * min(against)) if against else max(one.p(margin) for one in effects)
        found = [(FAILS if against else HOLDS, p)]
        if same and abs(hardest.value - margin) < same:
            found.append((SAME, max(hardest.p(margin - same), hardest.p(margin + same))))
    detectable = hardest.reach((1 - level) / 2, (1 - POWER) / (2 if side == "within" else 1))
    return Judgement(hardest.value, *ends, hardest.seeds, detectable, tuple(found), min(p for _, p in found))


def adjusted(p: Any) -> np.ndarray:
    """The false discovery rate at which each p value is just a discovery (Benjamini-Hochberg); nan stays nan."""
    rates = np.array(p, dtype=float)
    known = ~np.isnan(rates)
    rates[known] = stats.false_discovery_control(rates[known]) if known.any() else []
    return rates


def decide(findings: Sequence[Judgement], level: float) -> list[str]:
    """The verdict on each finding, at a false discovery rate of 1 - ``level`` over all of them."""
    p, rate = [one.p for one in findings], 1 - level
    most = rate * (adjusted(p) <= rate).sum() / max(1, np.isfinite(p).sum())  # Benjamini-Hochberg's threshold
    named = [[name for name, at in one.statements if at <= most] for one in findings]
    return [names[0] if names else UNDECIDED for names in named]
