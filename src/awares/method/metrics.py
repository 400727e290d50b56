"""Benchmark scores and their intervals (PAPER §5); what they say of the policy stands in `diagnostics`.

The six benchmark metrics follow the definitions of lmms-eval 0.7.3. Where a row accepts several answers the best counts; with one
accepted answer every score is lmms-eval's own. All scores lie in 0 to 1; tables multiply by 100.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from awares.errors import AwaresValueError

# Benchmarks


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA: a number within 5 % of the true one, else the same text but for case. "41%" reads as 0.41."""
    return float(any(_relaxed(prediction, answer, tolerance) for answer in answers))


def _relaxed(prediction: str, answer: str, tolerance: float) -> bool:
    value, truth = _to_float(prediction), _to_float(answer)
    if value is not None and truth:  # no relative error around zero: then the texts must be the same
        return abs(value - truth) / abs(truth) <= tolerance
    return prediction.lower() == answer.lower()


def _to_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """DocVQA: 1 - edit distance / length of the longer text, the best over ``answers``; 0 when below ``threshold``.

    Case and runs of white space do not count in the distance; the length is that of the raw texts, as in lmms-eval.
    """
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= threshold else 0.0


def _similarity(prediction: str, answer: str) -> float:
    length = max(len(prediction.upper()), len(answer.upper()))
    if not length:
        return 1.0
    return 1 - edit_distance(" ".join(prediction.lower().split()), " ".join(answer.lower().split())) / length


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
    """OCRBench: an accepted answer stands somewhere in the prediction; case does not count, a line break is a space.

    Of a formula (HME100k's rows, whose ``question`` asks for LaTeX) case does count, and white space does not.
    """
    read = _formula if "latex" in question.lower() else _print
    return float(any(read(answer) in read(prediction) for answer in answers))


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}  # full-width forms of ASCII


def _print(text: str) -> str:
    return text.translate(_HALF_WIDTH).lower().strip().replace("\n", " ")


def pope_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """POPE: "yes" or "no", but for case and outer white space; anything else is wrong."""
    return float(prediction.lower().strip() in {answer.lower().strip() for answer in answers})


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """RealWorldQA: the same text but for case, outer white space and a full stop; of a row with options, the right letter."""
    if letters := {answer.strip().upper() for answer in answers} & set("ABCD"):
        return float(option_letter(prediction) in letters)
    return same_text(prediction, answers)


def same_text(prediction: str, answers: Sequence[str]) -> float:
    """An accepted answer but for case, outer white space and a full stop."""
    return float(prediction.lower().strip().rstrip(".") in {answer.lower().strip() for answer in answers})


_NAMED = [
    f"{the}{what} is"
    for the in ("", "the ")
    for what in ("answer", "correct answer", "best answer", "choice", "correct choice")
]
_NAMED += [f"{the}{what} option is" for the in ("", "the ") for what in ("correct", "best")]
_NAMED += ["my answer is", "my choice is", "i choose", "i select", "i pick"]


def option_letter(prediction: str) -> str:
    """The option A-D that a prediction names, "" if none; lmms-eval's rule for RealWorldQA, in English.

    A letter alone at the beginning counts most, then one at the end, after words such as "the answer is", in brackets, before a
    full stop, a colon, a closing bracket or a space, anywhere; of equals the one that stands last.
    """
    bare = prediction.strip()
    for mark in ",.!?;:'\"":
        bare = bare.strip(mark)
    text = f" {bare} "
    told = [text.find(letter, start) for start in _after(text) for letter in "ABCD"]
    ranked: list[list[int]] = [
        [match.start(1) for match in re.finditer(r"^\s*([A-D])(?![^\W\d_])", text)],
        [match.start(1) for match in re.finditer(r"(?<![^\W\d_])([A-D])\s*$", text)],
        [place for place in told if place >= 0],
        *([match.start(1) for match in re.finditer(form, text)] for form in _FORMS),
    ]
    best = next((places for places in ranked if places), [])
    return text[max(best)] if best else ""


_FORMS = (r"\(([A-D])\)", r"([A-D])\.", r"([A-D]):", r"([A-D])\)", r"([A-D]) ", r"([A-D])")


def _after(text: str) -> list[int]:
    """Where those of the words that name an answer end, each where it first stands."""
    lower = text.lower()
    return [lower.find(words) + len(words) for words in _NAMED if words in lower]


_LETTER_PATTERNS = (
    re.compile(r"^([A-D])\s*[.)\]]*"),
    re.compile(r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])"),
    re.compile(r"\(([A-D])\)"),
    re.compile(r"([A-D])\s*[.)\]]"),
    re.compile(r"(?:^|\s)([A-D])(?:\s|$)"),
)


def choice_letter(prediction: str) -> str:
    """The option A-D that a prediction names, "" if none; the rules and their order are lmms-eval's for V*Bench."""
    text = prediction.strip().upper()
    for pattern in _LETTER_PATTERNS:
        match = pattern.search(text)
        if match:
            return match[1]
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else ""


def vstar_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """V*Bench: the right option letter. An answer in words (the embedded suite has no options) needs the same text."""
    letters = {answer.strip().upper() for answer in answers} & set("ABCD")
    if letters:
        return float(choice_letter(prediction) in letters)
    return same_text(prediction, answers)


SCORES: dict[str, Callable[..., float]] = {
    "chartqa": relaxed_accuracy,
    "docvqa": anls,
    "ocrbench": ocr_accuracy,
    "pope": pope_accuracy,
    "realworldqa": exact_match,
    "vstar": vstar_accuracy,
}


def score(benchmark: str, prediction: str, answers: Sequence[str], question: str = "") -> float:
    """The score of one prediction, 0 to 1, by the metric of ``benchmark``.

    A source that is no benchmark (most training sources, a user's own rows) has no published metric: there the same
    text counts (`same_text`). ``question`` matters to OCRBench alone. Raises AwaresError for a row without accepted answers.
    """
    if not answers:
        raise AwaresValueError(f"{benchmark}: a row without accepted answers cannot be scored")
    if benchmark == "ocrbench":
        return ocr_accuracy(prediction, answers, question)
    return SCORES.get(benchmark, same_text)(prediction, answers)


# Intervals


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval; ``n`` rows."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference(Interval):
    """Mean of a - b over the same rows; ``p``: two-sided bootstrap p-value of no difference."""

    p: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(
    values: Sequence[float],
    seed: int,
    n: int = 2000,
    level: float = 0.95,
    groups: Sequence[str] | None = None,
) -> Interval:
    """Mean of ``values`` (one per row) with the ``level`` interval of ``n`` resamples.

    With ``groups`` (one name per row) the statistic is the mean of the groups' means, resampled inside each group: that
    is the average over benchmarks. Raises AwaresError for no rows.
    """
    mean, draws = resampled_means(values, seed, n, groups)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(values))


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    seed: int,
    n: int = 2000,
    level: float = 0.95,
    groups: Sequence[str] | None = None,
) -> Difference:
    """Mean of a - b, both scored on the same rows in the same order, resampled row by row; ``groups`` as above.

    The same seed draws the same rows for every pair of systems.
    """
    if len(a) != len(b):
        raise AwaresValueError(f"paired bootstrap needs the same rows twice, not {len(a)} and {len(b)}")
    mean, draws = resampled_means(np.asarray(a, float) - np.asarray(b, float), seed, n, groups)
    draws = draws.round(12) + 0.0  # rounding errors are no differences, and -0 is 0
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (n + 1))  # never 0: the observed sample is one of the draws
    return Difference(mean, float(low), float(high), len(a), p)


def resampled_means(
    values: Any,
    seed: int,
    n: int,
    groups: Sequence[str] | None = None,
    memory: int = 4_000_000,
    wholes: Any = None,
) -> tuple[float, np.ndarray]:
    """The statistic behind every interval, and its ``n`` resamples (n,): the mean of ``values``, ``groups`` as above.

    With ``wholes`` (one number per row, >= 0) it is sum(values) / sum(wholes), a share among the rows that count, and
    nan where no drawn row counts. The same seed draws the same rows, whatever the values. ``memory`` bounds the drawn
    indices held at once.
    """
    array = np.asarray(values, dtype=float)
    if not len(array):
        raise AwaresValueError("no rows to resample: an empty list of scores has no interval")
    weights = None if wholes is None else np.asarray(wholes, dtype=float)
    names = np.zeros(len(array)) if groups is None else np.asarray(groups)
    rng = np.random.default_rng(seed)
    means, draws = [], np.zeros(n)
    members = [np.flatnonzero(names == name) for name in sorted(set(names.tolist()))]
    for member in members:
        step = max(1, memory // len(member))
        drawn = [
            _mean(array, weights, member[rng.integers(0, len(member), (min(step, n - start), len(member)))])
            for start in range(0, n, step)
        ]
        draws += np.concatenate(drawn) / len(members)
        means.append(_mean(array, weights, member))
    return float(np.mean(means)), draws


def _mean(values: np.ndarray, wholes: np.ndarray | None, rows: np.ndarray) -> Any:
    """Over the last axis of the indices ``rows``."""
    if wholes is None:
        return values[rows].mean(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return values[rows].sum(axis=-1) / wholes[rows].sum(axis=-1)
