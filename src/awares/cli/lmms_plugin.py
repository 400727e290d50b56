"""The chat model `awares` of lmms-eval, found through a package entry point: no fork, no copied file.

    lmms-eval --model awares --model_args pretrained=FOLDER,log=samples.jsonl \\
      --tasks chartqa,docvqa_val,ocrbench,pope,realworldqa,vstar_bench --batch_size 64

It runs the two-turn interaction with our engine. Arguments: ``pretrained`` (a merged model, or a base with ``adapter``), ``dtype``,
``device``, ``protocol`` (ours or released), ``call_bias``, ``max_new_tokens``, ``token_budget``, ``max_side``, and ``log``: a JSONL file with
answer, crops, visual tokens, RTR and seconds of every sample. What it holds of the same policy and settings is not asked again, so that a
killed run goes on (lmms-eval's own cache is written at the end only). A task's limit on new tokens is meant for the answer and would cut
calls off: ours holds. Several images of a row are set side by side, as our training data have them. lmms-eval lives in an environment of
its own; nothing else of awares imports it.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image

from awares.data.sources import side_by_side
from awares.engine.jsonl import Record, append_records, drop_torn_line, read_records, refuse_foreign
from awares.errors import AwaresValueError
from awares.method.rollout import Trajectory
from awares.policy import AwaRes
from awares.training.checkpoints import folder_digest

CHUNK = 64  # samples between two writes of the log, at least; so many images are held at a time
_HEAD = b'{"sample": '  # how every line of a log begins


def manifest() -> ModelManifest:
    """What lmms-eval's registry asks for."""
    return ModelManifest(model_id="awares", chat_class_path="awares.cli.lmms_plugin.AwaresChat")


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
        about = {"protocol": protocol, "dtype": dtype, "call_bias": self.call_bias, **limits}
        about |= {"weights": [folder_digest(folder) for folder in (pretrained, adapter) if folder]}
        self.identity = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(log) if log else None
        self.log = path.with_suffix(f".{self._rank}{path.suffix}") if path and self._world_size > 1 else path
        self.chunk = max(CHUNK, int(batch_size) if str(batch_size).isdecimal() else CHUNK)

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """One answer for each request, in their order. AwaresValueError for a row without an image, or with a video or sound.

        What the log holds of this policy is not asked again.
        """
        known, done = self._logged(), []
        written, begun = 0, time.perf_counter()
        for start in range(0, len(requests), self.chunk):
            rows = [self._row(*request.args) for request in requests[start : start + self.chunk]]
            asked = [row for row in rows if known.get(row.name, {}).get("question") != row.question]
            fresh = self._answer(asked)
            written += sum(record["output_tokens"] for record in fresh)
            known |= {record["sample"]: record for record in fresh}
            done += [(known[row.name], row.stops) for row in rows]
        seconds = time.perf_counter() - begun
        log_metrics(
            total_gen_tokens=written,
            total_elapsed_time=seconds,
            avg_speed=written / seconds if seconds else 0.0,
            additional_metrics={"rank": self._rank, "rtr": sum(one["rtr"] for one, _ in done) / max(1, len(done))},
        )
        return [_result(record, stops) for record, stops in done]

    def _row(self, _context: str, to_messages: Any, settings: Any, doc_id: int, task: str, split: str) -> "_Row":
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        images, videos, sounds = messages.extract_media()
        name = f"{task}/{split}/{doc_id}"
        if not images or videos or sounds:
            raise AwaresValueError(f"{name}: awares answers questions about images; this row has {len(images)} images, "
                                   f"{len(videos)} videos, {len(sounds)} sounds")  # fmt: skip
        parts = [
            part.text for one in messages.messages if one.role == "user" for part in one.content if part.type == "text"
        ]
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        return _Row(name, images, "\n".join(parts).strip(), stops)

    def _answer(self, rows: "list[_Row]") -> list[Record]:
        """Ask the policy; its records, which the log then holds."""
        if not rows:
            return []
        images, questions = [row.image() for row in rows], [row.question for row in rows]
        done = self.policy.engine.run(images, questions, call_bias=self.call_bias, row_ids=[row.name for row in rows])
        found = [_record(row, one, self.identity) for row, one in zip(rows, done, strict=True)]
        if self.log:
            append_records(self.log, found)
        return found

    def _logged(self) -> dict[str, Record]:
        """What this policy, in these settings, has answered before, by sample; AwaresFileError for a log that is none."""
        if self.log is None:
            return {}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        refuse_foreign(self.log, _HEAD, "samples")
        drop_torn_line(self.log)
        return {record["sample"]: record for record in read_records(self.log) if record.get("policy") == self.identity}

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not for a policy that decides what to see while it answers."""
        raise NotImplementedError("awares answers by generation: take a generate_until task")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not for an interaction with rounds of its own."""
        raise NotImplementedError("awares answers in one round: take a generate_until task")


@dataclass(frozen=True)
class _Row:
    """A request: its name in the log, its pictures (PIL, or what PIL opens), the question, where to cut the answer."""

    name: str
    pictures: list[Any]
    question: str
    stops: list[str]

    def image(self) -> Image.Image:
        """The picture; several are set side by side."""
        pictures = [one if isinstance(one, Image.Image) else Image.open(one) for one in self.pictures]
        return pictures[0] if len(pictures) == 1 else side_by_side(pictures)


def _record(row: _Row, done: Trajectory, identity: str) -> Record:
    read, written = (sum(turn.text_tokens + turn.visual_tokens for turn in done.turns[i::2]) for i in (0, 1))
    about: Record = {"sample": row.name, "policy": identity, "question": row.question, "answer": done.answer}
    about |= {"crops": list(done.crops), "call": done.call_status, "input_tokens": read, "output_tokens": written}
    counts = {"visual_tokens": done.visual_tokens, "full_visual_tokens": done.full_visual_tokens, "rtr": done.rtr}
    return {**about, **counts, "seconds": done.seconds}


def _result(record: Record, stops: list[str]) -> GenerationResult:
    text = record["answer"]
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return GenerationResult(
        text, TokenCounts(input_tokens=record["input_tokens"], output_tokens=record["output_tokens"])
    )
