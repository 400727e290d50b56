"""Rollouts of single rows, term by term, for the notebook of GRPO."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from awares import registry
from awares.config import Params
from awares.engine.jsonl import Record
from awares.engine.model import load_model, load_processor
from awares.method.grpo import build_grpo_trainer
from awares.method.rewards import RewardContext, RewardFunction, Rollout
from awares.training import distributed


def sample_rollouts(params: Params, rows: Dataset, model_path: str | Path) -> list[Rollout]:
    """``grpo.generations`` rollouts of every row by the policy at ``model_path``, sampled as in training."""
    kept: list[Rollout] = []

    def keep(rollouts: Sequence[Rollout], context: RewardContext) -> list[float]:
        kept.extend(rollouts)
        return [0.0] * len(rollouts)

    model = load_model(model_path, params.base.dtype, distributed.device(params))
    with tempfile.TemporaryDirectory() as folder:
        processor = load_processor(model_path, params.crops.pixels)
        trainer: Any = build_grpo_trainer(params, rows, model, processor, Path(folder), keep)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by a training
    for row in trainer.train_dataset:
        trainer._generate_and_score_completions([row] * params.grpo.generations)
    return kept


def score_rollouts(params: Params, rollouts: Sequence[Rollout], reward: RewardFunction | None = None) -> list[Record]:
    """One record per rollout: row_id, label, text, crops, prediction, terms of ``reward``, reward, advantage (Eq. 7).

    ``rollouts``: ``grpo.generations`` of each row, one row after the other (`sample_rollouts`).
    """
    context = RewardContext(params)
    values = context.score(registry.reward.find(reward or params.grpo.reward), rollouts)
    groups = torch.tensor(values).view(-1, params.grpo.generations)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    columns = {**context.shown, **context.logged, "reward": values, "advantage": advantages.flatten().tolist()}
    return [
        {"row_id": one.row_id, "label": one.label, "text": one.text, "crops": one.crops, "prediction": one.answer}
        | {name: column[index] for name, column in columns.items()}
        for index, one in enumerate(rollouts)
    ]
