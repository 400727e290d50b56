"""Training in several processes: the notebook's process starts `accelerate launch` and waits for the checkpoints.

``base.launch`` names an accelerate configuration (data/launch); ``sft.launch`` another one for SFT, the only training
that may shard the model (FSDP2). On several nodes the notebook runs on the first one; the others join with
``python -m awares.training.distributed JOB``. The first node writes the file JOB; all nodes share the file system.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from awares import config
from awares.config import Params
from awares.engine.model import set_threads
from awares.errors import AwaresError, AwaresFileError

NODE = {"MASTER_ADDR": "--main_process_ip", "MASTER_PORT": "--main_process_port", "NODE_RANK": "--machine_rank"}


def processes() -> int:
    """Processes of the training that this process belongs to; 1 outside a launched one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(params: Params) -> str:
    """Where this process loads the model: ``base.device``; its own GPU among several; the host's memory under FSDP.

    AwaresError when one process sees several GPUs: the trainers refuse them with a less helpful message.
    """
    seen = torch.cuda.device_count() if params.base.device == "cuda" and processes() == 1 else 0
    if seen > 1:
        raise AwaresError(
            f"{seen} GPUs are visible to a training in one process: set CUDA_VISIBLE_DEVICES=0, or base.launch to a "
            "file of data/launch"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "cpu"
    several = params.base.device == "cuda" and processes() > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if several else params.base.device


def layout(stage: str, batch_size: int, per_device: int) -> tuple[int, int]:
    """One update in each process: (samples of a micro-batch, at most ``per_device``; number of micro-batches).

    AwaresError where the processes cannot divide the batch evenly.
    """
    samples, rest = divmod(batch_size, processes())
    if rest:
        raise AwaresError(
            f"{stage}.batch_size {batch_size} is no multiple of the {processes()} processes of base.launch: change one"
        )
    size = next(size for size in range(min(per_device, samples), 0, -1) if samples % size == 0)
    return size, samples // size


def launch(stage: str, params: Params, out_dir: str | Path, fit: Callable[..., None], *arguments: Any) -> None:
    """Call ``fit(*arguments)`` in every process of the configuration of ``stage`` (sft or grpo) and wait for the end.

    AwaresError when a process fails; the same call then resumes from the last checkpoint.
    """
    job = Path(out_dir) / "launch.job"
    job.parent.mkdir(parents=True, exist_ok=True)
    partial = job.with_suffix(".partial")
    partial.write_bytes(pickle.dumps((stage, params, fit, arguments)))
    partial.replace(job)
    try:
        join(job)
    finally:
        job.unlink(missing_ok=True)


def join(job: Path) -> None:
    """Start this node's processes of a job."""
    stage, params, _, _ = _read(job)
    settings = params.path(params.launch(stage))
    key = "sft.launch" if stage == "sft" and params.sft.launch else "base.launch"
    values = config.read_yaml(settings, key)
    _check_fsdp(params, key, values)
    missing = [variable for variable in NODE if not os.environ.get(variable)]
    if values.get("num_machines", 1) > 1 and missing:
        raise AwaresError(
            f"{settings}: {values['num_machines']} machines, but {', '.join(missing)} not set: set them on each machine"
        )
    node = [part for name, flag in NODE.items() if os.environ.get(name) for part in (flag, os.environ[name])]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings), *node]
    command += ["-m", "awares.training.distributed", str(job), "--worker"]
    library = str(Path(__file__).parents[2])  # the workers import this very awares
    search = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(command, cwd=params.root, env={**os.environ, "PYTHONPATH": search}, check=False)
    if ended.returncode:
        raise AwaresError(
            f"{stage}: accelerate launch ended with exit code {ended.returncode}; see the output of its processes. "
            "Run again to resume from the last checkpoint"
        )


def _check_fsdp(params: Params, key: str, values: dict[str, Any]) -> None:
    """AwaresError for an FSDP configuration, named by ``key``, that would hang or would not train as it says."""
    found = values.get("fsdp_config") or {}
    problems = {
        "GRPO cannot be trained with FSDP: processes with different numbers of tool turns would wait for each other. "
        "Name this file in sft.launch, and one such as data/launch/8gpu.yaml in base.launch": key != "sft.launch",
        "accelerate shards on GPUs only: with base.device cpu use data/launch/2cpu.yaml": params.base.device == "cpu",
        "FSDP gathers weights per forward pass: set sft.share_computation to false": params.sft.share_computation,
        "fsdp_config.fsdp_version must be 2: libraries drop version 1": found.get("fsdp_version") != 2,
        "fsdp_config.fsdp_state_dict_type must be FULL_STATE_DICT: a sharded checkpoint holds no adapter to choose":
            found.get("fsdp_state_dict_type") != "FULL_STATE_DICT",
    }  # fmt: skip
    for problem, present in problems.items():
        if values.get("distributed_type") == "FSDP" and present:
            raise AwaresError(f"{key}: {problem}")


def main(arguments: Sequence[str]) -> int:
    """``python -m awares.training.distributed JOB`` joins a job; accelerate adds ``--worker`` for each process."""
    if not arguments:
        print("usage: python -m awares.training.distributed JOB", file=sys.stderr)
        return 2
    try:
        if "--worker" in arguments:
            _, params, fit, given = _read(Path(arguments[0]))
            set_threads(params.threads)
            fit(*given)
        else:
            join(Path(arguments[0]))
    except AwaresError as error:
        print(f"awares.training.distributed: {error}", file=sys.stderr)
        return 1
    return 0


def _read(job: Path) -> tuple[str, Params, Callable[..., None], tuple[Any, ...]]:
    try:
        return pickle.loads(job.read_bytes())
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise AwaresFileError(f"{job}: no job: the first node writes it when its training starts") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
