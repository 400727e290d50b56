"""GRPO beyond the paper: other rows, other advantages, and the reward on held-out rows while it trains (all ours)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather
from datasets import Dataset, Image
from torch import Tensor
from transformers import TrainerCallback

from awares.config import Params
from awares.engine.model import ImageOnlyProcessor, load_model, load_processor
from awares.engine.rows import share_of
from awares.errors import AwaresValueError
from awares.method import grpo
from awares.method.judges import HR, LR
from awares.method.rewards import RewardContext, RewardFunction, awares_reward, played
from awares.method.rollout import Engine, Trajectory
from awares.training import checkpoints as training
from awares.training import distributed
from awares.training.checkpoints import TrainedPolicy

HELD_OUT = ("held_out_reward", "held_out_answer", "held_out_rtr", "held_out_calls")


def train_sampled(
    params: Params,
    rows: Dataset,
    model_path: str | Path,
    out_dir: str | Path,
    held_out: Dataset,
    reward: RewardFunction | None = None,
) -> TrainedPolicy:
    """`grpo.train_grpo` with ``grpo.advantage``; logs the reward on curated ``held_out`` rows."""
    return grpo.train_grpo(params, rows, model_path, out_dir, reward, fit_sampled, held_out=held_out)


def fit_sampled(
    params: Params,
    rows: Dataset,
    model_path: Path,
    folder: Path,
    log: Path,
    reward: RewardFunction | None = None,
    held_out: Dataset | None = None,
) -> None:
    """Train to the last checkpoint in ``folder``; every process of the training runs this."""
    model = load_model(model_path, params.base.dtype, distributed.device(params))
    processor = load_processor(model_path, params.crops.pixels)
    kind = TurnTrainer if params.grpo.advantage == "turn" else grpo.CropTrainer
    trainer = grpo.build_grpo_trainer(params, rows, model, processor, folder, reward, kind)
    if held_out is not None:
        trainer.add_callback(HeldOut(params, held_out, model, processor))
    training.train(trainer, folder, training.Log(log, log_line, "reward"))


def log_line(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a trainer's log under our names: an update, or a measurement of `HeldOut`."""
    return {name: entry[name] for name in ("step", *HELD_OUT)} if HELD_OUT[0] in entry else grpo.log_entry(entry)


def prompt_rows(dataset: Dataset, params: Params) -> Dataset:
    """The rows of ``dataset`` that training draws prompts from: with ``grpo.fresh`` those that SFT has not seen.

    With ``grpo.balanced`` as many HR rows as LR rows of every source, the first ones of each.
    """
    rows = pd.DataFrame({name: dataset[name][:] for name in ("id", "source", "label")})
    if params.grpo.fresh:
        rows = rows[~rows.id.isin(share_of(dataset, params.sft.share)["id"])]
    if params.grpo.balanced:
        kinds = rows.groupby(["source", "label"]).id.transform("size").groupby(rows.source).min()
        both = rows.groupby("source").label.transform("nunique") == len((HR, LR))
        rows = rows[both & (rows.groupby(["source", "label"]).cumcount() < rows.source.map(kinds))]
    if not len(rows):
        fix = "lower sft.share or raise data.train_rows, or set them to false"
        raise AwaresValueError(f"grpo.fresh or grpo.balanced leaves no row: {fix}")
    return dataset.select(rows.index)


class TurnTrainer(grpo.CropTrainer):
    """`turn_advantages`, of the tokens of the decision and of the answer, in place of Eq. 7."""

    outcomes: Tensor  # of the last completions of all processes, (B, 2): the reward, and whether a tool replied

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
        called = [[float(len(one) > 1)] for one in completions]
        self.outcomes = torch.cat([rewards, gather(torch.tensor(called, device=rewards.device))], dim=1)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output: Any = super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        parts = turn_advantages(self.outcomes[:, 0], self.outcomes[:, 1], self.context.params.grpo.generations)[
            first : first + len(inputs)
        ]
        output["advantages"] = per_token(parts, output["completion_mask"], output.get("tool_mask"))
        return output


def turn_advantages(rewards: Tensor, called: Tensor, generations: int) -> Tensor:
    """Advantages (N, 2) of the decision and of the answer of N completions, ``generations`` of each prompt in a row.

    In the spirit of AdaptVision's DTPO (PAPER §8). The decision gets the mean reward of the group's completions that
    decided alike (``called`` or not) less the mean of the group; the answer gets its reward less the former.
    """
    group, call = rewards.view(-1, generations), called.view(-1, generations)
    same = (call[:, :, None] == call[:, None, :]).to(group)  # (groups, G, G)
    alike = (same @ group[:, :, None]).squeeze(-1) / same.sum(-1)
    return torch.stack([alike - group.mean(1, keepdim=True), group - alike], dim=-1).flatten(0, 1)


def per_token(parts: Tensor, mask: Tensor, tool_mask: Tensor | None) -> Tensor:
    """Advantages (B, T) of the tokens of B completions from ``parts`` (B, 2), those of the decision and of the answer.

    The decision is the whole first turn of a call, and the first token of a direct answer. ``mask`` (B, T): 1 on tokens
    of the completion; ``tool_mask``: 0 on those of the tool.
    """
    reply = (mask * (1 - tool_mask)).bool() if tool_mask is not None else torch.zeros_like(mask).bool()
    end = torch.where(reply.any(1), reply.int().argmax(1), 1)  # of the decision
    return torch.where(torch.arange(mask.size(1), device=mask.device) < end[:, None], parts[:, :1], parts[:, 1:])


class HeldOut(TrainerCallback):
    """Logs `held_out` of the greedy policy before the first update and at each checkpoint.

    On ``grpo.held_out_rows`` of ``rows``, spread over them, and only in a training of one process.
    """

    def __init__(self, params: Params, rows: Dataset, model: Any, processor: ImageOnlyProcessor) -> None:
        count = min(params.grpo.held_out_rows, len(rows))
        self.params, self.rows = params, rows.select(np.arange(count) * len(rows) // max(1, count))
        self.engine = Engine.from_params(model, processor, params, progress=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps or not state.global_step % args.save_steps:
            self._measure(state)

    def _measure(self, state: Any) -> None:
        if distributed.processes() == 1 and len(self.rows):
            done = self.engine.run(self.rows["image"], self.rows["question"], row_ids=self.rows["id"])
            state.log_history.append({"step": state.global_step, **held_out(self.params, self.rows, done)})


def held_out(params: Params, rows: Dataset, done: Sequence[Trajectory]) -> dict[str, float]:
    """`HELD_OUT` of trajectories of curated ``rows``: reward (Eq. 5), R_ans, RTR and call rate, means over sources."""
    rewards, answers = rewards_of(params, rows, done)
    calls = [float(bool(one.crops)) for one in done]
    found = pd.DataFrame(dict(zip(HELD_OUT, (rewards, answers, [one.rtr for one in done], calls), strict=True)))
    return found.groupby(rows["source"][:]).mean().mean().to_dict()


def rewards_of(params: Params, rows: Dataset, done: Sequence[Trajectory]) -> tuple[list[float], list[float]]:
    """Eq. 5 and R_ans of each trajectory of curated ``rows``, at the prices of ``params``."""
    context, undecoded = RewardContext(params), rows.cast_column("image", Image(decode=False))  # it looks at no image
    rewards = context.score(awares_reward, played(undecoded, done))
    return rewards, context.logged["answer"]
