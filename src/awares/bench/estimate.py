"""Forecast of the pipeline from params.yaml, stage by stage: ranges of wall-clock hours on the GPUs that a stage uses.

Matrix products are counted (`costs`) and divided by an assumed fraction of the GPU's peak; the vision tower and
decoding steps have measured times (``plan.bench``). A batch decodes as long as its longest row, and an update of a
training waits for its slowest GPU. assumptions.yaml has the rest. Hours and seconds are arrays (low, high).
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image as PilImage

from awares.bench import configs, costs
from awares.clients.served import get_model, read_served
from awares.config import read_yaml
from awares.data import sources
from awares.engine.images import cap
from awares.engine.model import load_config, load_processor
from awares.errors import AwaresFileError, AwaresValueError
from awares.settings import MAIN_SYSTEMS, Params

GB = 1e9
_known = read_yaml(Path(__file__).with_name("assumptions.yaml")).items()
assumed = SimpleNamespace(**{name: np.array(value) if isinstance(value, list) else value for name, value in _known})


class Stage(NamedTuple):
    """One line of the forecast; ``hours`` (low, high) are wall-clock hours on ``gpus`` GPUs."""

    stage: str
    hours: Any
    rows: int
    gpus: int = 0
    requests: int = 0  # to servers
    tokens: int = 0
    pflop: float = 0.0
    cpu_hours: float = 0.0  # of one core
    network_gb: float = 0.0
    gpu_memory_gb: float = 0.0  # peak of a GPU
    disk_gb: float = 0.0
    basis: str = "counted"


class Rates(NamedTuple):
    """Measured seconds: of vision tower and host per patch, of an eager decoding step per layer; 7B's on an H200."""

    tower: float = 0.215 / 8140
    host: float = 9e-6
    step: Any = np.array([0.022, 0.035]) / 28
    device: str = ""


class Work(NamedTuple):
    """Of one row, for each of the typical images: tokens, FLOPs of both parts, seconds of the vision tower."""

    tokens: Any
    vision: Any
    language: Any
    tower: Any
    requests: float
    steps: int  # tokens that the longest row of a batch writes


def measured_rates(params: Params) -> Rates:
    """From latency.csv of ``plan.bench``, if that is set; AwaresFileError without times of a published size."""
    if not params.plan.bench:
        return Rates()
    path = params.path(params.plan.bench) / "latency.csv"
    table = pd.read_csv(path, dtype={"batch": str}).set_index("benchmark") if path.is_file() else pd.DataFrame()
    if table.empty or table["shape"].iloc[0] not in configs.PUBLISHED:
        raise AwaresFileError(f"{path}: no times of a published size; plan.bench is a folder of `awares bench --train`")
    full, policy = (table[(table.batch == "1") & (table.system == name)] for name in ("full", "awares"))
    layers, patches = configs.PUBLISHED[full["shape"].iloc[0]].layers, 4e3 * full.visual_tokens.sum()
    steps = np.array([configs.answer_tokens(configs.BENCHMARKS[name].awares) - 1 for name in full.index])
    step = full.decode / steps / layers / 1e3
    ends = np.array([step.min(), step.max()])
    return Rates(full.vision.sum() / patches, policy.preprocess.sum() / patches, ends, full.device.iloc[0])


def forecast(params: Params) -> pd.DataFrame:
    """One line per stage of the main line: the columns of `Stage`, with ``hours_low`` and ``hours_high``."""
    table = pd.DataFrame(_Forecast(params).stages(), columns=Stage._fields)
    ends = pd.DataFrame([*table.pop("hours")], columns=["hours_low", "hours_high"])
    return pd.concat([table[["stage"]], ends, table.drop(columns="stage")], axis=1)


def labelling(rows: int, params: Params) -> pd.DataFrame:
    """Requests to servers for labelling ``rows`` rows, without retries and the check of repairs (about 6 % more)."""
    section, served = params.curation, read_served(params)
    once, hard = section.judge_order == "once", math.ceil(assumed.hr_fraction * rows)
    characters = {role: len(prompt.system + prompt.user) for role, prompt in served.prompts.items()}
    judge = ("judge", 1, characters["judge_once"], 0, 2) if once else ("judge", 2, characters["judge"], 0, 20)
    # model, rows, then: role, requests a row, characters of the prompt, visual tokens, tokens of the reply
    base = section.engine, rows, "base", 2, 0, assumed.served_visual_tokens * 5 // 8, 20  # full and half resolution
    oracle = section.oracle, hard, "oracle", 1, characters["oracle"], assumed.served_visual_tokens, 60
    calls: list[Any] = [base, *((name, rows, *judge) for name in section.all_judges), oracle]
    records = []
    for name, count, role, each, prompt, visual, reply in (one for one in calls if one[0] in served.models):
        model, requests = get_model(name, params), count * each
        tokens = requests * (visual + (prompt + 120) // assumed.characters), requests * reply
        dollars = sum(amount * price / 1e6 for amount, price in zip(tokens, model.dollars, strict=True))
        hours, gpus = count / model.rows_per_hour, _served_gpus(name, params)
        records.append((role, model.model, requests, *tokens, dollars, hours, gpus, model.weights_gb))
    columns = "role model requests prompt_tokens completion_tokens dollars hours gpus weights_gb"
    return pd.DataFrame(records, columns=columns.split())


def _served_gpus(name: str, params: Params) -> int:
    flags = get_model(name, params).vllm
    return math.prod(flags.get(f"{kind}-parallel-size", 1) for kind in ("tensor", "data", "pipeline"))


def model_config(params: Params) -> Any:
    """The configuration of ``base.model``, of its folder or as published; AwaresError for an unknown model."""
    path = params.model_path()
    if isinstance(path, Path):
        return load_config(path)
    if shape := next((shape for shape in configs.PUBLISHED if shape in path.lower()), ""):
        return configs.config_of(shape, 1.0, load_processor(configs.EMBEDDED_BASE).tokenizer)
    known = f"sizes are known for {', '.join(configs.PUBLISHED)}, and for folders, Qwen3-VL's too"
    fix = f"run `hf download {path} config.json --local-dir FOLDER` and plan with base.model FOLDER"
    raise AwaresValueError(f"base.model {path}: {known}: {fix}")


class _Forecast:
    def __init__(self, params: Params) -> None:
        self.params, self.config, self.rates = params, model_config(params), measured_rates(params)
        peak, bandwidth = costs.GPUS[params.plan.gpu]
        self.flops = peak * params.plan.utilisation  # a second
        text, self.itemsize = self.config.text_config, 4 if params.base.dtype == "float32" else 2
        embeddings = 0 if self.config.tie_word_embeddings else text.vocab_size * text.hidden_size
        read = self.itemsize * sum(costs.parameters(self.config))  # bytes per pass
        self.weights_gb = (read + self.itemsize * embeddings) / GB  # in memory and on disk
        eager, least = self.rates.step * text.num_hidden_layers, read / bandwidth
        self.step = {"vllm": assumed.vllm_step * least, "local": np.maximum(eager, least)}
        self.pixels, self.visual_tokens, self.vision_flops = _typical_images(params, self.config)
        self.patches = self.visual_tokens * self.config.vision_config.spatial_merge_size**2
        self.host = self.patches * self.rates.host  # seconds
        self.stored_gb = self.pixels.mean() * assumed.bytes_per_pixel / GB
        self.policy = self.work(assumed.half, configs.CALL_RATES["awares"])
        self.basis = f"{params.plan.utilisation:.0%} of the peak of {params.plan.gpu}"
        self.basis += f", measured on {self.rates.device}" * bool(self.rates.device)
        self.base_served = params.curation.engine != "local" and not params.curation.released
        self.hub, most, tasks = params.data.origin == "hub", params.evaluation.rows, params.data.tasks
        scored = [min(most, sources.get_source(params, "evaluation", task).rows) for task in tasks * self.hub]
        self.scored = sum(scored) if self.hub else most * len(tasks)
        self.gpus = params.plan.gpus if params.base.launch else 1

    def stages(self) -> Iterator[Stage]:
        data, sft, grpo = self.params.data, self.params.sft, self.params.grpo
        train_rows, checked = data.train_rows * len(data.sources), data.validation_rows * len(data.sources)
        rows, images = train_rows + checked, train_rows + checked + self.scored
        cpu, network = images * self.pixels.mean() * assumed.cpu_seconds / 3.6e9, images * self.stored_gb * self.hub
        hours = assumed.slack * cpu / self.params.threads + network / assumed.network / 3600
        disk = assumed.copies * rows * self.stored_gb
        yield Stage("data", hours, rows, cpu_hours=cpu, network_gb=network, disk_gb=disk)
        if not self.params.curation.released:
            yield from self.curation(rows, checked)
        passes = 1.0, 2.0 + sft.gradient_checkpointing  # backward through frozen weights costs a forward
        yield self.training("sft", round(sft.share * train_rows * sft.epochs), 1, passes, np.zeros(2))
        most = grpo.max_steps * grpo.batch_size / grpo.generations if grpo.max_steps > 0 else math.inf
        rows = round(min(grpo.share * train_rows * grpo.epochs, most) * grpo.generations)
        steps = _steps(assumed.longest + assumed.call, grpo.max_completion_length, grpo.batch_size)
        passes = 4.0, 4.5 + grpo.gradient_checkpointing  # prefills of both turns (1.5), reference, training
        decoding = rows / grpo.batch_size * steps * self.step[grpo.rollouts]
        yield self.training("grpo", rows, grpo.generations, passes, decoding)
        yield from self.evaluation()

    def curation(self, rows: int, checked: int) -> Iterator[Stage]:
        if not self.base_served:
            yield self.inference("curation", rows, [(rows, self.work(1.0)), (rows, self.work(assumed.half))])
        for one in labelling(rows, self.params).itertuples():
            hours = assumed.server_slack * one.hours + assumed.start_hours + one.weights_gb / assumed.network / 3600
            name, tokens = f"curation: {one.role} {one.model}", one.prompt_tokens + one.completion_tokens
            given = {"network_gb": one.weights_gb, "disk_gb": rows * 1e3 / GB}
            yield Stage(name, hours, rows, one.gpus, one.requests, tokens, basis="rows_per_hour", **given)
        graded = "role == 'base'" if self.params.curation.judge_order == "once" else "role != 'oracle'"
        check = labelling(checked, self.params).query(graded).drop_duplicates("role")
        if len(check):  # the base model answers with the target's crops: one view in place of two
            hours = assumed.server_slack * check.hours.sum() + assumed.start_hours * len(check)
            requests = check.requests.sum() - self.base_served * checked
            yield Stage("curation: check", hours, checked, check.gpus.max(), requests, basis="rows_per_hour")

    def training(self, stage: str, rows: int, same: int, passes: tuple[float, float], seconds: Any) -> Stage:
        """``rows`` trajectories, ``same`` of a prompt: ``passes`` of tower and language model; adds ``seconds``."""
        section, plan, tokens = getattr(self.params, stage), self.params.plan, self.policy.tokens.mean()
        gpus = plan.gpus if getattr(section, "launch", "") else self.gpus
        hours = (assumed.slack * rows * self.slowest(section, gpus, same, *passes) + seconds) / 3600
        # memory: weights, activations of a micro-batch (checkpointed: one value per layer, one complete layer), logits
        text, together = self.config.text_config, section.per_device_batch_size * tokens
        layer = together * (10 * text.hidden_size + 3 * text.intermediate_size) * self.itemsize
        kept = together * text.hidden_size * self.itemsize if section.gradient_checkpointing else layer
        memory = (text.num_hidden_layers * kept + layer + 2 * 4 * together * text.vocab_size) / GB
        memory += self.weights_gb + assumed.runtime_gb
        if plan.bench and (path := self.params.path(plan.bench) / "training.csv").is_file():
            memory = pd.read_csv(path).set_index("step").peak_memory_mb[stage] / 1e3
        pflop = rows * (passes[0] * self.policy.vision + passes[1] * self.policy.language).mean() / 1e15
        network, disk = self.weights_gb * (stage == "sft" and not self.base_served), assumed.kept * self.weights_gb
        return Stage(stage, hours, rows, gpus, 0, round(rows * tokens), pflop, 0, network, memory, disk, self.basis)

    def slowest(self, section: Any, gpus: int, same: int, vision: float, language: float) -> float:
        """Seconds per row, mean over drawn updates; micro-batches are padded, and SFT's (``same`` is 1) sorted."""
        each = max(1, min(section.per_device_batch_size, section.batch_size // gpus))
        shape = assumed.updates, max(1, section.batch_size // (gpus * each)), gpus, each
        count, drawn = math.prod(shape[1:]), np.random.default_rng(0)
        prompts = drawn.integers(len(self.patches), size=(assumed.updates, math.ceil(count / same)))
        size = prompts.repeat(same, axis=1)[:, :count]  # of the image
        calls = (drawn.random(size.shape) < configs.CALL_RATES["awares"]).astype(int)
        kinds = [self.work(assumed.half, called) for called in (0, 1)]
        texts = np.stack([language * one.language / self.flops for one in kinds])[calls, size]
        towers = np.stack([vision * one.tower + self.host for one in kinds])[calls, size]
        if same == 1:
            order = texts.argsort(axis=1)
            texts, towers = (np.take_along_axis(one, order, axis=1) for one in (texts, towers))
        padded = each * texts.reshape(shape).max(axis=3) + towers.reshape(shape).sum(axis=3)
        return float(padded.sum(axis=1).max(axis=1).mean()) / count

    def evaluation(self) -> Iterator[Stage]:
        """Evaluation, and the operating curve: the sweep's other trajectory, the frontier's eleven, both policies."""
        section, rows, vllm = self.params.evaluation, self.scored, self.params.evaluation.engine == "vllm"
        if section.lmms_eval:  # scores its six benchmarks completely with both policies, whatever the tasks are
            outside = sum(one.rows for one in sources.read_sources(self.params, "evaluation").values())
            yield self.inference("lmms_eval", outside, [(2 * outside, self.policy)], self.gpus)
        one_turn = {name: self.work(area) for name, area in (("full", 1.0), ("half", assumed.half), ("no_image", 0.0))}
        systems = [(rows, one_turn.get(name, self.policy)) for name in MAIN_SYSTEMS]
        gpus = _served_gpus("base", self.params) if vllm else 1
        disk = assumed.evaluation_copies * rows * self.stored_gb * self.hub
        yield self.inference("evaluation", rows, systems, gpus, 3 * vllm, 2)._replace(disk_gb=disk)
        swept, frontier = min(section.dial_rows, rows), min(section.frontier_rows, rows)
        again = [(2 * swept, self.policy), (22 * frontier, self.work(assumed.half, 10 / 11))]
        yield self.inference("operating_curve", max(swept, frontier), again, gpus, 4 * vllm, 2)

    def inference(
        self, stage: str, rows: int, parts: Sequence[tuple[int, Work]], gpus: int = 1, servers: int = 0, models: int = 1
    ) -> Stage:
        """``parts``: numbers of rows and their `Work`. ``servers`` are vLLM's, one after the other, each limited by
        its one client; without them, ``models`` are in memory at once."""
        protocol, engine, seconds = self.params.protocol, "vllm" if servers else "local", np.zeros(2)
        for count, work in parts:
            together = assumed.vllm_rows if servers else max(1, protocol.token_budget // round(work.tokens.mean()))
            tower = work.vision / self.flops if servers else work.tower + self.host
            decoding = _steps(work.steps, protocol.max_new_tokens, together) * self.step[engine] / together
            seconds += count / gpus * (assumed.slack * (tower + work.language / self.flops).mean() + decoding)
        requests = sum(count * work.requests for count, work in parts) * bool(servers)
        hours = np.maximum(seconds, requests / assumed.requests) / 3600 + servers * assumed.start_hours
        tokens = round(sum(count * work.tokens.mean() for count, work in parts))
        pflop = sum(count * (work.vision + work.language).mean() for count, work in parts) / 1e15
        cache = costs.cache_bytes(protocol.token_budget, self.config, self.itemsize)
        memory = (1 if servers else models) * self.weights_gb + cache / GB + assumed.runtime_gb
        given = {"pflop": pflop, "gpu_memory_gb": memory, "basis": self.basis}
        return Stage(stage, hours, rows, gpus, round(requests), tokens, **given)

    def work(self, area: float, calls: float = 0.0) -> Work:
        """A row that sees ``area`` of the image's pixels and calls with probability ``calls``; its cache is reused."""
        first = self.visual_tokens * area + assumed.text + assumed.answer
        more = self.visual_tokens * assumed.crop_area + assumed.call + assumed.answer
        language = costs.prefill_flops(first, 0, self.config) + calls * costs.prefill_flops(more, first, self.config)
        seen, depth = area + calls * assumed.crop_area, self.config.vision_config.depth / configs.VISION_DEPTH
        vision, tower = self.vision_flops * seen, self.patches * seen * self.rates.tower * depth
        if "flash" in self.params.base.attn_implementation:
            tower = vision / self.flops
        steps = assumed.longest + assumed.call * (calls > 0)
        return Work(first + calls * more, vision, language, tower, 1 + calls, steps)


def _steps(steps: int, most: int, rows: int) -> Any:
    """Steps of a batch of ``rows``: at the high end, one of them may be endless."""
    return min(steps, most) + np.array([0, (1 - (1 - assumed.endless) ** rows) * most])


def _typical_images(params: Params, config: Any) -> Any:
    """Pixels, visual tokens, vision FLOPs of the benchmarks' common sizes, which are also assumed for the training."""
    shape, merge = "paper" if params.data.origin == "hub" else configs.MINI, config.vision_config.spatial_merge_size
    side, found = merge * config.vision_config.patch_size, []
    for name in configs.BENCHMARKS:
        width, height = cap(PilImage.new("1", configs.image_size(name, shape, 1.0)), params.crops.max_side).size
        if 0 < params.crops.max_pixels < width * height:
            scale = math.sqrt(params.crops.max_pixels / (width * height))
            width, height = round(width * scale), round(height * scale)
        grid = merge * round(height / side), merge * round(width / side)
        found.append((width * height, grid[0] * grid[1] / merge**2, costs.vision_flops(grid, config)))
    return np.array(found).T
