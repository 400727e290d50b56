"""GRPO's objective for the decision, without sampling (ours).

The expected reward of a row is, with p the probability that the policy begins with a call::

    J = p R_call + (1 - p) R_direct - beta KL(pi || pi_ref)

The starting policy plays every row twice, greedily: it answers directly, and it calls. The two rewards (Eq. 5) do not
change while p is trained, so the gradient is exact: no group, no baseline, and none of the noise of sampled answers,
which are worth ``alpha_ans`` where costs are worth 0.25 to 2. The policy learns when to call. Where it looks and how it
reads stay those of SFT. The KL is that of the first token, over the whole vocabulary.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

from awares.config import Params
from awares.engine.decode import Codec
from awares.engine.model import ImageOnlyProcessor, load_model, load_processor
from awares.engine.rows import picture, share_of
from awares.errors import AwaresValueError
from awares.method import protocol
from awares.method.evaluation import FORCING_BIAS
from awares.method.rollout import Trajectory
from awares.plus.estimators import HeldOut, log_line, rewards_of
from awares.training import checkpoints as training
from awares.training import distributed
from awares.training.checkpoints import TrainedPolicy

Plays = Mapping[bool, Sequence[Trajectory]]  # by whether they begin with a call


def play(engine: Any, rows: Dataset) -> Plays:
    """Both plays of every row. ``engine``: a `served.KeptEngine` with the starting policy, made for ``rows``."""
    return {
        call: engine.run(call_bias=FORCING_BIAS * (1 if call else -1), row_ids=rows["id"]) for call in (False, True)
    }


def train_exact(
    params: Params, dataset: Dataset, plays: Plays, model_path: str | Path, out_dir: str | Path, held_out: Dataset
) -> TrainedPolicy:
    """As `grpo.train_grpo`, on the ``plays`` of curated rows. ``grpo.batch_size`` counts rows."""
    if params.grpo.reward != "awares":
        raise AwaresValueError(f"grpo.estimator exact knows the reward awares, not {params.grpo.reward}: use sampled")
    rewards = {call: rewards_of(params, dataset, plays[call])[0] for call in (False, True)}
    rows = dataset.add_column("direct", rewards[False]).add_column("called", rewards[True])
    rows = share_of(rows, params.grpo.share)
    digest = hashlib.sha256(repr((rows["direct"][:], rows["called"][:])).encode()).hexdigest()
    inputs = {"prompt": protocol.from_params(params).system, "rewards": digest}
    folder = training.run_training("grpo", fit_exact, params, rows, model_path, out_dir, inputs, held_out=held_out)
    return training.save_policy(params, model_path, training.checkpoints(folder)[-1], out_dir)


def fit_exact(
    params: Params, rows: Dataset, model_path: Path, folder: Path, log: Path, held_out: Dataset | None = None
) -> None:
    """Train to the last checkpoint in ``folder``; every process of the training runs this."""
    set_seed(params.seed)
    model = load_model(model_path, params.base.dtype, distributed.device(params))
    processor = load_processor(model_path, params.crops.pixels)
    given = training.lora_on(model, params.grpo)
    arguments = TrainingArguments(
        **training.trainer_arguments("grpo", params, folder),
        num_train_epochs=params.grpo.epochs,
        max_steps=params.grpo.max_steps,
        save_steps=params.grpo.save_steps,
        save_total_limit=2,
    )
    trainer = DecisionTrainer(
        model=get_peft_model(given["model"], given["peft_config"]),
        args=arguments,
        train_dataset=rows.with_format("python"),
        data_collator=FirstTurns(params, processor),
        callbacks=given["callbacks"],
    )
    trainer.decide(processor, params)
    if held_out is not None:
        trainer.add_callback(HeldOut(params, held_out, trainer.model, processor))
    training.train(trainer, folder, training.Log(log, log_line, "reward"))


class FirstTurns:
    """Rows with the rewards of their plays -> inputs of the model up to its first token, ``direct`` and ``gain``."""

    def __init__(self, params: Params, processor: ImageOnlyProcessor) -> None:
        self.side, self.form, self.processor = params.crops.max_side, protocol.from_params(params), processor
        processor.tokenizer.padding_side = "left"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        views = [self.form.low(picture(dict(row), self.side)) for row in rows]
        chats = [protocol.messages(row["question"], None, protocol=self.form) for row in rows]
        texts = self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=texts, images=views, padding=True, return_tensors="pt")
        direct, called = (torch.tensor([row[name] for row in rows]) for name in ("direct", "called"))
        return {**inputs, "direct": direct, "gain": called - direct}


class DecisionTrainer(Trainer):
    """Minus the expected reward J, and its terms in the log."""

    def decide(self, processor: ImageOnlyProcessor, params: Params) -> None:
        """Set the call's first token, the tokens that are never written, and beta."""
        self.call = Codec(processor, protocol.from_params(params).opening).call_token
        self.never = torch.tensor([processor.image_token_id, processor.video_token_id])
        self.beta, self.found = params.grpo.beta, list[tuple[float, float, float]]()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """-J of a batch of `FirstTurns`."""
        direct, gain = inputs.pop("direct"), inputs.pop("gain")
        written = self.first_token(model, inputs)
        calls, divergence = written[:, self.call].exp(), torch.zeros(())
        if self.beta:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                reference = self.first_token(model, inputs)
            divergence = (written.exp() * (written - reference)).sum(-1).mean()
        reward = (direct + calls * gain).mean()
        self.found.append((reward.item(), calls.mean().item(), divergence.item()))
        return self.beta * divergence - reward

    def first_token(self, model: Any, inputs: Any) -> Tensor:
        """Log-probabilities (B, vocabulary) of the first token that the policy writes."""
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        return torch.log_softmax(logits.index_fill(1, self.never.to(logits.device), -1e9), dim=-1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means over the update's micro-batches."""
        if self.found:
            means = np.mean(self.found, axis=0).tolist()
            logs |= dict(zip(("reward", "call_rate", "kl"), means, strict=True))
            self.found.clear()
        super().log(logs, *args, **kwargs)


def best_bias(params: Params, rows: Dataset, plays: Plays) -> float:
    """The one of ``evaluation.dial_biases`` with the highest mean reward on curated ``rows``, the mean over sources.

    A bias decides by the logit gap of the call (`Trajectory.call_gap`). Of equal ones, the nearest to 0.
    """
    direct, called = (np.array(rewards_of(params, rows, plays[call])[0]) for call in (False, True))
    gaps = np.array([one.call_gap for one in plays[False]], float)
    sources = np.array(rows["source"][:])
    groups = [sources == name for name in sorted(set(sources.tolist()))]

    def reward(bias: float) -> float:
        chosen = np.where(gaps + bias > 0, called, direct)
        return float(np.mean([chosen[group].mean() for group in groups]))

    return max(params.evaluation.dial_biases, key=lambda bias: (reward(bias), -abs(bias)))
