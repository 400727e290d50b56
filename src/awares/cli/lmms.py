"""The six benchmarks through lmms-eval: the call of its command, and the chat model ``awares`` that it loads.

It needs another build of torch, so it runs with the Python ``evaluation.lmms_eval``. The interaction alone is ours.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from awares import policy
from awares.config import Params
from awares.engine import jsonl
from awares.engine.images import join_strip, open_image
from awares.engine.jsonl import Record
from awares.engine.keys import checkpoint_folder, folder_digest
from awares.errors import AwaresError, AwaresFileError, AwaresValueError
from awares.method.protocol import get_protocol, read_system
from awares.method.rollout import limits_of
from awares.training import checkpoints

Tasks = Mapping[str, str]  # benchmark -> task of lmms-eval
LMMS_TASKS = {"chartqa": "chartqa", "docvqa": "docvqa_val", "ocrbench": "ocrbench", "pope": "pope",
              "realworldqa": "realworldqa", "vstar": "vstar_bench"}  # fmt: skip
LMMS_COLUMNS = ["system", "benchmark", "task", "metric", "value", "rtr", "seconds", "n"]
LMMS_DEFAULTS = {"protocol": "ours", "system": "", "geometry": "ours", "max_new_tokens": 512, "token_budget": 65536,
                 "max_side": 2000, "min_pixels": 0, "max_pixels": 0, "call_bias": 0.0}  # fmt: skip
LOG_EVERY = 64  # samples between two writes of the log; so many images are held at a time


def through_lmms_eval(
    system: str, model_path: Path, params: Params, out_dir: Path, tasks: Tasks = LMMS_TASKS, options: Sequence[str] = ()
) -> pd.DataFrame:
    """Scores of the policy at ``model_path`` by lmms-eval: a line per benchmark and metric, on lmms-eval's own scale.

    Columns: ``LMMS_COLUMNS``; rtr and seconds are means over the n samples. ``options``: more of its command line. It
    runs in the processes that ``base.launch`` has on a machine, keeps the samples next to ``out_dir`` and resumes
    there. AwaresError for a missing environment, a changed protocol, or a failure of lmms-eval.
    """
    from awares.bench.plan import launched  # needs more packages than lmms-eval's environment has

    python = params.path(params.evaluation.lmms_eval)
    if not python.is_file():
        raise AwaresFileError(f"evaluation.lmms_eval: no Python at {python}; see data/launch/README.md")
    limits, name, section = limits_of(params), params.protocol.name, params.crops
    form = limits["protocol"]
    if form != get_protocol(name, form.system, geometry=form.geometry):
        fix = "leave crops.offered, crops.region_budget and crops.margin as they are"
        raise AwaresValueError(f"evaluation.lmms_eval runs only the interaction of protocol.name: {fix}")
    inputs = checkpoints.describe_inputs("evaluation", params, [], model_path, [__file__, str(policy.__file__)])
    inputs |= {"tasks": [*tasks.values()], "options": [*options], "system": form.system}
    folder = checkpoint_folder(out_dir, inputs).resolve()
    shutil.rmtree(folder / "results", ignore_errors=True)  # of an earlier call
    arguments = {**limits, "protocol": name, "dtype": params.base.dtype, "device": params.base.device}
    arguments |= {"pretrained": model_path.resolve(), "log": folder / "samples.jsonl"}
    arguments |= {"geometry": form.geometry, "min_pixels": section.min_pixels, "max_pixels": section.max_pixels}
    arguments |= {"system": params.path(file)} if (file := params.protocol.system_file) else {}
    arguments |= {"call_bias": params.evaluation.call_bias}
    command = [str(python), "-m"]
    if launch := params.base.launch:  # a process for each GPU
        processes, machines = launched(params, launch)
        command += ["accelerate.commands.launch", "--config_file", str(params.path(launch)), "--num_machines", "1"]
        command += ["--num_processes", str(processes // machines), "-m"]
    command += ["lmms_eval", "--model", "awares", "--tasks", ",".join(tasks.values())]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    command += ["--batch_size", str(LOG_EVERY), "--output_path", str(folder / "results"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # its progress goes to stderr
    written = sorted(folder.glob("results/**/*results.json"))
    if done.returncode or not written:  # its exit code is 0 after most errors, too
        end = f"with {done.returncode}, {len(written)} results; the end of its output:\n{done.stdout[-2000:]}"
        raise AwaresError(f"lmms-eval ended on {system} {end}")
    results = json.loads(written[-1].read_text())["results"]
    samples = pd.DataFrame([one for log in sorted(folder.glob("samples*.jsonl")) for one in jsonl.read_records(log)])
    rows = []
    for benchmark, task in tasks.items():
        part = samples[samples["id"].str.startswith(f"{task}/")]
        means = part["rtr"].mean(), part["seconds"].mean(), len(part)
        for key, value in results[task].items():  # "metric,filter", and some that are no metrics
            metric, comma, _ = key.partition(",")
            if isinstance(value, int | float) and comma and not metric.endswith("_stderr"):
                rows.append((system, benchmark, task, metric, float(value), *means))
    return pd.DataFrame(rows, columns=LMMS_COLUMNS)


# Inside lmms-eval's environment

if importlib.util.find_spec("lmms_eval"):
    from lmms_eval.api.model import lmms as Model
else:
    Model = object


def manifest() -> Any:
    """The entry point of lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="awares", chat_class_path="awares.cli.lmms.AwaresChat")


class AwaresChat(Model):
    """The policy as a chat model of lmms-eval, a copy in each process: chat messages in, texts out.

    ``pretrained``: a merged model or an adapter. ``log``: a JSONL file with the trajectory of every sample, from which
    the same call resumes (lmms-eval writes its own cache only at the end); ``samples.<rank>.jsonl`` of each process.
    LMMS_DEFAULTS: further arguments; ``max_new_tokens`` replaces a task's limit, which would cut calls off.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, log: str = "samples.jsonl", dtype: str = "bfloat16", device: str = "cuda", **given: Any
    ) -> None:  # lmms-eval passes its own options to every model
        super().__init__()
        if processes := "LOCAL_RANK" in os.environ:
            device = f"{device}:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
        options: dict[str, Any] = {name: given.get(name, value) for name, value in LMMS_DEFAULTS.items()}
        self.settings = {**options, "dtype": dtype, "weights": folder_digest(pretrained)[:16]}
        self.call_bias = float(options.pop("call_bias"))
        system = read_system(Path(name)) if (name := options.pop("system")) else None
        form = get_protocol(options.pop("protocol"), system, geometry=options.pop("geometry"))
        self.settings["prompt"] = hashlib.sha256(form.system.encode()).hexdigest()[:16]
        options |= {"protocol": form, "pixels": (options.pop("min_pixels"), options.pop("max_pixels"))}
        self.engine = policy.AwaRes.from_pretrained(pretrained, None, dtype, device, **options).engine
        self.device, self.log = device, Path(log)  # lmms-eval reads the device
        if processes:
            self.log = self.log.with_suffix(f".{os.environ['RANK']}.jsonl")

    def generate_until(self, requests: list[Any]) -> list[str]:
        """One answer per request, in order. AwaresError for a row without an image, or a log of something else."""
        names = ["{4}/{5}/{3}".format(*request.args) for request in requests]  # task, split, row; some come twice
        rows = {name: request.args for name, request in zip(names, requests, strict=True)}

        def answer(ids: list[str]) -> list[Record]:
            images, questions = zip(*[self._read(name, *rows[name]) for name in ids], strict=True)
            done = self.engine.run(images, questions, call_bias=self.call_bias, row_ids=ids)
            more = [{"settings": self.settings, "rtr": one.rtr, **one.to_dict()} for one in done]
            heads = [{"id": name, "question": question} for name, question in zip(ids, questions, strict=True)]
            return [head | one for head, one in zip(heads, more, strict=True)]

        jsonl.drop_torn_line(self.log, b'{"id": ', "samples")
        found = jsonl.in_chunks(self.log, [*rows], LOG_EVERY, answer, lambda one: one["settings"] != self.settings)
        texts = {record["id"]: record["answer"] for record in found}
        return [_until(texts[name], rows[name][2].get("until") or []) for name in names]

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Not supported, like several rounds: the policy decides which crops to see while it writes."""
        raise NotImplementedError("awares answers by generation in one round: take a generate_until task")

    generate_until_multi_round = loglikelihood

    def _read(self, name: str, _: str, to_messages: Any, __: Any, doc: int, task: str, split: str) -> Any:
        """Image and question of a row. Several images are set side by side, as in the training rows."""
        from lmms_eval.protocol import ChatMessages

        chat = ChatMessages(messages=to_messages(self.task_dict[task][split][doc]))
        images, *others = chat.extract_media()
        if not images or any(others):
            raise AwaresValueError(f"{name}: awares needs an image, and reads no video and no sound")
        pictures = [open_image(one, name, min_side=1) for one in images]
        parts = [part for one in chat.messages if one.role == "user" for part in one.content if part.type == "text"]
        question = "\n".join(part.text for part in parts).strip()
        return pictures[0] if len(pictures) == 1 else join_strip(pictures), question


def _until(text: str, stops: str | Sequence[str]) -> str:
    for stop in filter(None, [stops] if isinstance(stops, str) else stops):
        text = text.split(stop)[0]
    return text
