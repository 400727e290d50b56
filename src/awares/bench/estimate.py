"""Cost estimate of the pipeline from params.yaml, stage by stage; the hours are good to a factor of two.

FLOPs are counted by `costs` and divided by an assumed fraction of the GPU's peak; decoding runs at its memory
bandwidth. `awares bench --train` can measure the training steps instead.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
HALF, CROP_AREA = 0.25, 0.35  # fraction of the image's pixels in the low resolution, and in an average call: assumed
DECODED_ROWS = 64  # rows decoded together: assumed
BYTES_PER_PIXEL = 0.5  # of a stored image: assumed
COPIES = 6  # of a training image: as fetched, as drawn, as rows, as curated rows, and DVC's of the last two
EVALUATION_COPIES = 4  # of an evaluation image: as fetched, as drawn, as rows, and DVC's of these
KEPT = 2  # copies of a model that a stage writes: its own and DVC's
RUNTIME_GB = 2  # CUDA, kernels and fragmentation on a GPU: assumed
GB = 1e9
CHARACTERS = 4  # of English text per token
SERVED_VISUAL_TOKENS = 1500  # of a full image, mean over the paper's sources: assumed
HR_FRACTION = 0.192  # of rows that reach the oracle (Fig. 5: 80.8 % LR)


class Stage(NamedTuple):
    """One line of the forecast: requests to servers, tokens through the model, hours of one GPU and their ``basis``."""

    stage: str
    rows: int
    requests: int = 0
    tokens: int = 0
    pflop: float = 0.0
    gpu_hours: float = 0.0
    gpu_memory_gb: float = 0.0  # peak of a GPU
    disk_gb: float = 0.0
    basis: str = "counted"


def forecast(params: Params) -> pd.DataFrame:
    """One line per stage of the main line, with the columns of `Stage`."""
    return pd.DataFrame(_Forecast(params).stages(), columns=Stage._fields)


def wall_hours(table: pd.DataFrame, params: Params) -> float:
    """Wall-clock hours of the stages without servers: the trainings share ``plan.gpus`` GPUs, the rest runs on one."""
    shared = table.stage.isin(["sft", "grpo"])
    return math.fsum(table.gpu_hours[~shared]) + math.fsum(table.gpu_hours[shared]) / params.plan.gpus


def labelling(rows: int, params: Params) -> pd.DataFrame:
    """Requests to servers for labelling ``rows`` rows, without retries and the check of repairs (about 6 % more)."""
    section, served = params.curation, read_served(params)
    once = section.judge_order == "once"
    sizes = {role: len(prompt.system + prompt.user) for role, prompt in served.prompts.items()}
    judge, oracle = sizes["judge_once" if once else "judge"], sizes["oracle"]
    # role, name, rows, requests per row, characters of the prompt, visual tokens, tokens of the reply
    roles = [("judge", name, rows, 1 if once else 2, judge, 0, 2 if once else 20) for name in section.all_judges]
    roles.append(("oracle", section.oracle, math.ceil(HR_FRACTION * rows), 1, oracle, SERVED_VISUAL_TOKENS, 60))
    roles.append(("base", section.engine, rows, 2, 0, SERVED_VISUAL_TOKENS * 5 // 8, 20))  # full and half resolution
    records = []
    for role, name, count, each, characters, visual, reply in (one for one in roles if one[1] in served.models):
        model, requests = get_model(name, params), count * each
        tokens = requests * (visual + (characters + 120) // CHARACTERS), requests * reply
        dollars = sum(amount * price / 1e6 for amount, price in zip(tokens, model.dollars, strict=True))
        records.append((role, model.model, requests, *tokens, dollars, count / model.rows_per_hour))
    columns = ["role", "model", "requests", "prompt_tokens", "completion_tokens", "dollars", "hours"]
    return pd.DataFrame(records, columns=columns)


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
    """Tokens of an average row, and its FLOPs in the vision tower and in the language model."""

    tokens: float
    vision: float
    language: float


Parts = list[tuple[int, list[Work]]]  # a number of rows, and the work of every system on each of them


class _Forecast:
    def __init__(self, params: Params) -> None:
        self.params, self.config = params, model_config(params)
        self.peak, self.bandwidth = costs.GPUS[params.plan.gpu]
        text, self.itemsize = self.config.text_config, 4 if params.base.dtype == "float32" else 2
        embeddings = 0 if self.config.tie_word_embeddings else text.vocab_size * text.hidden_size
        self.read = self.itemsize * sum(costs.parameters(self.config))  # bytes per pass
        self.weights_gb = (self.read + self.itemsize * embeddings) / GB  # in memory and on disk
        cache = costs.cache_bytes(params.protocol.token_budget, self.config, self.itemsize)
        self.inference_gb = self.weights_gb + cache / GB + RUNTIME_GB
        pixels, self.visual_tokens, self.vision_flops = _typical_image(params, self.config)
        self.stored_gb = pixels * BYTES_PER_PIXEL / GB
        self.policy = self._work(HALF, configs.CALL_RATES["awares"])
        self.assumed = f"{params.plan.utilisation:.0%} of the peak of {params.plan.gpu}"

    def stages(self) -> Iterator[Stage]:
        data, sft, grpo = self.params.data, self.params.sft, self.params.grpo
        train_rows = data.train_rows * len(data.sources)
        rows = train_rows + data.validation_rows * len(data.sources)
        yield Stage("data", rows, disk_gb=COPIES * rows * self.stored_gb)
        if not self.params.curation.released:
            yield from self._curation(rows)
        yield self._training("sft", sft, round(sft.share * train_rows * sft.epochs))
        most = grpo.max_steps * grpo.batch_size / grpo.generations if grpo.max_steps > 0 else math.inf
        prompts = min(grpo.share * train_rows * grpo.epochs, most)
        written = ANSWER + configs.CALL_RATES["awares"] * CALL
        more_flops = 2 * (self.policy.vision + self.policy.language)  # the rollout, and the reference
        yield self._training("grpo", grpo, round(prompts * grpo.generations), more_flops, written)
        yield from self._evaluation()

    def _curation(self, rows: int) -> Iterator[Stage]:
        if self.params.curation.engine == "local":
            yield self._inference("curation", rows, [(rows, [self._work(1.0), self._work(HALF)])], models=1)
        for one in labelling(rows, self.params).itertuples():
            name, hours = f"curation: {one.role} {one.model}", f"{one.hours:.1f} h of its server"
            tokens = one.prompt_tokens + one.completion_tokens
            yield Stage(name, rows, one.requests, tokens, disk_gb=rows * 1e3 / GB, basis=hours)

    def _training(self, stage: str, section: Any, rows: int, more_flops: float = 0.0, written: float = 0.0) -> Stage:
        """On ``rows`` trajectories, with ``more_flops`` and ``written`` tokens per row for rollouts."""
        tokens, vision, language = self.policy
        # backward through frozen weights costs a forward, checkpointing one more
        flops = rows * (vision + (3 if section.gradient_checkpointing else 2) * language + more_flops)
        memory = self._training_gb(section.per_device_batch_size * tokens, section.gradient_checkpointing)
        hours, basis = self._hours(flops, rows * written), self.assumed
        if bench := self.params.plan.bench:
            path = self.params.path(bench) / "training.csv"
            if not path.is_file():
                raise AwaresFileError(f"{path}: no such table; plan.bench is a folder of `awares bench --train`")
            measured = pd.read_csv(path).set_index("step").loc[stage]
            hours, memory = rows * tokens / measured.tokens_per_second / 3600, measured.peak_memory_mb / 1e3
            basis = f"measured on {measured.device}"
        disk = 1.1 * KEPT * self.weights_gb
        return Stage(stage, rows, 0, round(rows * tokens), flops / 1e15, hours, memory, disk, basis)

    def _evaluation(self) -> Iterator[Stage]:
        """Evaluation, and the operating curve: the sweep's other trajectory, the frontier's eleven, both policies."""
        section, data = self.params.evaluation, self.params.data
        rows, outside, disk = section.rows * len(data.tasks), 0, 0.0
        if data.origin == "hub":
            scored = [sources.get_source(self.params, "evaluation", name) for name in data.tasks]
            rows = sum(min(section.rows, one.rows) for one in scored)
            disk = EVALUATION_COPIES * rows * self.stored_gb
        if section.lmms_eval:  # scores its six benchmarks completely with both policies, whatever the tasks are
            outside = 2 * sum(one.rows for one in sources.read_sources(self.params, "evaluation").values())
        one_turn = {name: self._work(area) for name, area in (("full", 1.0), ("half", HALF), ("no_image", 0.0))}
        systems = [one_turn.get(name, self.policy) for name in MAIN_SYSTEMS]
        yield self._inference("evaluation", rows, [(rows, systems), (outside, [self.policy])], models=3, disk=disk)
        again = 2 * (min(section.dial_rows, rows) + 11 * min(section.frontier_rows, rows))
        curve = min(max(section.dial_rows, section.frontier_rows), rows)
        yield self._inference("operating_curve", curve, [(again, [self.policy])], models=2)

    def _inference(self, stage: str, rows: int, parts: Parts, models: int, disk: float = 0.0) -> Stage:
        tokens = sum(count * sum(one.tokens for one in systems) for count, systems in parts)
        flops = sum(count * sum(one.vision + one.language for one in systems) for count, systems in parts)
        answers = sum(count * len(systems) for count, systems in parts)
        hours, memory = self._hours(flops, answers * ANSWER), self.inference_gb + (models - 1) * self.weights_gb
        return Stage(stage, rows, 0, round(tokens), flops / 1e15, hours, memory, disk, self.assumed)

    def _work(self, area: float, calls: float = 0.0) -> Work:
        """A row that sees ``area`` of the image's pixels and calls with probability ``calls``; its cache is reused."""
        first, more = self.visual_tokens * area + TEXT + ANSWER, self.visual_tokens * CROP_AREA + CALL + ANSWER
        language = costs.prefill_flops(round(first), 0, self.config)
        language += calls * costs.prefill_flops(round(more), round(first), self.config)
        return Work(first + calls * more, self.vision_flops * (area + calls * CROP_AREA), language)

    def _hours(self, flops: float, written: float) -> float:
        seconds = flops / (self.peak * self.params.plan.utilisation)
        return (seconds + written / DECODED_ROWS * self.read / self.bandwidth) / 3600

    def _training_gb(self, tokens: float, checkpointing: bool) -> float:
        """Weights, activations of a micro-batch (checkpointed: one value per layer, one complete layer), logits."""
        text = self.config.text_config
        layer = tokens * (10 * text.hidden_size + 3 * text.intermediate_size) * self.itemsize
        layers = text.num_hidden_layers * (tokens * text.hidden_size * self.itemsize if checkpointing else layer)
        return self.weights_gb + (layers + layer + 2 * 4 * tokens * text.vocab_size) / GB + RUNTIME_GB


def _typical_image(params: Params, config: Any) -> tuple[float, float, float]:
    """Pixels, visual tokens, vision FLOPs: means over the benchmarks' common sizes, also assumed for the training."""
    shape, merge = "paper" if params.data.origin == "hub" else configs.MINI, config.vision_config.spatial_merge_size
    side, found = merge * config.vision_config.patch_size, []
    for name in configs.BENCHMARKS:
        width, height = cap(PilImage.new("1", configs.image_size(name, shape, 1.0)), params.crops.max_side).size
        if 0 < params.crops.max_pixels < width * height:
            scale = math.sqrt(params.crops.max_pixels / (width * height))
            width, height = round(width * scale), round(height * scale)
        grid = merge * round(height / side), merge * round(width / side)
        found.append((width * height, grid[0] * grid[1] / merge**2, costs.vision_flops(grid, config)))
    pixels, tokens, flops = (sum(part) / len(found) for part in zip(*found, strict=True))
    return pixels, tokens, flops
