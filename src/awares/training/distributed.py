"""Training in several processes: a notebook hands its job to `accelerate launch`, and goes on when the checkpoints are there.

``base.launch`` names an accelerate configuration (data/launch), ``sft.launch`` another one for the cold start, the only training that may shard
the model (FSDP2); without one the training runs in the notebook's process. Both run the same
`fit` of the stage, on the same rows, into the same checkpoint folder. On several nodes the notebook runs on the first one; the others join with
``python -m awares.launch JOB``, JOB being the file that the first one writes, on a file system that all of them share.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from awares import config
from awares.config import Params
from awares.engine.rows import load_rows
from awares.errors import AwaresError, AwaresFileError

FSDP = {  # what an FSDP configuration must say, and why
    "fsdp_version": (2, "the first one is on its way out of the libraries"),
    "fsdp_state_dict_type": ("FULL_STATE_DICT", "a sharded checkpoint holds no adapter to choose"),
}
NODE = {"MASTER_ADDR": "--main_process_ip", "MASTER_PORT": "--main_process_port", "NODE_RANK": "--machine_rank"}


class AwaresLaunchError(AwaresError, RuntimeError):
    """A launched training has ended with an error."""


def processes() -> int:
    """Processes of the training that this one belongs to; 1 outside a launched one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(params: Params) -> str:
    """Where this process loads the model: ``base.device``, of several GPUs its own; the host's memory for FSDP, which moves it on in parts.

    AwaresError when there are several GPUs and one process.
    """
    require_one_gpu(params.base.device)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "cpu"
    return (
        f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if params.base.device == "cuda" and processes() > 1
        else params.base.device
    )


def layout(name: str, batch_size: int, per_device: int) -> tuple[int, int]:
    """How an update of ``batch_size`` is cut up on each process: samples of a micro-batch, ``per_device`` at most, and micro-batches.

    AwaresError where the processes cannot share the batch evenly.
    """
    share, rest = divmod(batch_size, processes())
    if rest:
        raise AwaresError(
            f"{name}.batch_size {batch_size} is no multiple of the {processes()} processes of base.launch: change one of them"
        )
    size = next(size for size in range(min(per_device, share), 0, -1) if share % size == 0)
    return size, share // size


def require_one_gpu(device: str) -> None:
    """AwaresError when a training in one process would see several GPUs: the trainers refuse them, with less of a mend."""
    seen = torch.cuda.device_count() if device.startswith("cuda") and processes() == 1 else 0
    if seen > 1:
        raise AwaresError(
            f"{seen} GPUs are visible to a training in one process: set CUDA_VISIBLE_DEVICES=0, or base.launch to a file of data/launch"
        )


def launch(stage: str, params: Params, model_path: str | Path, out_dir: str | Path) -> None:
    """Run the ``fit`` of ``stage`` (sft or grpo) in the processes of its configuration and wait for it; what it prints is printed.

    The rows are those of the pipeline's run folder. AwaresError when a process fails; the same call then goes on from the last checkpoint.
    """
    job = Path(out_dir) / "launch.json"
    job.parent.mkdir(parents=True, exist_ok=True)
    named = {"stage": stage, "model_path": str(model_path), "out_dir": str(out_dir), "root": str(params.root)}
    asked = {"profile": params.profile, "variant": params.variant, "overrides": config.overrides_of(params)}
    job.write_text(json.dumps({**named, **asked}, indent=1))
    try:
        join(job)
    finally:
        job.unlink(missing_ok=True)


def join(job: Path) -> None:
    """Start this node's processes of a job."""
    asked = _read(job)
    params = _params(asked)
    settings = params.path(params.launch(asked["stage"]))
    named = "sft.launch" if asked["stage"] == "sft" and params.sft.launch else "base.launch"
    if not settings.is_file():
        raise AwaresFileError(f"{settings}: no such accelerate configuration; {named} names it")
    laid_out = config.read_yaml(settings, named)
    _check_fsdp(params, named, laid_out)
    missing = [variable for variable in NODE if not os.environ.get(variable)]
    if laid_out.get("num_machines", 1) > 1 and missing:
        raise AwaresError(
            f"{settings}: {laid_out['num_machines']} machines, and {', '.join(missing)} not set: set them on every machine"
        )
    node = [
        part for variable, flag in NODE.items() if os.environ.get(variable) for part in (flag, os.environ[variable])
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings), *node]
    found = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )  # this very awares
    environment = {**os.environ, "PYTHONPATH": found}
    done = subprocess.run(
        [*command, "-m", "awares.training.distributed", str(job), "--worker"],
        cwd=params.root,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise AwaresLaunchError(
            f"{asked['stage']}: accelerate launch ended with exit code {done.returncode}; what its processes printed tells why. "
            "Run again and it goes on from the last checkpoint"
        )


def _check_fsdp(params: Params, named: str, settings: dict[str, Any]) -> None:
    """AwaresError where ``settings``, the configuration that ``named`` names, is one of FSDP and would not train as it says."""
    if settings.get("distributed_type") != "FSDP":
        return
    if named != "sft.launch":  # said before the cold start, not hours later
        raise AwaresError(
            f"{named}: GRPO cannot be trained with FSDP: processes with different numbers of tool turns would wait for each other. "
            "Name this configuration in sft.launch, and one without FSDP, such as data/launch/8gpu.yaml, in base.launch"
        )
    if params.base.device == "cpu":
        raise AwaresError(
            f"{named}: accelerate shards on GPUs only, and would train whole copies without a word: with base.device cpu take data/launch/2cpu.yaml"
        )
    if params.sft.share_computation:
        raise AwaresError(
            f"{named}: FSDP gathers the weights only when the whole model is called: set sft.share_computation to false"
        )
    for key, (wanted, why) in FSDP.items():
        found = (settings.get("fsdp_config") or {}).get(key)
        if found != wanted:
            raise AwaresError(f"{named}: fsdp_config.{key} must be {wanted}, not {found}: {why}")


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m awares.launch JOB``: join a job; with ``--worker``, which accelerate adds, be one of its processes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print("usage: python -m awares.launch JOB", file=sys.stderr)
        return 2
    job = Path(given[0])
    try:
        if "--worker" not in given:
            join(job)
            return 0
        asked = _read(job)
        params = _params(asked)
        rows = {split: load_rows(params.run_dir("curation") / split / "dataset") for split in ("train", "validation")}
        fit = importlib.import_module(f"awares.method.{asked['stage']}").fit
        fit(params, rows["train"], rows["validation"], asked["model_path"], Path(asked["out_dir"]))
    except AwaresError as error:
        print(f"awares.launch: {error}", file=sys.stderr)
        return 1
    return 0


def _read(job: Path) -> dict[str, str]:
    try:
        return json.loads(job.read_text())
    except (OSError, ValueError) as error:
        raise AwaresFileError(f"{job}: no job: the first node writes it when its training starts") from error


def _params(asked: dict[str, str]) -> Params:
    path = Path(asked["root"]) / "params.yaml"
    return config.load_params(asked["profile"], asked["variant"], asked["overrides"], path=path)


if __name__ == "__main__":
    sys.exit(main())
