"""The six benchmarks through lmms-eval: the program that runs it, and the chat model ``awares`` that it finds.

lmms-eval wants another build of torch, so it runs in its own environment, whose Python ``evaluation.lmms_eval``
names. Rows, prompts and metrics are lmms-eval's; the interaction is ours. It finds the model through a package entry
point:

    lmms-eval --model awares --model_args pretrained=FOLDER,log=samples.jsonl --tasks chartqa,docvqa_val --batch_size 64
"""

import hashlib
import importlib.util
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from awares import policy
from awares.config import Params
from awares.data import sources
from awares.engine import jsonl
from awares.engine.jsonl import Record
from awares.errors import AwaresError, AwaresFileError, AwaresValueError
from awares.method import protocol
from awares.method.rollout import Trajectory
from awares.training import checkpoints

TASKS = {name: name for name in ("chartqa", "docvqa", "ocrbench", "pope", "realworldqa", "vstar")}
TASKS |= {"docvqa": "docvqa_val", "vstar": "vstar_bench"}
COLUMNS = ["system", "benchmark", "task", "metric", "value", "rtr", "seconds", "n"]
CHUNK = 64  # samples between two writes of the log, at least; so many images are held at a time


def through_lmms_eval(
    system: str,
    model_path: Path,
    params: Params,
    out_dir: Path,
    tasks: Mapping[str, str] = TASKS,
    options: Sequence[str] = (),
) -> pd.DataFrame:
    """Scores of the policy at ``model_path`` by lmms-eval: a line per benchmark and metric, on lmms-eval's own scale.

    Columns: ``COLUMNS``; rtr and seconds are means over the n samples. ``tasks``: benchmark -> task of lmms-eval;
    ``options``: more of its command line. The samples are kept in ``.checkpoints`` next to ``out_dir``, where the
    same call resumes. AwaresFileError for a missing environment, AwaresError with lmms-eval's last words where it
    fails.
    """
    python = params.path(params.evaluation.lmms_eval)
    if not python.is_file():
        fix = 'make that environment as data/launch/README.md says, or set it to ""'
        raise AwaresFileError(f"evaluation.lmms_eval: no Python at {python}; {fix}")
    if protocol.from_params(params) != protocol.get_protocol(params.protocol.name):
        fix = 'set it to "", or leave protocol.system_file, crops.offered and crops.region_budget as they are'
        raise AwaresValueError(f"evaluation.lmms_eval runs the interaction of protocol.name alone: {fix}")
    code = [__file__, str(policy.__file__), str(sources.__file__)]
    inputs = checkpoints.describe_inputs("evaluation", params, [], model_path, code)
    inputs |= {"tasks": list(tasks.values()), "options": list(options)}
    folder = checkpoints.checkpoint_folder(out_dir, inputs)
    samples = folder / "samples.jsonl"
    arguments: dict[str, Any] = {"pretrained": model_path.resolve(), "log": samples.resolve()}
    arguments |= {"max_new_tokens": params.protocol.max_new_tokens, "token_budget": params.protocol.token_budget}
    arguments |= {"max_side": params.crops.max_side, "call_bias": params.evaluation.call_bias}
    arguments |= {"dtype": params.base.dtype, "device": params.base.device, "protocol": params.protocol.name}
    command = [str(python), "-m", "lmms_eval", "--model", "awares", "--tasks", ",".join(tasks.values())]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    command += ["--batch_size", str(CHUNK), "--output_path", str(folder / "results"), *options]
    before = _results(folder)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # its progress goes to stderr
    fresh = _results(folder) - before
    if done.returncode or not fresh:  # it ends with 0 after most errors, too
        ended = f"ended with {done.returncode}, {'with' if fresh else 'without'} results"
        raise AwaresError(f"lmms-eval {ended} on {system}; its last words:\n{done.stdout[-2000:]}")
    results = json.loads(max(fresh)[1].read_text())["results"]
    return table(system, results, pd.DataFrame(jsonl.read_records(samples)), tasks)


def _results(folder: Path) -> set[tuple[int, Path]]:
    """(time, file) of every table of results that lmms-eval has written."""
    return {(file.stat().st_mtime_ns, file) for file in folder.glob("results/**/*results.json")}


def table(
    system: str, results: Mapping[str, Mapping[str, object]], samples: pd.DataFrame, tasks: Mapping[str, str] = TASKS
) -> pd.DataFrame:
    """lmms-eval's ``results`` (task -> ``metric,filter`` -> value) and the logged ``samples`` as one table."""
    latest = samples.drop_duplicates("sample", keep="last")
    by_task = latest.assign(task=latest["sample"].str.split("/").str[0]).groupby("task")
    rows = []
    for benchmark, task in tasks.items():
        part = by_task.get_group(task)
        for key, value in results[task].items():
            metric = key.split(",")[0]
            if isinstance(value, int | float) and "," in key and not metric.endswith("_stderr"):
                means = part.rtr.mean(), part.seconds.mean(), len(part)
                rows.append((system, benchmark, task, metric, float(value), *means))
    return pd.DataFrame(rows, columns=COLUMNS)


# Inside lmms-eval's environment

if importlib.util.find_spec("lmms_eval"):
    from lmms_eval.api.model import lmms as Model
else:
    Model = object


def manifest() -> Any:
    """The entry point of lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="awares", chat_class_path="awares.cli.lmms.AwaresChat")


@dataclass(frozen=True)
class Sample:
    """A request: name in the log, pictures (PIL, or what PIL opens), question, texts that end the answer."""

    name: str
    pictures: list[Any]
    question: str
    stops: list[str]

    def image(self) -> Image.Image:
        """The picture; several are set side by side, as in the training rows."""
        pictures = [one if isinstance(one, Image.Image) else Image.open(one) for one in self.pictures]
        return pictures[0] if len(pictures) == 1 else sources.join_strip(pictures)


class AwaresChat(Model):
    """The policy as lmms-eval wants a model: chat messages in, texts out.

    ``pretrained``: a merged model, or a base with ``adapter``. ``log``: a JSONL file with answer, crops, token counts
    and seconds of every sample; samples that it holds of the same policy and settings are not run again (lmms-eval
    writes its own cache only at the end). A task's limit on new tokens is for the answer and would cut calls off:
    ours holds.
    """

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
        from accelerate import Accelerator

        super().__init__()
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = str(self.accelerator.device) if device == "cuda" else device
        limits = {"max_new_tokens": int(max_new_tokens), "token_budget": int(token_budget), "max_side": int(max_side)}
        loaded = policy.AwaRes.from_pretrained(pretrained, adapter or None, dtype, place, protocol=protocol, **limits)
        self.engine, self.call_bias = loaded.engine, float(call_bias)
        about: dict[str, Any] = {"protocol": protocol, "dtype": dtype, "call_bias": self.call_bias, **limits}
        about["weights"] = [checkpoints.folder_digest(folder) for folder in (pretrained, adapter) if folder]
        self.identity = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(log) if log else None
        self.log = path.with_suffix(f".{self._rank}{path.suffix}") if path and self._world_size > 1 else path
        self.chunk = max(CHUNK, int(batch_size) if str(batch_size).isdecimal() else CHUNK)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """One answer per request, in order. AwaresValueError for a row without an image, or with a video or sound."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        known, done = self._logged(), []
        written, begun = 0, time.perf_counter()
        for start in range(0, len(requests), self.chunk):
            rows = [self._sample(*request.args) for request in requests[start : start + self.chunk]]
            fresh = self._answer([row for row in rows if known.get(row.name, {}).get("question") != row.question])
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

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not for a policy that decides what to see while it answers, in a single round of lmms-eval's."""
        raise NotImplementedError("awares answers by generation in one round: take a generate_until task")

    generate_until_multi_round = loglikelihood

    def _sample(self, _context: str, to_messages: Any, settings: Any, doc_id: int, task: str, split: str) -> Sample:
        from lmms_eval.protocol import ChatMessages

        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        images, videos, sounds = messages.extract_media()
        name = f"{task}/{split}/{doc_id}"
        if not images or videos or sounds:
            media = f"{len(images)} images, {len(videos)} videos, {len(sounds)} sounds"
            raise AwaresValueError(f"{name}: awares answers questions about images; this row has {media}")
        said = [part for one in messages.messages if one.role == "user" for part in one.content if part.type == "text"]
        until = settings.get("until") or []
        question = "\n".join(part.text for part in said).strip()
        return Sample(name, images, question, [until] if isinstance(until, str) else list(until))

    def _answer(self, rows: list[Sample]) -> list[Record]:
        """Runs the policy; its records, which are then in the log."""
        images, questions = [row.image() for row in rows], [row.question for row in rows]
        done = self.engine.run(images, questions, call_bias=self.call_bias, row_ids=[row.name for row in rows])
        found = [self._record(row, one) for row, one in zip(rows, done, strict=True)]
        if self.log and found:
            jsonl.append_records(self.log, found)
        return found

    def _record(self, row: Sample, done: Trajectory) -> Record:
        read, written = (sum(turn.text_tokens + turn.visual_tokens for turn in done.turns[i::2]) for i in (0, 1))
        about: Record = {"sample": row.name, "policy": self.identity, "question": row.question, "answer": done.answer}
        about |= {"crops": list(done.crops), "call": done.call_status, "input_tokens": read, "output_tokens": written}
        counts = {"visual_tokens": done.visual_tokens, "full_visual_tokens": done.full_visual_tokens, "rtr": done.rtr}
        return {**about, **counts, "seconds": done.seconds}

    def _logged(self) -> dict[str, Record]:
        """The records of this policy in these settings, by sample; AwaresFileError for a file that is no log."""
        if self.log is None:
            return {}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        jsonl.refuse_foreign(self.log, b'{"sample": ', "samples")
        jsonl.drop_torn_line(self.log)
        return {one["sample"]: one for one in jsonl.read_records(self.log) if one.get("policy") == self.identity}


def _result(record: Record, stops: list[str]) -> Any:
    from lmms_eval.api.instance import GenerationResult, TokenCounts

    text = record["answer"]
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    counts = TokenCounts(input_tokens=record["input_tokens"], output_tokens=record["output_tokens"])
    return GenerationResult(text, counts)
