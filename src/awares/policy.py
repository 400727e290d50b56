"""The library front: ``AwaRes.from_pretrained(path).ask(image, question)``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awares.config import AwaresFileError
from awares.model import load_model, load_processor
from awares.rollout import Engine, Source, Trajectory

Adapters = str | Path | Sequence[str | Path]


class AwaRes:
    """A trained policy that looks at a half-resolution image first and asks for the crops it needs (PAPER §1)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        adapter: Adapters | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        **options: Any,
    ) -> "AwaRes":
        """Load a merged model folder, or a base model with one or more adapters (merged in order).

        ``path`` may also be an adapter folder: its adapter_config.json then names the base model, as a path relative to
        that folder or to the working folder. ``options`` go to the engine (``max_new_tokens``, ``token_budget``, ...);
        ``protocol="released"`` for the paper's checkpoint, which calls in plain text (PAPER §7).
        AwaresError for a missing, foreign or truncated checkpoint.
        """
        if adapter is None and Path(path, "adapter_config.json").is_file():
            path, adapter = _base_of(Path(path)), path
        processor = load_processor(path)
        model = load_model(path, dtype=dtype, device=device, adapter=adapter)
        return cls(Engine(model, processor, **options))

    def ask(self, image: Source, question: str, call_bias: float = 0.0) -> Trajectory:
        """Answer ``question`` about ``image`` (a path or a PIL image).

        The trajectory has ``.answer``, ``.crops``, ``.visual_tokens``, ``.full_visual_tokens``, ``.rtr``, ``.turns``. A
        positive ``call_bias`` makes the policy ask for crops more readily, a negative one less.
        """
        return self.engine.run([image], [question], call_bias=call_bias)[0]


def _base_of(adapter: Path) -> Path | str:
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not name:
        raise AwaresFileError(
            f"{adapter}: adapter_config.json names no base model: give the base model and adapter={adapter}"
        )
    beside = adapter / name
    return beside.resolve() if beside.is_dir() else name
