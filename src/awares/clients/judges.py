"""Judges and oracle behind OpenAI-compatible servers such as vLLM (PAPER §2, steps 1 and 2), of data/served.yaml.

A row without a usable reply after several attempts is lost; if the server gave none, the next run retries it.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from PIL import Image
from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, WithJsonSchema, model_validator

from awares import registry
from awares.clients.chat import Request, RowFailed, Send
from awares.clients.served import PromptName, get_model, make_client, read_served
from awares.config import Params
from awares.engine.images import open_image
from awares.engine.jsonl import Record
from awares.engine.keys import code_of
from awares.errors import Failure
from awares.method import judges
from awares.method.judges import HIGH_BETTER, LOW_BETTER, TIE, AnnotationOracle, Judge, Oracle, Texts, Verdict


class ModelReply(BaseModel, extra="forbid", strict=True, json_schema_extra=lambda schema: schema.pop("description")):
    """A JSON object that a model must reply with. Its schema goes to the server, without these docstrings."""

    constrained: ClassVar[bool] = True  # by the server

    @classmethod
    def read(cls, text: str) -> Self | None:
        """The object in ``text``, alone or within other words; None without a valid one."""
        found = re.search(r"\{.*\}", text, re.DOTALL)
        try:
            return cls.model_validate_json(found[0]) if found else None
        except ValueError:
            return None


def _tidy(edges: list[float]) -> list[int]:
    """A box with whole edges inside the image and its corners in order; ValueError for one without an area."""
    whole = [min(1000, max(0, round(edge))) for edge in edges]
    (left, right), (top, bottom) = sorted(whole[0::2]), sorted(whole[1::2])
    if max(edges) <= 1 or left == right or top == bottom:
        raise ValueError("a box in fractions of 1, or an empty one")
    return [left, top, right, bottom]


_Edges = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4), AfterValidator(_tidy)]
EvidenceBox = Annotated[_Edges, WithJsonSchema({"type": "array", "items": {"type": "integer"}})]


class PairReply(ModelReply):
    """``first``, ``second``: whether that answer is right; ``better``: 0 = neither, 1 = the first, 2 = the second."""

    first: Literal[0, 1]
    second: Literal[0, 1]
    better: Literal[0, 1, 2]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.first != self.second and self.better != (LOW_BETTER if self.first else HIGH_BETTER):
            raise ValueError("better contradicts first and second")
        return self


class OneNumber(ModelReply):
    """The paper's reply, a number alone: ``better`` of `PairReply`."""

    better: Literal[0, 1, 2]
    constrained = False

    @classmethod
    def read(cls, text: str) -> Self | None:
        """The only number in ``text``; None for several, or none."""
        found = re.fullmatch(r"\D*([012])\D*", text)
        return super().read(f'{{"better": {found[1]}}}') if found else None


class Evidence(ModelReply):
    """Boxes [x1, y1, x2, y2] in 1/1000 of the image sides, at least one. One bad box makes the reply unusable."""

    question_boxes: list[EvidenceBox]
    answer_boxes: list[EvidenceBox]

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not self.question_boxes + self.answer_boxes:
            raise ValueError("no box")
        return self


class Asker:
    """A served model with one of the prompts: requests replies until one can be read as ``reply``."""

    def __init__(self, name: str, params: Params, prompt: PromptName, reply: type[ModelReply]) -> None:
        self.model, self.client, self.reply = get_model(name, params), make_client(name, params), reply
        self.prompt = read_served(params).prompts[prompt]
        self.source: dict[str, Any] = {"model": self.model.model, "version": self.prompt.version}
        limits = self.model.max_tokens, self.model.retries
        self.key = str((name, self.model.model, *limits, self.prompt, code_of(__file__)))

    def ask(self, send: Send, row_id: str, values: dict[str, str], image: Image.Image | None = None) -> tuple[Any, str]:
        """The first usable reply and its raw text; RowFailed after ``retries`` further attempts without one."""
        messages, reasons = self.prompt.messages(values, image), []
        schema = {"name": "reply", "strict": True, "schema": self.reply.model_json_schema()}
        form: Record = {"response_format": {"type": "json_schema", "json_schema": schema}}
        settings = form if self.reply.constrained else {}
        for seed in range(self.model.retries + 1):
            settings |= {"temperature": 0.7 if seed else 0.0, "seed": seed, "max_tokens": self.model.max_tokens}
            try:
                text = str(send(Request(row_id, messages, settings)).text)
                if found := self.reply.read(text):
                    return found, text
                reasons.append(f"not usable: {text[:200]!r}")
            except RowFailed as error:
                if error.silent:
                    raise  # another attempt now would fail the same way
                reasons.append(str(error))
        raise RowFailed("; ".join(reasons))


@dataclass(frozen=True)
class ServedVerdict(Verdict):
    """``forward``, ``swapped``: with the low answer first and second, 1 = low better; ``swapped`` None if judged once.

    ``replies``: raw, in that order; ``reason``: why there is no verdict; ``silent``: the server gave no reply.
    """

    forward: int | None = None
    swapped: int | None = None
    model: str = ""
    version: str = ""
    replies: tuple[str, ...] = ()
    reason: str = ""
    silent: bool = False


class ServedJudge(Judge):
    """Compares two answers once, or in both orders: a tie if these disagree (``curation.judge_order``).

    Scores: with both orders the share of "right", with one 1 or 0 from ``evaluation.judge``, as the reply has none.
    """

    def __init__(self, name: str, params: Params) -> None:
        self.once = params.curation.judge_order == "once"
        kind: Any = ("judge_once", OneNumber) if self.once else ("judge", PairReply)
        self.asker = Asker(name, params, *kind)
        super().__init__(name, self.grades, source=self.asker.key)
        if self.once:
            local = judges.build_judge(params.evaluation.judge, params)
            self.score = lambda *rows: [float(score >= local.correct_threshold) for score in local.scores(*rows)]
            self.source += local.key()

    def grades(self, questions: Texts, predictions: Texts, answers: Sequence[Texts]) -> list[float]:
        """Scores by a comparison of each answer with itself, which is one request; nan without a usable reply."""
        found = self.judge(questions, predictions, predictions, answers)
        return [math.nan if verdict.low is None else verdict.low for verdict in found]

    def judge(
        self, questions: Texts, lows: Texts, highs: Texts, answers: Sequence[Texts], row_ids: Texts | None = None
    ) -> list[Verdict]:
        """One `ServedVerdict` per row; its values are None without usable replies."""
        names = [*map(str, range(len(questions)))] if row_ids is None else row_ids
        graded = [self.scores(questions, side, answers) for side in (lows, highs)] if self.once else []

        def talk(index: int, send: Send) -> Verdict:
            shared = {"question": questions[index], "answers": " | ".join(dict.fromkeys(answers[index]))}
            orders = (lows[index], highs[index]), (highs[index], lows[index])
            pairs = [shared | {"first": first, "second": second} for first, second in orders]
            if self.once:
                reply, text = self.asker.ask(send, names[index], pairs[0])
                low, high = (part[index] for part in graded)
                found = reply.better, low, high, max(low, high) < self.correct_threshold, reply.better
                return ServedVerdict(*found, **self.asker.source, replies=(text,))
            return self.combine(*(self.asker.ask(send, names[index], values) for values in pairs))

        def lost(failure: Failure) -> Verdict:
            about: Record = {**self.asker.source, "reason": failure.reason, "silent": failure.silent}
            return ServedVerdict(None, None, None, None, **about)

        return self.asker.client.converse(names, talk, lost)

    def combine(self, low_first: tuple[PairReply, str], low_second: tuple[PairReply, str]) -> ServedVerdict:
        """The verdict from the two replies and their raw texts."""
        (one, text), (two, other_text) = low_first, low_second
        swapped = {TIE: TIE, LOW_BETTER: HIGH_BETTER, HIGH_BETTER: LOW_BETTER}[two.better]
        low, high = (one.first + two.second) / 2, (one.second + two.first) / 2
        value = one.better if one.better == swapped and max(low, high) > 0 else TIE  # two wrong ones are equally bad
        found = value, low, high, max(low, high) < self.correct_threshold, one.better, swapped
        return ServedVerdict(*found, **self.asker.source, replies=(text, other_text))


registry.judge("llama")(lambda params: ServedJudge("llama", params))  # the paper's judge
registry.judge("deepseek")(lambda params: ServedJudge("deepseek", params))  # the one it is compared with in Table 2


class ServedOracle(Oracle):
    """A vision-language model that sees the full image, the question and the accepted answers (PAPER §2.2)."""

    def __init__(self, name: str, params: Params) -> None:
        self.name, self.asker = name, Asker(name, params, "oracle", Evidence)

    def key(self) -> str:
        return self.asker.key

    def locate(self, rows: Sequence[Record]) -> list[Record]:
        """Boxes, source and ``read`` (strict or tolerant) per row; without a usable reply a ``reason`` and no boxes."""

        def talk(index: int, send: Send) -> Record:
            row = rows[index]
            values = {"question": row["question"], "answers": " | ".join(dict.fromkeys(row["answers"]))}
            found, text = self.asker.ask(send, row["id"], values, open_image(row["image"], f"row {row['id']}"))
            found = found.model_dump()
            how = "strict" if re.sub(r"\s", "", text) == json.dumps(found, separators=(",", ":")) else "tolerant"
            return {**found, **self.asker.source, "reply": text, "read": how, "reason": ""}

        def lost(failure: Failure) -> Record:
            empty = {"question_boxes": [], "answer_boxes": [], **self.asker.source, "reply": "", "read": ""}
            return {**empty, "reason": failure.reason, "silent": failure.silent}

        return self.asker.client.converse([row["id"] for row in rows], talk, lost)


def make_oracle(params: Params) -> Oracle:
    """The oracle of ``curation.oracle``."""
    if (section := params.curation).oracle == AnnotationOracle.name:
        return AnnotationOracle(section.oracle_seed, section.oracle_sigma, section.oracle_margin)
    return ServedOracle(section.oracle, params)
