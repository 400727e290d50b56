"""Judges: is the answer at full resolution better than the one at half resolution? (PAPER §2, step 1)

A judge scores an answer against the accepted answers and turns two scores into the paper's verdict: 0 = equally good
or equally bad, 1 = the low-resolution answer is better, 2 = the full-resolution answer is better. Three judges of
different temper stand here, so that their agreement can be measured (Tables 2 and 10): words and numbers after
normalisation, sentence embeddings, and edit distance.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from awares.config import Params
from awares.engine.answer_match import same_meaning
from awares.engine.embedding import SentenceEncoder, load_encoder
from awares.errors import AwaresValueError
from awares.method.metrics import anls

LR, HR = "LR", "HR"
TIE, LOW_BETTER, HIGH_BETTER = 0, 1, 2
TIE_MARGIN = 0.05  # ours: graded scores that lie closer than this are equally good


def label(verdict: int) -> str:
    """Verdict -> LR (no crop needed) for 0 and 1, HR for 2 (PAPER §2)."""
    if verdict not in (TIE, LOW_BETTER, HIGH_BETTER):
        raise AwaresValueError(f"verdict {verdict!r}: a judge answers 0, 1 or 2")
    return HR if verdict == HIGH_BETTER else LR


@dataclass(frozen=True)
class Verdict:
    """``value`` 0, 1 or 2; ``low`` and ``high``: the judge's raw scores, 0 to 1; ``both_wrong``: neither answer is
    right. All None where a judge gave no usable verdict: such a row is lost, not labelled.
    """

    value: int | None
    low: float | None
    high: float | None
    both_wrong: bool | None


class Judge(ABC):
    """Scores answers from 0 to 1. An answer is right from ``right_at``; scores within ``margin`` are equally good."""

    name: str
    right_at: float = 1.0
    margin: float = 0.0

    @abstractmethod
    def scores(
        self, questions: Sequence[str], predictions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[float]:
        """One score per prediction: its best over the row's accepted answers."""

    def judge(
        self,
        questions: Sequence[str],
        lows: Sequence[str],
        highs: Sequence[str],
        answers: Sequence[Sequence[str]],
        row_ids: Sequence[str] | None = None,
    ) -> list[Verdict]:
        """One verdict per row, scores included; ``row_ids`` name the rows in records and messages."""
        low_scores = self.scores(questions, lows, answers)
        high_scores = self.scores(questions, highs, answers)
        return [self._compare(low, high) for low, high in zip(low_scores, high_scores, strict=True)]

    def verdict(self, question: str, low: str, high: str, answers: Sequence[str]) -> int | None:
        """The verdict on one row: 0, 1 or 2."""
        return self.judge([question], [low], [high], [answers])[0].value

    def key(self) -> str:
        """Everything that decides a verdict, for keying stored verdicts."""
        return f"{self.name}:{self.right_at}:{self.margin}"

    def _compare(self, low: float, high: float) -> Verdict:
        """Two wrong answers are equally bad, however near one of them came."""
        both_wrong = max(low, high) < self.right_at
        if both_wrong or abs(high - low) <= self.margin:
            return Verdict(TIE, low, high, both_wrong)
        return Verdict(HIGH_BETTER if high > low else LOW_BETTER, low, high, both_wrong)


class SemanticJudge(Judge):
    """1 where prediction and an accepted answer say the same after :func:`awares.wording.normalise`, else 0."""

    name = "semantic"

    def scores(
        self, questions: Sequence[str], predictions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[float]:
        return [
            float(any(same_meaning(prediction, answer) for answer in accepted))
            for prediction, accepted in zip(predictions, answers, strict=True)
        ]


class AnlsJudge(Judge):
    """Edit-distance similarity with DocVQA's threshold; blind to meaning, as the paper found (Table 10)."""

    name = "anls"
    margin = TIE_MARGIN

    def __init__(self, threshold: float = 0.5) -> None:
        self.right_at = threshold

    def scores(
        self, questions: Sequence[str], predictions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[float]:
        pairs = zip(predictions, answers, strict=True)
        return [anls(prediction, accepted, self.right_at) for prediction, accepted in pairs]


class EmbeddingJudge(Judge):
    """Cosine of sentence embeddings, the best over the accepted answers, rounded to 4 decimals."""

    name = "embedding"
    margin = TIE_MARGIN

    def __init__(self, encoder: SentenceEncoder, threshold: float = 0.85) -> None:
        self.encoder, self.right_at = encoder, threshold

    def scores(
        self, questions: Sequence[str], predictions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[float]:
        return [round(value, 4) for value in self.encoder.similarity(predictions, answers)]

    def key(self) -> str:
        return f"{super().key()}:{self.encoder.name}"


class AlwaysJudge(Judge):
    """Calls every row HR, for a system that asks for a region whatever the question (ERGO, PAPER §6)."""

    name = "always"

    def scores(
        self, questions: Sequence[str], predictions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[float]:
        return SemanticJudge().scores(questions, predictions, answers)

    def _compare(self, low: float, high: float) -> Verdict:
        return Verdict(HIGH_BETTER, low, high, max(low, high) < self.right_at)


# The panel

# name -> judge of these parameters, for those that judge in this process; `served.make_judges` knows the others.
# A new judge is one entry here and one name in config.LOCAL_JUDGES.
JUDGES: dict[str, Callable[[Params], Judge]] = {
    "semantic": lambda params: SemanticJudge(),
    "always": lambda params: AlwaysJudge(),
    "embedding": lambda params: EmbeddingJudge(
        load_encoder(params.curation.embedder), params.curation.embedding_threshold
    ),
    "anls": lambda params: AnlsJudge(params.curation.anls_threshold),
}


def right_at(name: str, params: Params) -> float:
    """The score from which the judge of that name calls an answer right."""
    return JUDGES[name](params).right_at if name in JUDGES else Judge.right_at
