"""What both trainings share: checkpoints keyed by their inputs, LoRA, the log, saving.

A training may stop at any moment. Its checkpoints stand beside the stage's output, in ``.checkpoints/<key>``, where the key is a
hash of everything that determines the result: parameters, rows, weights, code, library versions. The same inputs find the same
folder and go on; other inputs find another one and start afresh.
"""

import hashlib
import importlib.metadata
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from peft import LoraConfig
from PIL import ExifTags, Image
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState

from awares.config import Grpo, Params, Sft
from awares.engine.images import cap, check_image
from awares.engine.jsonl import exclusive_lock
from awares.engine.model import ImageOnlyProcessor, save_model
from awares.errors import AwaresFileError, AwaresValueError
from awares.method import crops, protocol

# TRL reports every trainer it builds to its makers; nothing leaves the machine here.
huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
# Environments are experimental in TRL, which warns each time: its version is pinned, and our tests hold what it does.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

LIBRARIES = ("torch", "transformers", "trl", "peft")
TRAINED_ON = ("id", "question", "answers", "label", "target_crops")  # and the image: what a training takes from a row
# files of a whole checkpoint, beside its state and one `rng_state*.pth` a process; the optimizer's as FSDP keeps them, or as all others do
COMPLETE = ("adapter_model.safetensors", "scheduler.pt")
OPTIMIZER = (("optimizer.pt",), ("optimizer.bin", "pytorch_model_fsdp.bin"))


# Inputs and checkpoints


def describe_inputs(
    stage: str, params: Params, rows: Sequence[datasets.Dataset], model_path: str | Path, sources: Sequence[str]
) -> dict[str, Any]:
    """Everything that determines the result of a training ``stage``, as JSON values; ``sources`` are the files of its own code."""
    values = params.as_dict()
    sources = [*sources, __file__, str(crops.__file__), str(protocol.__file__)]
    launch = params.launch(stage)
    return {
        "stage": stage,
        "launch": hashlib.sha256(params.path(launch).read_bytes()).hexdigest()
        if launch and params.path(launch).is_file()
        else launch,
        "params": {key: values[key] for key in ("seed", "threads", "crops", "protocol", stage)},
        "prompt": protocol.from_params(params).system,
        "numbers": [params.base.dtype, params.base.device],
        "rows": [rows_digest(part) for part in rows],
        "weights": folder_digest(model_path),
        "code": {Path(source).name: code_of(source) for source in sources},
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def code_of(*files: str) -> str:
    """Hash of source files: stored work of older code must not be taken for this code's."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def rows_digest(rows: datasets.Dataset) -> str:
    """Hash of what a training takes from ``rows``, image bytes included: fingerprints of ``datasets`` differ between processes."""
    digest = hashlib.sha256()
    for row in rows.cast_column("image", datasets.Image(decode=False)):
        image = row["image"]
        digest.update(json.dumps([row.get(column) for column in TRAINED_ON]).encode())
        digest.update(image["bytes"] or Path(image["path"]).read_bytes())
    return digest.hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Hash of the files of a model folder; of name and commit for a model of the hub, as it lies in the hub's cache."""
    digest = hashlib.sha256(b"" if Path(folder).is_dir() else f"{folder}{_commit(str(folder))}".encode())
    for file in sorted(Path(folder).glob("*")) if Path(folder).is_dir() else []:
        if file.is_file() and file.suffix in (".safetensors", ".json", ".jinja", ".txt"):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _commit(name: str) -> str:
    """Of the model ``name`` as it lies in the hub's cache, fetched if need be."""
    found = try_to_load_from_cache(name, "config.json")
    return f"@{Path(found if isinstance(found, str) else hf_hub_download(name, 'config.json')).parent.name}"


def checkpoint_folder(out_dir: str | Path, inputs: dict[str, Any]) -> Path:
    """``<out_dir>/../.checkpoints/<key>``, made if need be, with the inputs beside the checkpoints in ``inputs.json``.

    It stands outside ``out_dir`` because DVC empties a stage's outputs before it runs. AwaresError when the folder holds
    checkpoints of other inputs (it was copied or renamed).
    """
    text = json.dumps(inputs, indent=1, sort_keys=True)
    folder = Path(out_dir).parent / ".checkpoints" / hashlib.sha256(text.encode()).hexdigest()[:16]
    note = folder / "inputs.json"
    if folder.is_dir() and any(folder.glob("checkpoint-*")) and (not note.is_file() or note.read_text() != text):
        raise AwaresValueError(f"{folder}: holds checkpoints of other inputs than inputs.json names: delete the folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not note.is_file() or note.read_text() != text:  # processes of one training come here together
        note.write_text(text)
    return folder


def checkpoints(folder: Path, processes: int = 1) -> list[Path]:
    """The complete checkpoints of ``folder``, oldest first, for as many ``processes`` to go on from. A torn one (a process was
    killed while it wrote) is skipped.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _is_complete(path, processes)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step at which a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def _is_complete(checkpoint: Path, processes: int) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    written = any(all((checkpoint / name).is_file() for name in (*COMPLETE, *kind)) for kind in OPTIMIZER)
    each = len(list(checkpoint.glob("rng_state*.pth"))) >= processes
    return written and each and state.get("global_step") == step_of(checkpoint)


def require_checkpoint(folder: Path) -> None:
    """AwaresError when a launched training has left no checkpoint in ``folder``: it worked on other rows than its caller."""
    if not checkpoints(folder):
        raise AwaresFileError(
            f"{folder}: the launched training left no checkpoint here: it reads the curated rows of the run folder, and was called with others"
        )


def train(trainer: Trainer, folder: Path, log: "Log") -> None:
    """Train to the end, from the last complete checkpoint of ``folder`` if there is one. AwaresError while another process does."""
    trainer.add_callback(log)
    trainer.remove_callback(PrinterCallback)  # the log in full on the screen, where `log` shows a bar
    with exclusive_lock(folder / "training") if trainer.is_world_process_zero() else nullcontext():
        done = checkpoints(folder, trainer.args.world_size)
        state = TrainerState.load_from_json(str(done[-1] / "trainer_state.json")) if done else None
        if state and state.global_step >= state.max_steps:  # the trainer would make one more update first
            if trainer.is_world_process_zero():
                log.write(state.log_history)
            return
        trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)


# The policy


def lora_config(section: Sft | Grpo) -> LoraConfig:
    """LoRA on the linear layers ``section.lora_modules`` of the language model; the vision tower stays as it is."""
    modules = "|".join(section.lora_modules)
    return LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=rf".*language_model\..*\.({modules})",
        task_type="CAUSAL_LM",
    )


def require_plain(model: PreTrainedModel) -> None:
    """AwaresError when ``model`` carries an adapter: a new one on top would take the *base* as its reference, unnoticed."""
    if hasattr(model, "peft_config"):
        raise AwaresValueError("the model to train already carries an adapter: give the merged model's folder")


def require_trainable(model: Any, section: str) -> None:
    """AwaresError when no parameter would be trained (PEFT says nothing about it)."""
    if not any(weight.requires_grad for weight in model.parameters()):
        raise AwaresValueError(
            f"{section}: 0 trainable parameters: {section}.lora_modules matches no layer of the model"
        )


def save_policy(model: Any, processor: ImageOnlyProcessor, out_dir: str | Path, base: str) -> tuple[Path, Path]:
    """Write ``out_dir/adapter`` (LoRA weights; made for the model named ``base``) and ``out_dir/merged`` (a plain model)."""
    adapter, merged = Path(out_dir) / "adapter", Path(out_dir) / "merged"
    save_model(model, processor, adapter)
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty form, with a path of this machine
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_model(model.merge_and_unload(), processor, merged)
    return adapter, merged


def relative(path: str | Path, root: Path) -> str:
    """``path`` as it is written into files: relative to the repository when it lies inside."""
    inside = Path(path).is_absolute() and Path(path).is_relative_to(root)
    return Path(path).relative_to(root).as_posix() if inside else str(path)


# Rows


def picture(row: dict[str, Any], params: Params) -> Image.Image:
    """The image of a row as the interaction sees it (PAPER §1): upright RGB, capped at ``crops.max_side``."""
    return cap(check_image(row["image"], f"row {row['id']}"), params.crops.max_side)


def picture_sizes(rows: datasets.Dataset, params: Params) -> list[tuple[int, int]]:
    """(width, height) in pixels of every :func:`picture`, from the headers of the files, without decoding a pixel."""
    sizes = []
    for stored in rows.cast_column("image", datasets.Image(decode=False))["image"]:
        with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # `datasets` turns such images upright
            size = image.size[::-1] if turned else image.size
        sizes.append(cap(Image.new("1", size), params.crops.max_side).size)
    return sizes


# Gradients


class SpareVision(TrainerCallback):
    """Keeps gradients out of the frozen vision tower, which gradient checkpointing of an adapter would let in.

    For checkpoints to pass gradients on, trainers let the input embeddings of *all* towers require them; the language model's suffice.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer when it has switched checkpointing on."""
        if args.gradient_checkpointing:
            patches = kwargs["model"].get_base_model().model.visual.get_input_embeddings()
            patches.register_forward_hook(_detached)  # after the hooks that let gradients in


def _detached(_module: Any, _inputs: Any, output: Any) -> Any:
    return output.detach()


# The log


class Log(TrainerCallback):
    """Writes the whole log of a training to a jsonl file at every step, and shows a bar with the last value of ``shown``.

    The file is written whole, from the trainer's own history, so that a resumed run leaves no gap and no repeat.
    """

    def __init__(self, path: Path, rename: Callable[[dict[str, Any]], dict[str, Any]], shown: str) -> None:
        self.path, self.rename, self.shown = path, rename, shown
        self.bar = tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar where the training starts."""
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="update", disable=not state.is_world_process_zero
        )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer after every update."""
        if not state.is_world_process_zero:
            return
        entries = self.write(state.log_history)
        self.bar.set_postfix({self.shown: f"{entries[-1][self.shown]:.3f}"}, refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def write(self, history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write the file from a trainer's ``log_history``; the entries."""
        entries = [entry for entry in map(self.rename, history) if entry]
        write_jsonl(self.path, entries)
        return entries

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


def write_jsonl(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line; the file is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    partial.replace(path)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The entries that :func:`write_jsonl` wrote; AwaresError when there is no such log."""
    if not Path(path).is_file():
        raise AwaresFileError(f"{path}: no such log: run the training first")
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
