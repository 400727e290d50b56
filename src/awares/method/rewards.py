"""The reward of multi-turn GRPO (PAPER §4): Eq. 5 ``R = alpha_ans * R_ans - C_tool``, Eq. 6 C_tool; other rewards.

A reward is a function of a batch of rollouts, in which the G rollouts of a row are consecutive. It returns one number
per rollout::

    @reward("frugal")
    def frugal(rollouts, context):
        right = context.answer_reward(rollouts)     # R_ans, one number per rollout
        context.log(right=right)                    # a column of the training curve
        return [10 * mark - 2 * len(one.crops) for mark, one in zip(right, rollouts)]

The advantages (Eq. 7) and the clipped objective with its KL term (Eq. 8) are TRL's.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL.Image import Image

from awares.engine.embedding import load_encoder
from awares.engine.model import load_model, load_processor
from awares.errors import AwaresValueError
from awares.method.crops import union_area
from awares.method.judges import HR, LR, semantic
from awares.method.metrics import anls
from awares.method.rollout import Engine, Trajectory
from awares.registry import reward
from awares.settings import Grpo, Params
from awares.training import distributed


@dataclass(frozen=True)
class Rollout:
    """One sampled interaction: the row, and the policy's actions.

    ``text``: all that the policy wrote. ``crops``: the requested regions, () without a readable call. ``malformed``: it
    wrote an unreadable call. ``overflow``: its crops did not fit and were dropped (departure 8 of `grpo`).
    """

    row_id: str
    question: str
    full_image: Image
    answers: Sequence[str]
    label: str
    text: str
    answer: str
    crops: tuple[str, ...]
    malformed: bool
    overflow: bool


def played(rows: Dataset, done: Sequence[Trajectory]) -> list[Rollout]:
    """The rollouts of greedy trajectories of curated ``rows``."""
    found = []
    for row, one in zip(rows, done, strict=True):
        text = "\n".join(turn.text for turn in one.turns if turn.role == "assistant")
        known = {name: row[name] for name in ("question", "answers", "label")}
        malformed = one.call_status in ("malformed", "recovered")
        about = {"row_id": row["id"], "full_image": row["image"], "text": text, "answer": one.answer}
        found.append(Rollout(**known, **about, crops=one.crops, malformed=malformed, overflow=False))
    return found


class RewardContext:
    """The second argument of a reward: it gives ``params``, R_ans and the base model, and takes the terms to log."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.logged: dict[str, list[float]] = {}
        self.shown: dict[str, list[float]] = {}

    def answer_reward(self, rollouts: Sequence[Rollout], predictions: Sequence[str] | None = None) -> list[float]:
        """R_ans (``grpo.answer_reward``) of the rollouts' answers, or of ``predictions`` instead.

        If a row accepts several answers, the best one counts; with one answer it is the paper's reward.
        """
        given = [one.answer for one in rollouts] if predictions is None else predictions
        return score_answers(self.params.grpo, given, [one.answers for one in rollouts])

    @functools.cached_property
    def base(self) -> Engine:
        """The frozen base model ``base.model``, for example to answer from a crop alone."""
        path, device = self.params.model_path(), distributed.device(self.params)
        with torch.random.fork_rng():  # loading must not change what the policy samples
            model = load_model(path, self.params.base.dtype, device)
        processor = load_processor(path, self.params.crops.pixels)
        return Engine.from_params(model, processor, self.params, progress=False)

    def log(self, **terms: Sequence[float]) -> None:
        """Terms of the reward, one number per rollout; the training log has their means."""
        self.logged |= {name: [float(value) for value in values] for name, values in terms.items()}

    def show(self, **terms: Sequence[float]) -> None:
        """Further terms for `grpo.score_rollouts`, which also lists those of `log`."""
        self.shown |= {name: [float(value) for value in values] for name, values in terms.items()}

    def score(self, function: "RewardFunction", rollouts: Sequence[Rollout]) -> list[float]:
        """The rewards of ``rollouts``; AwaresValueError unless each, and each term, is a finite number."""
        self.logged.clear()
        self.shown.clear()
        rewards = np.asarray(function(rollouts, self), dtype=float)
        for name, values in {"the result": rewards, **self.logged, **self.shown}.items():
            found = np.asarray(values)
            if found.shape != (len(rollouts),) or not np.isfinite(found).all():
                wanted = f"one finite number for each of {len(rollouts)} rollouts"
                raise AwaresValueError(f"grpo.reward {function.__name__}: {name} must be {wanted}, not {values}")
        return rewards.tolist()


RewardFunction = Callable[[Sequence[Rollout], RewardContext], Sequence[float]]


# AwaRes


@reward("awares")
def awares_reward(rollouts: Sequence[Rollout], context: RewardContext) -> Sequence[float]:
    """Eq. 5: alpha_ans * R_ans - C_tool."""
    section = context.params.grpo
    weights = section.alpha_miss, section.alpha_use, section.lambda_area
    costs = [tool_cost(one.label, one.crops, *weights) for one in rollouts]
    context.show(**{name: [getattr(cost, name) for cost in costs] for name in ToolCost._fields})
    return weighted_sum(context, context.answer_reward(rollouts), [sum(cost) for cost in costs])


def weighted_sum(context: RewardContext, answer: Sequence[float], cost: Sequence[float]) -> Sequence[float]:
    """``alpha_ans * answer - cost`` in float32, as TRL weighs and adds two rewards; both are logged."""
    context.log(answer=answer, tool_cost=cost)
    answers, costs = np.asarray(answer, np.float32), np.asarray(cost, np.float32)
    return (context.params.grpo.alpha_ans * answers - costs).tolist()


class ToolCost(NamedTuple):
    """The terms of Eq. 6, each 0 or more; their sum is C_tool(C, y)."""

    miss: float = 0.0  # a needed call that was not made
    use: float = 0.0  # a call
    area: float = 0.0  # the requested area


def tool_cost(label: str, crops: Sequence[str], alpha_miss: float, alpha_use: float, lambda_area: float) -> ToolCost:
    """Eq. 6: ``alpha_miss`` for an HR row without a call, ``alpha_use + lambda_area * ||C||`` for a call, else 0.

    ||C|| is the fraction of the image that the *union* of the requested ``crops`` covers.
    """
    if label not in (LR, HR):
        raise AwaresValueError(f"label {label!r}: a curated row is {LR} or {HR}")
    if crops:
        return ToolCost(use=alpha_use, area=lambda_area * union_area(tuple(crops)))
    return ToolCost(miss=alpha_miss if label == HR else 0.0)


def score_answers(grpo: Grpo, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """R_ans of each prediction, given its accepted answers, by ``grpo.answer_reward``; Table 4 compares the three.

    ``similarity`` (the paper's): cosine of sentence embeddings, -1 to 1, not clipped. ``anls``: edit-distance
    similarity, 0 to 1. ``judge``: 1 where the semantic judge calls the answer right, else 0.
    """
    if grpo.answer_reward == "similarity":
        return load_encoder(grpo.embedder).similarity(predictions, answers)
    measure = anls if grpo.answer_reward == "anls" else functools.partial(semantic, "")
    return [measure(*row) for row in zip(predictions, answers, strict=True)]
