"""Judges (PAPER §2, step 1: does a row need a crop?) and oracles (step 2: where is its evidence?).

A judge scores the answers at half and at full resolution and compares the scores: verdict 0 = equally good or equally
bad, 1 = low resolution is better, 2 = full resolution is better. Judges and oracles on servers: `clients.judges`.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np

from awares import registry
from awares.config import Params
from awares.engine.answer_match import same_meaning
from awares.engine.embedding import load_encoder
from awares.engine.jsonl import Record
from awares.errors import AwaresValueError
from awares.method.crops import move_box
from awares.method.metrics import anls

LR, HR = "LR", "HR"
TIE, LOW_BETTER, HIGH_BETTER = 0, 1, 2
TIE_MARGIN = 0.05  # assumed: graded scores that differ by less are equally good
Texts = Sequence[str]


def label(verdict: int) -> str:
    """Verdict -> LR (no crop needed) for 0 and 1, HR for 2 (PAPER §2)."""
    return HR if verdict == HIGH_BETTER else LR


@dataclass(frozen=True)
class Verdict:
    """``value`` 0, 1 or 2; ``low``, ``high``: raw scores, 0 to 1; ``both_wrong``: neither answer is correct.

    All are None if the judge gave no usable verdict; such a row is lost.
    """

    value: int | None
    low: float | None
    high: float | None
    both_wrong: bool | None


@dataclass(eq=False)
class Judge:
    """Scores answers from 0 to 1: correct from ``correct_threshold`` on, equally good if within ``margin``.

    ``score``: (questions, predictions, accepted answers) -> one score per row. ``source``: its code or model.
    """

    name: str
    score: Callable[[Texts, Texts, Sequence[Texts]], Sequence[float]]
    correct_threshold: float = 1.0
    margin: float = 0.0
    source: str = ""

    def scores(self, questions: Texts, predictions: Texts, answers: Sequence[Texts]) -> list[float]:
        """One score per prediction: its best over the row's accepted answers."""
        return list(map(float, self.score(questions, predictions, answers)))

    def judge(
        self, questions: Texts, lows: Texts, highs: Texts, answers: Sequence[Texts], row_ids: Texts | None = None
    ) -> list[Verdict]:
        """One verdict per row, scores included; ``row_ids`` name the rows in records and messages."""
        scores = self.scores(questions, lows, answers), self.scores(questions, highs, answers)
        return [self.compare(low, high) for low, high in zip(*scores, strict=True)]

    def compare(self, low: float, high: float) -> Verdict:
        """The verdict on two scores; two wrong answers are equally bad."""
        both_wrong = max(low, high) < self.correct_threshold
        if both_wrong or abs(high - low) <= self.margin:
            return Verdict(TIE, low, high, both_wrong)
        return Verdict(HIGH_BETTER if high > low else LOW_BETTER, low, high, both_wrong)

    def key(self) -> str:
        """Everything that determines a verdict, for the key of stored verdicts."""
        return f"{self.name}:{self.correct_threshold}:{self.margin}:{hashlib.sha256(self.source.encode()).hexdigest()}"


def build_judge(wanted: str | Callable[..., Any] | Judge, params: Params) -> Judge:
    """The judge for a name of `registry.judge`, for a function, or for a `Judge` (returned as it is).

    The function is ``(question, prediction, accepted answers) -> score``, or a factory ``(params) -> Judge``.
    """
    if isinstance(wanted, Judge):
        return wanted
    function = registry.judge.find(wanted)
    factory = len(inspect.signature(function).parameters) == 1
    built = function(params) if factory else Judge("", lambda *rows: list(map(function, *rows)))
    built.name = wanted if isinstance(wanted, str) else function.__name__
    built.source += registry.judge.source(wanted)
    return built


@registry.judge("semantic")
def semantic(question: str, prediction: str, answers: Texts) -> float:
    """1 if the prediction and an accepted answer mean the same after `answer_match.normalise`, else 0."""
    return float(any(same_meaning(prediction, answer) for answer in answers))


@registry.judge("anls")
def anls_judge(params: Params) -> Judge:
    """Edit-distance similarity with DocVQA's threshold; blind to meaning, as the paper found (Table 10)."""
    threshold = params.curation.anls_threshold
    score = partial(anls, threshold=threshold)
    return Judge("anls", lambda _, *rows: list(map(score, *rows)), threshold, TIE_MARGIN)


@registry.judge("embedding")
def embedding_judge(params: Params) -> Judge:
    """Cosine of sentence embeddings, the best over the accepted answers, rounded to 4 decimals."""
    encoder, threshold = load_encoder(params.curation.embedder), params.curation.embedding_threshold

    def score(_: Texts, *rows: Any) -> list[float]:
        return [round(value, 4) for value in encoder.similarity(*rows)]

    return Judge("embedding", score, threshold, TIE_MARGIN, encoder.name)


class Oracle:
    """Locates the evidence of rows.

    ``locate``: per row ``question_boxes`` and ``answer_boxes``, [x1, y1, x2, y2] in 1/1000, at least one in total; if
    localisation failed, no boxes and a ``reason``. ``looks``: whether it needs the images. ``key``: everything that
    determines a box. ``check``: AwaresError for a row that it cannot locate.
    """

    name: str
    looks = True

    def locate(self, rows: Sequence[Record]) -> list[Record]:
        raise NotImplementedError

    def key(self) -> str:
        return repr(self)

    def check(self, rows: datasets.Dataset) -> None:
        return None


@dataclass(frozen=True)
class AnnotationOracle(Oracle):
    """The annotated boxes with the errors of `crops.move_box`; ``seed`` and the row's id determine an error."""

    seed: int
    sigma: float
    margin: int = 0
    name = "annotation"
    looks = False

    def locate(self, rows: Sequence[Record]) -> list[Record]:
        found = []
        for row in rows:
            number = int.from_bytes(hashlib.sha256(row["id"].encode()).digest()[:8], "big")
            move = partial(move_box, np.random.default_rng([self.seed, number]), self.sigma, self.margin)
            found.append({key: list(map(move, row[key])) for key in ("question_boxes", "answer_boxes")})
        return found

    def check(self, rows: datasets.Dataset) -> None:
        for row_id, *boxes in zip(rows["id"], rows["question_boxes"], rows["answer_boxes"], strict=True):
            if not any(boxes):
                raise AwaresValueError(f"row {row_id}: curation.oracle annotation needs question_boxes or answer_boxes")
