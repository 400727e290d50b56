"""Judges, oracle and base model behind OpenAI-compatible servers such as vLLM (PAPER §2, steps 1 and 2).

data/served.yaml names the servers and holds the prompts. Every reply is kept raw (`client.ChatClient`), so that no recorded
one is asked for again after a kill. A reply that cannot be used is asked for again; a row that never gets a usable one is
listed as lost, not labelled. A row that never gets any is lost, too, but the next run asks about it again.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import pandas as pd
from PIL import Image

from awares.clients.chat import ChatClient, Send, Server
from awares.clients.engine import RemoteEngine, data_url
from awares.clients.replies import Lost, Request
from awares.config import Params, read_yaml
from awares.engine.images import to_rgb
from awares.engine.jsonl import Record
from awares.engine.model import ImageOnlyProcessor
from awares.errors import AwaresRequestError, AwaresValueError, Failure
from awares.method.curation import AnnotationOracle, Boxes, Oracle
from awares.method.judges import HIGH_BETTER, JUDGES, LOW_BETTER, TIE, Judge, Verdict
from awares.training.checkpoints import code_of

T = TypeVar("T")
SIDE = 1000  # boxes are in thousandths of a side
WARMER = 0.7  # temperature of a reply asked for again


# What data/served.yaml declares


@dataclass(frozen=True)
class Prompt:
    """``system`` and ``user`` text; ``{names}`` are filled in."""

    version: str
    system: str
    user: str

    def messages(self, image: Image.Image | None = None, **values: str) -> list[Record]:
        """The chat, the image before the question; braces in a value stay as they are."""
        text = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.user).strip()
        picture = [{"type": "image_url", "image_url": {"url": data_url(image)}}] if image else []
        content: Any = [*picture, {"type": "text", "text": text}] if image else text
        return [{"role": "system", "content": self.system.strip()}, {"role": "user", "content": content}]


@dataclass(frozen=True)
class Model:
    """A served model: an entry of data/served.yaml, which says what the fields are."""

    name: str
    model: str
    url: str
    key_variable: str
    concurrency: int
    timeout: float
    max_tokens: int
    retries: int
    dollars: tuple[float, float]
    rows_per_hour: float

    def server(self) -> Server:
        url = os.environ.get(self.url_variable()) or self.url
        return Server(url, self.model, self.key_variable, self.concurrency, self.timeout)

    def url_variable(self) -> str:
        return f"AWARES_{self.name.upper()}_URL"

    def client(self, params: Params) -> ChatClient:
        """A client whose replies all runs of a profile share."""
        path = params.path(params.paths.runs) / params.profile / ".replies" / f"{self.name}.jsonl"
        return ChatClient(self.server(), path, progress=True)


def get_model(name: str, params: Params) -> Model:
    """A served model by its name; AwaresError naming file and key for what is not declared as it should be."""
    models = _read(params)["models"]
    place = f"{params.curation.served_file}: models.{name}"
    if name not in models:
        raise AwaresValueError(f"{place} is not declared; declared are {', '.join(models)}")
    entry, kinds = models[name], {"concurrency": int, "max_tokens": int, "retries": int, "dollars": list}
    for one in fields(Model)[1:]:
        kind: Any = kinds.get(one.name, (int, float) if one.name in ("timeout", "rows_per_hour") else str)
        if not isinstance(entry, dict) or not isinstance(entry.get(one.name), kind):
            raise AwaresValueError(f"{place}.{one.name} is missing or of the wrong kind: see the comments there")
    unknown = set(entry) - {one.name for one in fields(Model)}
    wrong = [*unknown, *(["dollars"] if len(entry["dollars"]) != 2 else [])]
    wrong += ["rows_per_hour"] if entry["rows_per_hour"] <= 0 else []
    if wrong:
        raise AwaresValueError(f"{place}: {', '.join(wrong)}: not as the comments there say")
    return Model(name=name, **{**entry, "dollars": tuple(entry["dollars"])})


def get_prompt(name: str, params: Params) -> Prompt:
    """A prompt by its name."""
    try:
        return Prompt(**_read(params)["prompts"][name])
    except (KeyError, TypeError) as error:
        raise AwaresValueError(
            f"{params.curation.served_file}: prompts.{name} must have version, system and user"
        ) from error


def _read(params: Params) -> Record:
    path = params.path(params.curation.served_file)
    raw = read_yaml(path, "curation.served_file")
    if not all(isinstance(raw.get(key), dict) for key in ("models", "prompts")):
        raise AwaresValueError(f"{path.name} must have the sections models and prompts")
    return raw


# Asking


class Asked:
    """A served model with one prompt: asks until a reply can be read."""

    def __init__(self, model: Model, prompt: Prompt, schema: Record) -> None:
        self.model, self.prompt, self.schema = model, prompt, schema

    def key(self) -> str:
        """Everything of it that decides a reply."""
        return f"{self.model.model}:{self.model.max_tokens}:{self.model.retries}:{self.prompt}:{code_of(__file__)}"

    async def ask(
        self, send: Send, row_id: str, messages: Sequence[Record], read: Callable[[str], T | None]
    ) -> tuple[T, str]:
        """What ``read`` makes of a reply, and its raw text. Raises Lost when no attempt gave one that it can read."""
        reasons = []
        for attempt in range(self.model.retries + 1):
            settings = {
                "temperature": WARMER if attempt else 0.0,
                "seed": attempt,
                "max_tokens": self.model.max_tokens,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "reply", "strict": True, "schema": self.schema},
                },
            }
            try:
                text = (await send(Request(row_id, messages, settings, self.prompt.version))).text
            except Lost as error:
                if error.silent:
                    raise  # the server may be gone: another attempt now would fare no better
                reasons.append(str(error))
                continue
            found = read(text)
            if found is not None:
                return found, text
            reasons.append(f"not usable: {text[:200]!r}")
        raise Lost("; ".join(reasons))


def _choice(*values: int) -> Record:
    return {"type": "integer", "enum": list(values)}


def _object(properties: Record) -> Record:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _loads(text: str) -> Any:
    """The JSON object of a reply: the whole of it, or else the one that stands in other words; None where there is none."""
    for part in (text, *re.findall(r"\{.*\}", text, re.DOTALL)):
        try:
            return json.loads(part)
        except ValueError:
            continue
    return None


# Judges


@dataclass(frozen=True)
class ServedVerdict(Verdict):
    """A verdict with its source. ``forward``, ``swapped``: the verdict with the low answer first and with it second, both in the paper's
    terms (1 = low better); ``replies``: raw, in that order; ``reason``: why there is none;
    ``silent``: because the server did not answer.
    """

    forward: int | None
    swapped: int | None
    model: str
    version: str
    replies: tuple[str, ...]
    reason: str = ""
    silent: bool = False


JUDGE_SCHEMA = _object(
    {"first": _choice(0, 1), "second": _choice(0, 1), "better": _choice(TIE, LOW_BETTER, HIGH_BETTER)}
)
GRADE_SCHEMA = _object({"right": _choice(0, 1)})


def read_verdict(text: str) -> tuple[int, int, int] | None:
    """(first right, second right, verdict 0, 1 or 2) of a judge's reply; None for one that is malformed or contradicts itself."""
    found = _loads(text)
    if not isinstance(found, dict) or set(found) != set(JUDGE_SCHEMA["properties"]):
        return None
    first, second, better = (found[key] for key in ("first", "second", "better"))
    if any(type(value) is not int for value in (first, second, better)):
        return None
    if first not in (0, 1) or second not in (0, 1) or better not in (TIE, LOW_BETTER, HIGH_BETTER):
        return None
    wrong_way = (better == LOW_BETTER and second > first) or (better == HIGH_BETTER and first > second)
    undecided = better == TIE and first != second
    return None if wrong_way or undecided else (first, second, better)


def read_grade(text: str) -> int | None:
    """1 or 0 of a reply about one answer; None for a malformed one."""
    found = _loads(text)
    right = found.get("right") if isinstance(found, dict) and len(found) == 1 else None
    return right if type(right) is int and right in (0, 1) else None


class ServedJudge(Judge):
    """A language model asked in both orders (PAPER §2): where they disagree, the order decided, and the verdict is a tie.

    A score is the share of the two orders that called the answer right.
    """

    def __init__(self, name: str, params: Params) -> None:
        self.name = name
        model = get_model(name, params)
        self.client = model.client(params)
        self.pair = Asked(model, get_prompt("judge", params), JUDGE_SCHEMA)
        self.single = Asked(model, get_prompt("grade", params), GRADE_SCHEMA)

    def key(self) -> str:
        return f"{super().key()}:{self.pair.key()}"

    def scores(
        self, questions: Sequence[str], predictions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[float]:
        """1 for an answer that the model calls right, 0 for another, nan where it gave no usable reply."""

        async def talk(index: int, send: Send) -> float:
            messages = self.single.prompt.messages(
                question=questions[index], answers=_listed(answers[index]), answer=predictions[index]
            )
            return float((await self.single.ask(send, str(index), messages, read_grade))[0])

        found = self.client.converse([str(index) for index in range(len(questions))], talk, return_failures=True)
        return [math.nan if isinstance(one, Failure) else one for one in found]

    def judge(
        self,
        questions: Sequence[str],
        lows: Sequence[str],
        highs: Sequence[str],
        answers: Sequence[Sequence[str]],
        row_ids: Sequence[str] | None = None,
    ) -> list[Verdict]:
        names = list(row_ids) if row_ids is not None else [str(index) for index in range(len(questions))]

        async def talk(index: int, send: Send) -> Verdict:
            said = []
            for first, second in ((lows[index], highs[index]), (highs[index], lows[index])):
                messages = self.pair.prompt.messages(
                    question=questions[index], answers=_listed(answers[index]), first=first, second=second
                )
                said.append(await self.pair.ask(send, names[index], messages, read_verdict))
            return self._verdict(said)

        found = self.client.converse(names, talk, return_failures=True)
        return [self._lost(one) if isinstance(one, Failure) else one for one in found]

    def _lost(self, row: Failure) -> ServedVerdict:
        source = self.pair.model.model, self.pair.prompt.version
        return ServedVerdict(None, None, None, None, None, None, *source, (), row.reason, row.silent)

    def _verdict(self, said: Sequence[tuple[tuple[int, int, int], str]]) -> ServedVerdict:
        source, replies = (self.pair.model.model, self.pair.prompt.version), tuple(text for _, text in said)
        (low, high, forward), (high_again, low_again, turned) = (found for found, _ in said)
        swapped = {TIE: TIE, LOW_BETTER: HIGH_BETTER, HIGH_BETTER: LOW_BETTER}[turned]
        scores = (low + low_again) / 2, (high + high_again) / 2
        both_wrong = max(low, high, low_again, high_again) == 0  # equally bad, whatever is said to be better
        value = forward if forward == swapped and not both_wrong else TIE
        return ServedVerdict(value, *scores, max(scores) < self.right_at, forward, swapped, *source, replies)


def _listed(answers: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(answers))


def order_effects(verdicts: Sequence[Record]) -> pd.DataFrame:
    """How far the order of the answers decides, in percent of the rows with a verdict, for each served judge of verdicts.jsonl.

    Columns judge, n, same (one verdict in both orders), first (the answer shown first preferred in one order at least, and not
    in the other), second (likewise), lost (rows without a usable verdict).
    """
    records = []
    for name in [key for key in (verdicts[0] if verdicts else {}) if key != "id"]:
        found = [record[name] for record in verdicts if "forward" in record[name]]
        pairs = [(one["forward"], one["swapped"]) for one in found if one["value"] is not None]
        if not found:
            continue
        leaning = [(f == LOW_BETTER) + (s == HIGH_BETTER) - (f == HIGH_BETTER) - (s == LOW_BETTER) for f, s in pairs]
        marks = pd.DataFrame(
            {"same": [f == s for f, s in pairs], "first": [x > 0 for x in leaning], "second": [x < 0 for x in leaning]}
        )
        records.append((name, len(pairs), *(100 * marks.mean()), len(found) - len(pairs)))
    return pd.DataFrame(records, columns=["judge", "n", "same", "first", "second", "lost"])


# The oracle

ORACLE_SCHEMA = _object(
    {
        key: {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
        for key in ("question_boxes", "answer_boxes")
    }
)


def read_boxes(text: str) -> tuple[Boxes, Boxes, str] | None:
    """(question boxes, answer boxes, ``strict`` or ``tolerant``: how it was read) of an oracle's reply, in 0-1000; None for one without a
    single usable box.

    Read strictly first: the very object that was asked for. Else tolerantly: the object may stand in other words; a box may be a
    mapping with the key ``bbox_2d``, have its corners in another order, fractions, or edges outside, which are cut off. A box that
    is empty then, or not of four numbers, makes the reply unusable: half an answer is none.
    """
    for name, reader in (("strict", _read_strictly), ("tolerant", _read_tolerantly)):
        if found := reader(text):
            return *found, name
    return None


def _read_strictly(text: str) -> tuple[Boxes, Boxes] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or set(found) != set(ORACLE_SCHEMA["properties"]):
        return None
    question, answer = found["question_boxes"], found["answer_boxes"]
    if not isinstance(question, list) or not isinstance(answer, list) or not question + answer:
        return None
    return (question, answer) if all(map(_is_box, question + answer)) else None


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4 or any(type(value) is not int for value in box):
        return False
    left, top, right, bottom = box
    return 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE


def _read_tolerantly(text: str) -> tuple[Boxes, Boxes] | None:
    found = _loads(text)
    if not isinstance(found, dict):
        return None
    parts = [found.get(key, []) for key in ("question_boxes", "answer_boxes")]
    boxes = [_boxes(part) for part in parts]
    question, answer = boxes
    if question is None or answer is None or not question + answer:
        return None
    return question, answer


def _boxes(part: Any) -> Boxes | None:
    if not isinstance(part, list):
        return None
    if len(part) == 4 and all(isinstance(value, int | float) for value in part):
        part = [part]  # one box that is not in a list
    read = []
    for box in part:
        box = box.get("bbox_2d") if isinstance(box, dict) else box
        if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
            return None
        if not all(math.isfinite(value) for value in box) or max(box) <= 1:  # in shares of 1: to be asked again
            return None
        clipped = [min(SIDE, max(0, round(value))) for value in box]
        (left, right), (top, bottom) = sorted(clipped[0::2]), sorted(clipped[1::2])
        if right <= left or bottom <= top:
            return None
        read.append([left, top, right, bottom])
    return read


class ServedOracle(Oracle):
    """A vision-language model that sees the full image, the question and the accepted answers (PAPER §2.2)."""

    def __init__(self, name: str, params: Params) -> None:
        self.name = name
        model = get_model(name, params)
        self.client = model.client(params)
        self.asked = Asked(model, get_prompt("oracle", params), ORACLE_SCHEMA)

    def key(self) -> str:
        return f"{self.name}:{self.asked.key()}"

    def locate(self, rows: Sequence[Record]) -> list[Record]:
        """Boxes, raw reply, how it was ``read``, model and prompt version of each row; empty boxes and a ``reason`` where no reply could be used, or,
        ``silent``, none came.
        """
        about = {"model": self.asked.model.model, "version": self.asked.prompt.version}

        async def talk(index: int, send: Send) -> Record:
            row = rows[index]
            messages = self.asked.prompt.messages(
                to_rgb(row["image"], f"row {row['id']}"), question=row["question"], answers=_listed(row["answers"])
            )
            (question, answer, how), text = await self.asked.ask(send, row["id"], messages, read_boxes)
            boxes = {"question_boxes": question, "answer_boxes": answer}
            return {**boxes, **about, "reply": text, "read": how, "reason": ""}

        none = {"question_boxes": [], "answer_boxes": [], **about, "reply": "", "read": ""}
        return [
            {**none, "reason": one.reason, "silent": one.silent} if isinstance(one, Failure) else one
            for one in self.client.converse([row["id"] for row in rows], talk, return_failures=True)
        ]


# By name

# A new judge or oracle behind a server is one entry in data/served.yaml and one name in config.JUDGES or config.ORACLES.


def make_judges(params: Params) -> list[Judge]:
    """The judges of ``curation.panel`` in that order, here or behind a server."""
    return [JUDGES[name](params) if name in JUDGES else ServedJudge(name, params) for name in params.curation.panel]


def make_oracle(params: Params) -> Oracle:
    """The oracle of ``curation.oracle``."""
    section = params.curation
    if section.oracle == AnnotationOracle.name:
        return AnnotationOracle(section.oracle_seed, section.oracle_sigma, section.oracle_margin)
    return ServedOracle(section.oracle, params)


def make_engine(name: str, processor: ImageOnlyProcessor, params: Params) -> RemoteEngine:
    """The base model behind the server ``name`` in the place of `rollout.Engine`; AwaresError unless it serves ``base.model``."""
    model = get_model(name, params)
    if model.model != params.base.model:
        raise AwaresValueError(
            f"{params.curation.served_file}: models.{name}.model is {model.model!r}, base.model {params.base.model!r}: the "
            "labels would be those of another model"
        )
    return RemoteEngine.from_params(
        model.client(params), processor, params, max_new_tokens=params.curation.max_new_tokens
    )


# Before money is spent


@dataclass(frozen=True)
class Finding:
    """One thing that the profile needs. ``mend``: what to do where it is not ``there``."""

    what: str
    there: bool
    found: str
    mend: str = ""


def require_servers(params: Params, names: Sequence[str]) -> None:
    """AwaresRequestError, with the mend, unless each of ``names`` that is a served model is there."""
    missing = [one for one in servers(params, names) if not one.there]
    if missing:
        raise AwaresRequestError("\n".join(f"{one.what}: {one.found}; {one.mend}" for one in missing))


def servers(params: Params, names: Sequence[str]) -> Iterator[Finding]:
    """Whether each of ``names`` that is a served model is there."""
    for name in [name for name in names if is_served(name, params)]:
        yield _answers(name, get_model(name, params))


def _answers(name: str, model: Model) -> Finding:
    import openai

    server = model.server()
    what = f"{name}: {model.model} at {server.url}"
    try:
        with openai.OpenAI(base_url=server.url, api_key=server.api_key(), max_retries=1, timeout=20.0) as api:
            served_there = [one.id for one in api.models.list()]
    except openai.AuthenticationError:
        return Finding(what, False, "refuses the key", f"put it into the environment variable {model.key_variable}")
    except openai.OpenAIError as error:
        mend = f"start it (data/launch/README.md, Judge and oracle), or say where it is in {model.url_variable()}"
        return Finding(what, False, f"no answer: {type(error).__name__}", mend)
    mend = f"start it with --served-model-name {model.model}, or name what it serves in data/served.yaml"
    return Finding(what, model.model in served_there, f"serves {', '.join(served_there)}", mend)


CHARACTERS = 4  # of English text, to a token
VISUAL_TOKENS = 1500  # of a full image, on average over the paper's sources: assumed
HR_SHARE = 0.192  # of rows that reach the oracle (Fig. 5: 80.8 % LR)


def estimate(rows: int, params: Params) -> pd.DataFrame:
    """What labelling ``rows`` rows asks of the servers of ``params``, by the prompts and data/served.yaml alone.

    Columns role, model, requests, prompt_tokens, completion_tokens, dollars, hours; no line for what runs in this process. Retries are
    not counted, nor the check of the repaired answers (some 6 % more), nor are recorded replies taken off.
    """
    records = []
    asked = [("judge", name, rows, 2, "judge", 0) for name in params.curation.panel if is_served(name, params)]
    if is_served(params.curation.oracle, params):
        asked.append(("oracle", params.curation.oracle, math.ceil(HR_SHARE * rows), 1, "oracle", VISUAL_TOKENS))
    if params.curation.engine != "local":
        asked.append(("base", params.curation.engine, rows, 2, "", VISUAL_TOKENS * 5 // 8))  # full and half resolution
    for role, name, count, each, prompt, visual in asked:
        model = get_model(name, params)
        words = get_prompt(prompt, params) if prompt else Prompt("", "", "")
        request = visual + (len(words.system) + len(words.user) + 120) // CHARACTERS
        reply = {"judge": 20, "oracle": 60}.get(role, 20)
        requests = count * each
        tokens = requests * request, requests * reply
        dollars = sum(amount * price / 1e6 for amount, price in zip(tokens, model.dollars, strict=True))
        records.append((role, model.model, requests, *tokens, dollars, count / model.rows_per_hour))
    columns = ["role", "model", "requests", "prompt_tokens", "completion_tokens", "dollars", "hours"]
    return pd.DataFrame(records, columns=columns)


def is_served(name: str, params: Params) -> bool:
    """Whether ``name`` is a model behind a server."""
    return name in _read(params)["models"]
