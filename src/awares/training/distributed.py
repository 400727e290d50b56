"""Training in several processes: the notebook's process starts `accelerate launch` and waits for the checkpoints.

``base.launch`` names an accelerate configuration (data/launch); ``sft.launch`` another one for SFT, the only training
that may shard the model (FSDP2). On several nodes, which share a file system, the notebook runs on the first one. It
writes the file JOB, and the others join with ``python -m awares.training.distributed JOB``.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from datasets import Dataset
from pydantic import BaseModel, ValidationError

from awares import config
from awares.config import Params
from awares.engine.jsonl import write_records
from awares.engine.model import set_threads
from awares.engine.rows import load_rows, save_rows
from awares.errors import AwaresError, AwaresFileError

NODE = {"MASTER_ADDR": "--main_process_ip", "MASTER_PORT": "--main_process_port", "NODE_RANK": "--machine_rank"}


class LaunchedTraining(BaseModel):
    """The file JOB. ``fit``: module:function; ``rows``: the folder of its rows; the rest: its further arguments."""

    stage: str
    fit: str
    rows: Path
    params: Params
    model_path: Path
    folder: Path
    log: Path


def processes() -> int:
    """Processes of the training that this process belongs to; 1 outside a launched one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(params: Params) -> str:
    """Where this process loads the model: ``base.device``; its own GPU among several; the host's memory under FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "cpu"
    if params.base.device != "cuda":
        return params.base.device
    if processes() == 1 and (seen := torch.cuda.device_count()) > 1:  # the trainers refuse that
        fix = "set CUDA_VISIBLE_DEVICES=0, or base.launch to a file of data/launch"
        raise AwaresError(f"{seen} GPUs are visible to a training in one process: {fix}")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if processes() > 1 else "cuda"


def layout(stage: str, batch_size: int, per_device: int) -> tuple[int, int]:
    """(samples of a micro-batch, micro-batches) of an update in each process. AwaresError if they do not divide."""
    samples, rest = divmod(batch_size, processes())
    if rest:
        raise AwaresError(f"{stage}.batch_size {batch_size} cannot be divided among {processes()} processes")
    size = next(size for size in range(min(per_device, samples), 0, -1) if samples % size == 0)
    return size, samples // size


def launch(stage: str, fit: Callable[..., None], rows: Dataset, given: dict[str, Any]) -> None:
    """Call ``fit(rows=rows, **given)`` in every process and wait. AwaresError if one fails; a new call then resumes."""
    job, stored = given["log"].with_name("launch.job"), given["log"].with_name("launch.rows")
    save_rows(rows, stored)
    training = LaunchedTraining(stage=stage, fit=f"{fit.__module__}:{fit.__name__}", rows=stored, **given)
    write_records(job, [training.model_dump(mode="json")])  # whole or not at all: another node may wait for it
    try:
        join(job)
    finally:
        job.unlink(missing_ok=True)
        shutil.rmtree(stored, ignore_errors=True)


def join(job: Path) -> None:
    """Start this node's processes of the training in the file ``job``."""
    training = _read(job)
    stage, params = training.stage, training.params
    settings = params.path(params.launch(stage))
    key = "sft.launch" if stage == "sft" and params.sft.launch else "base.launch"
    values = config.read_yaml(settings, key)
    _check_fsdp(params, key, values)
    missing = [variable for variable in NODE if not os.environ.get(variable)]
    if values.get("num_machines", 1) > 1 and missing:
        raise AwaresError(f"{settings}: several machines, but {', '.join(missing)} not set: set them on each machine")
    node = [part for name, flag in NODE.items() if os.environ.get(name) for part in (flag, os.environ[name])]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings), *node]
    command += ["-m", "awares.training.distributed", str(job), "--worker"]
    source = str(Path(__file__).parents[2])  # the workers import the same awares
    search = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search}
    if code := subprocess.run(command, cwd=params.root, env=environment, check=False).returncode:
        raise AwaresError(f"{stage}: accelerate launch ended with exit code {code}: see its output, then run again")


def _check_fsdp(params: Params, key: str, values: dict[str, Any]) -> None:
    """AwaresError for an FSDP configuration, named by ``key``, that would hang or would not train as it says."""
    found = values.get("fsdp_config") or {}
    kinds = found.get("fsdp_version"), found.get("fsdp_state_dict_type")
    problems = {  # GRPO: processes with different numbers of tool turns would wait for each other
        "GRPO cannot be trained with FSDP: name this file in sft.launch, another in base.launch": key != "sft.launch",
        "accelerate shards on GPUs only: with base.device cpu use data/launch/2cpu.yaml": params.base.device == "cpu",
        "FSDP gathers weights per forward pass: set sft.share_computation to false": params.sft.share_computation,
        "fsdp_config needs fsdp_version 2, fsdp_state_dict_type FULL_STATE_DICT": kinds != (2, "FULL_STATE_DICT"),
    }
    for problem, present in problems.items():
        if values.get("distributed_type") == "FSDP" and present:
            raise AwaresError(f"{key}: {problem}")


def main() -> None:
    """``python -m awares.training.distributed JOB`` joins a training; accelerate adds ``--worker`` for each process."""
    parser = argparse.ArgumentParser(prog="awares.training.distributed")
    parser.add_argument("job", type=Path)
    parser.add_argument("--worker", action="store_true")
    options = parser.parse_args()
    try:
        if not options.worker:
            return join(options.job)
        training = _read(options.job)
        set_threads(training.params.threads)
        given = {name: getattr(training, name) for name in ("params", "model_path", "folder", "log")}
        resolve_name(training.fit)(rows=load_rows(training.rows), **given)
    except AwaresError as error:
        sys.exit(f"awares.training.distributed: {error}")


def _read(job: Path) -> LaunchedTraining:
    try:
        return LaunchedTraining.model_validate_json(job.read_bytes())
    except (OSError, ValidationError) as error:
        raise AwaresFileError(f"{job}: no job: the first node writes it when its training starts") from error


if __name__ == "__main__":
    main()
