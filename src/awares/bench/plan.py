"""`awares plan`: a profile's cost from params.yaml, stage by stage, and whether this machine meets its requirements.

The hours are good to a factor of two: FLOPs are counted by `costs` and divided by an assumed fraction of the GPU's
peak; decoding runs at its memory bandwidth. `awares bench --train` can measure the training steps instead.
"""

import importlib.util
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pandas as pd
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from PIL import Image as PilImage

from awares.bench import configs, costs
from awares.clients.served import get_model, read_served
from awares.config import read_yaml
from awares.data import sources
from awares.engine.images import cap
from awares.engine.model import GPU_FIX, load_config, load_processor
from awares.errors import AwaresFileError, AwaresRequestError, AwaresValueError
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

    def _inference(self, stage: str, rows: int, parts: Any, models: int, disk: float = 0.0) -> Stage:
        """``parts``: pairs of a number of rows and the `Work` of every system on each of them."""
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


class Finding(NamedTuple):
    """One requirement of a profile, whether it is ``there``, what was ``found``, and the ``fix`` if it is not there."""

    what: str
    there: bool
    found: str
    fix: str


def preflight(params: Params) -> list[Finding]:
    """One finding for each requirement of the profile; takes minutes at most."""
    section, stages = params.curation, forecast(params)
    served = [] if section.released else [*section.all_judges, section.oracle, section.engine]
    found = [*_gpus(params, float(stages.gpu_memory_gb.max()))] if params.base.device == "cuda" else []
    folder, need = params.path(params.paths.runs), float(stages.disk_gb.sum())
    free = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free / GB
    fix = "set paths.runs to a larger disk, or DVC's cache"
    found.append(Finding(f"{need:.0f} GB of disk", free >= need, f"{free:.0f} GB", fix))
    return [*found, *servers(params, served), *_files(params), *_hub(params)]


def servers(params: Params, names: Sequence[str]) -> Iterator[Finding]:
    """One finding for each of ``names`` that is a model of data/served.yaml."""
    for name in (name for name in names if name in read_served(params).models):
        model, there = get_model(name, params), False
        address = f"or give its address in AWARES_{name.upper()}_URL"
        if model.started_by:
            found, fix = model.started_by.lacks(), "name another interpreter in data/served.yaml (python)"
            fix = f"make vllm (data/launch/README.md), {fix}, {address}"
            yield Finding(f"{name}: vLLM for {model.model}", not found, found or "found", fix)
            continue
        try:
            with model.connect() as api:
                served = [one.id for one in api.with_options(max_retries=1, timeout=20.0).models.list()]
            there, found = model.model in served, f"serves {', '.join(served)}"
            fix = f"start it with --served-model-name {model.model}, or write the served name into data/served.yaml"
        except openai.AuthenticationError:
            found, fix = "refuses the key", f"set the environment variable {model.key_variable} to it"
        except openai.OpenAIError as error:
            found, fix = f"no answer: {type(error).__name__}", f"start it (data/launch/README.md), {address}"
        yield Finding(f"{name}: {model.model} at {model.url}", there, found, fix)


def require_servers(params: Params, name: str, *later: str) -> None:
    """AwaresRequestError with the fix unless the model ``name`` is served; a ``later`` server need not run yet."""
    found = [*servers(params, [name]), *(one for one in servers(params, later) if one.found[:9] != "no answer")]
    if missing := [one for one in found if not one.there]:
        raise AwaresRequestError("\n".join(f"{one.what}: {one.found}; {one.fix}" for one in missing))


def _gpus(params: Params, need: float) -> Iterator[Finding]:
    count, planned = torch.cuda.device_count(), params.plan.gpus
    for name in dict.fromkeys(map(params.launch, ("sft", "grpo"))):
        processes, machines = launched(params, name)
        here, by = processes // machines, name or "a training in one process"
        fix = f"name another file in {'base.launch' if name == params.base.launch else 'sft.launch'}"
        fix = fix if count else f"{GPU_FIX}, or {fix}"
        yield Finding(f"{here} GPUs here, for {by}", count >= here, str(count), fix)
    total, _ = launched(params, params.base.launch)
    yield Finding(f"{total} GPUs planned", planned == total, f"plan.gpus {planned}", f"set plan.gpus to {total}")
    for index in range(count):
        seen = torch.cuda.get_device_properties(index)
        room = seen.total_memory / GB
        fix = "lower sft.per_device_batch_size, grpo.per_device_batch_size or protocol.token_budget"
        yield Finding(f"{need:.0f} GB on GPU {index}", room >= need, f"{room:.0f} GB, {seen.name}", fix)


def launched(params: Params, name: str) -> tuple[int, int]:
    """Processes (of one GPU each) and machines of an accelerate configuration; one process without a configuration."""
    path = params.path(name)
    settings = read_yaml(path, "base.launch or sft.launch") if name else {"num_processes": 1, "num_machines": 1}
    try:
        return int(settings["num_processes"]), int(settings["num_machines"])
    except KeyError as error:
        raise AwaresValueError(f"{path}: {error} missing: use an accelerate configuration as in data/launch") from error


def _files(params: Params) -> Iterator[Finding]:
    rows = [name for name in params.data.sources if name.endswith(".jsonl")]
    found = [(f"rows {name}", params.path(name).is_file(), "correct its path in data.sources") for name in rows]
    if params.evaluation.lmms_eval:
        python = params.path(params.evaluation.lmms_eval)
        fix = 'make that environment (data/launch/README.md), or set evaluation.lmms_eval to ""'
        found.append((f"lmms-eval at {python}", python.is_file(), fix))
    if params.grpo.rollouts == "vllm":
        fix = "pip install -c constraints.txt -e '.[vllm]', or set grpo.rollouts to local"
        found.append(("vLLM for GRPO's rollouts", importlib.util.find_spec("vllm") is not None, fix))
    if (library := params.base.report_to) != "none":
        fix = f"pip install {library} here, or set base.report_to to none"
        found.append((f"{library} for the logs of both trainings", importlib.util.find_spec(library) is not None, fix))
    for what, there, fix in found:
        yield Finding(what, there, "found" if there else "missing", fix)


def _hub(params: Params) -> Iterator[Finding]:
    used = []
    if params.data.origin == "hub":
        named = [name for name in params.data.sources if not name.endswith(".jsonl")]
        used = [sources.get_source(params, "training", name) for name in named]
        used += sources.read_sources(params, "evaluation").values()
        if params.curation.released:
            used.append(sources.get_source(params, "curated", params.curation.released))
    for names in dict.fromkeys((one.hub, *one.fallback) for one in used):
        found = [_access(params, name, "dataset") for name in names]
        yield next((one for one in found if one.there), found[0])
    if isinstance(params.model_path(), str):
        yield _access(params, params.base.model, "model")


def _access(params: Params, name: str, kind: str) -> Finding:
    if kind == "dataset" and params.data.hub_root:
        folder = params.path(params.data.hub_root) / name
        return Finding(f"dataset {name}", folder.is_dir(), str(folder), "copy it there, or leave data.hub_root empty")
    token, found, fix = "it is set" if os.environ.get("HF_TOKEN") else "it is not", "readable", ""
    try:
        HfApi().auth_check(name, repo_type=kind)  # anybody may read the description of a gated repository
    except GatedRepoError:
        found, fix = "gated", f"accept its licence on its page and set HF_TOKEN ({token})"
    except RepositoryNotFoundError:
        found, fix = "not found, or private", f"check the id, set HF_TOKEN ({token})"
    except Exception as error:  # any failure of the network
        found = f"unreachable: {type(error).__name__}"
        fix = "check the network, or set data.hub_root to a folder of copies (base.model to a folder)"
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            found, fix = "refuses the token", "set HF_TOKEN to a valid one, or unset it"
    return Finding(f"{kind} {name}", not fix, found, fix)
