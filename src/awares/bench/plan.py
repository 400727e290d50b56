"""Whether this machine meets a profile's requirements: GPUs, disk, servers, keys, model, data sets. Changes nothing."""

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import openai
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from awares.bench.estimate import GB, forecast
from awares.clients.served import get_model, read_served
from awares.config import read_yaml
from awares.data import sources
from awares.engine.model import GPU_FIX
from awares.errors import AwaresRequestError, AwaresValueError
from awares.settings import Params


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
