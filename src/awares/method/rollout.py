"""The two-turn interaction of PAPER §1, for curation, evaluation, `AwaRes.ask`, the baselines and the benchmarks.

In turn 1 the policy sees the question and I_low, and answers or calls for crops. In turn 2 it also sees the crops (an
error message after an unreadable call) and answers; it cannot call again. RTR (§5) is counted here. Rows that answer
directly and rows that call share batches; a token budget bounds the batch size.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from PIL.Image import Image
from tqdm import tqdm

from awares.config import Params
from awares.engine import decode
from awares.engine.chat_format import END_OF_TURN, answer_text
from awares.engine.decode import Codec, Decoder, Output, call_scores, token_groups, windows
from awares.engine.images import ImageSource, cap, open_image
from awares.engine.keys import code_of, model_key
from awares.engine.model import ImageOnlyProcessor, set_attention, visual_tokens
from awares.errors import AwaresLengthError, AwaresValueError
from awares.method import protocol
from awares.method.protocol import OURS, Call, Protocol, get_protocol

VIEWS = ("full", "half", "none", "half+crops")
MAX_NEW_TOKENS = 64  # default per turn: a call with two free boxes fits


@dataclass(frozen=True)
class Turn:
    """One message. ``role``: user, assistant or tool; ``images``: sizes (width, height) in px before the processor."""

    role: str
    text: str
    images: tuple[tuple[int, int], ...]
    visual_tokens: int
    text_tokens: int  # the user turn includes the system prompt; an assistant turn counts the generated tokens


@dataclass(frozen=True)
class Trajectory:
    """One finished interaction."""

    row_id: str
    answer: str
    crops: tuple[str, ...]
    call_status: str  # none, valid, recovered, malformed or forced
    turns: tuple[Turn, ...]
    visual_tokens: int  # over all turns; for a pruner, the count that its own ratio uses
    full_visual_tokens: int  # of the full image alone
    seconds: float  # the time of its batch divided by the batch's rows
    margin: float  # smallest gap between the two best logits; near 0 the text may change with batch or thread count
    call_logprob: float | None = None  # of the call token at the first position, before any bias; None if forced
    call_gap: float | None = None  # logit of the call token minus the best other one; a call if gap + call_bias > 0
    layer_visual_tokens: float | None = None  # mean over the LM's layers, for a pruner that drops tokens between them

    @property
    def rtr(self) -> float:
        """Retain token ratio (PAPER §5): visual tokens of all turns / visual tokens of the full image."""
        return self.visual_tokens / self.full_visual_tokens

    @property
    def layer_rtr(self) -> float:
        """The mean RTR over the language model's layers; equal to ``rtr`` if no layer drops tokens."""
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


@dataclass
class Conversation:
    """An interaction in progress: everything that the model has seen so far."""

    row_id: str
    full: Image
    images: list[Image]
    ids: list[int]
    turns: list[Turn]
    messages: list[dict[str, Any]]  # the turns as chat messages, with image placeholders
    call: Call = Call((), "none", "")
    free: bool = False  # whether the next assistant turn may be a call
    bias: float = 0.0
    call_logprob: float | None = None
    call_gap: float | None = None
    margin: float = float("inf")
    seconds: float = 0.0
    layer_visual_tokens: float | None = None


class Interaction(ABC):
    """The two-turn interaction. ``_all`` runs it with a local model (`Engine`) or a server (`RemoteEngine`)."""

    def __init__(self, codec: Codec, max_side: int, protocol: Protocol = OURS) -> None:
        self.codec, self.processor = codec, codec.processor
        self.max_side, self.protocol = max_side, protocol
        self.longest_prompt: int | None = None  # tokens; None: the server checks it

    def run(
        self,
        images: Sequence[ImageSource],
        questions: Sequence[str],
        forced: Sequence[tuple[str, ...] | None] | None = None,
        call_bias: float | Sequence[float] = 0.0,
        row_ids: Sequence[str] | None = None,
    ) -> list[Trajectory]:
        """The two-turn policy on every row; AwaresError names a row with a bad image or question.

        ``forced`` sets the decision of each row: a tuple of crops makes turn 1 that call, () forbids a call, None lets
        the model decide. ``call_bias`` (one number, or one per row) is added to the logit of the call token at the
        first generated position.
        """
        biases = [call_bias] * len(questions) if isinstance(call_bias, float | int) else call_bias
        names = _names(questions, row_ids, images=images, forced=forced, call_bias=biases)

        def prepare(index: int) -> Conversation:
            decision = forced[index] if forced is not None else None
            row = self._open(images[index], questions[index], names[index], "half", (), self.protocol.system)
            if decision:
                return self._force(row, decision)
            row.free, row.bias = decision is None, biases[index] if decision is None else float("-inf")
            return row

        return self._all(names, prepare)

    def answer(
        self,
        images: Sequence[ImageSource],
        questions: Sequence[str],
        view: str = "full",
        crops: Sequence[tuple[str, ...]] | None = None,
        row_ids: Sequence[str] | None = None,
    ) -> list[Trajectory]:
        """One turn with the plain system prompt and one ``view`` (see `VIEWS`) of the image, for the base model.

        ``crops``: one tuple per row, for the view half+crops only: I_low and the crops in one user turn.
        """
        if view not in VIEWS:
            raise AwaresValueError(f"view {view!r}: use one of {', '.join(VIEWS)}")
        if (view == "half+crops") != (crops is not None):
            raise AwaresValueError("give crops for the view half+crops, and for no other")
        names = _names(questions, row_ids, images=images, crops=crops)

        def prepare(index: int) -> Conversation:
            seen = view, crops[index] if crops is not None else ()
            return self._open(images[index], questions[index], names[index], *seen, protocol.PLAIN_SYSTEM)

        return self._all(names, prepare)

    def check_length(self, tokens: int, row_id: str) -> None:
        """AwaresLengthError for a prompt with more ``tokens`` than ``longest_prompt``."""
        if self.longest_prompt is not None and tokens > self.longest_prompt:
            held = f"the prompt has {tokens} tokens, visual ones included, and may have {self.longest_prompt}"
            raise AwaresLengthError(f"row {row_id}: {held}: shorten the question or shrink the image")

    # Rows

    def _open(
        self, source: ImageSource, question: str, row_id: str, view: str, crops: Sequence[str], system: str
    ) -> Conversation:
        """A row up to its first assistant turn; AwaresError naming the row for a bad image or question."""
        full = cap(open_image(source, f"row {row_id}"), self.max_side)
        if view in ("full", "none"):
            pictures = [full] * (view == "full")
        else:
            pictures = [self.protocol.low(full), *(self.protocol.cut(full, name) for name in crops)]
        try:
            conversation = protocol.user_messages(question, [None] * len(pictures), system)
        except AwaresValueError as error:
            raise AwaresValueError(f"row {row_id}: {error}") from error
        text = self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        row = Conversation(row_id, full, [], [], [], conversation)
        self._append(row, "user", question, text, pictures)
        return row

    def _append(self, row: Conversation, role: str, text: str, rendered: str, pictures: list[Image]) -> list[int]:
        """Add a turn that the model does not write; return its ids."""
        sizes = tuple(picture.size for picture in pictures)
        ids = self.codec.tokenize(rendered, sizes)
        visual = sum(visual_tokens(size, self.processor) for size in sizes)
        row.turns.append(Turn(role, text, sizes, visual, len(ids) - visual))
        row.images += pictures
        row.ids += ids
        self.check_length(len(row.ids), row.row_id)
        return ids

    def _write(self, row: Conversation, tokens: list[int], margin: float = float("inf")) -> None:
        """Add an assistant turn that the model wrote."""
        row.ids += tokens
        row.margin = min(row.margin, margin)
        text = self.codec.text(tokens)
        row.turns.append(Turn("assistant", answer_text(text), (), 0, len(tokens)))
        row.messages.append({"role": "assistant", "content": text.removesuffix(END_OF_TURN)})

    def _respond(self, row: Conversation) -> tuple[list[int], list[Image]]:
        """Add the tool's turn for ``row.call``; return its ids and images."""
        pictures = [self.protocol.cut(row.full, name) for name in row.call.crops]
        error = None if pictures else protocol.TOOL_ERROR
        row.messages.append(self.protocol.reply([None] * len(pictures), error))
        suffix = protocol.tool_suffix(self.processor, row.messages[-1])
        if row.ids[-1] != self.codec.end:  # the call ran into max_new_tokens
            suffix = END_OF_TURN + suffix
        role = "tool" if self.protocol.name == "ours" else "user"
        return self._append(row, role, error or "", suffix, pictures), pictures

    def _force(self, row: Conversation, crops: tuple[str, ...]) -> Conversation:
        text = self.protocol.render_call(crops)
        self._write(row, self.codec.tokenize(text + END_OF_TURN))
        row.call, row.bias = Call(tuple(crops), "forced", text), float("-inf")
        self._respond(row)
        return row

    def _read_call(self, row: Conversation) -> Call:
        """The call in the last turn of ``row``."""
        return protocol.parse_call(row.turns[-1].text, self.protocol)

    @abstractmethod
    def key(self, crops: bool = True) -> str:
        """Everything that determines the answers, but for `code`: for the key of stored ones. ``crops``: with crops."""

    @abstractmethod
    def _all(self, names: Sequence[str], prepare: Callable[[int], Conversation]) -> list[Trajectory]:
        """Complete the rows ``prepare(0)``, ``prepare(1)``, ...: one trajectory for each of ``names``, in order."""

    def _trajectory(self, row: Conversation) -> Trajectory:
        retained, full = sum(turn.visual_tokens for turn in row.turns), visual_tokens(row.full.size, self.processor)
        values: tuple[Any, ...] = row.row_id, row.turns[-1].text, row.call.crops, row.call.status, tuple(row.turns)
        values += retained, full, row.seconds, row.margin, row.call_logprob, row.call_gap, row.layer_visual_tokens
        return Trajectory(*values)


class Engine(Interaction):
    """The interaction with a local ``model``. ``token_budget`` bounds a padded batch; a longer row runs alone.

    ``reuse=False`` prefills everything again in turn 2 (for comparison). ``protocol``: ours, released, or a `Protocol`.
    """

    decoder_type: type[Decoder] = Decoder

    def __init__(
        self,
        model: Any,
        processor: ImageOnlyProcessor,
        max_new_tokens: int = MAX_NEW_TOKENS,
        token_budget: int = 8192,
        max_side: int = 2000,
        reuse: bool = True,
        progress: bool = False,
        protocol: str | Protocol = OURS,
    ) -> None:
        chosen = get_protocol(protocol) if isinstance(protocol, str) else protocol
        self.decoder = self.decoder_type(model, processor, max_new_tokens, chosen.opening)
        super().__init__(self.decoder, max_side, chosen)
        self.longest_prompt = model.config.get_text_config().max_position_embeddings - max_new_tokens
        self.token_budget, self.reuse, self.progress = token_budget, reuse, progress

    @classmethod
    def from_params(cls, model: Any, processor: ImageOnlyProcessor, params: Params, **options: Any) -> Self:
        """An engine with the limits of params.yaml and a progress bar; ``options`` override them."""
        set_attention(model, params.base.attn_implementation)
        return cls(model, processor, **{**limits_of(params), "progress": True, **options})

    def key(self, crops: bool = True) -> str:
        limits = self.decoder.max_new_tokens, self.token_budget, self.max_side
        seen = self.protocol if crops else self.protocol.geometry
        return f"{model_key(self.decoder.model)}:{limits}:{dict(self.processor.image_processor.size)}:{seen}"

    # Batches

    def _all(self, names: Sequence[str], prepare: Callable[[int], Conversation]) -> list[Trajectory]:
        count, results = len(names), list[Trajectory]()
        training = self.decoder.model.training
        self.decoder.model.eval()
        try:
            with tqdm(total=count, unit="row", leave=False, disable=not self.progress) as bar:
                for rows in windows(map(prepare, range(count)), lambda row: row.full.width * row.full.height):
                    for batch in self._batches(rows):
                        self._play(batch)
                        bar.update(len(batch))
                    results += [self._trajectory(row) for row in rows]
        finally:
            self.decoder.model.train(training)
        return results

    def _batches(self, rows: Sequence[Conversation]) -> Iterator[list[Conversation]]:
        """Batches of rows of similar size, the largest first, so that a lack of memory shows at once."""
        by_size = sorted(rows, key=lambda row: (sum(turn.visual_tokens for turn in row.turns), len(row.ids)))[::-1]
        return ([by_size[index] for index in group] for group in self._groups([len(row.ids) for row in by_size]))

    def _groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        return token_groups(lengths, self.decoder.max_new_tokens, self.token_budget)

    def _play(self, rows: list[Conversation]) -> None:
        """One batch: turn 1 of all rows, then turn 2 of those that called."""
        begun = time.perf_counter()
        bias, names = [row.bias for row in rows], [row.row_id for row in rows]
        output = self.decoder.start([row.ids for row in rows], [row.images for row in rows], bias, names)
        for row, kept in zip(rows, output.kept or (), strict=False):
            row.turns[-1] = replace(row.turns[-1], visual_tokens=kept.nominal)
            row.layer_visual_tokens = kept.layer_mean
        logprobs, gaps = call_scores(output.first_logits, self.decoder.call_token)
        callers = []
        for index, row in enumerate(rows):
            self._write(row, output.tokens[index], output.margins[index])
            if row.free:
                row.call = self._read_call(row)
                row.call_logprob, row.call_gap = logprobs[index], gaps[index]
                callers += [index] if row.call.status != "none" else []
        self._second_turn(rows, callers, output)
        for row in rows:
            row.seconds = (time.perf_counter() - begun) / len(rows)

    def _second_turn(self, rows: list[Conversation], callers: list[int], output: Output) -> None:
        replies = [(index, *self._respond(rows[index])) for index in callers]
        replies.sort(key=lambda reply: len(reply[1]), reverse=True)
        known = output.state.ids.shape[1]
        for group in self._groups([known + len(ids) for _, ids, _ in replies]):
            picked, suffixes, images = zip(*(replies[member] for member in group), strict=True)
            extended = self.decoder.extend(output.state, picked, suffixes, images, self.reuse)
            for index, tokens, margin in zip(picked, extended.tokens, extended.margins, strict=True):
                self._write(rows[index], tokens, margin)


def limits_of(params: Params) -> dict[str, Any]:
    """The options of `Engine` that params.yaml has."""
    turns = {"max_new_tokens": params.protocol.max_new_tokens, "token_budget": params.protocol.token_budget}
    return {**turns, "max_side": params.crops.max_side, "protocol": protocol.from_params(params)}


def code() -> str:
    """Hash of the code that an answer depends on."""
    method = [Path(__file__).with_name(f"{name}.py") for name in ("crops", "protocol", "rollout")]
    return code_of(*map(str, [*sorted(Path(decode.__file__).parent.glob("*.py")), *method]))


def _names(questions: Sequence[str], row_ids: Sequence[str] | None, **others: Sequence[Any] | None) -> list[str]:
    """The rows' ids, by default their indices; AwaresValueError if one of ``others`` has another length."""
    for name, values in {**others, "row_ids": row_ids}.items():
        if values is not None and len(values) != len(questions):
            raise AwaresValueError(f"{len(questions)} questions but {len(values)} {name}: give one for each question")
    return [str(name) for name in (range(len(questions)) if row_ids is None else row_ids)]
