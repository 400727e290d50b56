"""The library front: ``AwaRes.from_pretrained(path).ask(image, question)``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awares.config import load_params
from awares.engine.model import adapter_folder, load_model, load_processor
from awares.errors import AwaresFileError
from awares.method.protocol import Protocol, from_params
from awares.method.rollout import Engine, ImageSource, Trajectory

Adapters = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Checkpoint:
    """A policy on disk: a model folder or hub name, and the adapters to merge into it, in order.

    ``name``: to show. ``form``: the interaction that it was trained on, if known.
    """

    name: str
    path: Path | str
    adapters: tuple[Path, ...] = ()
    form: Protocol | None = None


def shipped(root: Path | None = None) -> Checkpoint:
    """The policy of the repository: data/base with the adapters data/policy/sft and data/policy/grpo.

    ``root``: the repository, by default the one of this file. AwaresFileError when a part is missing.
    """
    data = (root or Path(__file__).resolve().parents[2]) / "data"
    adapters = tuple(data / "policy" / stage for stage in ("sft", "grpo"))
    files = [data / "base" / "config.json", *(folder / "adapter_config.json" for folder in adapters)]
    missing = [str(file.parent.relative_to(data.parent)) for file in files if not file.is_file()]
    if missing:
        raise AwaresFileError(
            f"no shipped policy here ({', '.join(missing)} missing): give one with --model PATH, or train one with "
            "`make repro` and give --run mini"
        )
    return Checkpoint("shipped", data / "base", adapters)


def of_run(name: str) -> Checkpoint:
    """The policy of a pipeline run: ``profile``, ``profile/stage`` or ``profile/stage/variant-sN``.

    The stage is sft or grpo (default); the default of the third part is main with the seed of params.yaml. AwaresError
    for a run that does not exist.
    """
    profile, stage, which, *more = [*name.strip("/").split("/"), "", ""]
    if any(more):
        raise AwaresFileError(f"no run {name!r}: give profile, profile/stage or profile/stage/variant-sN")
    params = load_params(profile)
    stage = stage or "grpo"
    folder = params.run_dir(stage) if not which else params.run_dir(stage).with_name(which)
    if stage not in ("sft", "grpo") or not (folder / "merged" / "config.json").is_file():
        raise AwaresFileError(
            f"{folder / 'merged'}: no policy of run {name!r}: run `make repro`, or give another, such as mini/sft"
        )
    variant = folder.name.rpartition("-s")[0]
    form = from_params(load_params(profile, variant))
    return Checkpoint(f"run {profile}/{stage}/{folder.name}", folder / "merged", form=form)


class AwaRes:
    """A trained policy that looks at a half-resolution image first and asks for the crops it needs (PAPER §1)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        adapter: Adapters | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        **options: Any,
    ) -> "AwaRes":
        """Load the shipped policy (no ``path``), a merged model folder, or a base model with adapters, merged in order.

        ``path`` may also be an adapter (folder or hub name). Its adapter_config.json names the model or adapter that it
        was trained on: a path relative to that folder or to the working folder, or a hub name. ``options`` go to the
        engine (``max_new_tokens``, ``token_budget``, ...); ``protocol="released"`` is for the paper's checkpoint, which
        calls in plain text (PAPER §7). AwaresError for a missing, foreign or truncated checkpoint.
        """
        if path is None:
            found = shipped()
            path, adapter = found.path, found.adapters
        chain: list[str | Path] = []
        while adapter is None and (folder := adapter_folder(path)):
            if folder in chain:
                raise AwaresFileError(f"{folder}: adapter_config.json names an adapter that was trained on this one")
            chain.insert(0, folder)
            path = _base_of(folder)
        adapter = chain or adapter
        processor = load_processor(path)
        model = load_model(path, dtype=dtype, device=device, adapter=adapter)
        return cls(Engine(model, processor, **options))

    def ask(self, image: ImageSource, question: str, call_bias: float = 0.0) -> Trajectory:
        """Answer ``question`` about ``image`` (a path or a PIL image).

        The trajectory has ``.answer``, ``.crops``, ``.visual_tokens``, ``.full_visual_tokens``, ``.rtr``, ``.turns``. A
        positive ``call_bias`` makes the policy call for crops more often, a negative one less often.
        """
        return self.engine.run([image], [question], call_bias=call_bias)[0]


def _base_of(adapter: Path) -> Path | str:
    try:
        name = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise AwaresFileError(f"{adapter}: adapter_config.json is broken ({error}): fetch it again") from error
    if not isinstance(name, str) or not name:
        raise AwaresFileError(
            f"{adapter}: adapter_config.json names no base model: give the base model and adapter={adapter}"
        )
    folder = adapter / name
    return folder.resolve() if folder.is_dir() else name
