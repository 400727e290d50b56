"""Forecast of the pipeline from params.yaml, stage by stage: ranges of wall-clock hours on the GPUs that a stage uses.

Matrix products are counted (`costs`) and divided by an assumed fraction of the GPU's peak; the vision tower and
decoding steps have measured times (``plan.bench``). A batch decodes as long as its longest row, and an update of a
training waits for its slowest GPU.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image as PilImage

from awares.bench import configs, costs
from awares.clients.served import get_model, read_served
from awares.data import sources
from awares.engine.images import cap
from awares.engine.model import load_config, load_processor
from awares.errors import AwaresFileError, AwaresValueError
from awares.settings import MAIN_SYSTEMS, Params

TEXT = 300  # tokens of system prompt, tool schema and question: assumed
ANSWER, CALL = 4, 30  # tokens of an answer (§5) and of a call, with the end of the turn
LONGEST = 20  # tokens of the longest answer of a batch: assumed
ENDLESS = 0.01  # of the completions have the maximal length, in the high end of a range: assumed
HALF, CROP_AREA = 0.25, 0.35  # fraction of the image's pixels in the low resolution, and in an average call: assumed
BYTES_PER_PIXEL = 0.5  # of a stored image: assumed
COPIES = 6  # of a training image: as fetched, as drawn, as rows, as curated rows, and DVC's of the last two
EVALUATION_COPIES = 4  # of an evaluation image: as fetched, as drawn, as rows, and DVC's of these
KEPT = 2  # copies of a model that a stage writes: its own and DVC's
RUNTIME_GB = 2  # CUDA, kernels and fragmentation on a GPU: assumed
GB = 1e9
CHARACTERS = 4  # of English text per token
SERVED_VISUAL_TOKENS = 1500  # of a full image, mean over the paper's sources: assumed
HR_FRACTION = 0.192  # of rows that reach the oracle (Fig. 5: 80.8 % LR)
CPU_SECONDS = 0.35  # of the data stage per megapixel: three decodings, one PNG (from measured parts)
UPDATES = 300  # drawn for the mean of the slowest GPU
# Low and high ends
SLACK = np.array([0.8, 1.3])  # of counted and measured time: assumed
SERVER_SLACK = np.array([0.7, 1.5])  # of a server's hours at its rows_per_hour: assumed
START_HOURS = np.array([0.1, 0.3])  # until a vLLM server has read its weights: assumed
REQUESTS = np.array([15.0, 10.0])  # that one client sends a second: from measured encoding and hashing
VLLM_STEP = np.array([1.1, 2.2])  # of the time to read the weights (assumed): 5 to 10 ms for 7B on an H100
VLLM_ROWS = 32  # decoded together on a replica: 256 at a time on eight
NETWORK = np.array([0.4, 0.1])  # GB a second from the hub: assumed


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


def measured_rates(params: Params) -> tuple[float, float, Any, str]:
    """Seconds of the vision tower and of the host per patch, of an eager decoding step per layer (low, high); the GPU.

    From latency.csv of ``plan.bench``, else 7B's on an H200; AwaresFileError without times of a published size.
    """
    if not params.plan.bench:
        return 0.215 / 8140, 9e-6, np.array([0.022, 0.035]) / 28, ""
    path = params.path(params.plan.bench) / "latency.csv"
    table = pd.read_csv(path, dtype={"batch": str}).set_index("benchmark") if path.is_file() else pd.DataFrame()
    if table.empty or table["shape"].iloc[0] not in configs.PUBLISHED:
        raise AwaresFileError(f"{path}: no times of a published size; plan.bench is a folder of `awares bench --train`")
    full, policy = (table[(table.batch == "1") & (table.system == name)] for name in ("full", "awares"))
    layers, patches = configs.PUBLISHED[full["shape"].iloc[0]].layers, 4e3 * full.visual_tokens.sum()
    steps = np.array([configs.answer_tokens(configs.BENCHMARKS[name].awares) - 1 for name in full.index])
    step, host = full.decode / steps / layers / 1e3, policy.preprocess.sum() / patches
    return full.vision.sum() / patches, host, np.array([step.min(), step.max()]), full.device.iloc[0]


def forecast(params: Params) -> pd.DataFrame:
    """One line per stage of the main line: the columns of `Stage`, with ``hours_low`` and ``hours_high``."""
    table = pd.DataFrame(_Forecast(params).stages(), columns=Stage._fields)
    for place, hours in enumerate(zip(*table.pop("hours"), strict=True)):
        table.insert(1 + place, ("hours_low", "hours_high")[place], hours)
    return table


def labelling(rows: int, params: Params) -> pd.DataFrame:
    """Requests to servers for labelling ``rows`` rows, without retries and the check of repairs (about 6 % more)."""
    section, served = params.curation, read_served(params)
    once = section.judge_order == "once"
    sizes = {role: len(prompt.system + prompt.user) for role, prompt in served.prompts.items()}
    judge, oracle = sizes["judge_once" if once else "judge"], sizes["oracle"]
    # role, name, rows, requests per row, characters of the prompt, visual tokens, tokens of the reply
    base = "base", section.engine, rows, 2, 0, SERVED_VISUAL_TOKENS * 5 // 8, 20  # full and half resolution
    roles: list[Any] = [base]
    roles += [("judge", name, rows, 1 if once else 2, judge, 0, 2 if once else 20) for name in section.all_judges]
    roles.append(("oracle", section.oracle, math.ceil(HR_FRACTION * rows), 1, oracle, SERVED_VISUAL_TOKENS, 60))
    records = []
    for role, name, count, each, characters, visual, reply in (one for one in roles if one[1] in served.models):
        model, requests = get_model(name, params), count * each
        tokens = requests * (visual + (characters + 120) // CHARACTERS), requests * reply
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
    for shape in configs.PUBLISHED:
        if shape in path.lower():
            return configs.config_of(shape, 1.0, load_processor(configs.EMBEDDED_BASE).tokenizer)
    known = f"sizes are known for {', '.join(configs.PUBLISHED)}, and for folders, Qwen3-VL's too"
    fix = f"run `hf download {path} config.json --local-dir FOLDER` and plan with base.model FOLDER"
    raise AwaresValueError(f"base.model {path}: {known}: {fix}")


class Work(NamedTuple):
    """Of a row of each of the benchmarks' image sizes: tokens, FLOPs of both parts, seconds of the vision tower."""

    tokens: Any
    vision: Any
    language: Any
    tower: Any
    requests: float
    steps: int  # tokens that the longest row of a batch writes


class _Forecast:
    def __init__(self, params: Params) -> None:
        self.params, self.config = params, model_config(params)
        self.patch_seconds, host, step, device = measured_rates(params)
        peak, bandwidth = costs.GPUS[params.plan.gpu]
        self.flops = peak * params.plan.utilisation  # a second
        text, self.itemsize = self.config.text_config, 4 if params.base.dtype == "float32" else 2
        embeddings = 0 if self.config.tie_word_embeddings else text.vocab_size * text.hidden_size
        read = self.itemsize * sum(costs.parameters(self.config))  # bytes per pass
        self.weights_gb = (read + self.itemsize * embeddings) / GB  # in memory and on disk
        eager, least = step * text.num_hidden_layers, read / bandwidth
        self.step = {True: VLLM_STEP * least, False: np.maximum(eager, least)}  # with vLLM, and without
        cache = costs.cache_bytes(params.protocol.token_budget, self.config, self.itemsize)
        self.inference_gb = self.weights_gb + cache / GB + RUNTIME_GB
        self.pixels, self.visual_tokens, self.vision_flops = _typical_images(params, self.config)
        self.patches = self.visual_tokens * self.config.vision_config.spatial_merge_size**2
        self.host = self.patches * host
        self.stored_gb = self.pixels.mean() * BYTES_PER_PIXEL / GB
        self.policy = self._work(HALF, configs.CALL_RATES["awares"])
        self.basis = f"{params.plan.utilisation:.0%} of the peak of {params.plan.gpu}"
        self.basis += f", measured on {device}" * bool(device)
        self.base_served = params.curation.engine != "local" and not params.curation.released
        self.hub, most, tasks = params.data.origin == "hub", params.evaluation.rows, params.data.tasks
        scored = [min(most, sources.get_source(params, "evaluation", task).rows) for task in tasks * self.hub]
        self.scored = sum(scored) if self.hub else most * len(tasks)
        self.gpus = params.plan.gpus if params.base.launch else 1

    def stages(self) -> Iterator[Stage]:
        data, sft, grpo = self.params.data, self.params.sft, self.params.grpo
        train_rows, checked = data.train_rows * len(data.sources), data.validation_rows * len(data.sources)
        rows = train_rows + checked
        images = rows + self.scored
        cpu, network = images * self.pixels.mean() * CPU_SECONDS / 3.6e9, images * self.stored_gb * self.hub
        hours, disk = SLACK * cpu / self.params.threads + network / NETWORK / 3600, COPIES * rows * self.stored_gb
        yield Stage("data", hours, rows, cpu_hours=cpu, network_gb=network, disk_gb=disk)
        if not self.params.curation.released:
            yield from self._curation(rows, checked)
        passes = 1.0, 2.0 + sft.gradient_checkpointing  # backward through frozen weights costs a forward
        yield self._training("sft", round(sft.share * train_rows * sft.epochs), 1, passes, np.zeros(2))
        most = grpo.max_steps * grpo.batch_size / grpo.generations if grpo.max_steps > 0 else math.inf
        rows = round(min(grpo.share * train_rows * grpo.epochs, most) * grpo.generations)
        steps = _steps(LONGEST + CALL, grpo.max_completion_length, grpo.batch_size)
        decoding = rows / grpo.batch_size * steps * self.step[grpo.rollouts == "vllm"]
        passes = 4.0, 4.5 + grpo.gradient_checkpointing  # prefills of both turns (1.5), reference, training
        yield self._training("grpo", rows, grpo.generations, passes, decoding)
        yield from self._evaluation()

    def _curation(self, rows: int, checked: int) -> Iterator[Stage]:
        if not self.base_served:
            yield self._inference("curation", rows, [(rows, self._work(1.0)), (rows, self._work(HALF))])
        for one in labelling(rows, self.params).itertuples():
            hours = SERVER_SLACK * one.hours + START_HOURS + one.weights_gb / NETWORK / 3600
            name, tokens = f"curation: {one.role} {one.model}", one.prompt_tokens + one.completion_tokens
            given = {"network_gb": one.weights_gb, "disk_gb": rows * 1e3 / GB}
            yield Stage(name, hours, rows, one.gpus, one.requests, tokens, basis="rows_per_hour", **given)
        graded = "role == 'base'" if self.params.curation.judge_order == "once" else "role != 'oracle'"
        check = labelling(checked, self.params).query(graded).drop_duplicates("role")
        if len(check):  # the base model answers with the target's crops: one view in place of two
            hours, requests = SERVER_SLACK * check.hours.sum(), check.requests.sum() - self.base_served * checked
            hours += START_HOURS * len(check)
            yield Stage("curation: check", hours, checked, check.gpus.max(), requests, basis="rows_per_hour")

    def _training(self, stage: str, rows: int, same: int, passes: tuple[float, float], seconds: Any) -> Stage:
        """``rows`` trajectories, ``same`` of a prompt: ``passes`` of tower and language model; adds ``seconds``."""
        section, work, bench = getattr(self.params, stage), self.policy, self.params.plan.bench
        gpus = self.params.plan.gpus if getattr(section, "launch", "") else self.gpus
        hours = (SLACK * rows * self._slowest(section, gpus, same, *passes) + seconds) / 3600
        memory = self._training_gb(section.per_device_batch_size * work.tokens.mean(), section.gradient_checkpointing)
        if bench and (path := self.params.path(bench) / "training.csv").is_file():
            memory = pd.read_csv(path).set_index("step").peak_memory_mb[stage] / 1e3
        pflop = rows * (passes[0] * work.vision + passes[1] * work.language).mean() / 1e15
        tokens, network = round(rows * work.tokens.mean()), self.weights_gb * (stage == "sft" and not self.base_served)
        kept = 1.1 * KEPT * self.weights_gb
        return Stage(stage, hours, rows, gpus, 0, tokens, pflop, 0, network, memory, kept, self.basis)

    def _slowest(self, section: Any, gpus: int, same: int, vision: float, language: float) -> float:
        """Seconds per row, mean over drawn updates; micro-batches are padded, and SFT's (``same`` is 1) sorted."""
        each = max(1, min(section.per_device_batch_size, section.batch_size // gpus))
        shape = UPDATES, max(1, section.batch_size // (gpus * each)), gpus, each
        drawn, count = np.random.default_rng(0), math.prod(shape[1:])
        size = drawn.integers(len(self.pixels), size=(UPDATES, math.ceil(count / same))).repeat(same, axis=1)[:, :count]
        calls = (drawn.random(size.shape) < configs.CALL_RATES["awares"]).astype(int)
        kinds = [self._work(HALF, called) for called in (0, 1)]
        texts = np.stack([language * one.language / self.flops for one in kinds])[calls, size]
        towers = np.stack([vision * one.tower + self.host for one in kinds])[calls, size]
        if same == 1:
            order = texts.argsort(axis=1)
            texts, towers = (np.take_along_axis(one, order, axis=1) for one in (texts, towers))
        padded = each * texts.reshape(shape).max(axis=3) + towers.reshape(shape).sum(axis=3)
        return float(padded.sum(axis=1).max(axis=1).mean()) / count

    def _evaluation(self) -> Iterator[Stage]:
        """Evaluation, and the operating curve: the sweep's other trajectory, the frontier's eleven, both policies."""
        section, rows, vllm = self.params.evaluation, self.scored, self.params.evaluation.engine == "vllm"
        if section.lmms_eval:  # scores its six benchmarks completely with both policies, whatever the tasks are
            outside = sum(one.rows for one in sources.read_sources(self.params, "evaluation").values())
            yield self._inference("lmms_eval", outside, [(2 * outside, self.policy)], self.gpus)
        one_turn = {name: self._work(area) for name, area in (("full", 1.0), ("half", HALF), ("no_image", 0.0))}
        systems = [(rows, one_turn.get(name, self.policy)) for name in MAIN_SYSTEMS]
        gpus = _served_gpus("base", self.params) if vllm else 1
        disk = EVALUATION_COPIES * rows * self.stored_gb * self.hub
        yield self._inference("evaluation", rows, systems, gpus, 3 * vllm, 2)._replace(disk_gb=disk)
        swept, frontier = min(section.dial_rows, rows), min(section.frontier_rows, rows)
        again = [(2 * swept, self.policy), (22 * frontier, self._work(HALF, 10 / 11))]
        yield self._inference("operating_curve", max(swept, frontier), again, gpus, 4 * vllm, 2)

    def _inference(self, stage: str, rows: int, parts: Any, gpus: int = 1, servers: int = 0, models: int = 1) -> Stage:
        """``parts``: numbers of rows and their `Work`. ``servers`` are vLLM's, one after the other, each limited by
        its one client; without them, ``models`` are in memory at once."""
        protocol, vllm, seconds = self.params.protocol, servers > 0, np.zeros(2)
        for count, work in parts:
            together = VLLM_ROWS if vllm else max(1, protocol.token_budget // round(work.tokens.mean()))
            tower = work.vision / self.flops if vllm else work.tower + self.host
            decoding = _steps(work.steps, protocol.max_new_tokens, together) * self.step[vllm] / together
            seconds += count / gpus * (SLACK * (tower + work.language / self.flops).mean() + decoding)
        requests = sum(count * one.requests for count, one in parts) * vllm
        hours = np.maximum(seconds, requests / REQUESTS) / 3600 + servers * START_HOURS
        tokens = round(sum(count * one.tokens.mean() for count, one in parts))
        pflop = sum(count * (one.vision + one.language).mean() for count, one in parts) / 1e15
        memory = self.inference_gb + (0 if vllm else models - 1) * self.weights_gb
        return Stage(stage, hours, rows, gpus, round(requests), tokens, pflop, 0, 0, memory, 0, self.basis)

    def _work(self, area: float, calls: float = 0.0) -> Work:
        """A row that sees ``area`` of the image's pixels and calls with probability ``calls``; its cache is reused."""
        first, more = self.visual_tokens * area + TEXT + ANSWER, self.visual_tokens * CROP_AREA + CALL + ANSWER
        language = costs.prefill_flops(first, 0, self.config) + calls * costs.prefill_flops(more, first, self.config)
        seen, depth = area + calls * CROP_AREA, self.config.vision_config.depth / configs.VISION_DEPTH
        vision, measured = self.vision_flops * seen, self.patches * seen * self.patch_seconds * depth
        tower = vision / self.flops if "flash" in self.params.base.attn_implementation else measured
        return Work(first + calls * more, vision, language, tower, 1 + calls, LONGEST + CALL * (calls > 0))

    def _training_gb(self, tokens: float, checkpointing: bool) -> float:
        """Weights, activations of a micro-batch (checkpointed: one value per layer, one complete layer), logits."""
        text = self.config.text_config
        layer = tokens * (10 * text.hidden_size + 3 * text.intermediate_size) * self.itemsize
        layers = text.num_hidden_layers * (tokens * text.hidden_size * self.itemsize if checkpointing else layer)
        return self.weights_gb + (layers + layer + 2 * 4 * tokens * text.vocab_size) / GB + RUNTIME_GB


def _steps(steps: int, most: int, rows: int) -> Any:
    return min(steps, most) + np.array([0, (1 - (1 - ENDLESS) ** rows) * most])


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
