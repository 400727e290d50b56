"""An engine for timing: rows write the tokens of a script, and the end of every phase is reported."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from awares.engine.chat_format import END_OF_TURN
from awares.engine.decode import Decoder, Output, State
from awares.errors import AwaresValueError
from awares.method.protocol import Call
from awares.method.rollout import Conversation, Engine, ImageSource, Trajectory

PHASES = ("preprocess", "vision", "prefill", "decode")
PhaseEnd = Callable[[str, int], None]  # called with a phase of `PHASES` that has just ended, and its turn: 1 or 2
Tokens = list[int] | int | None  # per row: write these ids, write this many tokens, or decode freely


@dataclass(frozen=True)
class Script:
    """The behaviour of a row: the model writes its call token by token and gets a second turn, as after a free call.

    ``crops``: the first turn's call, () = it answers at once. ``answer_tokens``: tokens of the last turn with its
    end-of-turn token; None = the model decides.
    """

    crops: tuple[str, ...] = ()
    answer_tokens: int | None = None


class ForcedTokens(LogitsProcessor):
    """Makes B rows write ``tokens`` at the cost of writing them; also works for models with random weights.

    A number means that many tokens, the last of them the end of the turn. ``first_step`` is called at the first step.
    """

    def __init__(self, tokens: Sequence[Tokens], decoder: Decoder, first_step: Callable[[], None]) -> None:
        limit, shape = decoder.max_new_tokens, (len(tokens), decoder.max_new_tokens)
        must, open_ended = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
        for index, row in enumerate(tokens):
            count = row if isinstance(row, int) else len(row or ())
            if count > limit:
                raise AwaresValueError(f"{count} tokens scripted, max_new_tokens is {limit}: raise it")
            if isinstance(row, int):
                open_ended[index, : row - 1] = True
                must[index, row - 1] = decoder.end
            elif row:
                must[index, : len(row)] = torch.tensor(row)
        self.must, self.open_ended = must.to(decoder.model.device), open_ended.to(decoder.model.device)
        self.free = all(row is None for row in tokens)
        self.end, self.first_step, self.step = decoder.end, first_step, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step == 0:
            self.first_step()
        must, open_ended = self.must[:, self.step, None], self.open_ended[:, self.step, None]  # (B, 1)
        self.step += 1
        if self.free:
            return scores
        token = torch.arange(scores.shape[1], device=scores.device)
        barred = ((must >= 0) & (token != must)) | (open_ended & (token == self.end))
        # a forced token gets 0, because the model may not be allowed to write it
        return scores.masked_fill(barred, float("-inf")).masked_fill(token == must, 0.0)


class ScriptedDecoder(Decoder):
    """A decoder that forces tokens by row id, in the first and in the second turn, and reports the end of phases."""

    first_turn: Mapping[str, Tokens] = {}
    second_turn: Mapping[str, Tokens] = {}
    on_phase_end: PhaseEnd | None = None
    turn = 1
    names: Sequence[str] = ()  # of the rows of the last `start`

    def start(
        self,
        rows: Sequence[list[int]],
        images: Sequence[list[Image]],
        call_bias: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> Output:
        self.turn, self.names = 1, names or [str(index) for index in range(len(rows))]
        self._force([self.first_turn.get(name) for name in self.names])
        return super().start(rows, images, call_bias, names)

    def extend(self, state: State, picked: Sequence[int], *arguments: Any) -> Output:
        self.turn = 2
        self._force([self.second_turn.get(self.names[row]) for row in picked])
        return super().extend(state, picked, *arguments)

    def _force(self, tokens: Sequence[Tokens]) -> None:
        self.processors = LogitsProcessorList([ForcedTokens(tokens, self, lambda: self._report("prefill"))])

    def _pixels(self, images: list[Image]) -> Any:
        pixels = super()._pixels(images)
        self._report("preprocess")
        return pixels

    def _encode(self, images: Sequence[list[Image]]) -> tuple[list[Tensor], list[Tensor]]:
        encoded = super()._encode(images)
        self._report("vision" if any(images) else "preprocess")
        return encoded

    def _generate(self, state: State, features: list[Tensor], call_bias: Sequence[float] | None) -> Output:
        output = super()._generate(state, features, call_bias)
        self._report("decode")
        return output

    def _report(self, phase: str) -> None:
        if self.on_phase_end:
            self.on_phase_end(phase, self.turn)


class ScriptedEngine(Engine):
    """An engine whose rows can follow scripts; ``on_phase_end`` is called at the end of every phase of a batch."""

    decoder_type = ScriptedDecoder
    decoder: ScriptedDecoder

    def __init__(self, *arguments: Any, on_phase_end: PhaseEnd | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.decoder.on_phase_end = on_phase_end
        self.calls: dict[str, tuple[str, ...]] = {}

    def run_scripts(
        self, images: Sequence[ImageSource], questions: Sequence[str], row_ids: Sequence[str], scripts: Sequence[Script]
    ) -> list[Trajectory]:
        """`run` with one script per row; ``call_status`` of a row with a call is forced."""
        forced = [None if script.crops else () for script in scripts]
        with self._following(row_ids, scripts):
            played = self.run(images, questions, forced, call_bias=float("-inf"), row_ids=row_ids)
        return [replace(trajectory, call_logprob=None, call_gap=None) for trajectory in played]

    def answer_scripts(
        self, images: Sequence[ImageSource], questions: Sequence[str], view: str, row_ids: Sequence[str],
        scripts: Sequence[Script],
    ) -> list[Trajectory]:  # fmt: skip
        """`answer` with one script per row, which says how long the answer is."""
        with self._following(row_ids, scripts):
            return self.answer(images, questions, view, row_ids=row_ids)

    @contextmanager
    def _following(self, row_ids: Sequence[str], scripts: Sequence[Script]) -> Iterator[None]:
        by_id = dict(zip(row_ids, scripts, strict=True))
        assert len(by_id) == len(row_ids), "a row id occurs twice"
        self.calls = {row_id: script.crops for row_id, script in by_id.items() if script.crops}
        answers = {row_id: script.answer_tokens for row_id, script in by_id.items()}
        written = {
            row_id: self.decoder.tokenize(self.protocol.render_call(crops) + END_OF_TURN)
            for row_id, crops in self.calls.items()
        }
        self.decoder.first_turn, self.decoder.second_turn = {**answers, **written}, answers
        try:
            yield
        finally:
            self.calls, self.decoder.first_turn, self.decoder.second_turn = {}, {}, {}

    def _read_call(self, row: Conversation) -> Call:
        if row.row_id in self.calls:
            return Call(self.calls[row.row_id], "forced", row.turns[-1].text)
        return super()._read_call(row)
