"""An engine for timing: rows write the tokens of a script, and the end of every phase is reported."""

from collections.abc import Callable, Mapping, Sequence
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
FREE = -1  # in a script of token ids: the model decides
PhaseEnd = Callable[[str, int], None]  # called with a phase of `PHASES` that has just ended, and its turn: 1 or 2


class Script(NamedTuple):
    """The output of a row, generated at its full cost."""

    crops: tuple[str, ...] = ()  # the call of turn 1; () = a direct answer
    answer_tokens: int | None = None  # of the last turn, with the end of the turn; None = the model decides


class ForcedTokens(LogitsProcessor):
    """Makes B rows write ``scripts`` (token ids); ``first_step`` is called at the first step."""

    def __init__(self, scripts: Sequence[Sequence[int]], device: Any, first_step: Callable[[], None]) -> None:
        longest = max(map(len, scripts))
        padded = [[*script, *[FREE] * (longest - len(script))] for script in scripts]
        self.tokens = torch.tensor(padded, device=device)  # (B, longest)
        self.first_step, self.step = first_step, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step == 0:
            self.first_step()
        must = self.tokens[:, self.step : self.step + 1]  # (B, 1), or (B, 0) after the scripts
        self.step += 1
        if not must.numel():
            return scores
        token = torch.arange(scores.shape[1], device=scores.device)
        # a forced token gets 0, because the model may not be allowed to write it
        return scores.masked_fill(must != FREE, float("-inf")).masked_fill(token == must, 0.0)


class ScriptedDecoder(Decoder):
    """A decoder that forces tokens by row id, in the first and in the second turn, and reports the end of phases."""

    scripts: tuple[Mapping[str, list[int]], Mapping[str, list[int]]] = ({}, {})
    on_phase_end: PhaseEnd = staticmethod(lambda phase, turn: None)
    turn = 1

    def start(self, rows: Any, images: Any, call_bias: Any = None, names: Any = None) -> Output:
        self.names = names
        self._force(1, names)
        return super().start(rows, images, call_bias, names)

    def extend(self, state: State, picked: Sequence[int], *arguments: Any) -> Output:
        self._force(2, [self.names[row] for row in picked])
        return super().extend(state, picked, *arguments)

    def _force(self, turn: int, names: Sequence[str]) -> None:
        self.turn, scripts = turn, [self.scripts[turn - 1].get(name, []) for name in names]
        forced = ForcedTokens(scripts, self.model.device, lambda: self.on_phase_end("prefill", turn))
        self.processors = LogitsProcessorList([forced])

    def _pixels(self, images: list[Image]) -> Any:
        pixels = super()._pixels(images)
        self.on_phase_end("preprocess", self.turn)
        return pixels

    def _encode(self, images: Sequence[list[Image]]) -> tuple[list[Tensor], list[Tensor]]:
        encoded = super()._encode(images)
        self.on_phase_end("vision", self.turn)
        return encoded

    def _generate(self, *arguments: Any) -> Output:
        output = super()._generate(*arguments)
        self.on_phase_end("decode", self.turn)
        return output


class ScriptedEngine(Engine):
    """An engine whose rows can follow scripts; a batch reports its phases to ``decoder.on_phase_end``."""

    decoder_type = ScriptedDecoder
    decoder: ScriptedDecoder
    calls: Mapping[str, tuple[str, ...]] = {}

    def run_scripts(
        self, images: Sequence[ImageSource], questions: Sequence[str], scripts: Mapping[str, Script], view: str = ""
    ) -> list[Trajectory]:
        """`run`, or `answer` from a ``view``, with a script per row id; a scripted call has ``call_status`` forced."""
        decoder, row_ids = self.decoder, [*scripts]
        self.calls = {name: script.crops for name, script in scripts.items() if script.crops}
        lengths = {name: script.answer_tokens for name, script in scripts.items() if script.answer_tokens}
        answers = {name: decoder.tokenize("x") * (length - 1) + [decoder.end] for name, length in lengths.items()}
        texts = {name: self.protocol.render_call(crops) + END_OF_TURN for name, crops in self.calls.items()}
        first = answers | {name: decoder.tokenize(text) for name, text in texts.items()}
        longest = max(map(len, [*first.values(), *answers.values()]), default=0)
        if longest > decoder.max_new_tokens:
            raise AwaresValueError(f"{longest} tokens scripted, max_new_tokens is {decoder.max_new_tokens}: raise it")
        decoder.scripts = first, answers
        try:
            if view:
                return self.answer(images, questions, view, row_ids=row_ids)
            forced = [None if script.crops else () for script in scripts.values()]
            return self.run(images, questions, forced, float("-inf"), row_ids)
        finally:
            self.calls, decoder.scripts = {}, ({}, {})

    def _read_call(self, row: Conversation) -> Call:
        crops = self.calls.get(row.row_id)
        return Call(crops, "forced", row.turns[-1].text) if crops else super()._read_call(row)
