"""Multi-turn GRPO (PAPER §4): TRL's GRPOTrainer with the crop tool as an environment that returns images.

The reward (Eq. 5, 6; `rewards`) is normalised within the G completions of a prompt (Eq. 7). Assistant tokens are the
actions; tool and image tokens are masked. The KL term (Eq. 8) is to the SFT policy. Departures from the paper or from
textbook GRPO:

1.  One update per batch of rollouts (``iterations: 1``): the probability ratio is 1, the PPO clip acts only from 2 on.
2.  KL is the k3 estimate on sampled tokens, ``r - log r - 1`` with ``r = pi_ref/pi``, not a sum over the vocabulary.
3.  Advantage: the sample's standard deviation (n - 1), and 1e-4 added to it, both TRL's.
4.  The loss is the mean over a completion's tokens, then over completions, as published; TRL's default is DAPO's.
5.  The trained policy is a *new* adapter on the merged SFT model; with the adapter off, the model is the reference.
6.  At most one tool call: a second one ends the rollout with an empty answer. The engine cannot write a second one.
7.  A call that is not JSON ends the rollout; wrong arguments get an error as reply. The engine recovers both.
8.  TRL drops crops that overflow the completion length, but the call costs the same; `check_budget` prevents it.
9.  Temperature 1, top-p 1, but image and video placeholders cannot be sampled.
10. ``answer_reward: judge`` (Table 4) is the local semantic judge in both profiles, not a served language model.
11. With ``rollouts: vllm`` TRL weights a completion by how far vLLM's probabilities are from the trainer's (vLLM
    computes a float32 policy in bfloat16).
12. With ``share_prompts`` the G completions of a prompt share its computation (`prompt_sharing`): the same numbers.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather, set_seed
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel
from trl import GRPOConfig

from awares import registry
from awares.config import Params
from awares.engine.chat_format import TOOL_CALL, answer_text
from awares.engine.images import join_strip
from awares.engine.model import ImageOnlyProcessor, load_model, load_processor, set_attention, visual_tokens
from awares.engine.rows import picture, picture_sizes, share_of
from awares.errors import AwaresValueError
from awares.method import crops, protocol
from awares.method.judges import HR, LR
from awares.method.rewards import RewardContext, RewardFunction, Rollout, awares_reward
from awares.training import checkpoints as training
from awares.training import distributed
from awares.training.checkpoints import TrainedPolicy
from awares.training.prompt_sharing import SharedPromptTrainer, expanded_once

PROMPT = 1024  # tokens of text that a prompt may have under vLLM: system prompt, tool schema and question
ROW = ("row_id", "question", "full_image", "answers", "label")  # the columns of a row that a reward sees
LOGGED_GRPO = {  # TRL's name -> ours, after step, reward and the reward's terms
    **{name: name for name in ("call_rate", "call_rate_hr", "call_rate_lr", "area", "malformed", "overflow")},
    **{"kl": "kl", "entropy": "entropy", "completions/mean_length": "completion_tokens"},
    **{"completions/clipped_ratio": "truncated", "frac_reward_zero_std": "flat_groups"},
    **{"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr"},
}


def train_grpo(
    params: Params,
    dataset: Dataset,
    model_path: str | Path,
    out_dir: str | Path,
    reward: RewardFunction | None = None,
    fit: Callable[..., None] | None = None,
    **prepared: Any,
) -> TrainedPolicy:
    """Train the merged policy at ``model_path`` on ``grpo.share`` of the curated ``dataset``, write to ``out_dir``.

    ``dataset``: the row schema plus ``label`` (LR or HR). ``model_path``: the merged SFT policy, which is also the
    reference (for "GRPO only" the base model). ``reward``: a function (see `rewards`) instead of the one that
    ``grpo.reward`` names. ``fit``: a function instead of `fit_grpo`, and its further arguments. Writes ``adapter/``,
    ``merged/`` and ``log.jsonl``, one line per update. After an interruption the same call resumes from the last
    checkpoint. AwaresError for bad inputs, before any training.
    """
    rows = share_of(dataset, params.grpo.share)
    check_budget(rows, load_processor(model_path, params.crops.pixels), params)
    chosen = registry.reward.find(reward or params.grpo.reward)
    if params.launch("grpo"):  # its processes find the reward by this name
        if chosen.__module__ == "__main__" or "<locals>" in chosen.__qualname__:
            raise AwaresValueError(
                f"grpo.reward: {chosen.__qualname__} exists in this process only, but base.launch starts others: write "
                "it to a module on the Python path and set grpo.reward: module:function"
            )
        params = replace(params, grpo=replace(params.grpo, reward=f"{chosen.__module__}:{chosen.__qualname__}"))
    source = registry.reward.source(reward or params.grpo.reward)
    inputs = {"prompt": protocol.from_params(params).system, "reward": source}
    prepared |= {"reward": chosen}
    folder = training.run_training("grpo", fit or fit_grpo, params, rows, model_path, out_dir, inputs, **prepared)
    return training.save_policy(params, model_path, training.checkpoints(folder)[-1], out_dir)


def fit_grpo(
    params: Params, rows: Dataset, model_path: Path, folder: Path, log: Path, reward: RewardFunction | None = None
) -> None:
    """Train to the last checkpoint in ``folder``; every process of the training runs this."""
    model = load_model(model_path, params.base.dtype, distributed.device(params))
    processor = load_processor(model_path, params.crops.pixels)
    trainer = build_grpo_trainer(params, rows, model, processor, folder, reward)
    training.train(trainer, folder, training.Log(log, log_entry, "reward"))


def build_grpo_trainer(
    params: Params,
    rows: Dataset,
    model: PreTrainedModel,
    processor: ImageOnlyProcessor,
    folder: Path,
    reward: RewardFunction | None = None,
    kind: "type[CropTrainer] | None" = None,
) -> "CropTrainer":
    """The trainer on curated ``rows``. ``model``: the merged SFT policy, which stays the reference."""
    if "label" not in rows.column_names:
        raise AwaresValueError("grpo: the rows have no column label: give the rows that curation wrote")
    if params.protocol.name != protocol.OURS.name:
        raise AwaresValueError(
            f"protocol.name {params.protocol.name}: TRL reads JSON tool calls only; use protocol.name ours"
        )
    processor.tokenizer.padding_side = "left"  # right padding misaligns mm_token_type_ids without an error
    chosen: Any = registry.reward.find(reward or params.grpo.reward)
    completions = params.grpo.batch_size // distributed.processes()
    groups = {"grpo.share_prompts": params.grpo.share_prompts}
    groups[f"grpo.reward {chosen.__name__}"] = chosen is not awares_reward
    for name in (name for name, needed in groups.items() if needed and completions % params.grpo.generations):
        raise AwaresValueError(
            f"{name} needs whole groups, but each process has {completions} completions, not a multiple of "
            f"grpo.generations {params.grpo.generations}: raise grpo.batch_size, or use fewer GPUs"
        )
    set_attention(model, params.base.attn_implementation)
    factory: Any = functools.partial(CropEnvironment, protocol.from_params(params))
    trainer = (kind or CropTrainer)(
        **training.lora_on(model, params.grpo),
        reward_funcs=chosen,
        args=_config(params, folder, processor),
        train_dataset=rollout_dataset(rows, params),
        processing_class=processor,
        environment_factory=factory,
    )
    trainer.share_prompts = params.grpo.share_prompts
    trainer.reward, trainer.context = chosen, RewardContext(params)
    if trainer.use_vllm:
        served: Any = trainer.vllm_generation
        served.generate = functools.partial(expanded_once, served.generate, processor.image_token_id)
        set_seed(trainer.args.seed, device_specific=True)  # vLLM has set the generators to the process's number
    return trainer


# The tool


class CropEnvironment:
    """The crop tool of one rollout. TRL offers the public methods to the policy, except ``reset``."""

    _image: Image.Image

    def __init__(self, form: protocol.Protocol = protocol.OURS) -> None:
        self._form = form

    def reset(self, full_image: Image.Image, **row: Any) -> None:
        """Start a rollout on a row of `rollout_dataset`."""
        self._image = full_image

    def crop(self, regions: list[str]) -> list:
        """
        See regions of the image at full resolution.

        Args:
            regions: Names of the regions to see.
        """
        names = read_calls([{"name": protocol.TOOL_NAME, "arguments": {"regions": regions}}], self._form).crops
        pictures = [self._form.cut(self._image, name) for name in names]
        return self._form.reply(pictures, None if pictures else protocol.TOOL_ERROR)["content"]


def check_budget(rows: Dataset, processor: ImageOnlyProcessor, params: Params) -> None:
    """AwaresError if the crop `all` of some row has more tokens than ``grpo.crop_token_budget`` (departure 8)."""
    frame = processor.tokenizer(protocol.tool_suffix(processor.tokenizer, protocol.OURS.reply([None])))["input_ids"]
    tokens = [len(frame) - 1 + visual_tokens(size, processor) for size in picture_sizes(rows, params.crops.max_side)]
    worst = int(np.argmax(tokens))
    if tokens[worst] > params.grpo.crop_token_budget:
        raise AwaresValueError(
            f"grpo.crop_token_budget {params.grpo.crop_token_budget} is too small: the crop `all` of row "
            f"{rows[worst]['id']} has {tokens[worst]} tokens, and TRL would drop it"
        )


def rollout_dataset(rows: Dataset, params: Params) -> Dataset:
    """Rows in TRL's format: ``prompt`` (messages that contain I_low) and the columns `ROW`.

    A batch of rollouts reads every row G times, so recent rows are cached.
    """
    form = protocol.from_params(params)

    @functools.lru_cache(maxsize=4 * params.grpo.batch_size // params.grpo.generations)
    def view(index: int) -> dict[str, Any]:
        row = rows[index]
        image = picture(row, params.crops.max_side)
        prompt = protocol.messages(row["question"], form.low(image), protocol=form)
        return {"prompt": prompt, **row, "full_image": image, "row_id": row["id"]}

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        views = [view(index) for index in batch["row"]]
        return {key: [one[key] for one in views] for key in ("prompt", *ROW)}

    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(read)


# From a completion to a rollout


def read_rollout(completion: Sequence[dict[str, Any]], form: protocol.Protocol, **row: Any) -> Rollout:
    """The rollout of a ``row`` from TRL's completion: ``[assistant]`` or ``[assistant(calls), tool, assistant]``."""
    first, last = completion[0], completion[-1]
    calls = [call["function"] for call in first.get("tool_calls") or []]
    call = read_calls(calls, form) if calls else protocol.parse_call(_text(first), form)
    ended = last["role"] == "assistant" and not last.get("tool_calls")
    return Rollout(
        **row,
        text="\n".join(_text(message) for message in completion if message["role"] == "assistant"),
        answer=answer_text(_text(last)) if ended else "",
        crops=call.crops if calls else (),
        malformed=call.status == "malformed" or (call.status == "recovered" and not calls),
        overflow=bool(calls) and len(completion) == 1,
    )


def read_calls(functions: Sequence[dict[str, Any]], form: protocol.Protocol) -> protocol.Call:
    """Calls that TRL has parsed, read as the engine reads them; one that TRL does not serve is malformed."""
    tool = [(one, one.get("arguments")) for one in functions if one.get("name") == protocol.TOOL_NAME]
    served = [one for one, given in tool if isinstance(given, dict) and set(given) == {"regions"}]
    return protocol.parse_call(_rendered(served) or TOOL_CALL, form)  # a bare opening is a malformed call


def _rendered(functions: Sequence[dict[str, Any]]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(one, ensure_ascii=False)}\n</tool_call>" for one in functions)


def _text(message: dict[str, Any]) -> str:
    """The text of a message with its calls; the content is a string or a list of parts."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return text + _rendered([call["function"] for call in message.get("tool_calls") or []])


# The trainer


class CropTrainer(SharedPromptTrainer):
    """GRPOTrainer with one reward on rollouts (TRL: on completions), whose terms are logged."""

    reward: RewardFunction
    context: RewardContext

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> torch.Tensor:
        """The rewards of the completions of all processes, (B, 1)."""
        form = protocol.from_params(self.context.params)
        rows = [{name: one[name] for name in ROW} for one in inputs]
        rollouts = [read_rollout(one, form, **row) for one, row in zip(completions, rows, strict=True)]
        for name, values in call_metrics(rollouts).items():
            for value in values:  # one by one: the mean over processes is then that over completions
                self._log_metric(name, value)
        rewards = self.context.score(self.reward, rollouts)
        training.report_pictures(self, lambda: map(_shown, rollouts[: self.num_generations], rewards, repeat(form)))
        terms = self.context.logged
        columns = torch.tensor(list(zip(rewards, *terms.values(), strict=True)), device=self.accelerator.device)
        columns = gather(columns)  # (B, 1 + terms)
        for name, column in zip(terms, columns.T[1:], strict=True):
            self._metrics["train"][f"terms/{name}"].append(torch.nanmean(column).item())
        return columns[:, :1]


def _shown(rollout: Rollout, reward: float, form: protocol.Protocol) -> tuple[Image.Image, str]:
    """What a rollout saw, as one picture, and what it wrote."""
    views = [form.low(rollout.full_image), *(form.cut(rollout.full_image, name) for name in rollout.crops)]
    return join_strip(views), f"{rollout.question} | {rollout.text} | {rollout.label}, reward {reward:.2f}"


def call_metrics(rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
    """Values to average: calls (all, by label), requested area per call, malformed and overflowing calls."""
    called = [(bool(one.crops), one.label) for one in rollouts]
    values: dict[str, list[Any]] = {
        "call_rate": [call for call, _ in called],
        "call_rate_hr": [call for call, label in called if label == HR],
        "call_rate_lr": [call for call, label in called if label == LR],
        "area": [crops.union_area(one.crops) for one in rollouts if one.crops],
        "malformed": [one.malformed for one in rollouts],
        "overflow": [one.overflow for one in rollouts],
    }
    return {name: [float(value) for value in some] for name, some in values.items() if some}


def log_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """One update of the trainer's log under our names; {} for the summary at the end."""
    terms = {name: name.removeprefix("terms/") for name in sorted(entry) if name.startswith("terms/")}
    names = {"step": "step", "reward": "reward", "reward_std": "reward_std", **terms, **LOGGED_GRPO}
    return {ours: entry[theirs] for theirs, ours in names.items() if theirs in entry} if "reward" in entry else {}


def _config(params: Params, folder: Path, processor: ImageOnlyProcessor) -> GRPOConfig:
    section, shared = params.grpo, training.trainer_arguments("grpo", params, folder)
    vllm = section.rollouts == "vllm"
    forbidden = [processor.image_token_id, processor.video_token_id]
    limits: dict[str, Any] = {"max_new_tokens": section.max_completion_length, "suppress_tokens": forbidden}
    if vllm:
        limits = {"max_tokens": section.max_completion_length, "logit_bias": dict.fromkeys(forbidden, -100.0)}
    completion = 2 * section.max_completion_length + section.crop_token_budget  # both turns and the crops
    view = visual_tokens((params.crops.max_side // 2,) * 2, processor)
    return GRPOConfig(
        **shared,
        # One generation, one update of batch_size completions, in micro-batches
        steps_per_generation=shared["gradient_accumulation_steps"],
        num_generations=section.generations,
        num_iterations=section.iterations,
        max_completion_length=completion,
        generation_kwargs=limits,  # of each turn
        use_vllm=vllm,
        vllm_mode="colocate",  # one server per GPU: ranks differ in their number of tool turns
        # Without a length vLLM reserves memory for the model's whole context
        vllm_max_model_length=view + PROMPT + completion if vllm else None,
        max_tool_calling_iterations=1,
        temperature=section.temperature,
        top_p=section.top_p,
        beta=section.beta,
        epsilon=section.epsilon,
        loss_type="grpo",
        scale_rewards="group" if section.advantage == "group_std" else "none",
        num_train_epochs=section.epochs,
        max_steps=section.max_steps,
        save_steps=section.save_steps,
        save_total_limit=2,  # the last one, and one before it in case the last one is incomplete
        log_multimodal=False,  # otherwise every process sends its images to every other one
        ddp_broadcast_buffers=False,  # they are constant, and processes with fewer prompts would wait
    )
