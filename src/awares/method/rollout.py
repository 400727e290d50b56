"""The one two-turn interaction: used by curation, evaluation, the library front and the benchmarks (PAPER §1).

Turn 1 sees the question and I_low, and answers or calls for crops. Turn 2 adds the crops, or an error in words when the
call could not be read, and answers: it cannot call again, since there is no third turn. Rows that answer directly and
rows that call share batches; a batch is bounded by its tokens.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from awares.config import Params
from awares.engine.chat_format import END_OF_TURN, answer_text
from awares.engine.decode import Codec, Decoder, Lap, Orders, Output
from awares.engine.images import cap, open_image
from awares.engine.model import ImageOnlyProcessor, visual_tokens
from awares.errors import AwaresRequestError, AwaresValueError, Failure
from awares.method import protocol
from awares.method.crops import cut, low_resolution
from awares.method.protocol import OURS, Call, Protocol, get_protocol

T = TypeVar("T")
Source = str | Path | Image
VIEWS = ("full", "half", "none", "half+crops")
MAX_NEW_TOKENS = 64  # of a turn, where nobody says: a call with two free boxes fits
WINDOW, WINDOW_PIXELS = 256, 2**28  # rows opened and sorted at a time, and pixels of their images: 0.8 GB


@dataclass(frozen=True)
class Turn:
    """One message. ``role``: user, assistant or tool; ``images``: sizes (width, height) in px before the processor."""

    role: str
    text: str
    images: tuple[tuple[int, int], ...]
    visual_tokens: int
    text_tokens: int  # of the user turn with the system prompt; of an assistant turn, what was generated


@dataclass(frozen=True)
class Trajectory:
    """One interaction.

    ``call_status``: none, valid, recovered, malformed or forced. ``seconds``: this row's share of its batch's time.
    ``margin``: smallest gap between the two best logits at any token written; near 0 the text may change with the
    batch or the thread count. ``call_logprob``: of the call token at the first position, before any bias; None if it
    was no choice. ``call_gap``: there, the call token's logit less the best other one, before any bias: the first token
    is the call token where ``call_gap + call_bias > 0``. ``layer_visual_tokens``: of a system that drops tokens inside
    the language model, their mean over its layers; ``visual_tokens`` is then what the system's ratio counts.
    """

    row_id: str
    answer: str
    crops: tuple[str, ...]
    call_status: str
    turns: tuple[Turn, ...]
    visual_tokens: int
    full_visual_tokens: int  # of the full image alone
    seconds: float
    margin: float
    call_logprob: float | None = None
    call_gap: float | None = None
    layer_visual_tokens: float | None = None

    @property
    def rtr(self) -> float:
        """Retain token ratio: visual tokens over all turns by those of the full image (PAPER §5)."""
        return self.visual_tokens / self.full_visual_tokens

    @property
    def layer_rtr(self) -> float:
        """RTR as the mean over the language model's layers; ``rtr`` where no layer drops tokens."""
        tokens = self.visual_tokens if self.layer_visual_tokens is None else self.layer_visual_tokens
        return tokens / self.full_visual_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Trajectory":
        """The inverse of `to_dict`, also after JSON has made lists of tuples."""
        turns = tuple(Turn(**{**turn, "images": tuple(map(tuple, turn["images"]))}) for turn in values["turns"])
        return cls(**{**values, "turns": turns, "crops": tuple(values["crops"])})


@dataclass(frozen=True)
class Script:
    """What a row must do, for timing: its call is written token by token and answered in a second turn, like a free one.

    ``crops``: what its first turn calls for; () = it answers at once. ``answer_tokens``: tokens of the last turn, the
    end of the turn included; None = what the model writes.
    """

    crops: tuple[str, ...] = ()
    answer_tokens: int | None = None


@dataclass
class _Row:
    """A conversation under way: everything the model has seen of it so far."""

    row_id: str
    full: Image
    images: list[Image]
    ids: list[int]
    turns: list[Turn]
    messages: list[dict[str, Any]]  # the same as chat messages, image placeholders without their images
    call: Call = Call((), "none", "")
    free: bool = False  # the next assistant turn may be a call
    script: Script = Script()
    bias: float = 0.0
    call_logprob: float | None = None
    call_gap: float | None = None
    margin: float = float("inf")
    seconds: float = 0.0
    layer_visual_tokens: float | None = None


def with_failures(row_ids: Sequence[str], ask: Callable[[list[int]], Sequence[T]]) -> list[T | Failure]:
    """``ask`` on the places of all rows; a `Failure` in place of a row that its AwaresRequestError lists as lost.

    The others are then asked for once more, which costs nothing where replies are recorded. A call that was given up
    as a whole raises as before.
    """
    found: dict[int, T | Failure] = {}
    while left := [place for place in range(len(row_ids)) if place not in found]:
        try:
            found |= dict(zip(left, ask(left), strict=True))
        except AwaresRequestError as error:
            lost = {failure.row_id: failure for failure in error.failures}
            fallen = {place: lost[row_ids[place]] for place in left if row_ids[place] in lost}
            if not fallen:
                raise
            found |= fallen
    return [found[place] for place in range(len(row_ids))]


class Interaction(ABC):
    """The two-turn interaction, whoever writes the assistant's turns: `Engine` here, `remote.RemoteEngine` a server.

    A subclass says in ``_all`` how rows are played. ``protocol``: ours or released, by name or with a prompt of one's
    own (`protocol.get_protocol`).
    """

    def __init__(self, codec: Codec, max_side: int, protocol: Protocol = OURS) -> None:
        self.codec = codec
        self.protocol = protocol
        self.processor = codec.processor
        self.max_side = max_side

    def run(
        self,
        images: Sequence[Source],
        questions: Sequence[str],
        forced: Sequence[tuple[str, ...] | None] | None = None,
        call_bias: float | Sequence[float] = 0.0,
        row_ids: Sequence[str] | None = None,
        scripts: Sequence[Script] | None = None,
    ) -> list[Trajectory]:
        """The two-turn policy on every row.

        ``forced`` fixes the decision of a row: a tuple of crops = the first turn is that call, () = it may not call,
        None = its own choice. ``call_bias``, one for all or one per row, is added to the logit of the call token at the
        first generated position. ``scripts`` instead make the rows *write* what they say, for timing.
        """
        if forced is not None and scripts is not None:
            raise AwaresValueError("give forced or scripts, not both")
        biases = [call_bias] * len(questions) if isinstance(call_bias, float | int) else call_bias
        _check_lengths(questions, images=images, forced=forced, call_bias=biases, row_ids=row_ids, scripts=scripts)

        def prepare(index: int) -> _Row:
            decision = forced[index] if forced is not None else None
            row = self._open(images[index], questions[index], _name(row_ids, index), "half", (), self.protocol.system)
            if scripts is not None:
                row.script, row.bias = scripts[index], float("-inf")
                return row
            if decision:
                return self._force(row, decision)
            row.free, row.bias = decision is None, biases[index] if decision is None else float("-inf")
            return row

        return self._all([_name(row_ids, index) for index in range(len(questions))], prepare)

    def prompt_length(self, image: Source, question: str) -> int:
        """Tokens of a row's first turn, visual ones included; AwaresError for a row that `run` would refuse."""
        return len(self._open(image, question, "0", "half", (), self.protocol.system).ids)

    def answer(
        self,
        images: Sequence[Source],
        questions: Sequence[str],
        view: str = "full",
        crops: Sequence[tuple[str, ...]] | None = None,
        row_ids: Sequence[str] | None = None,
        answer_tokens: Sequence[int | None] | None = None,
    ) -> list[Trajectory]:
        """One turn of the base model with its plain system prompt, from one ``view`` (of `VIEWS`) of the image.

        ``crops`` are each row's, for the view half+crops (the low-resolution image, then the crops, in one user turn).
        ``answer_tokens`` make rows write that many tokens, the end of the turn included, for timing.
        """
        if view not in VIEWS:
            raise AwaresValueError(f"view {view!r}: use one of {', '.join(VIEWS)}")
        if (view == "half+crops") != (crops is not None):
            raise AwaresValueError("give crops for the view half+crops, and for no other")
        _check_lengths(questions, images=images, crops=crops, row_ids=row_ids, answer_tokens=answer_tokens)

        def prepare(index: int) -> _Row:
            names, row_id = crops[index] if crops is not None else (), _name(row_ids, index)
            row = self._open(images[index], questions[index], row_id, view, names, protocol.PLAIN_SYSTEM)
            row.script = Script((), answer_tokens[index] if answer_tokens is not None else None)
            return row

        return self._all([_name(row_ids, index) for index in range(len(questions))], prepare)

    # Rows

    def _open(self, source: Source, question: str, row_id: str, view: str, crops: Sequence[str], system: str) -> _Row:
        """The row up to the first assistant turn; AwaresError naming the row for a bad image or question."""
        full = cap(open_image(source, f"row {row_id}"), self.max_side)
        seen = {"full": [full], "none": []}.get(view)
        pictures = (
            [low_resolution(full), *(cut(full, name, self.protocol.region_budget) for name in crops)]
            if seen is None
            else seen
        )
        try:
            conversation = protocol.user_messages(question, [None] * len(pictures), system)
        except AwaresValueError as error:
            raise AwaresValueError(f"row {row_id}: {error}") from error
        text = self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        row = _Row(row_id, full, [], [], [], conversation)
        self._append(row, "user", question, text, pictures)
        return row

    def _append(self, row: _Row, role: str, text: str, rendered: str, pictures: list[Image]) -> list[int]:
        """Add a turn that the model does not write; returns its ids."""
        sizes = tuple(picture.size for picture in pictures)
        ids = self.codec.tokenize(rendered, sizes)
        visual = sum(visual_tokens(size, self.processor) for size in sizes)
        row.turns.append(Turn(role, text, sizes, visual, len(ids) - visual))
        row.images += pictures
        row.ids += ids
        return ids

    def _write(self, row: _Row, tokens: list[int], margin: float = float("inf")) -> None:
        """Add an assistant turn that the model has written."""
        row.ids += tokens
        row.margin = min(row.margin, margin)
        text = self.codec.text(tokens)
        row.turns.append(Turn("assistant", answer_text(text), (), 0, len(tokens)))
        row.messages.append({"role": "assistant", "content": text.removesuffix(END_OF_TURN)})

    def _respond(self, row: _Row) -> tuple[list[int], list[Image]]:
        """Add the tool's turn for ``row.call``; returns the ids and images that are new to the model."""
        pictures = [cut(row.full, name, self.protocol.region_budget) for name in row.call.crops]
        error = None if pictures else protocol.TOOL_ERROR
        row.messages.append(self.protocol.reply([None] * len(pictures), error))
        suffix = protocol.tool_suffix(self.processor, row.messages[-1])
        if row.ids[-1] != self.codec.end:  # the call ran into max_new_tokens
            suffix = END_OF_TURN + suffix
        role = "tool" if self.protocol.name == "ours" else "user"
        return self._append(row, role, error or "", suffix, pictures), pictures

    def _force(self, row: _Row, crops: tuple[str, ...]) -> _Row:
        text = self.protocol.render_call(crops)
        self._write(row, self.codec.tokenize(text + END_OF_TURN))
        row.call, row.bias = Call(tuple(crops), "forced", text), float("-inf")
        self._respond(row)
        return row

    @abstractmethod
    def _all(self, names: Sequence[str], prepare: Callable[[int], _Row]) -> list[Trajectory]:
        """Play the rows ``prepare(0)``, ``prepare(1)``, ... to their end; one trajectory for each of ``names``."""

    def _trajectory(self, row: _Row) -> Trajectory:
        return Trajectory(
            row_id=row.row_id,
            answer=row.turns[-1].text,
            crops=row.call.crops,
            call_status=row.call.status,
            turns=tuple(row.turns),
            visual_tokens=sum(turn.visual_tokens for turn in row.turns),
            full_visual_tokens=visual_tokens(row.full.size, self.processor),
            seconds=row.seconds,
            margin=row.margin,
            call_logprob=row.call_logprob,
            call_gap=row.call_gap,
            layer_visual_tokens=row.layer_visual_tokens,
        )


def windows(count: int, prepare: Callable[[int], _Row]) -> Iterator[list[_Row]]:
    """The rows ``prepare(0)`` to ``prepare(count - 1)`` in parts that may be open at a time, by number and by pixels."""
    rows: list[_Row] = []
    pixels = 0
    for index in range(count):
        rows.append(prepare(index))
        pixels += rows[-1].full.width * rows[-1].full.height
        if len(rows) >= WINDOW or pixels >= WINDOW_PIXELS:
            yield rows
            rows, pixels = [], 0
    if rows:
        yield rows


class Engine(Interaction):
    """Runs rows through ``model``; ``token_budget`` bounds the tokens of a padded batch, a longer row runs alone.

    ``reuse=False`` re-prefills everything in turn 2, for comparison only; ``lap`` is the decoder's, for timing. Results
    come in the order of the rows.
    """

    def __init__(
        self,
        model: Any,
        processor: ImageOnlyProcessor,
        max_new_tokens: int = MAX_NEW_TOKENS,
        token_budget: int = 8192,
        max_side: int = 2000,
        reuse: bool = True,
        progress: bool = False,
        lap: Lap | None = None,
        protocol: str | Protocol = OURS,
    ) -> None:
        chosen = get_protocol(protocol) if isinstance(protocol, str) else protocol
        self.decoder = Decoder(model, processor, max_new_tokens, lap, chosen.opening)
        super().__init__(self.decoder, max_side, chosen)
        self.token_budget = token_budget
        self.reuse = reuse
        self.progress = progress

    @classmethod
    def from_params(cls, model: Any, processor: ImageOnlyProcessor, params: Params, **options: Any) -> "Engine":
        """An engine with the limits of params.yaml, which shows its progress; ``options`` override them."""
        limits: dict[str, Any] = dict(
            progress=True,
            max_new_tokens=params.protocol.max_new_tokens,
            token_budget=params.protocol.token_budget,
            max_side=params.crops.max_side,
            protocol=protocol.from_params(params),
        )
        return cls(model, processor, **{**limits, **options})

    # Batches

    def _all(self, names: Sequence[str], prepare: Callable[[int], _Row]) -> list[Trajectory]:
        count = len(names)
        results: list[Trajectory] = []
        training = self.decoder.model.training
        self.decoder.model.eval()
        try:
            with tqdm(total=count, unit="row", leave=False, disable=not self.progress) as bar:
                for rows in windows(count, prepare):
                    for batch in self._batches(rows):
                        self._play(batch)
                        bar.update(len(batch))
                    results += [self._trajectory(row) for row in rows]
        finally:
            self.decoder.model.train(training)
        return results

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Rows of like size together, the largest first, so that what does not fit in memory fails at once."""
        by_size = sorted(rows, key=lambda row: (sum(turn.visual_tokens for turn in row.turns), len(row.ids)))
        ordered = by_size[::-1]
        return ([ordered[index] for index in group] for group in self._groups([len(row.ids) for row in ordered]))

    def _groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Consecutive indices whose padded size, room for the answer included, stays within the token budget."""
        group: list[int] = []
        for index, length in enumerate(lengths):
            longest = max([length, *(lengths[other] for other in group)]) + self.decoder.max_new_tokens
            if group and longest * (len(group) + 1) > self.token_budget:
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _play(self, rows: list[_Row]) -> None:
        """One batch: the first turn of all rows, then the second turn of those that called."""
        begun = time.perf_counter()
        bias, names = [row.bias for row in rows], [row.row_id for row in rows]
        orders = [self._order(row) for row in rows]
        output = self.decoder.start([row.ids for row in rows], [row.images for row in rows], bias, names, orders)
        for row, kept in zip(rows, output.kept or (), strict=False):
            row.turns[-1] = replace(row.turns[-1], visual_tokens=kept.nominal)
            row.layer_visual_tokens = kept.layer_mean
        scores = torch.log_softmax(output.first_logits, dim=-1)[:, self.decoder.call_token].tolist()
        gaps = _call_gaps(output.first_logits, self.decoder.call_token)
        callers = []
        for index, row in enumerate(rows):
            self._write(row, output.tokens[index], output.margins[index])
            if row.free:
                row.call = protocol.parse_call(row.turns[-1].text, self.protocol)
                row.call_logprob, row.call_gap = scores[index], gaps[index]
                callers += [index] if row.call.status != "none" else []
            elif row.script.crops:
                row.call = Call(row.script.crops, "forced", row.turns[-1].text)
                callers.append(index)
        self._second_turn(rows, callers, output)
        for row in rows:
            row.seconds = (time.perf_counter() - begun) / len(rows)

    def _order(self, row: _Row) -> Orders:
        """What the script of ``row`` has the model write in the first turn."""
        if not row.script.crops:
            return row.script.answer_tokens
        return self.decoder.tokenize(self.protocol.render_call(row.script.crops) + END_OF_TURN)

    def _second_turn(self, rows: list[_Row], callers: list[int], output: Output) -> None:
        replies = [(index, *self._respond(rows[index])) for index in callers]
        replies.sort(key=lambda reply: len(reply[1]), reverse=True)
        known = output.state.ids.shape[1]
        for group in self._groups([known + len(ids) for _, ids, _ in replies]):
            picked, suffixes, images = zip(*(replies[member] for member in group), strict=True)
            orders = [rows[index].script.answer_tokens for index in picked]
            extended = self.decoder.extend(output.state, picked, suffixes, images, self.reuse, orders)
            for index, tokens, margin in zip(picked, extended.tokens, extended.margins, strict=True):
                self._write(rows[index], tokens, margin)


def _call_gaps(logits: Tensor, token: int) -> list[float]:
    """Of every row of ``logits`` (B, vocabulary): the logit of ``token`` less the best other one."""
    others = logits.clone()
    others[:, token] = float("-inf")
    return (logits[:, token] - others.amax(dim=-1)).tolist()


def _name(row_ids: Sequence[str] | None, index: int) -> str:
    return str(row_ids[index]) if row_ids is not None else str(index)


def _check_lengths(questions: Sequence[str], **others: Sequence[Any] | None) -> None:
    for name, values in others.items():
        if values is not None and len(values) != len(questions):
            raise AwaresValueError(f"{len(questions)} questions but {len(values)} {name}: give one for each question")
