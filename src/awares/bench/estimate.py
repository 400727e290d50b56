"""Cost estimate of the pipeline from params.yaml, stage by stage, before hours or money are spent.

FLOPs are counted by `costs` and divided by an assumed fraction of the GPU's peak; decoding runs at its memory
bandwidth. Tokens per second and peak memory of the training steps come from `awares bench --train` if it measured them.
The hours are good to a factor of two.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image as PilImage

from awares.bench import configs, costs
from awares.clients.judges import get_model, read_served
from awares.config import MAIN_SYSTEMS, Params
from awares.data import sources
from awares.engine.images import cap
from awares.engine.model import load_config, load_processor
from awares.errors import AwaresFileError, AwaresValueError

COLUMNS = ("stage", "rows", "requests", "tokens", "pflop", "gpu_hours", "gpu_memory_gb", "disk_gb", "basis")
TEXT = 300  # tokens of system prompt, tool schema and question: assumed
ANSWER, CALL = 4, 30  # tokens of an answer (§5) and of a call, with the end of the turn
CROP_AREA = 0.35  # fraction of the image in an average request: assumed
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


@dataclass(frozen=True)
class TypicalImage:
    """Mean image of the benchmarks: pixels, visual tokens and vision FLOPs in this model."""

    pixels: float
    tokens: float
    flops: float

    def scaled(self, area: float) -> "TypicalImage":
        """A view or crop with this fraction of the pixels; attention is taken as linear, too."""
        return TypicalImage(self.pixels * area, self.tokens * area, self.flops * area)


def forecast(params: Params) -> pd.DataFrame:
    """One line per stage of the main line, with COLUMNS.

    Requests to servers, tokens through the model, PFLOP, hours of one GPU, peak memory of a GPU and disk in GB, and the
    basis of the hours.
    """
    return pd.DataFrame([{"requests": 0, **stage} for stage in _Forecast(params).stages()], columns=list(COLUMNS))


def wall_hours(table: pd.DataFrame, params: Params) -> float:
    """Wall-clock hours of the stages without servers: the trainings share ``plan.gpus`` GPUs, the rest runs on one."""
    shared = table.stage.isin(["sft", "grpo"])
    return math.fsum(table.gpu_hours[~shared]) + math.fsum(table.gpu_hours[shared]) / params.plan.gpus


def labelling(rows: int, params: Params) -> pd.DataFrame:
    """Requests to servers for labelling ``rows`` rows, from the prompts and data/served.yaml.

    Columns role, model, requests, prompt_tokens, completion_tokens, dollars, hours; no line for local models. Not
    counted: retries, the check of repaired answers (about 6 % more), savings by recorded replies.
    """
    section, served = params.curation, read_served(params)
    needed = [("judge", name, rows, 2, "judge", 0, 20) for name in section.all_judges if name in served.models]
    if section.oracle in served.models:
        located = math.ceil(HR_FRACTION * rows)
        needed.append(("oracle", section.oracle, located, 1, "oracle", SERVED_VISUAL_TOKENS, 60))
    if section.engine != "local":  # full and half resolution
        needed.append(("base", section.engine, rows, 2, "", SERVED_VISUAL_TOKENS * 5 // 8, 20))
    records = []
    for role, name, count, each, prompt, visual, reply in needed:
        model = get_model(name, params)
        words = getattr(served.prompts, prompt) if prompt else None
        characters = len(words.system) + len(words.user) if words else 0
        requests = count * each
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
    shape = next((name for name in configs.SHAPES if name in path.lower()), None)
    if shape is None:
        raise AwaresValueError(
            f"base.model {path}: sizes are known for {', '.join(configs.SHAPES)}, and for folders, Qwen3-VL's too: "
            f"run `hf download {path} config.json --local-dir FOLDER` and plan with base.model FOLDER"
        )
    return configs.config_of(shape, 1.0, load_processor(configs.EMBEDDED).tokenizer)


class _Forecast:
    def __init__(self, params: Params) -> None:
        self.params, self.config = params, model_config(params)
        self.gpu = costs.GPUS[params.plan.gpu]
        self.itemsize = 4 if params.base.dtype == "float32" else 2
        self.read = self.itemsize * sum(costs.parameters(self.config))  # bytes per pass
        text = self.config.text_config
        embeddings = 0 if self.config.tie_word_embeddings else text.vocab_size * text.hidden_size
        self.weights = self.read + self.itemsize * embeddings  # bytes in memory and on disk
        self.image = _typical_image(params, self.config)
        self.stored = self.image.pixels * BYTES_PER_PIXEL / GB
        self.train_rows = params.data.train_rows * len(params.data.sources)
        self.curated_rows = self.train_rows + params.data.validation_rows * len(params.data.sources)
        budget = costs.cache_bytes(params.protocol.token_budget, self.config, self.itemsize)
        self.inference_gb = (self.weights + budget) / GB + RUNTIME_GB
        self.assumed = f"{params.plan.utilisation:.0%} of the peak of {params.plan.gpu}"

    def stages(self) -> Iterator[dict[str, Any]]:
        rows = self.curated_rows
        yield {**_line("data", rows, 0, 0.0, 0.0, 0.0, "counted"), "disk_gb": COPIES * rows * self.stored}
        if not self.params.curation.released:
            yield from self._curation(rows)
        section = self.params.sft
        yield self._training("sft", round(section.share * self.train_rows * section.epochs), 0.0, 0.0)
        prompts = (grpo := self.params.grpo).share * self.train_rows * grpo.epochs
        if grpo.max_steps > 0:
            prompts = min(prompts, grpo.max_steps * grpo.batch_size / grpo.generations)
        once = 2 * self._policy()[1]  # the rollout, and the reference
        yield self._training(
            "grpo", round(prompts * grpo.generations), once, ANSWER + configs.CALL_RATES["awares"] * CALL
        )
        yield self._evaluation()

    def _curation(self, rows: int) -> Iterator[dict[str, Any]]:
        if self.params.curation.engine == "local":
            tokens, flops = self._turns([(self.image, ANSWER), (self.image.scaled(0.25), ANSWER)])
            hours = self._hours(rows * flops, rows * 2 * ANSWER)
            yield _line("curation", rows, rows * tokens, rows * flops, hours, self.inference_gb, self.assumed)
        for one in labelling(rows, self.params).itertuples():
            tokens = one.prompt_tokens + one.completion_tokens
            line = _line(
                f"curation: {one.role} {one.model}", rows, tokens, 0.0, 0.0, 0.0, f"{one.hours:.1f} h of its server"
            )
            yield {**line, "requests": one.requests, "disk_gb": rows * 1e3 / GB}

    def _training(self, stage: str, rows: int, more_flops: float, written: float) -> dict[str, Any]:
        """A training on ``rows`` trajectories, with ``more_flops`` and ``written`` tokens per row for rollouts."""
        section: Any = getattr(self.params, stage)
        tokens, flops = self._trained(section.gradient_checkpointing)
        memory = self._training_gb(section.per_device_batch_size * tokens, section.gradient_checkpointing)
        hours, basis = self._hours(rows * (flops + more_flops), rows * written), self.assumed
        measured = self._measured(stage)
        if measured is not None:
            hours, memory = rows * tokens / measured.tokens_per_second / 3600, measured.peak_memory_mb / 1e3
            basis = f"measured on {measured.device}"
        line = _line(stage, rows, rows * tokens, rows * (flops + more_flops), hours, memory, basis)
        return {**line, "disk_gb": 1.1 * KEPT * self.weights / GB}

    def _evaluation(self) -> dict[str, Any]:
        section, on_hub = self.params.evaluation, self.params.data.origin == "hub"
        rows = section.rows * len(self.params.data.tasks)
        if on_hub:
            scored = [sources.get_source(self.params, "evaluation", name) for name in self.params.data.tasks]
            rows = sum(min(section.rows, one.rows or 0) for one in scored)
        outside = 0  # lmms-eval scores its six benchmarks completely, whatever the tasks are
        if section.lmms_eval:
            outside = sum(one.rows or 0 for one in sources.read_sources(self.params, "evaluation").values())
        policy = self._policy()
        views = {"full": self.image, "half": self.image.scaled(0.25), "no_image": self.image.scaled(0.0)}
        done = [self._turns([(views[name], ANSWER)]) if name in views else policy for name in MAIN_SYSTEMS]
        # both policies again: the sweep's other trajectory, the frontier's eleven, lmms-eval's own run
        again = 2 * (min(section.dial_rows, rows) + 11 * min(section.frontier_rows, rows) + outside)
        tokens, flops = (rows * sum(part) + again * part[-1] for part in zip(*done, strict=True))
        hours = self._hours(flops, (rows * len(done) + again) * ANSWER)
        memory = self.inference_gb + 2 * self.weights / GB  # the base model and both policies
        line = _line("evaluation", rows, tokens, flops, hours, memory, self.assumed)
        return {**line, "disk_gb": EVALUATION_COPIES * rows * self.stored if on_hub else 0.0}

    def _turns(self, views: list[tuple[TypicalImage, int]]) -> tuple[float, float]:
        """(tokens, FLOPs) of single turns, given as (image, written tokens)."""
        tokens = [view.tokens + TEXT + written for view, written in views]
        read = sum(costs.prefill_flops(round(count), 0, self.config) for count in tokens)
        return sum(tokens), read + sum(view.flops for view, _ in views)

    def _policy(self) -> tuple[float, float]:
        """(tokens, FLOPs) of an average interaction of the policy, with cache reuse."""
        low, crop, rate = self.image.scaled(0.25), self.image.scaled(CROP_AREA), configs.CALL_RATES["awares"]
        first, more = low.tokens + TEXT + ANSWER, crop.tokens + CALL + ANSWER
        text = costs.prefill_flops(round(first), 0, self.config)
        text += rate * costs.prefill_flops(round(more), round(first), self.config)
        return first + rate * more, text + low.flops + rate * crop.flops

    def _trained(self, checkpointing: bool) -> tuple[float, float]:
        """(tokens, FLOPs) of a trajectory: backward through frozen weights costs a forward, checkpointing one more."""
        tokens, once = self._policy()
        seen = self.image.scaled(0.25).flops + configs.CALL_RATES["awares"] * self.image.scaled(CROP_AREA).flops
        return tokens, seen + (3 if checkpointing else 2) * (once - seen)

    def _hours(self, flops: float, written: float) -> float:
        seconds = flops / (self.gpu.flops * self.params.plan.utilisation)
        return (seconds + written / DECODED_ROWS * self.read / self.gpu.bandwidth) / 3600

    def _measured(self, stage: str) -> Any:
        """The stage's line in the table of `awares bench --train`; None if ``plan.bench`` is not set."""
        if not self.params.plan.bench:
            return None
        path = self.params.path(self.params.plan.bench) / "training.csv"
        if not path.is_file():
            raise AwaresFileError(f"{path}: no such table; plan.bench is the folder that `awares bench --train` wrote")
        return pd.read_csv(path).set_index("step").loc[stage]

    def _training_gb(self, tokens: float, checkpointing: bool) -> float:
        """Weights, activations of a micro-batch (checkpointed: one value per layer, one complete layer), logits."""
        text = self.config.text_config
        layer = tokens * (10 * text.hidden_size + 3 * text.intermediate_size) * self.itemsize
        layers = text.num_hidden_layers * (tokens * text.hidden_size * self.itemsize if checkpointing else layer)
        return (self.weights + layers + layer + 2 * 4 * tokens * text.vocab_size) / GB + RUNTIME_GB


def _line(
    stage: str, rows: int, tokens: float, flops: float, hours: float, memory: float, basis: str
) -> dict[str, Any]:
    counted = {"stage": stage, "rows": rows, "tokens": round(tokens), "pflop": flops / 1e15, "disk_gb": 0.0}
    return {**counted, "gpu_hours": hours, "gpu_memory_gb": memory, "basis": basis}


def _typical_image(params: Params, config: Any) -> TypicalImage:
    """The mean over the six benchmarks' common sizes, also assumed for the training sources."""
    shape = configs.MINI if params.data.origin != "hub" else "paper"
    merge = config.vision_config.spatial_merge_size
    side = merge * config.vision_config.patch_size
    found = []
    for name in configs.BENCHMARKS:
        blank = PilImage.new("1", configs.image_size(name, shape, 1.0))
        width, height = cap(blank, params.crops.max_side).size
        grid = merge * round(height / side), merge * round(width / side)
        found.append((width * height, grid[0] * grid[1] / merge**2, costs.vision_flops(grid, config)))
    return TypicalImage(*(sum(part) / len(found) for part in zip(*found, strict=True)))
