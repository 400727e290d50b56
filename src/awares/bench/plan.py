"""What the pipeline will ask for, from params.yaml alone, and whether this machine has it: before hours or money are spent.

Counted, not measured: FLOPs by `awares.costs` at an assumed share of the GPU's peak, decoding at its memory's speed. Where `awares bench --train` has
measured the two training steps on the GPU, its tokens per second and peak memory stand instead. Take the hours as good to a factor of two.
"""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image as Blank

from awares.bench import configs as shapes
from awares.bench import costs
from awares.clients import judges as served
from awares.clients.judges import Finding
from awares.config import SYSTEMS, Params, read_yaml
from awares.data import sources
from awares.engine.images import cap
from awares.engine.model import load_config
from awares.errors import AwaresFileError, AwaresValueError
from awares.mini import base

COLUMNS = ("stage", "rows", "requests", "tokens", "pflop", "gpu_hours", "gpu_memory_gb", "disk_gb", "basis")
TEXT = 300  # tokens of system prompt, tool schema and question: assumed
ANSWER, CALL = 4, 30  # tokens of an answer (§5) and of a call, with the end of the turn
CROP_AREA = 0.35  # of the image, of an average request: assumed
TOGETHER = 64  # rows decoded at a time: assumed
BYTES_PER_PIXEL = 0.5  # of a stored image: assumed
COPIES = 6  # of a training picture: as fetched, as drawn, as rows, as curated rows, and DVC's of the last two
EVALUATION_COPIES = 4  # of an evaluation picture: as fetched, as drawn, as rows, and DVC's of these
KEPT = 2  # of a model that a stage writes: its own and DVC's
RUNTIME_GB = 2  # of CUDA, kernels and fragmentation on a GPU: assumed
GB = 1e9


@dataclass(frozen=True)
class Image:
    """A typical image in the benchmarks' mix: px, and what it costs in this model. ``tokens`` and ``flops`` at full resolution."""

    pixels: float
    tokens: float
    flops: float

    def scaled(self, area: float) -> "Image":
        """A view or crop of that share of the pixels; attention over the whole image is taken as linear, too."""
        return Image(self.pixels * area, self.tokens * area, self.flops * area)


def forecast(params: Params) -> pd.DataFrame:
    """One line per stage of the main line, COLUMNS: rows, requests to servers, tokens through the model, PFLOP, hours of one GPU, peak memory
    of a GPU and disk in GB, and what the hours rest on.
    """
    return pd.DataFrame(list(_Count(params).stages()), columns=list(COLUMNS))


class _Count:
    def __init__(self, params: Params) -> None:
        self.params, self.config = params, model_config(params)
        self.gpu = costs.GPUS[params.plan.gpu]
        self.itemsize = 4 if params.base.dtype == "float32" else 2
        self.read = self.itemsize * sum(costs.parameters(self.config))  # bytes, in every pass
        text = self.config.text_config
        lookup = 0 if self.config.tie_word_embeddings else text.vocab_size * text.hidden_size
        self.weights = self.read + self.itemsize * lookup  # bytes that lie in memory and on disk
        self.image = _typical(params, self.config)
        self.train_rows = params.data.train_rows * len(params.data.sources)
        self.held_out = params.data.validation_rows * len(params.data.sources)

    def stages(self) -> Iterator[tuple[Any, ...]]:
        yield self._data()
        yield from self._curation()
        yield self._sft()
        yield self._grpo()
        yield self._evaluation()

    def _data(self) -> tuple[Any, ...]:
        rows = self.train_rows + self.held_out
        return ("data", rows, 0, 0, 0.0, 0.0, 0.0, COPIES * rows * self._stored(), "counted")

    def _curation(self) -> Iterator[tuple[Any, ...]]:
        if self.params.curation.released:
            return
        rows = self.train_rows + self.held_out
        asked = served.estimate(rows, self.params)
        if self.params.curation.engine == "local":
            views = [self.image, self.image.scaled(0.25)]
            tokens, flops = self._turns([(view, ANSWER) for view in views])
            hours = self._hours(rows * flops, rows * 2 * ANSWER)
            yield (
                "curation",
                rows,
                0,
                round(rows * tokens),
                rows * flops / 1e15,
                hours,
                self._inference(),
                0.0,
                self._assumed(),
            )
        for one in asked.itertuples():
            name = f"curation: {one.role} {one.model}"
            tokens = one.prompt_tokens + one.completion_tokens
            yield (name, rows, one.requests, tokens, 0.0, 0.0, 0.0, rows * 1e3 / GB, f"{one.hours:.1f} h of its server")

    def _sft(self) -> tuple[Any, ...]:
        section = self.params.sft
        rows = round(section.share * self.train_rows * section.epochs)
        tokens, flops = self._trained(section.gradient_checkpointing)
        memory = self._training(section.per_device_batch_size * tokens, section.gradient_checkpointing)
        hours, memory, basis = self._measured("sft", rows * tokens, self._hours(rows * flops, 0), memory)
        return (
            "sft",
            rows,
            0,
            round(rows * tokens),
            rows * flops / 1e15,
            hours,
            memory,
            1.1 * KEPT * self.weights / GB,
            basis,
        )

    def _grpo(self) -> tuple[Any, ...]:
        section = self.params.grpo
        prompts = section.share * self.train_rows * section.epochs
        if section.max_steps > 0:
            prompts = min(prompts, section.max_steps * section.batch_size / section.generations)
        rows = round(prompts * section.generations)
        tokens, flops = self._trained(section.gradient_checkpointing)
        once = self._policy()[1]  # the rollout, and the reference once more
        written = ANSWER + shapes.CALL_RATES["awares"] * CALL
        hours = self._hours(rows * (flops + 2 * once), rows * written)
        memory = self._training(section.per_device_batch_size * tokens, section.gradient_checkpointing)
        hours, memory, basis = self._measured("grpo", rows * tokens, hours, memory)
        pflop = rows * (flops + 2 * once) / 1e15
        return ("grpo", rows, 0, round(rows * tokens), pflop, hours, memory, 1.1 * KEPT * self.weights / GB, basis)

    def _evaluation(self) -> tuple[Any, ...]:
        section = self.params.evaluation
        if self.params.data.origin == "hub":
            scored = [sources.get_source(self.params, "evaluation", name) for name in self.params.data.tasks]
            rows = sum(min(section.rows, one.rows or 0) for one in scored)
        else:
            rows = section.rows * len(self.params.data.tasks)
        outside = self._lmms_eval()
        policy = self._policy()
        shown = {"full": self.image, "half": self.image.scaled(0.25), "no_image": self.image.scaled(0.0)}
        done = [self._turns([(shown[name], ANSWER)]) if name in shown else policy for name in SYSTEMS]
        # both policies again: the dial's other trajectory, the frontier's eleven, lmms-eval's own run
        again = 2 * (min(section.dial_rows, rows) + 11 * min(section.frontier_rows, rows) + outside)
        tokens, flops = (rows * sum(part) + again * part[-1] for part in zip(*done, strict=True))
        hours = self._hours(flops, (rows * len(done) + again) * ANSWER)
        stored = EVALUATION_COPIES * rows * self._stored() if self.params.data.origin == "hub" else 0.0
        memory = self._inference() + 2 * self.weights / GB  # the base model and both policies
        return ("evaluation", rows, 0, round(tokens), flops / 1e15, hours, memory, stored, self._assumed())

    def _lmms_eval(self) -> int:
        """Rows that lmms-eval scores: its six benchmarks whole, whatever the tasks are."""
        if not self.params.evaluation.lmms_eval:
            return 0
        return sum(one.rows or 0 for one in sources.read_sources(self.params, "evaluation").values())

    # Parts

    def _turns(self, views: list[tuple[Image, int]]) -> tuple[float, float]:
        """(tokens, FLOPs) of single turns: what is seen, how much is written."""
        tokens = [view.tokens + TEXT + written for view, written in views]
        read = sum(costs.prefill_flops(round(count), 0, self.config) for count in tokens)
        return sum(tokens), read + sum(view.flops for view, _ in views)

    def _policy(self) -> tuple[float, float]:
        """(tokens, FLOPs) of an average interaction of the policy, cache reused."""
        low, crop, rate = self.image.scaled(0.25), self.image.scaled(CROP_AREA), shapes.CALL_RATES["awares"]
        first, more = low.tokens + TEXT + ANSWER, crop.tokens + CALL + ANSWER
        text = costs.prefill_flops(round(first), 0, self.config)
        text += rate * costs.prefill_flops(round(more), round(first), self.config)
        return first + rate * more, text + low.flops + rate * crop.flops

    def _trained(self, checkpointing: bool) -> tuple[float, float]:
        """(tokens, FLOPs) of a trained trajectory: a backward pass through frozen weights costs a forward one, checkpointing one more."""
        tokens, once = self._policy()
        seen = self.image.scaled(0.25).flops + shapes.CALL_RATES["awares"] * self.image.scaled(CROP_AREA).flops
        return tokens, seen + (3 if checkpointing else 2) * (once - seen)

    def _hours(self, flops: float, written: float) -> float:
        seconds = flops / (self.gpu.flops * self.params.plan.utilisation)
        return (seconds + written / TOGETHER * self.read / self.gpu.bandwidth) / 3600

    def _assumed(self) -> str:
        return f"{self.params.plan.utilisation:.0%} of the peak of {self.params.plan.gpu}"

    def _measured(self, step: str, tokens: float, hours: float, memory: float) -> tuple[float, float, str]:
        """Hours and GB by the tokens per second and the peak of `awares bench --train`, where there is a table of it; else as given."""
        if not self.params.plan.bench:
            return hours, memory, self._assumed()
        path = self.params.path(self.params.plan.bench) / "training.csv"
        if not path.is_file():
            raise AwaresFileError(
                f"{path}: no such table; plan.bench names the folder that `awares bench --train` wrote"
            )
        line = pd.read_csv(path).set_index("step").loc[step]
        return tokens / line.tokens_per_second / 3600, line.peak_memory_mb / 1e3, f"measured on {line.device}"

    def _stored(self) -> float:
        return self.image.pixels * BYTES_PER_PIXEL / GB

    def _inference(self) -> float:
        budget = self.params.protocol.token_budget
        return (self.weights + costs.cache_bytes(budget, self.config, self.itemsize)) / GB + RUNTIME_GB

    def _training(self, tokens: float, checkpointing: bool) -> float:
        """Weights, activations of a micro-batch (with checkpointing: one value a layer and one layer whole), and its logits, in GB."""
        text = self.config.text_config
        layer = tokens * (10 * text.hidden_size + 3 * text.intermediate_size) * self.itemsize
        layers = text.num_hidden_layers * (tokens * text.hidden_size * self.itemsize if checkpointing else layer)
        return (self.weights + layers + layer + 2 * 4 * tokens * text.vocab_size) / GB + RUNTIME_GB


def model_config(params: Params) -> Any:
    """The configuration of ``base.model``: of the folder, or the published sizes; AwaresError for a model whose sizes are not known here."""
    path = params.model_path()
    if isinstance(path, Path):
        return load_config(path)
    shape = next((name for name in shapes.SHAPES if name in path.lower()), None)
    if shape is None:
        raise AwaresValueError(
            f"base.model {path}: sizes are known of {', '.join(shapes.SHAPES)}, and of a folder here, Qwen3-VL's too: "
            f"run `hf download {path} config.json --local-dir FOLDER` and plan with base.model FOLDER"
        )
    return shapes.config_of(shape, 1.0, base.build_tokenizer())


def _typical(params: Params, config: Any) -> Image:
    """The mean over the six benchmarks' common sizes (assumed for the training sources, too)."""
    shape = shapes.MINI if params.data.origin != "hub" else "paper"
    merge = config.vision_config.spatial_merge_size
    side = merge * config.vision_config.patch_size
    found = []
    for name in shapes.BENCHMARKS:
        width, height = cap(Blank.new("1", shapes.image_size(name, shape, 1.0)), params.crops.max_side).size
        grid = merge * round(height / side), merge * round(width / side)
        found.append((width * height, grid[0] * grid[1] / merge**2, costs.vision_flops(grid, config)))
    return Image(*(sum(part) / len(found) for part in zip(*found, strict=True)))


# Is it there?


def preflight(params: Params) -> list[Finding]:
    """Looks at GPUs, disk, servers, keys, model and datasets of the profile, and changes nothing. Minutes at most."""
    section = params.curation
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: _gpus(params),
        lambda: _disk(params),
        lambda: served.servers(params, [] if section.released else [*section.panel, section.oracle, section.engine]),
        lambda: _own_rows(params),
        lambda: _hub(params),
        lambda: _lmms_eval(params),
        lambda: _vllm(params),
    ]
    return [finding for check in checks for finding in check()]


def _gpus(params: Params) -> Iterator[Finding]:
    if params.base.device != "cuda":
        return
    count = torch.cuda.device_count()
    for name in dict.fromkeys(map(params.launch, ("sft", "grpo"))):
        processes, machines = _launched(params, name)
        here, by = processes // machines, name or "a training in one process"
        key = "base.launch" if name == params.base.launch else "sft.launch"
        yield Finding(f"{here} GPUs here, for {by}", count >= here, str(count), f"name another file in {key}")
    planned, (total, _) = params.plan.gpus, _launched(params, params.base.launch)
    yield Finding(f"{total} GPUs planned", planned == total, f"plan.gpus {planned}", f"set plan.gpus to {total}")
    need = float(forecast(params).gpu_memory_gb.max())
    for index in range(count):
        seen = torch.cuda.get_device_properties(index)
        room = seen.total_memory / GB
        mend = "lower sft.per_device_batch_size, grpo.per_device_batch_size or protocol.token_budget"
        yield Finding(f"{need:.0f} GB on GPU {index}", room >= need, f"{room:.0f} GB, {seen.name}", mend)


def _launched(params: Params, name: str) -> tuple[int, int]:
    """Processes, of one GPU each, and machines of an accelerate configuration; of none: one process here."""
    if not name:
        return 1, 1
    path = params.path(name)
    settings = read_yaml(path, "base.launch or sft.launch")
    try:
        return int(settings["num_processes"]), int(settings["num_machines"])
    except KeyError as error:
        raise AwaresValueError(
            f"{path}: {error} missing: an accelerate configuration as in data/launch has it"
        ) from error


def _disk(params: Params) -> Iterator[Finding]:
    need = float(forecast(params).disk_gb.sum())
    folder = params.path(params.paths.runs)
    place = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(place).free / GB
    yield Finding(
        f"{need:.0f} GB of disk", free >= need, f"{free:.0f} GB", "set paths.runs to a larger disk, or DVC's cache"
    )


def _lmms_eval(params: Params) -> Iterator[Finding]:
    if params.evaluation.lmms_eval:
        python = params.path(params.evaluation.lmms_eval)
        mend = 'make that environment (data/launch/README.md), or set evaluation.lmms_eval to ""'
        yield Finding(f"lmms-eval at {python}", python.is_file(), "found" if python.is_file() else "missing", mend)


def _vllm(params: Params) -> Iterator[Finding]:
    if params.grpo.rollouts == "vllm":
        there = importlib.util.find_spec("vllm") is not None
        mend = 'pip install "trl[vllm]" here, or set grpo.rollouts to local'
        yield Finding("vLLM for GRPO's rollouts", there, "found" if there else "missing", mend)


def _own_rows(params: Params) -> Iterator[Finding]:
    for name in params.data.sources:
        if name.endswith(".jsonl"):
            there = params.path(name).is_file()
            yield Finding(f"rows {name}", there, "found" if there else "missing", "correct its path in data.sources")


def _hub(params: Params) -> Iterator[Finding]:
    """Whether the hub, or the folder that stands for it, lets us at model and datasets."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    wanted: list[tuple[str, str]] = []
    if params.data.origin == "hub":
        named = [name for name in params.data.sources if not name.endswith(".jsonl")]
        used = [sources.get_source(params, "training", name) for name in named]
        used += list(sources.read_sources(params, "evaluation").values())
        if params.curation.released:
            used.append(sources.get_source(params, "curated", params.curation.released))
        wanted += [(one.hub, "dataset") for one in used]
    if isinstance(params.model_path(), str):
        wanted.append((params.base.model, "model"))
    root = params.data.hub_root
    for name, kind in dict.fromkeys(wanted):
        if root and kind == "dataset":
            folder = params.path(root) / name
            yield Finding(f"{kind} {name}", folder.is_dir(), str(folder), "copy it there, or leave data.hub_root empty")
            continue
        try:
            HfApi().auth_check(name, repo_type=kind)  # of a gated repository anybody may read the description
            yield Finding(f"{kind} {name}", True, "readable")
        except GatedRepoError:
            yield Finding(
                f"{kind} {name}", False, "gated", f"accept its licence on its page and set HF_TOKEN ({_token()})"
            )
        except RepositoryNotFoundError:
            yield Finding(f"{kind} {name}", False, "not found, or private", f"check the id, set HF_TOKEN ({_token()})")
        except Exception as error:  # whatever the network does
            if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
                yield Finding(f"{kind} {name}", False, "refuses the token", "set HF_TOKEN to a valid one, or unset it")
                continue
            mend = "check the network, or set data.hub_root to a folder of copies (base.model to a folder)"
            yield Finding(f"{kind} {name}", False, f"unreachable: {type(error).__name__}", mend)


def _token() -> str:
    return "it is set" if os.environ.get("HF_TOKEN") else "it is not"


def hours(table: pd.DataFrame, params: Params) -> float:
    """Wall-clock hours of the stages, servers not counted: the trainings share ``plan.gpus`` GPUs evenly, all else runs on one."""
    shared = table.stage.isin(["sft", "grpo"])
    return math.fsum(table.gpu_hours[~shared]) + math.fsum(table.gpu_hours[shared]) / params.plan.gpus
