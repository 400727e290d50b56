"""Multi-turn GRPO (PAPER §4): TRL's GRPOTrainer with the crop tool as an environment that returns images.

``R = alpha_ans * R_ans - C_tool`` (Eq. 5-8), normalised within the G completions of a prompt; assistant tokens are the actions, tool
and image tokens are masked; KL to the cold-started policy. Where this departs from textbook GRPO or from the paper:

1.  One update per batch of rollouts (``iterations: 1``), so the probability ratio is 1 and the PPO clip rests; it works from 2 on.
2.  KL is the k3 estimate on the sampled tokens, ``r - log r - 1`` with ``r = pi_ref/pi``, and not a sum over the vocabulary.
3.  Advantage: the sample's standard deviation (n - 1) and 1e-4 under the fraction, both TRL's.
4.  The loss is the mean over a completion's tokens, then over completions, as GRPO was published; TRL's own default is DAPO's.
5.  The policy that is trained is a *new* adapter over the merged cold-started model. With the adapter off, that model is the reference.
6.  One tool call at most. A second one is not answered: the rollout ends with an empty answer. The engine does not let it be written.
7.  In training a call that is not JSON ends the rollout, and its text is the answer (TRL runs only what it can parse). The engine
    would recover it or answer it with an error. One with other arguments than ``regions`` is answered with an error. Such calls
    are counted, ``malformed`` in the log, and cost as no call does.
8.  The tool's cost is read from the completion, not counted by the environment: TRL drops a tool result that overflows the
    completion length *after* the environment has run. A dropped call still costs, and is counted as ``overflow``. ``check_budget``
    makes sure that every single crop fits.
9.  Temperature 1, top-p 1, but image and video placeholders cannot be sampled.
10. `grpo.answer_reward: judge` (Table 4) is the local semantic judge in both profiles, not a served language model.
11. With ``rollouts: vllm`` TRL weights a completion by how far vLLM's probabilities lie from the trainer's (its default), which
    no equation of the paper has.
12. With ``share_prompts`` the G completions of a prompt share its computation (`awares.sharing`): the same numbers for less work.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from awares.config import Params
from awares.engine import answer_match as wording
from awares.engine import chat_format, decode
from awares.engine import model as models
from awares.engine.model import ImageOnlyProcessor
from awares.engine.rows import share_of
from awares.errors import AwaresValueError
from awares.method import crops, judges, metrics, protocol, rewards, rollout
from awares.method.rollout import Engine
from awares.training import checkpoints as training
from awares.training import distributed as launch
from awares.training import prompt_sharing as sharing

PROMPT = 1024  # tokens of text that a prompt may have under vLLM: system prompt, tool schema and question
LOGGED = {  # TRL's name -> ours
    "step": "step",
    "reward": "reward",
    "reward_std": "reward_std",
    "rewards/answer/mean": "answer",
    "rewards/tool_cost/mean": "tool_cost",
    "call_rate": "call_rate",
    "call_rate_hr": "call_rate_hr",
    "call_rate_lr": "call_rate_lr",
    "area": "area",
    "malformed": "malformed",
    "overflow": "overflow",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "flat_groups",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
}


@dataclass(frozen=True)
class GrpoResult:
    """What a training wrote: the folders of adapter and merged model, the log, the number of updates."""

    adapter: Path
    merged: Path
    log: Path
    steps: int


def train_grpo(params: Params, dataset: datasets.Dataset, model_path: str | Path, out_dir: str | Path) -> GrpoResult:
    """Train the merged policy at ``model_path`` on ``grpo.share`` of the curated ``dataset``, write to ``out_dir``.

    ``dataset``: the row schema plus ``label`` (LR or HR). ``model_path``: the merged SFT policy, which is also the reference (for
    "GRPO only" the base model). Writes ``adapter/``, ``merged/`` and ``log.jsonl``, one line per update: reward and its parts, call
    rate (also by label), mean requested area of the calls, malformed and overflowing calls as shares of completions, KL. After an
    interruption the same call goes on from the last checkpoint. AwaresError for rows or sizes that cannot work, before any training.
    """
    job = _prepare(params, dataset, model_path, out_dir)
    if params.base.launch:
        launch.launch("grpo", params, model_path, out_dir)
        training.require_checkpoint(job.folder)
    else:
        _fit(job, params, model_path)
    last = training.checkpoints(job.folder)[-1]
    policy = models.load_model(model_path, params.base.dtype, params.base.device, adapter=last, trainable=True)
    adapter, merged = training.save_policy(policy, job.processor, out_dir, training.relative(model_path, params.root))
    return GrpoResult(adapter, merged, job.log, training.step_of(last))


def fit(params: Params, dataset: datasets.Dataset, _: Any, model_path: str | Path, out_dir: str | Path) -> None:
    """The training of `train_grpo` alone, to its last checkpoint: what each process of a launched one runs."""
    _fit(_prepare(params, dataset, model_path, out_dir), params, model_path)


@dataclass(frozen=True)
class _Job:
    """What a training works on, the folder of its checkpoints, its log."""

    rows: datasets.Dataset
    processor: ImageOnlyProcessor
    folder: Path
    log: Path


def _prepare(params: Params, dataset: datasets.Dataset, model_path: str | Path, out_dir: str | Path) -> _Job:
    models.set_threads(params.threads)
    rows = share_of(dataset, params.grpo.share)
    processor = models.load_processor(model_path)
    check_budget(rows, processor, params)
    parts = (decode, judges, metrics, models, rewards, rollout, sharing, wording)
    code = [__file__, *(str(part.__file__) for part in parts)]
    folder = training.checkpoint_folder(out_dir, training.describe_inputs("grpo", params, [rows], model_path, code))
    return _Job(rows, processor, folder, Path(out_dir) / "log.jsonl")


def _fit(job: _Job, params: Params, model_path: str | Path) -> None:
    model = models.load_model(model_path, params.base.dtype, launch.device(params))
    trainer = build_trainer(params, job.rows, model, job.processor, job.folder)
    training.train(trainer, job.folder, training.Log(job.log, log_entry, "reward"))


def log_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """One update of TRL's log in our words; empty for its closing summary."""
    return {ours: entry[theirs] for theirs, ours in LOGGED.items() if theirs in entry} if "reward" in entry else {}


def check_budget(rows: datasets.Dataset, processor: ImageOnlyProcessor, params: Params) -> None:
    """AwaresError when the whole of some image, as a crop, would overflow ``grpo.crop_token_budget`` (departure 8)."""
    frame = processor.tokenizer(protocol.tool_suffix(processor.tokenizer, protocol.OURS.reply([None])))["input_ids"]
    sizes = training.picture_sizes(rows, params)
    tokens = [len(frame) - 1 + models.visual_tokens(size, processor) for size in sizes]
    worst = int(np.argmax(tokens))
    if tokens[worst] > params.grpo.crop_token_budget:
        raise AwaresValueError(f"grpo.crop_token_budget {params.grpo.crop_token_budget} is too small: the crop `all` of row "
                               f"{rows[worst]['id']} takes {tokens[worst]} tokens, and TRL drops what overflows")  # fmt: skip


# The tool


class CropEnvironment:
    """The crop tool of one rollout. TRL offers every public method but ``reset`` to the policy, so there is one: ``crop``."""

    def __init__(self, form: protocol.Protocol = protocol.OURS) -> None:
        self._image: Image.Image | None = None
        self._form = form

    def reset(self, full_image: Image.Image, **row: Any) -> None:
        """Start a rollout on a row of the dataset; ``full_image`` is its capped image at native density."""
        self._image = full_image

    def crop(self, regions: list[str]) -> list:
        """
        See regions of the image at full resolution.

        Args:
            regions: Names of the regions to see.
        """
        names = read_calls([{"name": protocol.TOOL_NAME, "arguments": {"regions": regions}}], self._form).crops
        if not names or self._image is None:
            return [{"type": "text", "text": protocol.TOOL_ERROR}]
        pictures = [crops.cut(self._image, name, self._form.region_budget) for name in names]
        return protocol.OURS.reply(pictures)["content"]


def rollout_dataset(rows: datasets.Dataset, params: Params) -> datasets.Dataset:
    """Rows as TRL wants them: ``prompt`` (messages with I_low inside), ``full_image``, ``answers``, ``label``, ``row_id``.

    A batch of rollouts asks for every row G times over; the last few views are remembered.
    """

    form = protocol.from_params(params)

    @functools.lru_cache(maxsize=4 * params.grpo.batch_size // params.grpo.generations)
    def view(index: int) -> dict[str, Any]:
        row = rows[index]
        image = training.picture(row, params)
        prompt = protocol.messages(row["question"], crops.low_resolution(image), protocol=form)
        return {
            "prompt": prompt,
            "full_image": image,
            "answers": row["answers"],
            "label": row["label"],
            "row_id": row["id"],
        }

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        views = [view(index) for index in batch["row"]]
        return {key: [one[key] for one in views] for key in views[0]}

    return datasets.Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(read)


# The reward


@dataclass(frozen=True)
class Outcome:
    """What a completion did. ``crops``: the requested ones; ``overflow``: they were requested but did not fit (departure 8)."""

    answer: str
    crops: tuple[str, ...]
    malformed: bool
    overflow: bool


def read_completion(completion: Sequence[dict[str, Any]], form: protocol.Protocol = protocol.OURS) -> Outcome:
    """A completion of TRL, ``[assistant]`` or ``[assistant(tool_calls), tool, assistant]``, as answer and requested crops."""
    first, last = completion[0], completion[-1]
    calls = [call["function"] for call in first.get("tool_calls") or []]
    call = read_calls(calls, form) if calls else protocol.parse_call(text_of(first), form)
    ended = last["role"] == "assistant" and not last.get("tool_calls")
    return Outcome(
        answer=chat_format.answer_text(text_of(last)) if ended else "",
        crops=call.crops if calls else (),
        malformed=call.status == "malformed" or (call.status == "recovered" and not calls),
        overflow=bool(calls) and len(completion) == 1,
    )


def read_calls(functions: Sequence[dict[str, Any]], form: protocol.Protocol) -> protocol.Call:
    """What calls that TRL has parsed ask for, read as the engine reads them; what TRL cannot serve asks for nothing (departure 7)."""
    served = [
        one for one in functions if isinstance(one.get("arguments"), dict) and set(one["arguments"]) == {"regions"}
    ]
    written = "\n".join(f"<tool_call>\n{json.dumps(one)}\n</tool_call>" for one in served)
    return protocol.parse_call(written or chat_format.TOOL_CALL, form)  # a bare opening is a malformed call


def text_of(message: dict[str, Any]) -> str:
    """The text of a message whose content is a string or a list of parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Reward:
    """Eq. 5-8 as TRL's two reward functions, R_ans and C_tool; the trainer weighs them with ``alpha_ans`` and -1."""

    def __init__(self, params: Params) -> None:
        self.section = params.grpo
        self.form = protocol.from_params(params)
        self.similarity = rewards.ANSWER_REWARDS[params.grpo.answer_reward](params.grpo)

    def answer(self, completions: list[Any], answers: list[list[str]], **_: Any) -> list[float]:
        """R_ans of each completion; where a row accepts several answers, the best counts."""
        return self.similarity([read_completion(one, self.form).answer for one in completions], answers)

    def tool_cost(self, completions: list[Any], label: list[str], log_metric: Any = None, **_: Any) -> list[float]:
        """C_tool of each completion; logs what the calls were like."""
        outcomes = [read_completion(one, self.form) for one in completions]
        for name, values in call_metrics(outcomes, label).items() if log_metric else ():
            for value in values:  # one by one: the mean over processes is then that over completions
                log_metric(name, value)
        return [self.cost(truth, outcome) for truth, outcome in zip(label, outcomes, strict=True)]

    def cost(self, truth: str, outcome: Outcome) -> float:
        """What a completion has cost."""
        section = self.section
        return rewards.tool_cost(truth, outcome.crops, section.alpha_miss, section.alpha_use, section.lambda_area)


class VisionThinkReward(Reward):
    """VisionThink's own reward (PAPER §6): discounted accuracy, plus half a point for a well-formed completion as a negative cost."""

    def answer(self, completions: list[Any], answers: list[list[str]], **_: Any) -> list[float]:
        """Accuracy of each completion less its discounts, group by group."""
        outcomes = [read_completion(one, self.form) for one in completions]
        marks = self.similarity([outcome.answer for outcome in outcomes], answers)
        return rewards.escalation_discounts(
            marks, [bool(outcome.crops) for outcome in outcomes], self.section.generations
        )

    def cost(self, truth: str, outcome: Outcome) -> float:
        """-0.5 for a completion that can be read to its end."""
        return 0.0 if outcome.malformed or outcome.overflow or not outcome.answer else -rewards.FORMAT


class ErgoReward(Reward):
    """ERGO's own reward (PAPER §6): is the region enough by itself, is it small, is the answer right, is the form?

    Whether it is enough says the frozen base model, which gets the crop and the question and nothing else.
    """

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        base = models.load_model(params.model_path(), params.base.dtype, launch.device(params))
        self.reader = Engine.from_params(base, models.load_processor(params.model_path()), params, progress=False)

    def answer(self, completions: list[Any], answers: list[list[str]], **given: Any) -> list[float]:
        """r_region + 0.5 for a small region + r_acc of each completion; TRL gives the rows' prompts and full_image as well."""
        prompts, full_image = given["prompts"], given["full_image"]
        outcomes = [read_completion(one, self.form) for one in completions]
        marks = self.similarity([outcome.answer for outcome in outcomes], answers)
        asked = [index for index, outcome in enumerate(outcomes) if outcome.crops]
        cuts = [crops.cut(full_image[i], outcomes[i].crops[0], self.form.region_budget) for i in asked]
        pieces = [crops.readable(piece) for piece in cuts]
        found = self.reader.answer(pieces, [text_of(prompts[i][-1]) for i in asked]) if asked else []
        enough = self.similarity([one.answer for one in found], [answers[i] for i in asked]) if asked else []
        for index, mark in zip(asked, enough, strict=True):
            marks[index] += mark + rewards.SMALL * (crops.union_area(outcomes[index].crops) <= rewards.SMALL_AREA)
        return marks

    def cost(self, truth: str, outcome: Outcome) -> float:
        """-1 for a completion that asks for a region and can be read to its end."""
        return -1.0 if outcome.crops and outcome.answer and not outcome.malformed and not outcome.overflow else 0.0


# grpo.reward -> the reward with these parameters
REWARDS: dict[str, type[Reward]] = {"awares": Reward, "visionthink": VisionThinkReward, "ergo": ErgoReward}


def call_metrics(outcomes: Sequence[Outcome], labels: Sequence[str]) -> dict[str, list[float]]:
    """Values to average: calls (all, by label), requested area of the calls, malformed and overflowing calls."""
    called = [(bool(outcome.crops), label) for outcome, label in zip(outcomes, labels, strict=True)]
    values: dict[str, list[Any]] = {
        "call_rate": [call for call, _ in called],
        "call_rate_hr": [call for call, label in called if label == "HR"],
        "call_rate_lr": [call for call, label in called if label == "LR"],
        "area": [crops.union_area(outcome.crops) for outcome in outcomes if outcome.crops],
        "malformed": [outcome.malformed for outcome in outcomes],
        "overflow": [outcome.overflow for outcome in outcomes],
    }
    return {name: [float(value) for value in some] for name, some in values.items() if some}


# Trainer


class CropGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose completions share the computation of their prompt (departure 12)."""

    share_prompts = False

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's order of prompts, which a resumed run enters at its own epoch."""
        return ResumedSampler(super()._get_train_sampler(dataset), lambda: int((self.state.epoch or 0) + 1e-6))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch, its rollouts included where they are due."""
        plain = self.accelerator.unwrap_model(self.model).get_base_model()
        with sharing.vision_memo(plain) if self.share_prompts else contextlib.nullcontext():
            return super().training_step(*args, **kwargs)

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> Any:
        """First turn (G equal prompts in a row): one prefill for each prompt. Second turn: TRL's way."""
        share = self.share_prompts and num_generations > 1
        plain = self.accelerator.unwrap_model(self.model).get_base_model()
        with sharing.shared_prefill(plain, num_generations) if share else contextlib.nullcontext():
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
        **inputs: Any,
    ) -> Any:
        """Log-probabilities and entropies of the completion tokens, (B, C) each, 0 on padding."""
        if not self.share_prompts or inputs.get("pixel_values") is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **inputs
            )
        with self.accelerator.autocast():
            found = sharing.packed_log_probs(
                model,
                self.accelerator.unwrap_model(model).get_base_model(),
                input_ids,
                attention_mask,
                logits_to_keep,
                inputs["mm_token_type_ids"],
                inputs["pixel_values"],
                inputs["image_grid_thw"],
                inputs["num_images"],
            )
        return *found, None


class ResumedSampler(torch.utils.data.Sampler[int]):
    """TRL's `RepeatSampler` draws an epoch's order where its generator stands, which no checkpoint holds: here that follows from the epoch."""

    def __init__(self, plain: Any, epoch: Callable[[], int]) -> None:
        self.plain, self.epoch = plain, epoch

    def __len__(self) -> int:
        return len(self.plain)

    def __iter__(self) -> Iterator[int]:
        self.plain.generator.manual_seed(self.plain.seed)
        for _ in range(self.epoch()):
            torch.randperm(self.plain.num_samples, generator=self.plain.generator)
        yield from self.plain


def build_trainer(
    params: Params, rows: datasets.Dataset, model: PreTrainedModel, processor: ImageOnlyProcessor, folder: Path
) -> CropGRPOTrainer:
    """The trainer over curated ``rows``; ``model`` is the merged cold-started policy, and stays the reference. AwaresError when
    ``model`` carries an adapter, nothing is trainable, or a label is missing."""
    training.require_plain(model)
    if "label" not in rows.column_names:
        raise AwaresValueError("grpo: the rows have no column label: give the rows that curation wrote")
    if params.protocol.name != protocol.OURS.name:
        raise AwaresValueError(
            f"protocol.name {params.protocol.name}: GRPO's rollouts are TRL's, which reads tool calls only; use protocol.name ours"
        )
    processor.tokenizer.padding_side = "left"  # right padding would misalign mm_token_type_ids, silently
    reward: Any = REWARDS[params.grpo.reward](params)
    factory: Any = functools.partial(CropEnvironment, protocol.from_params(params))
    trainer = CropGRPOTrainer(
        model=model,
        reward_funcs=[reward.answer, reward.tool_cost],
        args=_config(params, folder, processor),
        train_dataset=rollout_dataset(rows, params),
        processing_class=processor,
        peft_config=training.lora_config(params.grpo),
        environment_factory=factory,
    )
    trainer.share_prompts = params.grpo.share_prompts
    training.require_trainable(trainer.model, "grpo")
    trainer.add_callback(training.SpareVision())
    return trainer


def _config(params: Params, folder: Path, processor: ImageOnlyProcessor) -> GRPOConfig:
    section, gpu = params.grpo, params.base.device != "cpu"
    size, steps = launch.layout("grpo", section.batch_size, section.per_device_batch_size)
    if section.reward == "visionthink" and size * steps % section.generations:
        raise AwaresValueError(
            f"grpo.reward visionthink looks at whole groups, and each process has {size * steps} completions of grpo.batch_size "
            f"{section.batch_size}: a multiple of grpo.generations {section.generations} is wanted: raise grpo.batch_size, or train on fewer GPUs"
        )
    forbidden = [processor.image_token_id, processor.video_token_id]
    vllm = section.rollouts == "vllm"
    if vllm and section.share_prompts:
        raise AwaresValueError("grpo.rollouts vllm shares prompts in its own way: set grpo.share_prompts: false")
    limits: dict[str, Any] = (
        {"max_tokens": section.max_completion_length, "logit_bias": dict.fromkeys(forbidden, -100.0)}
        if vllm
        else {"max_new_tokens": section.max_completion_length, "suppress_tokens": forbidden}
    )
    completion = 2 * section.max_completion_length + section.crop_token_budget
    view = models.visual_tokens((params.crops.max_side // 2,) * 2, processor)
    return GRPOConfig(
        output_dir=str(folder),
        # One generation, one update of batch_size completions, in micro-batches
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        steps_per_generation=steps,
        num_generations=section.generations,
        num_iterations=section.iterations,
        # Both turns and the crops; each turn is limited by max_new_tokens
        max_completion_length=completion,
        generation_kwargs=limits,
        use_vllm=vllm,
        vllm_mode="colocate",  # on each GPU its own: ranks with different numbers of tool turns would wait for each other in a shared one
        # Without it vLLM reserves for all that the model can read
        vllm_max_model_length=view + PROMPT + completion if vllm else None,
        max_tool_calling_iterations=1,
        temperature=section.temperature,
        top_p=section.top_p,
        reward_weights=[section.alpha_ans, -1.0],
        beta=section.beta,
        epsilon=section.epsilon,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.scheduler,
        warmup_steps=section.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        num_train_epochs=section.epochs,
        max_steps=section.max_steps,
        save_steps=section.save_steps,
        save_total_limit=2,  # the last one counts; the one before is there should it be torn
        seed=params.seed,
        bf16=gpu and params.base.dtype == "bfloat16",  # TRL's default is True, on a CPU too
        use_cpu=not gpu,
        gradient_checkpointing=section.gradient_checkpointing,
        remove_unused_columns=False,
        logging_steps=1,
        log_multimodal=False,  # every process would send its images to every other, for a table that nobody reads
        disable_tqdm=True,  # `training.Log` shows the bar
        ddp_broadcast_buffers=False,  # they are constants, and processes with other numbers of prompts would wait for each other
        report_to="none",
    )
