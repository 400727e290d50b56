"""Cold start (PAPER §3): supervised fine-tuning on the curated two-turn trajectories with TRL's SFTTrainer.

The loss is Eq. 4, ``L = -sum_t w_t log pi(y_t | h_t)`` over assistant tokens, with ``w_t = sft.tool_turn_weight`` on the tool-call
turn and 1 on other assistant tokens. Where we depart from the paper, or fill in what it leaves open:

1. The sum is divided by the *number* of assistant tokens in the optimiser batch, not by the sum of their weights: the loss stays
   proportional to Eq. 4 whatever the weight, and a tool-call token pulls ``w_t`` times as hard as it would with weight 1.
2. Turn-level samples (``level: turn``) keep the history before the turn; only the turn itself is trained on.
3. Phased training (``phased: true``) is one pass over the tool-call turns of the HR rows, then the epochs on everything, under one
   optimiser and one learning-rate schedule.
4. Samples of one optimiser batch are ordered by length, so that micro-batches pad less; the gradient of the batch is the same.
5. ``sft.checkpoints`` candidates are kept at even distances and answer validation rows in two turns; the result is the latest one
   that these cannot tell from the most accurate (`choose`).
6. With ``share_computation`` what all samples of a micro-batch begin with, the system prompt, passes through the language model once, and a
   picture through the frozen vision tower once in all epochs, whose features are kept in memory: the same numbers for less work.
7. In several processes the last batch, if it is a short one, is filled up with the first samples.
"""

import contextlib
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from awares.config import Params
from awares.engine import answer_match as wording
from awares.engine import decode
from awares.engine import model as models
from awares.engine.chat_format import END_OF_TURN
from awares.engine.decode import prefix_cache
from awares.engine.model import ImageOnlyProcessor
from awares.engine.rows import share_of
from awares.errors import AwaresValueError
from awares.method import crops, judges, metrics, protocol, rollout
from awares.method.judges import SemanticJudge
from awares.method.protocol import Protocol
from awares.method.rollout import Engine
from awares.training import checkpoints as training
from awares.training import distributed as launch
from awares.training import prompt_sharing as sharing

KINDS = ("direct", "trajectory", "call", "answer")


@dataclass(frozen=True)
class Sample:
    """What is trained on: a row, its turns, its length in tokens.

    ``kind``: direct (LR: one turn), trajectory (HR: both turns), call (HR: the first turn), answer (HR: the last turn, given the rest).
    """

    row: int
    kind: str
    length: int


@dataclass(frozen=True)
class SftResult:
    """What a training wrote: the folders of adapter and merged model, the log, the chosen step and its validation accuracy."""

    adapter: Path
    merged: Path
    log: Path
    step: int
    accuracy: float


def train_sft(
    params: Params, dataset: datasets.Dataset, validation: datasets.Dataset, model_path: str | Path, out_dir: str | Path
) -> SftResult:
    """Train on ``sft.share`` of the curated ``dataset``, choose the checkpoint on ``validation``, write to ``out_dir``.

    ``dataset``: the row schema plus ``label`` (LR or HR) and ``target_crops``; ``validation``: the row schema. Writes ``adapter/``,
    ``merged/`` and ``log.jsonl`` (per step loss and lr; per candidate ``validation_accuracy`` and ``call_rate``). After an interruption
    the same call goes on from the last checkpoint. AwaresError for rows that cannot be trained on, before any training.
    """
    job = _prepare(params, dataset, validation, model_path, out_dir)
    if params.launch("sft"):
        launch.launch("sft", params, model_path, out_dir)
        training.require_checkpoint(job.folder)
    else:
        _fit(job, params, model_path)
    processor = job.processor
    scores = [
        candidate_score(path, params, job.chosen, model_path, processor) for path in training.checkpoints(job.folder)
    ]
    training.write_jsonl(job.log, [*training.read_jsonl(job.log), *scores])
    best = choose(scores, len(job.chosen))
    policy = models.load_model(
        model_path, params.base.dtype, params.base.device, job.folder / f"checkpoint-{best['step']}", True
    )
    adapter, merged = training.save_policy(policy, processor, out_dir, training.relative(model_path, params.root))
    return SftResult(adapter, merged, job.log, best["step"], best["validation_accuracy"])


def fit(
    params: Params, dataset: datasets.Dataset, validation: datasets.Dataset, model_path: str | Path, out_dir: str | Path
) -> None:
    """The training of `train_sft` alone, to its last checkpoint: what each process of a launched one runs."""
    _fit(_prepare(params, dataset, validation, model_path, out_dir), params, model_path)


@dataclass(frozen=True)
class _Job:
    """What a training works on: its rows, its samples in order, the rows to choose on, the folder of its checkpoints."""

    rows: datasets.Dataset
    samples: list[Sample]
    chosen: datasets.Dataset
    processor: ImageOnlyProcessor
    folder: Path
    log: Path


def _prepare(
    params: Params, dataset: datasets.Dataset, validation: datasets.Dataset, model_path: str | Path, out_dir: str | Path
) -> _Job:
    section = params.sft
    models.set_threads(params.threads)
    rows = share_of(dataset, section.share)
    chosen = validation.select(range(min(section.selection_rows, len(validation))))
    processor = models.load_processor(model_path)
    samples = plan(rows, processor, params)
    code = [__file__, *(str(part.__file__) for part in (decode, judges, metrics, models, rollout, sharing, wording))]
    inputs = training.describe_inputs("sft", params, [rows, chosen], model_path, code)
    folder = training.checkpoint_folder(out_dir, inputs)
    return _Job(rows, samples, chosen, processor, folder, Path(out_dir) / "log.jsonl")


def _fit(job: _Job, params: Params, model_path: str | Path) -> None:
    model = models.load_model(model_path, params.base.dtype, launch.device(params))
    trainer = build_trainer(params, job.rows, job.samples, model, job.processor, job.folder)
    share = params.sft.share_computation
    with sharing.vision_memo(model) if share else contextlib.nullcontext():
        training.train(trainer, job.folder, training.Log(job.log, log_entry, "loss"))


def log_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """One step of the trainer's log in our words; empty for its closing summary."""
    names = {
        "step": "step",
        "loss": "loss",
        "learning_rate": "lr",
        "grad_norm": "grad_norm",
        "mean_token_accuracy": "token_accuracy",
    }
    return {ours: entry[theirs] for theirs, ours in names.items()} if "loss" in entry else {}


# Samples


def plan(rows: datasets.Dataset, processor: ImageOnlyProcessor, params: Params) -> list[Sample]:
    """Every sample of the whole training, in the order in which it is trained on.

    AwaresError naming the row for an unknown label, a HR row without crops, or a sample longer than ``sft.max_length`` tokens.
    """
    section, rng, form = params.sft, np.random.default_rng(params.seed), protocol.from_params(params)
    pool: list[Sample] = []
    table = rows.remove_columns("image")
    for index, size in enumerate(training.picture_sizes(rows, params)):
        row = table[index]
        kinds = _kinds(row, section.level)
        _check_call(row, processor, params.protocol.max_new_tokens, form)
        samples = [Sample(index, kind, _length(row, kind, size, processor, section.max_length, form)) for kind in kinds]
        pool += samples * (section.hr_upsample if row["label"] == "HR" else 1)
    calls = (
        [Sample(s.row, "call", s.length) for s in pool if s.kind in ("trajectory", "call")] if section.phased else []
    )
    order = _passes(calls, 1.0, rng) + _passes(pool, section.epochs, rng)
    if not order:
        raise AwaresValueError("sft: no sample to train on: give rows, and sft.epochs above 0")
    step = section.batch_size
    return [
        sample for at in range(0, len(order), step) for sample in sorted(order[at : at + step], key=lambda s: s.length)
    ]


def _kinds(row: dict[str, Any], level: str) -> tuple[str, ...]:
    """The samples that one row gives."""
    if row["label"] not in ("LR", "HR"):
        raise AwaresValueError(f"row {row['id']}: label {row['label']!r}: curation gives LR or HR")
    if row["label"] == "LR":
        return ("direct",)
    if not row["target_crops"]:
        raise AwaresValueError(f"row {row['id']}: labelled HR but target_crops is empty: curate it again")
    return ("trajectory",) if level == "trajectory" else ("call", "answer")


def _check_call(row: dict[str, Any], processor: ImageOnlyProcessor, limit: int, form: Protocol) -> None:
    """AwaresError when the row's call is longer than the policy may write: it would learn calls that are always cut off."""
    call = form.render_call(row["target_crops"]) + END_OF_TURN if row["label"] == "HR" else ""
    tokens = len(processor.tokenizer(call)["input_ids"])
    if tokens > limit:
        raise AwaresValueError(
            f"row {row['id']}: the call takes {tokens} tokens, protocol.max_new_tokens is {limit}: raise it"
        )


def _passes(pool: Sequence[Sample], epochs: float, rng: np.random.Generator) -> list[Sample]:
    """``epochs`` passes over ``pool``, each in a new order; the last may be part of a pass."""
    order = [pool[index] for _ in range(math.ceil(epochs)) for index in rng.permutation(len(pool))]
    return order[: round(epochs * len(pool))]


def _length(
    row: dict[str, Any], kind: str, size: tuple[int, int], processor: ImageOnlyProcessor, limit: int, form: Protocol
) -> int:
    """Tokens of a sample, visual ones included; AwaresError above ``limit``: cutting a sample would cut an image in two."""
    messages = conversation(row, kind, None, form)
    images = _view_sizes(size, () if kind in ("direct", "call") else tuple(row["target_crops"]), form.region_budget)
    text = processor.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    length = len(text) + sum(models.visual_tokens(view, processor) - 1 for view in images)
    if length > limit:
        raise AwaresValueError(
            f"row {row['id']}: {length} tokens, more than sft.max_length {limit}: raise it, or lower crops.max_side"
        )
    return length


@functools.lru_cache(maxsize=4096)
def _view_sizes(size: tuple[int, int], names: tuple[str, ...], budget: float) -> list[tuple[int, int]]:
    """Pixel sizes of the low-resolution view and of the crops, worked out on a blank image."""
    blank = Image.new("1", size)
    return [crops.low_resolution(blank).size, *(crops.cut(blank, name, budget).size for name in names)]


def conversation(
    row: dict[str, Any], kind: str, image: Image.Image | None, form: Protocol = protocol.OURS
) -> list[dict[str, Any]]:
    """The messages of a sample, with pictures cut from ``image`` (already capped), or with placeholders when it is None."""
    low = None if image is None else crops.low_resolution(image)
    if kind == "direct":
        return protocol.messages(row["question"], low, answer=row["answers"][0], protocol=form)
    names = row["target_crops"]
    pictures = None if image is None else [crops.cut(image, name, form.region_budget) for name in names]
    messages = protocol.messages(row["question"], low, names, pictures, row["answers"][0], form)
    return messages[:3] if kind == "call" else messages  # system, user, call


def turn_weights(kind: str, tool_turn_weight: float) -> list[float]:
    """w_t of each assistant turn of a sample, in order; 0 takes a turn out of the loss."""
    weights = {"direct": [1.0], "trajectory": [tool_turn_weight, 1.0], "call": [tool_turn_weight], "answer": [0.0, 1.0]}
    return weights[kind]


# Trainer


@dataclass
class WeightedCollator(DataCollatorForVisionLanguageModeling):
    """TRL's vision collator plus ``loss_weights`` (B, T): w_t on assistant tokens, 0 elsewhere."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Examples with ``messages``, ``images`` and ``turn_weights`` -> padded tensors; labels are -100 where w_t is 0."""
        batch = super().torch_call(examples)
        weights = torch.zeros(batch["labels"].shape)
        for row, example in enumerate(examples):
            spans = assistant_spans(batch["labels"][row])
            if len(spans) != len(example["turn_weights"]):
                raise AwaresValueError(f"{len(spans)} assistant turns in the loss mask, {len(example['turn_weights'])} expected: "
                                       "the chat template must mark assistant turns with {% generation %}")  # fmt: skip
            for (start, end), weight in zip(spans, example["turn_weights"], strict=True):
                weights[row, start:end] = weight
        batch["labels"][weights == 0] = -100
        batch["loss_weights"] = weights
        return batch


def assistant_spans(labels: torch.Tensor) -> list[tuple[int, int]]:
    """[start, end) of every run of trained tokens in ``labels`` (T,)."""
    edges = torch.diff(
        (labels != -100).int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int)
    )
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


class WeightedSFTTrainer(SFTTrainer):
    """SFTTrainer with the weighted loss of Eq. 4."""

    loss_is_scaled_for_ga: Any = (
        True  # the loss is divided by the tokens of the whole optimiser batch, not of the micro-batch
    )

    share_prefix = False  # of a micro-batch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # Qwen2.5-VL says False, and the trainer would not count those tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of w_t * -log pi(y_t) over the assistant tokens, divided by their number in the optimiser batch."""
        if self.share_prefix:
            inputs = without_prefix(self.accelerator.unwrap_model(model).get_base_model(), inputs)
        weights = inputs.pop("loss_weights")[:, 1:]  # (B, T-1), as the token at t is predicted at t-1
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)  # log_probs (B, T-1), 0 where the label is -100
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -(weights * outputs.log_probs).sum() / tokens
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the data-parallel wrapper averages gradients over processes
        self._metrics["train"]["mean_token_accuracy"].append((outputs.is_top1.sum() / outputs.label_mask.sum()).item())
        return (loss, outputs) if return_outputs else loss


def without_prefix(core: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` of B right-padded samples from the column on where they differ, with the cache of what stands before it.

    ``core``: the plain model with its LoRA layers. All but the last of the text tokens that every sample begins with, none of them trained
    on, become a key-value cache that gradients pass through; every position stays what it was.
    """
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    same = (ids == ids[:1]).all(0) & (types == 0).all(0) & (inputs["labels"] == -100).all(0)
    shared = int(same.int().cumprod(0).sum()) - 1
    if shared < 1:
        return inputs
    positions, _ = core.model.get_rope_index(
        ids, mm_token_type_ids=types, image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
    )
    rest = {name: inputs[name][:, shared:] for name in ("input_ids", "labels", "loss_weights")}
    cache = prefix_cache(core, ids[:1, :shared], len(ids))
    return {
        **{name: value for name, value in inputs.items() if name != "mm_token_type_ids"},
        **rest,
        "position_ids": positions[..., shared:],
        "past_key_values": cache,
    }


def build_trainer(
    params: Params,
    rows: datasets.Dataset,
    samples: Sequence[Sample],
    model: PreTrainedModel,
    processor: ImageOnlyProcessor,
    folder: Path,
) -> WeightedSFTTrainer:
    """The trainer that takes ``samples`` in their order; checkpoints go to ``folder``."""
    training.require_plain(model)
    if params.sft.share_computation and params.sft.gradient_checkpointing:
        raise AwaresValueError(
            "sft.share_computation keeps a cache, which checkpointing drops: set it or sft.gradient_checkpointing to false"
        )
    steps = math.ceil(len(samples) / params.sft.batch_size)
    trainer = WeightedSFTTrainer(
        model=model,
        args=_config(params, folder, save_steps=math.ceil(steps / params.sft.checkpoints)),
        data_collator=WeightedCollator(processor, assistant_only_loss=True),
        train_dataset=_views(params, rows, samples),
        processing_class=processor,
        peft_config=training.lora_config(params.sft),
    )
    trainer.share_prefix = params.sft.share_computation
    training.require_trainable(trainer.model, "sft")
    trainer.add_callback(training.SpareVision())
    return trainer


def _views(params: Params, rows: datasets.Dataset, samples: Sequence[Sample]) -> datasets.Dataset:
    """Samples as a dataset whose conversations, pictures included, are made when they are read."""
    form = protocol.from_params(params)

    def view(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = [rows[index] for index in batch["row"]]
        messages = [
            conversation(row, kind, training.picture(row, params), form)
            for row, kind in zip(found, batch["kind"], strict=True)
        ]
        weights = [turn_weights(kind, params.sft.tool_turn_weight) for kind in batch["kind"]]
        return {"messages": messages, "images": [[] for _ in messages], "turn_weights": weights}

    return datasets.Dataset.from_list([asdict(sample) for sample in samples]).with_transform(view)


def _config(params: Params, folder: Path, save_steps: int) -> SFTConfig:
    section, gpu = params.sft, params.base.device != "cpu"
    size, steps = launch.layout("sft", section.batch_size, section.per_device_batch_size)
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        num_train_epochs=1,  # `plan` has laid out all epochs
        train_sampling_strategy="sequential",
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.scheduler,
        warmup_steps=section.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        save_steps=save_steps,
        seed=params.seed,
        bf16=gpu and params.base.dtype == "bfloat16",  # TRL's default is True, on a CPU too
        use_cpu=not gpu,
        max_length=None,  # `plan` has checked it; cutting would split images
        assistant_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        gradient_checkpointing=section.gradient_checkpointing,
        logging_steps=1,
        disable_tqdm=True,  # `training.Log` shows the bar
        report_to="none",
    )


# Choice of the checkpoint


def choose(scores: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """The latest checkpoint that ``rows`` validation rows cannot tell from the most accurate one (two proportions, 95 %).

    Of 300 rows the most accurate of several is mostly a lucky one; only a decline that shows is worth giving up training for.
    """
    top = max(entry["validation_accuracy"] for entry in scores)

    def level(entry: dict[str, Any]) -> bool:
        mean = entry["validation_accuracy"]
        return top - mean <= 1.96 * math.sqrt((top * (1 - top) + mean * (1 - mean)) / rows)

    return max(filter(level, scores), key=lambda entry: entry["step"])


def candidate_score(
    checkpoint: Path, params: Params, rows: datasets.Dataset, model_path: str | Path, processor: ImageOnlyProcessor
) -> dict[str, Any]:
    """``step``, ``validation_accuracy`` (0-1) and ``call_rate`` of a checkpoint; kept beside it, so that it is worked out once."""
    note = checkpoint / "validation.json"
    if not note.is_file():
        model = models.load_model(model_path, params.base.dtype, params.base.device, adapter=checkpoint)
        engine, questions = Engine.from_params(model, processor, params), list(rows["question"])
        trajectories = engine.run(list(rows["image"]), questions, row_ids=list(rows["id"]))
        marks = SemanticJudge().scores(questions, [one.answer for one in trajectories], list(rows["answers"]))
        calls = [bool(trajectory.crops) for trajectory in trajectories]
        values = {
            "step": training.step_of(checkpoint),
            "validation_accuracy": float(np.mean(marks)),
            "call_rate": float(np.mean(calls)),
        }
        note.write_text(json.dumps(values))
    return json.loads(note.read_text())
