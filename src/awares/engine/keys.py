"""Keys of stored work: a folder named by a hash of everything that determines the work, code and weights included."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from awares.errors import AwaresValueError

LIBRARIES = ("torch", "transformers", "trl", "peft")  # their versions are part of a key
MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt")


def code_of(*files: str) -> str:
    """Hash of files: stored work of older code must not be taken for this code's."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Hash of the files of a model folder; for a model of the hub, of its name and its commit in the hub's cache."""
    if not Path(folder).is_dir():
        commit = Path(hf_hub_download(str(folder), "config.json")).parent.name
        return hashlib.sha256(f"{folder}@{commit}".encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.suffix in MODEL_FILES):
        with path.open("rb") as stream:
            digest.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def model_key(model: Any) -> str:
    """Hash of a loaded model's weights; number format, device, threads and libraries."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    numbers = str(model.dtype), model.device.type, torch.get_num_threads()
    return f"{digest.hexdigest()}:{numbers}:{tuple(map(importlib.metadata.version, LIBRARIES))}"


def checkpoint_folder(out_dir: str | Path, inputs: dict[str, Any]) -> Path:
    """``<out_dir>/../.checkpoints/<key>``, which DVC does not empty; AwaresError if it is of other inputs."""
    text = json.dumps(inputs, indent=1, sort_keys=True)
    folder = Path(out_dir).parent / ".checkpoints" / hashlib.sha256(text.encode()).hexdigest()[:16]
    note = folder / "inputs.json"
    if not note.is_file() or note.read_text() != text:
        if any(folder.glob("checkpoint-*")):
            raise AwaresValueError(f"{folder}: holds checkpoints of other inputs than inputs.json: delete the folder")
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(text)
    return folder
