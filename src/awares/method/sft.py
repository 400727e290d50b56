"""SFT (PAPER §3): supervised fine-tuning on the curated two-turn trajectories with TRL's SFTTrainer.

The loss is Eq. 4, ``L = -sum_t w_t log pi(y_t | h_t)`` over assistant tokens, with ``w_t = sft.tool_turn_weight`` on
the tool-call turn and 1 on other assistant tokens. Departures from the paper and decisions that it leaves open:

1. The sum is divided by the *number* of assistant tokens in the optimiser batch, not by the sum of their weights.
2. Turn-level samples (``level: turn``) keep the history before the turn; only the turn itself is trained on.
3. Phased training (``phased: true``): one pass over the call turns of the HR rows, then the epochs, in one schedule.
4. Samples of one optimiser batch are sorted by length to reduce padding in micro-batches; the gradient is the same.
5. ``checkpoints`` candidates answer validation rows; `choose` takes the latest one that is not worse than the best.
6. ``share_computation`` encodes the system prompt of a micro-batch, and every image, once; the numbers are the same.
7. In several processes a short last batch is filled up with the first samples.
"""

import contextlib
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from awares.config import Params
from awares.engine.chat_format import END_OF_TURN
from awares.engine.jsonl import read_records, write_records
from awares.engine.model import ImageOnlyProcessor, load_model, load_processor, set_attention, visual_tokens
from awares.engine.rows import picture, picture_sizes, rows_digest, share_of
from awares.errors import AwaresValueError
from awares.method import protocol
from awares.method.judges import HR, LR, semantic
from awares.method.protocol import Protocol
from awares.method.rollout import Engine
from awares.settings import Sft
from awares.training import checkpoints as training
from awares.training import distributed
from awares.training.checkpoints import TrainedPolicy
from awares.training.prompt_sharing import vision_memo, without_prefix

LOGGED_SFT = {"step": "step", "loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}  # TRL's name -> ours
LOGGED_SFT |= {"mean_token_accuracy": "token_accuracy"}


@dataclass(frozen=True)
class Sample:
    """One training sequence: the index of its row, the turns that it has, its length in tokens.

    ``kind``: direct (LR: one turn), trajectory (HR: both turns), call (HR: first turn), answer (HR: last turn).
    """

    row: int
    kind: str
    length: int


def train_sft(
    params: Params, dataset: Dataset, validation: Dataset, model_path: str | Path, out_dir: str | Path
) -> TrainedPolicy:
    """Train on ``sft.share`` of the curated ``dataset``, choose the checkpoint on ``validation``, write to ``out_dir``.

    ``dataset``: the row schema plus ``label`` (LR or HR) and ``target_crops``; ``validation``: the row schema. Writes
    ``adapter/``, ``merged/`` and ``log.jsonl`` (per update loss and lr; per candidate ``validation_accuracy`` and
    ``call_rate``). After an interruption the same call resumes from the last checkpoint. AwaresError for rows that
    cannot be trained on, before any training.
    """
    rows = share_of(dataset, params.sft.share)
    chosen = validation.select(range(min(params.sft.selection_rows, len(validation))))
    samples = plan_samples(rows, load_processor(model_path, params.crops.pixels), params)
    inputs = {"prompt": protocol.from_params(params).system, "selection": rows_digest(chosen)}
    folder = training.run_training("sft", fit_sft, params, rows, model_path, out_dir, inputs, samples=samples)
    scores = [candidate_score(path, params, chosen, model_path) for path in training.checkpoints(folder)]
    log = Path(out_dir) / "log.jsonl"
    write_records(log, [*read_records(log), *scores])
    best = choose(scores, len(chosen))
    checkpoint = folder / f"checkpoint-{best['step']}"
    return training.save_policy(params, model_path, checkpoint, out_dir, accuracy=best["validation_accuracy"])


def fit_sft(
    params: Params, rows: Dataset, model_path: Path, folder: Path, log: Path, samples: list[Sample] | None = None
) -> None:
    """Train to the last checkpoint in ``folder``; every process runs this. ``samples``: `plan_samples`."""
    model = load_model(model_path, params.base.dtype, distributed.device(params))
    processor = load_processor(model_path, params.crops.pixels)
    samples = samples or plan_samples(rows, processor, params)
    trainer = build_sft_trainer(params, rows, samples, model, processor, folder)
    with vision_memo(model) if params.sft.share_computation else contextlib.nullcontext():
        training.train(trainer, folder, training.Log(log, _log_entry, "loss"))


def _log_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """One update of the trainer's log under our names; {} for the summary at the end."""
    return {ours: entry[theirs] for theirs, ours in LOGGED_SFT.items()} if "loss" in entry else {}


def plan_samples(rows: Dataset, processor: ImageOnlyProcessor, params: Params) -> list[Sample]:
    """Every sample of the whole training, in the order of training.

    AwaresError naming the row for a wrong label, an HR row without crops, and a call or a sample that is too long.
    """
    section, rng, form = params.sft, np.random.default_rng(params.seed), protocol.from_params(params)
    pool: list[Sample] = []
    sizes = picture_sizes(rows, params.crops.max_side)
    for index, (row, size) in enumerate(zip(rows.remove_columns("image"), sizes, strict=True)):
        kinds = _kinds(row, processor, params, form)
        lengths = [_length(row, kind, size, processor, section, form) for kind in kinds]
        samples = [Sample(index, kind, length) for kind, length in zip(kinds, lengths, strict=True)]
        pool += samples * (section.hr_upsample if row["label"] == "HR" else 1)
    calls = [replace(one, kind="call") for one in pool if one.kind in ("trajectory", "call")]
    order = (_passes(calls, 1.0, rng) if section.phased else []) + _passes(pool, section.epochs, rng)
    if not order:
        raise AwaresValueError("sft: no sample to train on: give rows, and sft.epochs above 0")
    batches = [order[start : start + section.batch_size] for start in range(0, len(order), section.batch_size)]
    return [sample for batch in batches for sample in sorted(batch, key=lambda one: one.length)]


def _kinds(row: dict[str, Any], processor: ImageOnlyProcessor, params: Params, form: Protocol) -> tuple[str, ...]:
    """The kinds of sample that one row gives; AwaresError for a call longer than the policy may write in a turn."""
    if row["label"] == LR:
        return ("direct",)
    if row["label"] != HR or not row["target_crops"]:
        found = f"label {row['label']!r} with target_crops {row['target_crops']}"
        raise AwaresValueError(f"row {row['id']}: {found}: a row is LR, or HR with crops: curate it again")
    tokens = len(processor.tokenizer(form.render_call(row["target_crops"]) + END_OF_TURN)["input_ids"])
    if tokens > (limit := params.protocol.max_new_tokens):
        found = f"the call has {tokens} tokens, more than protocol.max_new_tokens {limit}"
        raise AwaresValueError(f"row {row['id']}: {found}: raise it")
    return ("trajectory",) if params.sft.level == "trajectory" else ("call", "answer")


def _passes(pool: Sequence[Sample], epochs: float, rng: np.random.Generator) -> list[Sample]:
    """``epochs`` passes over ``pool``, each in a new order; the last may be part of a pass."""
    order = [pool[index] for _ in range(math.ceil(epochs)) for index in rng.permutation(len(pool))]
    return order[: round(epochs * len(pool))]


def _length(
    row: dict[str, Any], kind: str, size: tuple[int, int], processor: ImageOnlyProcessor, section: Sft, form: Protocol
) -> int:
    """Tokens of a sample, visual ones included; AwaresError above ``max_length``, where TRL would split an image."""
    limit, messages = section.max_length, conversation(row, kind, None, form, section.answers)
    images = _view_sizes(size, () if kind in ("direct", "call") else tuple(row["target_crops"]), form)
    text = processor.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    length = len(text) + sum(visual_tokens(view, processor) - 1 for view in images)
    if length > limit:
        found = f"{length} tokens, more than sft.max_length {limit}"
        raise AwaresValueError(f"row {row['id']}: {found}: raise it, or lower crops.max_side")
    return length


@functools.lru_cache(maxsize=4096)
def _view_sizes(size: tuple[int, int], names: tuple[str, ...], form: Protocol) -> list[tuple[int, int]]:
    """Pixel sizes of I_low and of the crops, measured on a blank image."""
    blank = Image.new("1", size)
    return [form.low(blank).size, *(form.cut(blank, name).size for name in names)]


def conversation(
    row: dict[str, Any],
    kind: str,
    image: Image.Image | None,
    form: Protocol = protocol.OURS,
    answers: str = "accepted",
) -> list[dict[str, Any]]:
    """The messages of a sample, with crops of ``image`` (already capped), or placeholders for None.

    ``answers``: what the policy answers after a call, the first accepted answer or (`full`) that of the base model from
    the full image.
    """
    low = None if image is None else form.low(image)
    if kind == "direct":
        return protocol.messages(row["question"], low, answer=row["answers"][0], protocol=form)
    names, answer = row["target_crops"], row["high_answer"] if answers == "full" else row["answers"][0]
    pictures = None if image is None else [form.cut(image, name) for name in names]
    messages = protocol.messages(row["question"], low, names, pictures, answer, form)
    return messages[:3] if kind == "call" else messages  # system, user, call


def turn_weights(kind: str, tool_turn_weight: float) -> list[float]:
    """w_t of Eq. 4 for each assistant turn of a sample, in order; 0 removes a turn from the loss."""
    weights = {"direct": [1.0], "trajectory": [tool_turn_weight, 1.0], "call": [tool_turn_weight], "answer": [0.0, 1.0]}
    return weights[kind]


@dataclass
class WeightedCollator(DataCollatorForVisionLanguageModeling):
    """TRL's vision collator plus ``loss_weights`` (B, T): w_t on assistant tokens, 0 elsewhere."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Examples with ``messages``, ``images``, ``turn_weights`` -> padded tensors; label -100 where w_t is 0."""
        batch = super().torch_call(examples)
        weights = torch.zeros(batch["labels"].shape)
        for row, example in enumerate(examples):
            spans = assistant_spans(batch["labels"][row])
            if len(spans) != len(example["turn_weights"]):
                counts = f"{len(spans)} assistant turns in the loss mask, {len(example['turn_weights'])} expected"
                raise AwaresValueError(f"{counts}: the chat template must mark them with {{% generation %}}")
            for (start, end), weight in zip(spans, example["turn_weights"], strict=True):
                weights[row, start:end] = weight
        batch["labels"][weights == 0] = -100
        batch["loss_weights"] = weights
        return batch


def assistant_spans(labels: torch.Tensor) -> list[tuple[int, int]]:
    """[start, end) of every run of trained tokens in ``labels`` (T,)."""
    edges = torch.diff(torch.nn.functional.pad((labels != -100).int(), (1, 1)))
    starts, ends = ((edges == step).nonzero().flatten().tolist() for step in (1, -1))
    return list(zip(starts, ends, strict=True))


class WeightedSFTTrainer(SFTTrainer):
    """SFTTrainer with the weighted loss of Eq. 4."""

    loss_is_scaled_for_ga: Any = True  # its divisor counts the optimiser batch, not the micro-batch
    share_prefix = False  # encode the common prefix of a micro-batch once

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # with Qwen2.5-VL's False the trainer would not count the tokens

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
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


def build_sft_trainer(
    params: Params, rows: Dataset, samples: Sequence[Sample], model: Any, processor: ImageOnlyProcessor, folder: Path
) -> WeightedSFTTrainer:
    """The trainer on ``samples`` in their order; checkpoints go to ``folder``."""
    if params.sft.share_computation and params.sft.gradient_checkpointing:
        raise AwaresValueError("sft.share_computation does not work with sft.gradient_checkpointing: set one to false")
    set_attention(model, params.base.attn_implementation)
    updates = math.ceil(len(samples) / params.sft.batch_size)
    config = SFTConfig(
        **training.trainer_arguments("sft", params, folder),
        num_train_epochs=1,  # `plan_samples` repeats the rows
        train_sampling_strategy="sequential",
        save_steps=math.ceil(updates / params.sft.checkpoints),
        max_length=None,  # `plan_samples` has checked it
        assistant_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = WeightedSFTTrainer(
        **training.lora_on(model, params.sft),
        args=config,
        data_collator=WeightedCollator(processor, assistant_only_loss=True),
        train_dataset=_views(params, rows, samples),
        processing_class=processor,
    )
    trainer.share_prefix = params.sft.share_computation
    return trainer


def _views(params: Params, rows: Dataset, samples: Sequence[Sample]) -> Dataset:
    """The samples as a dataset that makes conversations, with their images, when they are read."""
    form = protocol.from_params(params)

    def view(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = [(rows[index], kind) for index, kind in zip(batch["row"], batch["kind"], strict=True)]
        shown = [(row, kind, picture(row, params.crops.max_side)) for row, kind in pairs]
        messages = [conversation(*one, form, params.sft.answers) for one in shown]
        weights = [turn_weights(kind, params.sft.tool_turn_weight) for kind in batch["kind"]]
        return {"messages": messages, "images": [[] for _ in messages], "turn_weights": weights}

    return Dataset.from_list([asdict(sample) for sample in samples]).with_transform(view)


def choose(scores: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """The latest checkpoint whose accuracy on ``rows`` validation rows does not differ from the best one's (95 %).

    The test is that of two proportions. Reason: on 300 rows the best of several candidates is mostly best by chance.
    """
    top = max(entry["validation_accuracy"] for entry in scores)

    def as_good(entry: dict[str, Any]) -> bool:
        mean = entry["validation_accuracy"]
        return top - mean <= 1.96 * math.sqrt((top * (1 - top) + mean * (1 - mean)) / rows)

    return max(filter(as_good, scores), key=lambda entry: entry["step"])


def candidate_score(checkpoint: Path, params: Params, rows: Dataset, model_path: str | Path) -> dict[str, Any]:
    """``step``, ``validation_accuracy`` (0-1), ``call_rate`` of a checkpoint; stored in its folder and reused."""
    note = checkpoint / "validation.json"
    if not note.is_file():
        model = load_model(model_path, params.base.dtype, params.base.device, adapter=checkpoint)
        processor, questions = load_processor(model_path, params.crops.pixels), list(rows["question"])
        engine = Engine.from_params(model, processor, params)
        trajectories = engine.run(list(rows["image"]), questions, row_ids=list(rows["id"]))
        correct = list(map(semantic, questions, [one.answer for one in trajectories], rows["answers"]))
        accuracy, calls = float(np.mean(correct)), float(np.mean([bool(one.crops) for one in trajectories]))
        values = {"step": training.step_of(checkpoint), "validation_accuracy": accuracy, "call_rate": calls}
        note.write_text(json.dumps(values))
    return json.loads(note.read_text())
