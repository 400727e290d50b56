"""The chat model `awares` of lmms-eval, found through a package entry point: no fork, no copied file.

    lmms-eval --model awares --model_args pretrained=FOLDER,log=samples.jsonl \\
      --tasks chartqa,docvqa_val,ocrbench,pope,realworldqa,vstar_bench --batch_size 64

It runs the two-turn interaction with our engine. Arguments: ``pretrained`` (a merged model, or a base with ``adapter``), ``dtype``,
``device``, ``protocol`` (ours or released), ``call_bias``, ``max_new_tokens``, ``token_budget``, ``max_side``, and ``log``: a JSONL file with
crops, visual tokens, RTR and seconds of every sample. A task's limit on new tokens is meant for the answer and would cut calls off: ours holds.
Several images of a row are set side by side, as our training data have them. lmms-eval lives in an environment of its own; nothing else of
awares imports it.
"""

import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image

from awares.config import AwaresValueError
from awares.policy import AwaRes
from awares.records import append_records, drop_torn_line
from awares.rollout import Trajectory
from awares.sources import side_by_side

CHUNK = 256  # samples between two lines of the log, at least


def manifest() -> ModelManifest:
    """What lmms-eval's registry asks for."""
    return ModelManifest(model_id="awares", chat_class_path="awares.lmms_plugin.AwaresChat")


class AwaresChat(lmms):
    """The policy as lmms-eval wants a model: chat messages in, texts out."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        adapter: str = "",
        dtype: str = "bfloat16",
        device: str = "cuda",
        protocol: str = "ours",
        call_bias: float = 0.0,
        max_new_tokens: int = 512,
        token_budget: int = 65536,
        max_side: int = 2000,
        log: str = "",
        batch_size: int | str = 1,
        **_: Any,  # whatever else lmms-eval hands to every model
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = str(self.accelerator.device) if device == "cuda" else device
        limits = {"max_new_tokens": int(max_new_tokens), "token_budget": int(token_budget), "max_side": int(max_side)}
        self.policy = AwaRes.from_pretrained(pretrained, adapter or None, dtype, place, protocol=protocol, **limits)
        self.call_bias = float(call_bias)
        self.log = Path(log) if log else None
        self.chunk = max(CHUNK, int(batch_size) if str(batch_size).isdecimal() else CHUNK)

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """One answer for each request, in their order. AwaresValueError for a row without an image, or with a video or sound."""
        rows = [self._row(*request.args) for request in requests]
        done: list[Trajectory] = []
        begun = time.perf_counter()
        for start in range(0, len(rows), self.chunk):
            names, images, questions, _ = zip(*rows[start : start + self.chunk], strict=True)
            fresh = self.policy.engine.run(images, questions, call_bias=self.call_bias, row_ids=names)
            self._record(names, fresh)
            done += fresh
        written = sum(turn.text_tokens for one in done for turn in one.turns[1::2])
        seconds = time.perf_counter() - begun
        log_metrics(
            total_gen_tokens=written,
            total_elapsed_time=seconds,
            avg_speed=written / seconds if seconds else 0.0,
            additional_metrics={"rank": self._rank, "rtr": sum(one.rtr for one in done) / max(1, len(done))},
        )
        return [self._result(one, stops) for one, (*_, stops) in zip(done, rows, strict=True)]

    def _row(
        self, _context: str, to_messages: Any, settings: Any, doc_id: int, task: str, split: str
    ) -> tuple[Any, ...]:
        """(name, image, question, where to cut the answer) of a request."""
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        images, videos, sounds = messages.extract_media()
        name = f"{task}/{split}/{doc_id}"
        if not images or videos or sounds:
            raise AwaresValueError(f"{name}: awares answers questions about images; this row has {len(images)} images, "
                                   f"{len(videos)} videos, {len(sounds)} sounds")  # fmt: skip
        pictures = [one if isinstance(one, Image.Image) else Image.open(one) for one in images]
        parts = [
            part.text for one in messages.messages if one.role == "user" for part in one.content if part.type == "text"
        ]
        until = settings.get("until") or []
        return (
            name,
            pictures[0].convert("RGB") if len(pictures) == 1 else side_by_side(pictures),
            "\n".join(parts).strip(),
            [until] if isinstance(until, str) else list(until),
        )

    def _result(self, done: Trajectory, stops: list[str]) -> GenerationResult:
        text = done.answer
        for stop in stops:
            text = text.split(stop)[0] if stop else text
        read, written = ([turn.text_tokens + turn.visual_tokens for turn in done.turns[i::2]] for i in (0, 1))
        return GenerationResult(text, TokenCounts(input_tokens=sum(read), output_tokens=sum(written)))

    def _record(self, names: tuple[str, ...], done: list[Trajectory]) -> None:
        if self.log is None:
            return
        path = self.log if self._world_size == 1 else self.log.with_suffix(f".{self._rank}{self.log.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        found = []
        for name, one in zip(names, done, strict=True):
            counts = {"visual_tokens": one.visual_tokens, "full_visual_tokens": one.full_visual_tokens, "rtr": one.rtr}
            about = {"sample": name, "answer": one.answer, "crops": list(one.crops), "call": one.call_status}
            found.append({**about, **counts, "seconds": one.seconds})
        drop_torn_line(path)
        append_records(path, found)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not for a policy that decides what to see while it answers."""
        raise NotImplementedError("awares answers by generation: take a generate_until task")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not for an interaction with rounds of its own."""
        raise NotImplementedError("awares answers in one round: take a generate_until task")
