"""Judges and oracle behind OpenAI-compatible servers such as vLLM (PAPER §2, steps 1 and 2).

data/served.yaml declares the models and the prompts. A reply that cannot be used is requested again; a row that never
gets a usable one is listed as lost. A row without any reply of the server is lost, too, but the next run asks again.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Self, TypeVar

from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator
from pydantic_core import from_json

from awares import registry
from awares.clients.chat import ChatClient, Request, RowFailed, Send, Server
from awares.clients.engine import RemoteEngine, data_url
from awares.config import Params, read_yaml
from awares.engine.images import to_rgb
from awares.engine.jsonl import Record
from awares.engine.keys import code_of
from awares.engine.model import ImageOnlyProcessor
from awares.errors import AwaresValueError, Failure, first_fault
from awares.method import protocol
from awares.method.judges import HIGH_BETTER, LOW_BETTER, TIE, AnnotationOracle, Judge, Oracle, Texts, Verdict

Boxes = list[list[int]]
SIDE = 1000  # boxes are in thousandths of the image's width and height


# Declarations


class Prompt(BaseModel, extra="forbid"):
    """``system`` and ``user`` text; ``{names}`` are filled in."""

    version: str
    system: str
    user: str

    def messages(self, values: dict[str, str], image: Image.Image | None = None) -> list[Record]:
        """The chat, the image before the question; braces in a value stay as they are."""
        text = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.user).strip()
        content: Any = text
        if image:
            picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
            content = [picture, {"type": "text", "text": text}]
        return [{"role": "system", "content": self.system.strip()}, {"role": "user", "content": content}]


class ServedModel(Server, extra="forbid", frozen=True):
    """A model behind a server; data/served.yaml explains the fields."""

    max_tokens: int = Field(gt=0)
    retries: int = Field(ge=0)
    dollars: tuple[float, float]
    rows_per_hour: float = Field(gt=0)


class Prompts(BaseModel, extra="forbid"):
    """The prompts for comparing two answers, for grading one, and for finding the evidence."""

    judge: Prompt
    grade: Prompt
    oracle: Prompt


class Served(BaseModel, extra="forbid"):
    """The file data/served.yaml."""

    models: dict[str, ServedModel]
    prompts: Prompts


def read_served(params: Params) -> Served:
    """The declarations of ``curation.served_file``; AwaresValueError names a wrong key."""
    path = params.path(params.curation.served_file)
    try:
        return Served.model_validate(read_yaml(path, "curation.served_file"))
    except ValidationError as error:
        raise AwaresValueError(f"{path}: {first_fault(error)}: see the comments there") from error


def get_model(name: str, params: Params) -> ServedModel:
    """A declared model, else AwaresValueError. AWARES_<NAME>_URL in the environment replaces its ``url``."""
    models = read_served(params).models
    if name not in models:
        place = f"{params.curation.served_file}: models.{name}"
        raise AwaresValueError(f"{place} is not declared, only {', '.join(models)}")
    url = os.environ.get(f"AWARES_{name.upper()}_URL") or models[name].url
    return models[name].model_copy(update={"url": url})


def make_client(name: str, params: Params) -> ChatClient:
    """The client of a served model; all runs of a profile share its replies."""
    path = params.path(params.paths.runs) / params.profile / ".replies" / f"{name}.jsonl"
    return ChatClient(get_model(name, params), path, progress=True)


# Replies


class ModelReply(BaseModel, extra="forbid", strict=True, json_schema_extra=lambda schema: schema.pop("description")):
    """A JSON object that a model must reply with. Its schema goes to the server, without these docstrings."""

    @classmethod
    def read(cls, text: str) -> Self | None:
        """The object in ``text``, alone or within other words; None without a valid one."""
        for part in (text, *re.findall(r"\{.*\}", text, re.DOTALL)):
            try:
                return cls.model_validate(from_json(part))
            except ValidationError:
                break
            except ValueError:  # no JSON
                continue
        return None


# Not Literal[0, 1], which accepts true and 1.0 even in strict mode
Bit = Annotated[int, Field(ge=0, le=1, json_schema_extra={"enum": [0, 1]})]
Preference = Annotated[int, Field(ge=0, le=2, json_schema_extra={"enum": [TIE, LOW_BETTER, HIGH_BETTER]})]


class Comparison(ModelReply):
    """``first``, ``second``: whether that answer is right; ``better``: 0 = neither, 1 = the first, 2 = the second."""

    first: Bit
    second: Bit
    better: Preference

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.first != self.second and self.better != (LOW_BETTER if self.first else HIGH_BETTER):
            raise ValueError("better contradicts first and second")
        return self


class Grade(ModelReply):
    """Whether an answer is right."""

    right: Bit


_EDGES = TypeAdapter(list[FiniteFloat])


class Evidence(ModelReply):
    """Boxes [x1, y1, x2, y2] in 0-1000, at least one.

    Other keys are ignored and a missing list is empty. A box may be a mapping with the key ``bbox_2d``, and have
    fractions, its corners in another order, or edges outside, which are cut off. One bad box spoils the reply.
    """

    question_boxes: list[list[int]]
    answer_boxes: list[list[int]]

    @model_validator(mode="before")
    @classmethod
    def _repair(cls, found: Any) -> Any:
        keys = ("question_boxes", "answer_boxes")
        boxes = {key: _boxes(found.get(key, [])) for key in keys} if isinstance(found, dict) else {}
        if not any(boxes.values()):
            raise ValueError("no box")
        return boxes

    def is_all_of(self, text: str) -> bool:
        """Whether ``text`` is this object, as requested and without repair."""
        return re.sub(r"\s", "", text) == self.model_dump_json()


def _boxes(part: Any) -> Boxes:
    if not isinstance(part, list):
        raise ValueError("boxes must be a list")
    if len(part) == 4 and all(isinstance(edge, int | float) for edge in part):
        part = [part]  # one box without its list
    boxes = []
    for box in part:
        edges = _EDGES.validate_python(box.get("bbox_2d") if isinstance(box, dict) else box, strict=True)
        clipped = [min(SIDE, max(0, round(edge))) for edge in edges]
        (left, right), (top, bottom) = sorted(clipped[0::2]), sorted(clipped[1::2])
        if max(edges) <= 1 or left == right or top == bottom:
            raise ValueError("a box in fractions of 1, or an empty one")
        boxes.append([left, top, right, bottom])
    return boxes


R = TypeVar("R", bound=ModelReply)


class Asker(Generic[R]):
    """A served model with one of the prompts: asks until a reply can be read as ``reply``."""

    def __init__(self, name: str, params: Params, prompt: str, reply: type[R]) -> None:
        self.model, self.client, self.reply = get_model(name, params), make_client(name, params), reply
        self.prompt: Prompt = getattr(read_served(params).prompts, prompt)
        self.source = {"model": self.model.model, "version": self.prompt.version}
        limits = f"{self.model.max_tokens}:{self.model.retries}"
        self.key = f"{name}:{self.model.model}:{limits}:{self.prompt}:{code_of(__file__)}"  # all that decides a reply

    def ask(self, send: Send, row_id: str, values: dict[str, str], image: Image.Image | None = None) -> tuple[R, str]:
        """The first usable reply and its raw text; RowFailed after ``retries`` further attempts without one."""
        schema = {"name": "reply", "strict": True, "schema": self.reply.model_json_schema()}
        messages, reasons = self.prompt.messages(values, image), []
        for attempt in range(self.model.retries + 1):
            settings = {
                "temperature": 0.7 if attempt else 0.0,
                "seed": attempt,
                "max_tokens": self.model.max_tokens,
                "response_format": {"type": "json_schema", "json_schema": schema},
            }
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


# Judges


@dataclass(frozen=True)
class ServedVerdict(Verdict):
    """A verdict with its source.

    ``forward``, ``swapped``: the verdicts with the low answer first and second, both in the paper's terms (1 = low
    better); ``replies``: raw, in that order; ``reason``: why there is no verdict; ``silent``: no reply of the server.
    """

    forward: int | None
    swapped: int | None
    model: str
    version: str
    replies: tuple[str, ...]
    reason: str = ""
    silent: bool = False


class ServedJudge(Judge):
    """A language model that compares two answers in both orders (PAPER §2): if these disagree, the verdict is a tie.

    A score of a verdict is the share of the two orders that called the answer right.
    """

    def __init__(self, name: str, params: Params) -> None:
        self.pair, self.single = Asker(name, params, "judge", Comparison), Asker(name, params, "grade", Grade)
        super().__init__(name, self.grades, source=self.pair.key)

    def grades(self, questions: Texts, predictions: Texts, answers: Sequence[Texts]) -> list[float]:
        """1 for an answer that the model calls right, 0 for another, nan without a usable reply."""

        def talk(index: int, send: Send) -> float:
            values = {"question": questions[index], "answers": _joined(answers[index]), "answer": predictions[index]}
            return float(self.single.ask(send, str(index), values)[0].right)

        return self.single.client.converse([*map(str, range(len(questions)))], talk, lambda failure: math.nan)

    def judge(
        self, questions: Texts, lows: Texts, highs: Texts, answers: Sequence[Texts], row_ids: Texts | None = None
    ) -> list[Verdict]:
        """One `ServedVerdict` per row; its values are None without two usable replies."""
        names = [*map(str, range(len(questions)))] if row_ids is None else row_ids

        def talk(index: int, send: Send) -> Verdict:
            shared = {"question": questions[index], "answers": _joined(answers[index])}
            low_first = shared | {"first": lows[index], "second": highs[index]}
            low_second = shared | {"first": highs[index], "second": lows[index]}
            return self.combine(*(self.pair.ask(send, names[index], values) for values in (low_first, low_second)))

        def lost(failure: Failure) -> Verdict:
            source, reason, silent = self.pair.source, failure.reason, failure.silent
            return ServedVerdict(None, None, None, None, None, None, **source, replies=(), reason=reason, silent=silent)

        return self.pair.client.converse(names, talk, lost)

    def combine(self, low_first: tuple[Comparison, str], low_second: tuple[Comparison, str]) -> ServedVerdict:
        """The verdict from the two replies and their raw texts."""
        (one, text), (two, other_text) = low_first, low_second
        swapped = {TIE: TIE, LOW_BETTER: HIGH_BETTER, HIGH_BETTER: LOW_BETTER}[two.better]
        low, high = (one.first + two.second) / 2, (one.second + two.first) / 2
        decided = one.better == swapped and max(low, high) > 0  # two wrong answers are equally bad
        scores = low, high, max(low, high) < self.correct_threshold
        source: Any = {**self.pair.source, "replies": (text, other_text)}
        return ServedVerdict(one.better if decided else TIE, *scores, one.better, swapped, **source)


def _joined(answers: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(answers))


@registry.judge("llama")
def llama(params: Params) -> Judge:
    """The paper's judge."""
    return ServedJudge("llama", params)


@registry.judge("deepseek")
def deepseek(params: Params) -> Judge:
    """The judge of Table 2 that it is compared with."""
    return ServedJudge("deepseek", params)


# Oracle and base model


class ServedOracle(Oracle):
    """A vision-language model that sees the full image, the question and the accepted answers (PAPER §2.2)."""

    def __init__(self, name: str, params: Params) -> None:
        self.name = name
        self.asker = Asker(name, params, "oracle", Evidence)

    def key(self) -> str:
        return self.asker.key

    def locate(self, rows: Sequence[Record]) -> list[Record]:
        """Boxes, raw reply, how it was ``read``, model and prompt version of each row.

        A row without a usable reply has no boxes, a ``reason``, and whether the server was ``silent``.
        """

        def talk(index: int, send: Send) -> Record:
            row = rows[index]
            values = {"question": row["question"], "answers": _joined(row["answers"])}
            found, text = self.asker.ask(send, row["id"], values, to_rgb(row["image"], f"row {row['id']}"))
            how = "strict" if found.is_all_of(text) else "tolerant"
            return {**found.model_dump(), **self.asker.source, "reply": text, "read": how, "reason": ""}

        def lost(failure: Failure) -> Record:
            none = {"question_boxes": [], "answer_boxes": [], **self.asker.source, "reply": "", "read": ""}
            return {**none, "reason": failure.reason, "silent": failure.silent}

        return self.asker.client.converse([row["id"] for row in rows], talk, lost)


def make_oracle(params: Params) -> Oracle:
    """The oracle of ``curation.oracle``."""
    section = params.curation
    if section.oracle == AnnotationOracle.name:
        return AnnotationOracle(section.oracle_seed, section.oracle_sigma, section.oracle_margin)
    return ServedOracle(section.oracle, params)


def make_engine(name: str, processor: ImageOnlyProcessor, params: Params) -> RemoteEngine:
    """The engine of the served base model ``name``; AwaresValueError unless that is ``base.model``."""
    served = get_model(name, params).model
    if served != params.base.model:
        file = params.curation.served_file
        raise AwaresValueError(f"{file}: models.{name}.model is {served!r}, but base.model is {params.base.model!r}")
    return RemoteEngine(
        make_client(name, params),
        processor,
        max_new_tokens=params.curation.max_new_tokens,
        max_side=params.crops.max_side,
        protocol=protocol.from_params(params),
    )
