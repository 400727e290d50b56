"""The models of data/served.yaml: their declarations, their prompts, and clients and engines for them.

The file's comments explain the fields. A model without an address gets a vLLM server of ours (`launch`).
"""

import hashlib
import os
import re
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from PIL import Image
from pydantic import BaseModel, Field

from awares.clients import launch
from awares.clients.chat import ChatClient, Server
from awares.clients.engine import RemoteEngine, image_part
from awares.config import Params, read_yaml
from awares.engine.jsonl import Record, in_chunks
from awares.engine.keys import checkpoint_folder, folder_digest
from awares.engine.model import ImageOnlyProcessor, load_model, load_processor
from awares.engine.rows import rows_digest
from awares.errors import AwaresValueError, validated
from awares.method import protocol, rollout
from awares.method.rollout import Engine, Trajectory

PromptName = Literal["judge", "judge_once", "oracle"]


class Prompt(BaseModel, extra="forbid"):
    """``system`` and ``user`` text; ``{names}`` are filled in."""

    version: str
    system: str
    user: str

    def messages(self, values: dict[str, str], image: Image.Image | None = None) -> list[Record]:
        """The chat, the image before the question; braces in a value stay as they are."""
        text = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.user).strip()
        content: Any = [image_part(image), {"type": "text", "text": text}] if image else text
        return [{"role": "system", "content": self.system.strip()}, {"role": "user", "content": content}]


class ServedModel(Server, extra="forbid", frozen=True):
    """A declaration."""

    url: str = Field("", pattern="^(https?://.+)?$")
    vllm: dict[str, Any] = Field(min_length=1)
    max_tokens: int = Field(gt=0)
    retries: int = Field(ge=0)
    dollars: tuple[float, float]
    rows_per_hour: float = Field(gt=0)
    weights_gb: float = Field(0, ge=0)


class Served(BaseModel, extra="forbid"):
    """The file data/served.yaml."""

    python: str
    minutes: float = Field(gt=0)
    models: dict[str, ServedModel]
    prompts: dict[PromptName, Prompt] = Field(min_length=3)


def read_served(params: Params) -> Served:
    """The declarations of ``curation.served_file``; AwaresValueError names a wrong key."""
    path = params.path(params.curation.served_file)
    return validated(Served, read_yaml(path, "curation.served_file"), str(path))


def get_model(name: str, params: Params, policy: Path | None = None) -> ServedModel:
    """A declared model, else AwaresValueError. AWARES_<NAME>_URL in the environment replaces its ``url``.

    ``policy``: the model in this folder in place of the declared one, with the settings of ``base``.
    """
    served = read_served(params)
    declared = "base" if policy else name
    if declared not in served.models:
        raise AwaresValueError(f"{params.curation.served_file}: no models.{declared}, only {', '.join(served.models)}")
    model = served.models[declared]
    source = str(policy or model.model)
    served_as = f"{name}-{folder_digest(policy)[:12]}" if policy else source  # a new training is another model
    changes: Record = {"model": served_as, "url": os.environ.get(f"AWARES_{name.upper()}_URL") or model.url}
    if not changes["url"]:
        given: Record = {"model": source, "served-model-name": served_as, **model.vllm}
        if declared == "base" and any(params.crops.pixels):
            limits = zip(("min_pixels", "max_pixels"), params.crops.pixels, strict=True)
            given["mm-processor-kwargs"] = {key: pixels for key, pixels in limits if pixels}
        log = params.path(params.paths.runs) / params.profile / ".servers" / f"{name}.log"
        python, flags = params.path(served.python), tuple(launch.as_flags(given))
        changes["started_by"] = launch.Launch(name, python, flags, params.root, log, served.minutes)
    return model.model_copy(update=changes)


def make_client(name: str, params: Params, policy: Path | None = None) -> ChatClient:
    """The client of a served model; all runs of a profile share its replies."""
    path = params.path(params.paths.runs) / params.profile / ".replies" / f"{name}.jsonl"
    return ChatClient(get_model(name, params, policy), path, progress=True)


def make_engine(
    name: str, processor: ImageOnlyProcessor, params: Params, policy: Path | None = None, **options: Any
) -> RemoteEngine:
    """The engine of the served base model ``name``, or of ``policy``; AwaresValueError for another base model."""
    if not policy and (served := get_model(name, params).model) != params.base.model:
        raise AwaresValueError(f"models.{name}.model is {served!r}, but base.model is {params.base.model!r}")
    given = {"max_new_tokens": params.curation.max_new_tokens, "max_side": params.crops.max_side, **options}
    return RemoteEngine(make_client(name, params, policy), processor, **given, protocol=protocol.from_params(params))


class KeptEngine:
    """An engine for ``rows`` that keeps trajectories in chunks of ``evaluation.chunk_rows``; the same calls resume.

    It runs the base model, or the ``policy`` in a folder, called ``system``, as ``evaluation.engine`` says. `run` and
    `answer` as in `rollout.Interaction`, with ``row_ids`` of ``rows``, which give images and questions. The chunks are
    next to ``out_dir``, keyed by everything that determines a trajectory.
    """

    def __init__(
        self, params: Params, rows: Dataset, out_dir: Path, system: str = "base", policy: Path | None = None
    ) -> None:
        processor = load_processor(params.model_path(), params.crops.pixels)
        if params.evaluation.engine == "vllm":
            options: Record = {"max_new_tokens": params.protocol.max_new_tokens, "scores": True}
            self.engine: Any = make_engine(system, processor, params, policy, **options)
        else:
            weights = load_model(policy or params.model_path(), params.base.dtype, params.base.device)
            self.engine = Engine.from_params(weights, processor, params)
        self.rows, self.out_dir, self.size = rows, out_dir, params.evaluation.chunk_rows
        self.place = {row_id: index for index, row_id in enumerate(rows["id"])}
        self.inputs = {"stage": "evaluation", "rows": rows_digest(rows), "chunk_rows": self.size}
        self.inputs |= {"engine": self.engine.key(), "code": rollout.code()}

    def _kept(self, method: str, *_: Any, row_ids: Sequence[str], **choices: Any) -> list[Trajectory]:
        ids = list(row_ids)
        about = {**self.inputs, "method": method, "choices": hashlib.sha256(repr((ids, choices)).encode()).hexdigest()}
        place = {row_id: index for index, row_id in enumerate(ids)}

        def work(chunk: list[str]) -> list[Record]:
            at, part = [place[row_id] for row_id in chunk], self.rows.select([self.place[row_id] for row_id in chunk])
            own = {key: [one[index] for index in at] if isinstance(one, list) else one for key, one in choices.items()}
            done = getattr(self.engine, method)(part["image"], part["question"], row_ids=chunk, **own)
            return [{"id": one.row_id, **one.to_dict()} for one in done]

        found = in_chunks(checkpoint_folder(self.out_dir, about) / f"{method}.jsonl", ids, self.size, work)
        return [Trajectory.from_dict({key: one[key] for key in one if key != "id"}) for one in found]

    run, answer = partialmethod(_kept, "run"), partialmethod(_kept, "answer")
