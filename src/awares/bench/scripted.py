"""An engine for timing: rows write the tokens of a script, and the end of every phase is reported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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
FREE, NOT_END = -1, -2  # in a script of token ids: the model decides; it may not end its turn


class Script(NamedTuple):
    """The behaviour of a row: the model writes its call token by token and gets a second turn, as after a free call.

    ``crops``: the first turn's call, () = it answers at once. ``answer_tokens``: tokens of the last turn with its
    end-of-turn token; None = the model decides.
    """

    crops: tuple[str, ...] = ()
    answer_tokens: int | None = None


class ForcedTokens(LogitsProcessor):
    """Makes B rows write ``scripts`` (ids, FREE, NOT_END) at the cost of writing them, with random weights, too.

    ``first_step`` is called at the first step.
    """

    def __init__(self, scripts: Sequence[Sequence[int]], decoder: Decoder, first_step: Callable[[], None]) -> None:
        limit, longest = decoder.max_new_tokens, max(map(len, scripts))
        if longest > limit:
            raise AwaresValueError(f"{longest} tokens scripted, max_new_tokens is {limit}: raise it")
        padded = [[*script, *[FREE] * (limit - len(script))] for script in scripts]
        self.tokens = torch.tensor(padded, device=decoder.model.device)  # (B, max_new_tokens)
        self.free, self.end, self.first_step, self.step = longest == 0, decoder.end, first_step, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step == 0:
            self.first_step()
        must = self.tokens[:, self.step, None]  # (B, 1)
        self.step += 1
        if self.free:
            return scores
        token = torch.arange(scores.shape[1], device=scores.device)
        barred = ((must >= 0) & (token != must)) | ((must == NOT_END) & (token == self.end))
        # a forced token gets 0, because the model may not be allowed to write it
        return scores.masked_fill(barred, float("-inf")).masked_fill(token == must, 0.0)


class ScriptedDecoder(Decoder):
    """A decoder that forces tokens by row id, in the first and in the second turn, and reports the end of phases."""

    scripts: tuple[Mapping[str, list[int]], Mapping[str, list[int]]] = ({}, {})
    on_phase_end: PhaseEnd | None = None
    turn = 1
    names: Sequence[str] = ()  # of the rows of the last `start`

    def start(self, rows: Any, images: Any, call_bias: Any = None, names: Sequence[str] | None = None) -> Output:
        self.names = names or [str(index) for index in range(len(rows))]
        self._force(1, self.names)
        return super().start(rows, images, call_bias, names)

    def extend(self, state: State, picked: Sequence[int], *arguments: Any) -> Output:
        self._force(2, [self.names[row] for row in picked])
        return super().extend(state, picked, *arguments)

    def _force(self, turn: int, names: Sequence[str]) -> None:
        self.turn, scripts = turn, [self.scripts[turn - 1].get(name, []) for name in names]
        self.processors = LogitsProcessorList([ForcedTokens(scripts, self, lambda: self._report("prefill"))])

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
        self,
        images: Sequence[ImageSource],
        questions: Sequence[str],
        row_ids: Sequence[str],
        scripts: Sequence[Script],
        view: str = "",
    ) -> list[Trajectory]:
        """`run`, or `answer` from a ``view``, with one script per row; a scripted call has ``call_status`` forced."""
        decoder, by_id = self.decoder, dict(zip(row_ids, scripts, strict=True))
        self.calls = {row_id: script.crops for row_id, script in by_id.items() if script.crops}
        lengths = {row_id: script.answer_tokens for row_id, script in by_id.items() if script.answer_tokens}
        answers = {row_id: [NOT_END] * (length - 1) + [decoder.end] for row_id, length in lengths.items()}
        texts = {row_id: self.protocol.render_call(crops) + END_OF_TURN for row_id, crops in self.calls.items()}
        decoder.scripts = {**answers, **{row_id: decoder.tokenize(text) for row_id, text in texts.items()}}, answers
        try:
            if view:
                return self.answer(images, questions, view, row_ids=row_ids)
            forced = [None if script.crops else () for script in scripts]
            played = self.run(images, questions, forced, float("-inf"), row_ids)
            return [replace(trajectory, call_logprob=None, call_gap=None) for trajectory in played]
        finally:
            self.calls, decoder.scripts = {}, ({}, {})

    def _read_call(self, row: Conversation) -> Call:
        if row.row_id in self.calls:
            return Call(self.calls[row.row_id], "forced", row.turns[-1].text)
        return super()._read_call(row)
