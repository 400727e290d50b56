"""The models of data/served.yaml: their declarations, their prompts, and clients and engines for them.

The file's comments explain the fields. A model without an address gets a vLLM server of ours (`launch`).
"""

import os
import re
from pathlib import Path
from typing import Any, Literal

import openai
from PIL import Image
from pydantic import BaseModel, Field

from awares.clients import launch
from awares.clients.chat import ChatClient, Server
from awares.clients.engine import RemoteEngine, image_part
from awares.config import Params, read_yaml
from awares.engine.jsonl import Record
from awares.engine.keys import folder_digest
from awares.engine.model import ImageOnlyProcessor
from awares.errors import AwaresValueError, validated
from awares.method import protocol

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
    """A declaration; ``started_by`` starts its server if it has no ``url``."""

    url: str = Field("", pattern="^(https?://.+)?$")
    vllm: dict[str, Any] = Field(min_length=1)
    max_tokens: int = Field(gt=0)
    retries: int = Field(ge=0)
    dollars: tuple[float, float]
    rows_per_hour: float = Field(gt=0)
    started_by: launch.Launch | None = None

    def connect(self, **options: Any) -> openai.OpenAI:
        """The library's client. Without a ``url`` it waits for the server of ours, and passes by proxies."""
        if self.started_by:
            direct = openai.DefaultHttpxClient(trust_env=False)
            options |= {"base_url": launch.running.address(self.started_by), "http_client": direct}
        return super().connect(**options)

    def fault(self) -> str:
        return launch.running.fault(self.started_by) if self.started_by else ""


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
    source, served_as = model.model, model.model
    if policy:
        source, served_as = str(policy), f"{name}-{folder_digest(policy)[:12]}"  # a new training is another model
    changes: Record = {"model": served_as, "url": os.environ.get(f"AWARES_{name.upper()}_URL") or model.url}
    if not changes["url"]:
        given: Record = {"model": source, "served-model-name": served_as, **model.vllm}
        if declared == "base" and any(params.crops.pixels):
            limits = zip(("min_pixels", "max_pixels"), params.crops.pixels, strict=True)
            given["mm-processor-kwargs"] = {key: pixels for key, pixels in limits if pixels}
        log = params.path(params.paths.runs) / params.profile / ".servers" / f"{name}.log"
        python = params.path(served.python)
        changes["started_by"] = launch.Launch(
            name, python, tuple(launch.as_flags(given)), params.root, log, served.minutes
        )
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
