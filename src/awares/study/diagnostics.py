"""What a policy does: when it calls, where it looks, how it writes, why it fails, how far from the best (PAPER §5)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from awares.errors import AwaresValueError
from awares.method.crops import CROPS, FREE, coverage, in_order, union_area

Crops = Sequence[str]

# The coupled-decision policy (Table 7)


@dataclass(frozen=True)
class CdpDiagnostics:
    """Table 7, as shares 0 to 1; nan where no row decides a figure.

    Call: ``precision`` P(HR | call), ``recall`` P(call | HR), ``f1``, ``fpr`` P(call | LR), ``call_rate``. Region,
    over the calls on HR rows (an LR row has no oracle crop): ``exact`` the requested set is the oracle's, ``relaxed``
    the requested region has IoU >= 0.25 with an oracle crop. ``area``: mean requested area over all calls.
    """

    n: int
    calls: int
    call_rate: float
    precision: float
    recall: float
    f1: float
    fpr: float
    exact: float
    relaxed: float
    area: float


def cdp_diagnostics(
    labels: Sequence[str], crops: Sequence[Crops], oracle_crops: Sequence[Crops], relaxed_iou: float = 0.25
) -> CdpDiagnostics:
    """Diagnostics of the first-turn action; one label (LR/HR), requested set and oracle set per row (PAPER §5)."""
    parts = decision_parts(labels, crops, oracle_crops, relaxed_iou)
    shares = {name: _share(part.sum(), whole.sum()) for name, (part, whole) in parts.items()}
    return CdpDiagnostics(n=len(labels), calls=sum(bool(asked) for asked in crops), **shares)


def decision_parts(
    labels: Sequence[str], crops: Sequence[Crops], oracle_crops: Sequence[Crops], relaxed_iou: float = 0.25
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every share of `CdpDiagnostics` as what each row adds to its numerator and to its denominator, (N,) each.

    So a share can be resampled row by row. Raises AwaresError for no rows and for another label than LR or HR.
    """
    rows = list(zip(labels, crops, oracle_crops, strict=True))
    if not rows or any(name not in ("LR", "HR") for name in labels):
        raise AwaresValueError("CDP diagnostics need at least one row, each labelled LR or HR")
    hr = np.array([name == "HR" for name in labels], float)
    call = np.array([bool(asked) for asked in crops], float)
    hit = hr * call
    known = hit * np.array(
        [bool(wanted) for wanted in oracle_crops], float
    )  # benchmarks have no boxes, so no target crops
    exact = np.array([name == "HR" and bool(asked) and set(asked) == set(wanted) for name, asked, wanted in rows])
    near = [name == "HR" and bool(asked) and region_iou(asked, wanted) >= relaxed_iou for name, asked, wanted in rows]
    area = np.array([union_area(tuple(asked)) if asked else 0.0 for asked in crops])
    return {
        "call_rate": (call, np.ones(len(rows))),
        "precision": (hit, call),
        "recall": (hit, hr),
        "f1": (2 * hit, call + hr),
        "fpr": (call - hit, 1 - hr),
        "exact": (exact.astype(float), known),
        "relaxed": (np.array(near, float), known),
        "area": (area, call),
    }


def region_iou(asked: Iterable[str], wanted: Iterable[str]) -> float:
    """The best IoU of the requested region (union of ``asked``) with one crop of ``wanted`` or with all of them."""
    asked, wanted = _ordered(asked), _ordered(wanted)
    targets = [(name,) for name in wanted] + [wanted]
    return max(_union_iou(asked, target) for target in targets) if wanted else 0.0


def _union_iou(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    both = union_area(_ordered({*a, *b}))
    return (union_area(a) + union_area(b) - both) / both


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    return in_order(names)


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")


def format_table(statuses: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Table 9: system -> call status of each of its rows, to percentages of the *attempted* calls.

    ``valid``: parsed as written; ``corrupt`` = ``recoverable`` (read with tolerance) + ``incorrect`` (malformed). nan
    where a system never called.
    """
    rows = []
    for system, found in statuses.items():
        counts = {name: sum(status == name for status in found) for name in ("valid", "recovered", "malformed")}
        calls = sum(counts.values())
        valid, recovered, malformed = (100 * _share(count, calls) for count in counts.values())
        rows.append((system, valid, recovered + malformed, recovered, malformed, calls, len(found)))
    columns = ["system", "valid", "corrupt", "recoverable", "incorrect", "calls", "n"]
    return pd.DataFrame(rows, columns=columns)


# Policy flow (Fig. 5)

NO_CALL, SEVERAL = "no call", "several"
OUTCOMES = (
    NO_CALL,
    *CROPS,
    SEVERAL,
    FREE,
)  # of a first turn; "several": more than one region; a single free one is "box"


def outcome(crops: Crops) -> str:
    """What a request amounts to in the policy flow: one of ``OUTCOMES``. A malformed call shows nothing: no call."""
    if len(crops) > 1:
        return SEVERAL
    return NO_CALL if not crops else crops[0] if crops[0] in CROPS else FREE


def known(found: Iterable[str]) -> list[str]:
    """The outcomes that a table of ``found`` ones has a line for: ``OUTCOMES``, free boxes only where there are any."""
    boxes = FREE in set(found)
    return [name for name in OUTCOMES if name != FREE or boxes]


def policy_flow(policies: Mapping[str, Sequence[Crops]]) -> pd.DataFrame:
    """Fig. 5 as a table: policy -> crops requested row by row, to the share (percent) of every outcome, zeros included (`known`).

    Columns policy, outcome, share, n. AwaresError when the policies did not answer equally many rows.
    """
    if len({len(requests) for requests in policies.values()}) > 1:
        raise AwaresValueError("policy flow: every policy must have answered the same rows in the same order")
    rows, found = [], {policy: [outcome(crops) for crops in requests] for policy, requests in policies.items()}
    names = known([name for outcomes in found.values() for name in outcomes])
    for policy, outcomes in found.items():
        rows += [(policy, name, 100 * _share(outcomes.count(name), len(outcomes)), len(outcomes)) for name in names]
    return pd.DataFrame(rows, columns=["policy", "outcome", "share", "n"])


# Which errors are when, where, reading

ERRORS = ("correct", "when", "where", "reading")


def error_kind(
    correct: bool, label: str, crops: Crops, evidence: Sequence[Sequence[int]], threshold: float = 0.95
) -> str:
    """Why a row failed: ``when`` (HR, but no crop was requested), ``where`` (HR, and the requested crops show less than
    ``threshold`` of a box of the evidence), else ``reading`` (what was needed was in view).

    ``evidence``: question and answer boxes, [x1, y1, x2, y2] in 1/1000 of the image; without any, a call cannot miss.
    """
    if correct:
        return "correct"
    if label != "HR":
        return "reading"
    if not crops:
        return "when"
    shown = all(coverage(tuple(box), tuple(crops)) >= threshold for box in evidence)
    return "reading" if shown else "where"


# The oracle frontier


@dataclass(frozen=True)
class Frontier:
    """The best that any policy over these options can do: accuracy (0 to 1) at its RTR, and the way there.

    ``choice`` (N,): the cheapest of the best options of each row. ``rtr_curve``, ``accuracy_curve`` (K + 1,): from the
    cheapest option everywhere, rows moved to their choice one by one, the largest gain per token first.
    """

    accuracy: float
    rtr: float
    choice: np.ndarray
    rtr_curve: np.ndarray
    accuracy_curve: np.ndarray


def oracle_frontier(scores: Any, rtrs: Any) -> Frontier:
    """Frontier over options: ``scores`` and ``rtrs`` are (N rows, K options), option 0 = no call, then the ten crops.

    Of each row's options with its best score the cheapest counts, the earlier one at equal cost; a row that no option
    answers stays with its cheapest.
    """
    scores, rtrs = np.asarray(scores, float), np.asarray(rtrs, float)
    if scores.ndim != 2 or scores.shape != rtrs.shape or not len(scores):
        raise AwaresValueError(f"oracle frontier needs two tables rows x options, not {scores.shape} and {rtrs.shape}")
    rows = np.arange(len(scores))
    choice = np.where(scores >= scores.max(axis=1, keepdims=True), rtrs, np.inf).argmin(axis=1)
    cheapest = rtrs.argmin(axis=1)
    gain = scores[rows, choice] - scores[rows, cheapest]
    cost = rtrs[rows, choice] - rtrs[rows, cheapest]
    moved = np.flatnonzero(gain > 0)
    moved = moved[np.argsort(-gain[moved] / np.maximum(cost[moved], 1e-12), kind="stable")]
    start = np.array([[rtrs[rows, cheapest].mean()], [scores[rows, cheapest].mean()]])
    steps = np.cumsum([cost[moved], gain[moved]], axis=1) / len(rows)  # (2, K)
    curve = start + np.concatenate([np.zeros((2, 1)), steps], axis=1)
    return Frontier(float(curve[1, -1]), float(curve[0, -1]), choice, curve[0], curve[1])
