"""The library front: ``AwaRes.from_pretrained(path).ask(image, question)``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awares.config import load_params
from awares.engine.images import ImageSource
from awares.engine.model import adapter_folder, load_model, load_processor, set_attention
from awares.errors import AwaresFileError
from awares.method.protocol import Protocol, from_params
from awares.method.rollout import Engine, Trajectory


@dataclass(frozen=True)
class Checkpoint:
    """A policy on disk."""

    name: str  # to show
    path: Path | str  # a model folder or hub name
    adapters: tuple[Path, ...] = ()  # to merge into it, in order
    form: Protocol | None = None  # the interaction that it was trained on, if known
    base: Path | str | None = None  # the model that it was trained from, if known


def shipped(root: Path | None = None) -> Checkpoint:
    """The policy of the repository ``root``: data/base with the adapters data/policy/sft and data/policy/grpo."""
    root = root or Path(__file__).resolve().parents[2]
    base, *adapters = folders = [root / "data" / name for name in ("base", "policy/sft", "policy/grpo")]
    if missing := [str(folder.relative_to(root)) for folder in folders if not [*folder.glob("*config.json")]]:
        fix = "give one with --model PATH, or train one with `make repro` and give --run mini"
        raise AwaresFileError(f"no shipped policy here ({', '.join(missing)} missing): {fix}")
    return Checkpoint("shipped", base, tuple(adapters), base=base)


def of_run(name: str) -> Checkpoint:
    """The policy of run ``profile[/stage[/variant-sN]]`` (default: GRPO, main line); AwaresError if there is none."""
    profile, stage, which = [*name.strip("/").split("/", 2), "", ""][:3]
    stage = stage or "grpo"
    main = load_params(profile).run_dir(stage)
    folder = main.parent / (which or main.name)
    if stage not in ("sft", "grpo") or not (folder / "merged" / "config.json").is_file():
        fix = "run `make repro`, or give profile, profile/stage or profile/stage/variant-sN of another"
        raise AwaresFileError(f"{folder / 'merged'}: no policy of run {name!r}: {fix}")
    params = load_params(profile, folder.name.rpartition("-s")[0])
    name = f"run {profile}/{stage}/{folder.name}"
    return Checkpoint(name, folder / "merged", form=from_params(params), base=params.model_path())


class AwaRes:
    """A trained policy that looks at a half-resolution image first and requests the crops it needs (PAPER §1)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        pixels: tuple[int, int] = (0, 0),
        attn_implementation: str = "",
        **options: Any,
    ) -> "AwaRes":
        """Load the shipped policy (no ``path``), a merged model folder, or a base model with adapters, merged in order.

        ``path`` may also be an adapter (folder or hub name), whose adapter_config.json names what it was trained on.
        ``pixels``: as in `load_processor`; ``attn_implementation``: as in `set_attention`. ``options`` go to the
        engine: ``max_new_tokens``, ``token_budget``, or ``protocol="released"`` for the paper's checkpoint, which calls
        in plain text (PAPER §7). AwaresError for a missing, foreign or truncated checkpoint.
        """
        if path is None:
            path, adapter = shipped().path, shipped().adapters
        chain: list[str | Path] = []
        while adapter is None and (folder := adapter_folder(path)):
            if folder in chain:
                raise AwaresFileError(f"{folder}: adapter_config.json names an adapter that was trained on this one")
            chain.insert(0, folder)
            path = _base_of(folder)
        model = load_model(path, dtype, device, chain or adapter)
        set_attention(model, attn_implementation)
        return cls(Engine(model, load_processor(path, pixels), **options))

    def ask(self, image: ImageSource, question: str, call_bias: float = 0.0) -> Trajectory:
        """Answer ``question`` about ``image`` (path, file content or PIL image): ``answer``, ``crops``, ``rtr``.

        A positive ``call_bias`` (in logits) makes the policy call for crops more often, a negative one less often.
        """
        return self.engine.run([image], [question], call_bias=call_bias)[0]


def _base_of(adapter: Path) -> Path | str:
    try:
        name = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        return (adapter / name).resolve() if (adapter / name).is_dir() else name
    except (ValueError, TypeError, KeyError) as error:
        fix = f"fetch it again, or give the base model and adapter={adapter}"
        raise AwaresFileError(f"{adapter}: adapter_config.json names no base model ({error!r}): {fix}") from error
