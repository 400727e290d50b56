"""The engines of the evaluation: a model in this process or on vLLM servers, with trajectories that are kept."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from awares.clients.served import make_engine
from awares.config import Params
from awares.engine.jsonl import Record, in_chunks
from awares.engine.keys import checkpoint_folder
from awares.engine.model import load_model, load_processor
from awares.engine.rows import rows_digest
from awares.method import rollout
from awares.method.rollout import Engine, Trajectory


class KeptEngine:
    """An engine for ``rows`` that keeps trajectories in chunks of ``evaluation.chunk_rows``; the same calls resume.

    It runs the base model, or the ``policy`` in a folder, which is called ``system``, as ``evaluation.engine`` says.
    `run` and `answer` as in `rollout.Interaction`, with ``row_ids`` of ``rows``, which give images and questions. The
    chunks are next to ``out_dir``, keyed by everything that determines a trajectory.
    """

    def __init__(
        self, params: Params, rows: Dataset, out_dir: Path, system: str = "base", policy: Path | None = None
    ) -> None:
        self.engine = _load(params, system, policy)
        self.rows, self.out_dir, self.size = rows, out_dir, params.evaluation.chunk_rows
        self.place = {row_id: index for index, row_id in enumerate(rows["id"])}
        self.inputs = {"stage": "evaluation", "rows": rows_digest(rows), "chunk_rows": self.size}
        self.inputs |= {"engine": self.engine.key(), "code": rollout.code()}

    def run(self, *_: Any, row_ids: Sequence[str], **choices: Any) -> list[Trajectory]:
        """The two-turn policy; the further arguments are those of `rollout.Interaction.run`."""
        return self._kept("run", list(row_ids), choices)

    def answer(self, *_: Any, row_ids: Sequence[str], **choices: Any) -> list[Trajectory]:
        """One turn of the base model; the further arguments are those of `rollout.Interaction.answer`."""
        return self._kept("answer", list(row_ids), choices)

    def _kept(self, method: str, ids: list[str], choices: Record) -> list[Trajectory]:
        about = {**self.inputs, "method": method, "choices": hashlib.sha256(repr((ids, choices)).encode()).hexdigest()}
        place = {row_id: index for index, row_id in enumerate(ids)}

        def work(chunk: list[str]) -> list[Record]:
            at, part = [place[row_id] for row_id in chunk], self.rows.select([self.place[row_id] for row_id in chunk])
            own = {key: [one[index] for index in at] if isinstance(one, list) else one for key, one in choices.items()}
            done = getattr(self.engine, method)(part["image"], part["question"], row_ids=chunk, **own)
            return [{"id": one.row_id, **one.to_dict()} for one in done]

        found = in_chunks(checkpoint_folder(self.out_dir, about) / f"{method}.jsonl", ids, self.size, work)
        return [Trajectory.from_dict({key: one[key] for key in one if key != "id"}) for one in found]


def _load(params: Params, system: str, policy: Path | None) -> Any:
    processor = load_processor(params.model_path(), params.crops.pixels)
    if params.evaluation.engine == "vllm":
        options: Record = {"max_new_tokens": params.protocol.max_new_tokens, "scores": True}
        return make_engine(system, processor, params, policy, **options)
    weights = load_model(policy or params.model_path(), params.base.dtype, params.base.device)
    return Engine.from_params(weights, processor, params)
