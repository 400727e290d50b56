"""Benchmark scores and bootstrap intervals (PAPER §5).

The six benchmark metrics follow lmms-eval 0.7.3. A row with several accepted answers gets its best score; with one
accepted answer the score equals lmms-eval's. Scores are in 0 to 1; tables multiply by 100.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from awares.errors import AwaresValueError


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA: a number within 5 % of the true one, or the same text ignoring case. "41%" reads as 0.41."""
    return float(any(_relaxed(prediction, answer, tolerance) for answer in answers))


def _relaxed(prediction: str, answer: str, tolerance: float) -> bool:
    value, truth = _to_float(prediction), _to_float(answer)
    if value is not None and truth:  # zero has no relative error: compare the texts instead
        return abs(value - truth) / abs(truth) <= tolerance
    return prediction.lower() == answer.lower()


def _to_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """DocVQA: 1 - edit distance / length of the longer text, the best over ``answers``; 0 below ``threshold``.

    The distance ignores case and repeated white space; the length is that of the raw texts, as in lmms-eval.
    """
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= threshold else 0.0


def _similarity(prediction: str, answer: str) -> float:
    length = max(len(prediction.upper()), len(answer.upper()))
    distance = edit_distance(" ".join(prediction.lower().split()), " ".join(answer.lower().split()))
    return 1 - distance / length if length else 1.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        row = [i]
        for j, right in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (left != right)))
        previous = row
    return previous[-1]


def ocr_accuracy(prediction: str, answers: Sequence[str], question: str = "") -> float:
    """OCRBench: the prediction contains an accepted answer, ignoring case; a line break counts as a space.

    For a formula (HME100k: the ``question`` asks for LaTeX) case counts and white space does not.
    """
    formula = "latex" in question.lower()
    return float(any(_ocr_text(answer, formula) in _ocr_text(prediction, formula) for answer in answers))


_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}  # full-width forms of ASCII


def _ocr_text(text: str, formula: bool) -> str:
    if formula:
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.translate(_HALF_WIDTH).lower().strip().replace("\n", " ")


def pope_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """POPE: the same text ("yes" or "no") ignoring case and outer white space."""
    return float(prediction.lower().strip() in {answer.lower().strip() for answer in answers})


def option_accuracy(prediction: str, answers: Sequence[str], read: Callable[[str], str]) -> float:
    """RealWorldQA, V*Bench: the right option letter, as ``read`` finds it; without options in the row, `same_text`."""
    letters = {answer.strip().upper() for answer in answers} & set("ABCD")
    return float(read(prediction) in letters) if letters else same_text(prediction, answers)


def same_text(prediction: str, answers: Sequence[str]) -> float:
    """An accepted answer, ignoring case, outer white space and a final full stop."""
    return float(prediction.lower().strip().rstrip(".") in {answer.lower().strip() for answer in answers})


_NOUNS = "answer, correct answer, best answer, choice, correct choice, correct option, best option".split(", ")
_ANSWER_PHRASES = [f"{the}{noun} is" for the in ("", "the ") for noun in _NOUNS]
_ANSWER_PHRASES += ["my answer is", "my choice is", "i choose", "i select", "i pick"]
_LETTER_FORMS = (r"\(([A-D])\)", r"([A-D])\.", r"([A-D]):", r"([A-D])\)", r"([A-D]) ", r"([A-D])")


def option_letter(prediction: str) -> str:
    """The option A-D that a prediction names, "" if none; lmms-eval's rule for RealWorldQA, in English.

    Priority: a letter alone at the beginning; at the end; after words such as "the answer is"; in brackets; before a
    full stop, a colon, a closing bracket or a space; anywhere. Within one priority the last letter wins.
    """
    bare = prediction.strip()
    for mark in ",.!?;:'\"":
        bare = bare.strip(mark)
    text = f" {bare} "
    lower = text.lower()
    starts = [lower.find(phrase) + len(phrase) for phrase in _ANSWER_PHRASES if phrase in lower]
    named = [text.find(letter, start) for start in starts for letter in "ABCD"]
    forms = (r"^\s*([A-D])(?![^\W\d_])", r"(?<![^\W\d_])([A-D])\s*$", *_LETTER_FORMS)
    ranked = [[match.start(1) for match in re.finditer(form, text)] for form in forms]
    ranked.insert(2, [place for place in named if place >= 0])
    best = next((places for places in ranked if places), [])
    return text[max(best)] if best else ""


_CHOICE_FORMS = (
    r"^([A-D])\s*[.)\]]*",
    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*[.)\]]",
    r"(?:^|\s)([A-D])(?:\s|$)",
)


def choice_letter(prediction: str) -> str:
    """The option A-D that a prediction names, "" if none; the rules and their order are lmms-eval's for V*Bench."""
    text = prediction.strip().upper()
    for form in _CHOICE_FORMS:
        if match := re.search(form, text):
            return match[1]
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else ""


BENCHMARK_METRICS: dict[str, Callable[..., float]] = {
    "chartqa": relaxed_accuracy,
    "docvqa": anls,
    "ocrbench": ocr_accuracy,
    "pope": pope_accuracy,
    "realworldqa": partial(option_accuracy, read=option_letter),
    "vstar": partial(option_accuracy, read=choice_letter),
}


def score(benchmark: str, prediction: str, answers: Sequence[str], question: str = "") -> float:
    """The score of one prediction, 0 to 1, by the metric of ``benchmark``.

    Other sources (training sources, a user's rows) have no published metric and use `same_text`. Only OCRBench reads
    ``question``. AwaresError for a row without accepted answers.
    """
    if not answers:
        raise AwaresValueError(f"{benchmark}: a row without accepted answers cannot be scored")
    metric = BENCHMARK_METRICS.get(benchmark, same_text)
    return metric(prediction, answers, question) if benchmark == "ocrbench" else metric(prediction, answers)


Names = Sequence[str] | None
_INDICES = 4_000_000  # most row indices that a bootstrap holds in memory


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` rows with its percentile bootstrap interval. ``p``: of a difference, two-sided, else nan."""

    mean: float
    low: float
    high: float
    n: int
    p: float = float("nan")


def bootstrap_interval(
    values: Sequence[float], seed: int, n: int = 2000, level: float = 0.95, groups: Names = None
) -> Interval:
    """Mean of ``values`` (one per row) with the ``level`` interval of ``n`` resamples.

    With ``groups`` (one name per row) the statistic is the mean of the group means, resampled inside each group: the
    average over benchmarks. AwaresError for no rows.
    """
    mean, draws = resampled_means(values, seed, n, groups)
    return Interval(mean, *percentiles(draws, level), len(values))


def percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    """Both ends of the central ``level`` (0 to 1) of the resamples ``draws``."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int, n: int = 2000, level: float = 0.95, groups: Names = None
) -> Interval:
    """Mean of a - b over the same rows in the same order; ``groups`` as above. Equal seeds draw equal rows."""
    assert len(a) == len(b), f"not the same rows: {len(a)} and {len(b)}"
    mean, draws = resampled_means(np.asarray(a, float) - np.asarray(b, float), seed, n, groups)
    draws = draws.round(12) + 0.0  # rounding errors are not differences, and -0 is 0
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (n + 1))  # never 0: the observed sample counts as one draw
    return Interval(mean, *percentiles(draws, level), len(a), p)


def resampled_means(
    values: Any, seed: int, n: int, groups: Names = None, denominators: Any = None
) -> tuple[float, np.ndarray]:
    """The mean of ``values`` (one per row) and the means of its ``n`` resamples (n,); ``groups`` as above.

    With ``denominators`` (one number per row, >= 0): sum(values) / sum(denominators), nan for a sum of 0. Equal seeds
    draw equal rows for all values.
    """
    array = np.asarray(values, dtype=float)
    if not len(array):
        raise AwaresValueError("no rows to resample: an empty list of scores has no interval")
    divisors = None if denominators is None else np.asarray(denominators, dtype=float)

    def statistic(rows: np.ndarray) -> Any:  # over the last axis of the row indices
        if divisors is None:
            return array[rows].mean(axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return array[rows].sum(axis=-1) / divisors[rows].sum(axis=-1)

    names = np.zeros(len(array)) if groups is None else np.asarray(groups)
    members = [np.flatnonzero(names == name) for name in sorted(set(names.tolist()))]
    rng = np.random.default_rng(seed)
    means, draws = [], np.zeros(n)
    for member in members:
        step = max(1, _INDICES // len(member))
        shapes = [(min(step, n - start), len(member)) for start in range(0, n, step)]
        drawn = [statistic(member[rng.integers(0, len(member), shape)]) for shape in shapes]
        draws += np.concatenate(drawn) / len(members)
        means.append(statistic(member))
    return float(np.mean(means)), draws
