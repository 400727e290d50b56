"""Shared by both trainings: checkpoints keyed by their inputs, resuming, LoRA, trainer settings, the log, saving.

After a kill at any moment the same inputs (`describe_inputs`) resume from ``.checkpoints/<key>`` next to the output.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub.constants
import numpy as np
from peft import LoraConfig
from PIL.Image import Image
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from awares.engine.jsonl import exclusive_lock, write_records
from awares.engine.keys import LIBRARIES, checkpoint_folder, code_of, folder_digest
from awares.engine.model import load_model, load_processor, save_model, set_threads
from awares.engine.rows import rows_digest
from awares.errors import AwaresValueError
from awares.settings import Grpo, Params, Sft
from awares.training import distributed

huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every trainer to its makers
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns of environments each time; its version is pinned

# A complete checkpoint also has its state and one `rng_state*.pth` per process. The second line: FSDP's
COMPLETE = (("adapter_model.safetensors", "scheduler.pt", "optimizer.pt"),
            ("adapter_model.safetensors", "scheduler.pt", "optimizer.bin", "pytorch_model_fsdp.bin"))  # fmt: skip


class TrainedPolicy(NamedTuple):
    """The outputs of a training, the step of the checkpoint that was saved, and its validation accuracy (SFT)."""

    adapter: Path
    merged: Path
    log: Path
    step: int
    accuracy: float = math.nan


def run_training(
    stage: str,
    fit: Callable[..., None],
    params: Params,
    rows: datasets.Dataset,
    model_path: str | Path,
    out_dir: str | Path,
    inputs: dict[str, Any],
    **prepared: Any,
) -> Path:
    """Train ``stage`` (sft or grpo) to its last checkpoint; returns the folder of its checkpoints.

    ``fit`` takes params, rows, model_path, folder, log and calls `train`, here or in the processes of the launch file.
    ``inputs``: what else determines the result. ``prepared``: arguments of ``fit`` that those make themselves.
    """
    if (library := params.base.report_to) != "none" and not importlib.util.find_spec(library):
        raise AwaresValueError(f"base.report_to {library}: not here: pip install {library}, or set it to none")
    set_threads(params.threads)
    folder = checkpoint_folder(out_dir, describe_inputs(stage, params, [rows], model_path) | inputs)
    given = {"params": params, "model_path": Path(model_path), "folder": folder, "log": Path(out_dir) / "log.jsonl"}
    if params.launch(stage):
        distributed.launch(stage, fit, rows, given)
    else:
        fit(rows=rows, **given, **prepared)
    return folder


def train(trainer: Trainer, folder: Path, log: "Log") -> None:
    """Train to the end, from the last complete checkpoint of ``folder``. AwaresError while another process does."""
    trainer.add_callback(log)
    trainer.remove_callback(PrinterCallback)  # prints the whole log, where `log` shows a bar
    with exclusive_lock(folder / "training") if trainer.is_world_process_zero() else nullcontext():
        done = checkpoints(folder, trainer.args.world_size)
        state = TrainerState.load_from_json(str(done[-1] / "trainer_state.json")) if done else None
        if not state or state.global_step < state.max_steps:
            trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
        elif trainer.is_world_process_zero():  # the trainer would make one more update
            log.write(state.log_history)


def save_policy(
    params: Params, model_path: str | Path, checkpoint: Path, out_dir: str | Path, accuracy: float = math.nan
) -> TrainedPolicy:
    """Write ``out_dir/adapter`` (LoRA of ``checkpoint``, made for ``model_path``) and ``out_dir/merged`` (plain)."""
    adapter, merged, base = Path(out_dir) / "adapter", Path(out_dir) / "merged", str(model_path)
    processor = load_processor(model_path, params.crops.pixels)
    model = load_model(model_path, params.base.dtype, params.base.device, checkpoint, trainable=True)
    save_model(model, processor, adapter)
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty template, with a path of this machine
    file = adapter / "adapter_config.json"
    if Path(base).is_absolute() and Path(base).is_relative_to(params.root):
        base = Path(base).relative_to(params.root).as_posix()
    config = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_model(model.merge_and_unload(), processor, merged)
    return TrainedPolicy(adapter, merged, Path(out_dir) / "log.jsonl", step_of(checkpoint), accuracy)


def describe_inputs(
    stage: str, params: Params, rows: Sequence[datasets.Dataset], model_path: str | Path, sources: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything that determines the result of a ``stage``, as JSON values; ``sources``: further files of code."""
    values, launch = params.as_dict(), params.launch(stage)
    names = ("engine", "training", "method", "plus") if stage == "grpo" else ("engine", "training", "method")
    packages = [Path(__file__).parents[1] / name for name in names]
    code = sorted(str(file) for package in packages for file in package.rglob("*.py"))
    return {
        "stage": stage,
        "launch": code_of(str(params.path(launch))) if launch and params.path(launch).is_file() else launch,
        "params": {key: values[key] for key in ("seed", "threads", "crops", "protocol", stage)},
        "numbers": [params.base.dtype, params.base.device],
        "rows": [rows_digest(part) for part in rows],
        "weights": folder_digest(model_path),
        "code": code_of(*code, *sources),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def checkpoints(folder: Path, processes: int = 1) -> list[Path]:
    """The complete checkpoints of ``folder``, oldest first, from which ``processes`` can resume."""
    return sorted((path for path in folder.glob("checkpoint-*") if _is_complete(path, processes)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step at which a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def _is_complete(checkpoint: Path, processes: int) -> bool:
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError):
        return False
    written = any(all((checkpoint / name).is_file() for name in kind) for kind in COMPLETE)
    return written and step == step_of(checkpoint) and len(list(checkpoint.glob("rng_state*.pth"))) >= processes


def trainer_arguments(stage: str, params: Params, folder: Path) -> dict[str, Any]:
    """The arguments that SFTConfig and GRPOConfig share."""
    section, gpu = getattr(params, stage), params.base.device != "cpu"
    size, steps = distributed.layout(stage, section.batch_size, section.per_device_batch_size)
    return {
        "output_dir": str(folder),
        "seed": params.seed,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.scheduler,
        "warmup_steps": section.warmup_ratio,  # below 1 it is a share of the steps
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "gradient_checkpointing": section.gradient_checkpointing,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": steps,
        "bf16": gpu and params.base.dtype == "bfloat16",  # TRL's default is True, on a CPU too
        "use_cpu": not gpu,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "disable_tqdm": True,  # `Log` shows the bar
        "report_to": params.base.report_to,
        "project": "awares",
        "run_name": f"{stage}-{folder.name}",
    }


def lora_on(model: Any, section: Sft | Grpo) -> dict[str, Any]:
    """A trainer's arguments for LoRA on the layers ``lora_modules`` of the language model; the vision tower is frozen.

    AwaresError when ``model`` has an adapter: a new one on top would take the *base* as its reference, silently.
    """
    if hasattr(model, "peft_config"):
        raise AwaresValueError("the model to train already carries an adapter: give the merged model's folder")
    modules = rf".*language_model\..*\.({'|'.join(section.lora_modules)})"
    scale: Any = {"r": section.lora_rank, "lora_alpha": section.lora_alpha, "lora_dropout": section.lora_dropout}
    config = LoraConfig(target_modules=modules, task_type="CAUSAL_LM", **scale)
    return {"model": model, "peft_config": config, "callbacks": [SpareVision()]}


def report_pictures(trainer: Any, pictures: Callable[[], Iterable[tuple[Image, str]]]) -> None:
    """Send ``pictures`` with captions to ``base.report_to``, if there is one, whenever a checkpoint is due."""
    args, step = trainer.args, trainer.state.global_step
    due = args.report_to and trainer.is_in_train and args.process_index == 0 and not step % args.save_steps
    for number, (picture, caption) in enumerate(pictures() if due else ()):
        tag = f"rollouts/{number}"
        if args.report_to == ["tensorboard"]:
            writer: Any = next(one.tb_writer for one in trainer.callback_handler.callbacks if hasattr(one, "tb_writer"))
            writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
            writer.add_text(tag, caption, step)
        else:  # wandb and trackio have the same functions
            library = importlib.import_module(args.report_to[0])
            library.log({tag: library.Image(picture, caption=caption), "train/global_step": step})


class SpareVision(TrainerCallback):
    """Keeps gradients out of the frozen vision tower: with checkpointing, trainers make all embeddings require them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.gradient_checkpointing:  # the trainer's own hook is there already; this one follows it
            patches = kwargs["model"].get_base_model().model.visual.get_input_embeddings()
            patches.register_forward_hook(lambda _module, _inputs, output: output.detach())


class Log(TrainerCallback):
    """Writes the log as JSONL, every entry through ``rename`` ({} = leave it out); a bar with the last ``shown``."""

    def __init__(self, path: Path, rename: Callable[[dict[str, Any]], dict[str, Any]], shown: str) -> None:
        self.path, self.rename, self.shown, self.bar = path, rename, shown, tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden = not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="update", disable=hidden)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            entries = self.write(state.log_history)
            self.bar.set_postfix({self.shown: f"{entries[-1][self.shown]:.3f}"}, refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def write(self, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        entries = [entry for entry in map(self.rename, history) if entry]
        write_records(self.path, entries)  # all of them: a resumed run leaves no gap and no repeat
        return entries

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
