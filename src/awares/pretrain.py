"""The training loop of the embedded base VLM (notebooks/00_base_model): batches, losses, checkpoints, progress.

A step costs about ``base.work`` 14 px patches. First the vision tower alone (dense losses), then small canvases with questions, then
everything.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from awares.base import (
    CHARS,
    IGNORE,
    LINKS,
    PATCH,
    SUBJECTS,
    TOKEN,
    WORDS,
    DenseHeads,
    Example,
    View,
    build_tokenizer,
    example,
    tiny_config,
)
from awares.config import AwaresError, Base
from awares.lookup import Code
from awares.lexicon import COLOURS

MEAN, STD = (
    np.array(v, np.float32) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)


def patchify(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (patches, 3·2·14·14) in the order of Qwen2VLImageProcessor (tested equal)."""
    pixels = ((image.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)
    rows, columns = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
    grid = pixels.reshape(3, rows // 2, 2, PATCH, columns // 2, 2, PATCH).transpose(1, 4, 2, 5, 0, 3, 6)
    return np.repeat(grid[:, :, :, :, :, None], 2, axis=5).reshape(rows * columns, -1)


def _merge_order(grid: np.ndarray, cell: int) -> np.ndarray:
    """(rows·cell, columns·cell) targets -> (patches, cell·cell) in patch order of the processor."""
    rows, columns = grid.shape[0] // cell, grid.shape[1] // cell
    blocks = grid.reshape(rows // 2, 2, cell, columns // 2, 2, cell).transpose(0, 3, 1, 4, 2, 5)
    return blocks.reshape(rows * columns, cell * cell)


def encode(item: Example, tokenizer: Qwen2Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids and labels (assistant tokens only) of a conversation in the chat template's words."""
    pads = [f"<|vision_start|>{'<|image_pad|>' * (v.words.size // 4)}<|vision_end|>" for v in item.views]
    shown = {0: pads} if item.late == 0 else {0: pads[:1], item.late: pads[1:]}
    pieces = [(f"<|im_start|>system\n{item.system}<|im_end|>\n", False)]
    for index, (question, answer) in enumerate(item.turns):
        pieces += [
            (f"<|im_start|>user\n{''.join(shown.get(index, []))}{question}<|im_end|>\n<|im_start|>assistant\n", False)
        ]
        pieces += [(f"{answer}<|im_end|>", True), ("\n", False)]
    if not item.turns:
        pieces.append((f"<|im_start|>user\n{''.join(pads)}", False))
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [IGNORE] * len(tokens)
    return ids, labels


def collate(items: list[Example], tokenizer: Qwen2Tokenizer) -> dict[str, torch.Tensor]:
    """Right-padded batch: ids, labels (B, T); pixel_values (P, 1176); dense targets (P, 1), (P, 1), (P, 4)."""
    rows = [encode(item, tokenizer) for item in items]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORE)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, (row, target) in enumerate(rows):
        ids[i, : len(row)], labels[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), torch.tensor(target), 1
    pad: Any = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    views: list[View] = [v for item in items for v in item.views]
    stack = lambda parts: torch.from_numpy(np.concatenate(parts))  # noqa: E731
    return {
        "input_ids": ids, "labels": labels, "attention_mask": mask,
        "mm_token_type_ids": torch.eq(ids, pad).long(),
        "pixel_values": stack([patchify(np.asarray(v.image)) for v in views]),
        "image_grid_thw": torch.tensor([[1, *v.words.shape] for v in views]),
        "words": stack([_merge_order(v.words, 1) for v in views]), "colours": stack([_merge_order(v.colours, 1) for v in views]),
        "glyphs": stack([_merge_order(v.glyphs, 2) for v in views]),
        "links": stack([np.stack([_merge_order(v.links[..., i], 1)[:, 0] for i in range(LINKS)], -1) for v in views]),
    }  # fmt: skip


GROUP = 4
EMPTY = 0.25  # weight of cells where nothing stands


def _work(item: Example) -> int:
    """Cost of an example in patches: those it holds, and about as much for each of its turns."""
    return sum(v.words.size for v in item.views) + 30 * len(item.turns) + len(item.system) // 4


class Batches(torch.utils.data.IterableDataset):
    """Batch k depends on (seed, k) alone, so that a resumed run sees what an undisturbed one sees."""

    def __init__(self, recipe: Base, tokenizer: Qwen2Tokenizer, stage: str, start: int, stop: int) -> None:
        self.recipe, self.tokenizer, self.stage, self.start, self.stop = recipe, tokenizer, stage, start, stop

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self.start - self.start % GROUP, self.stop, GROUP):
            for offset, items in enumerate(self._group(step)):
                if self.start <= step + offset < self.stop:
                    yield collate(items, self.tokenizer)

    def _group(self, step: int) -> list[list[Example]]:
        """GROUP batches of equal work, drawn together and cut by length, so that little of a batch is padding."""
        rng = np.random.default_rng([self.recipe.seed, *self.stage.encode(), step])
        items: list[Example] = []
        while sum(_work(i) for i in items) < GROUP * self.recipe.work:
            items.append(example(rng, self.stage))
        items.sort(key=_work)
        ends = np.cumsum([_work(i) for i in items])
        batches = [
            [i for i, e in zip(items, ends, strict=True) if b < e * GROUP / ends[-1] <= b + 1] for b in range(GROUP)
        ]
        return [
            batches[i] for i in rng.permutation(GROUP) if any(v for item in batches[i] for v in item.views)
        ] or batches


class Dense:
    """The losses on what the vision tower sees; hooks catch its middle layer, the merger's hidden layer and the visual tokens."""

    def __init__(self, visual: Any, heads: DenseHeads, code: Code) -> None:
        self.visual, self.heads, self.code = visual, heads, code
        self._seen: dict[str, torch.Tensor] = {}
        catch = lambda name: lambda _m, _i, out: self._seen.__setitem__(name, out)  # noqa: E731
        visual.blocks[visual.config.depth // 2].register_forward_hook(catch("middle"))  # (P, Dv), in window order
        visual.merger.mlp[1].register_forward_hook(catch("hidden"))  # (P/4, 4 Dv), in window order
        visual.merger.register_forward_hook(catch("merged"))  # (P/4, D), in window order

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss after a forward pass of the vision tower, and what to log."""
        order = _window_order(self.visual, batch["image_grid_thw"])  # (P/4,)
        by_token = lambda t: t.reshape(len(order), 4, *t.shape[1:])[order]  # noqa: E731
        words, colours, glyphs, links = (by_token(batch[k]) for k in ("words", "colours", "glyphs", "links"))
        words, colours = words[..., 0], colours[..., 0]
        hidden = self._seen["hidden"]
        word_logits = self.heads.words(hidden).reshape(-1, len(WORDS) + 1)
        link_logits = self.heads.links(hidden).reshape(-1, len(SUBJECTS) + 1)
        glyph_logits = self.heads.glyphs(self._seen["middle"]).reshape(-1, len(CHARS) + 1)
        parts = {
            "word": _dense(word_logits, words.reshape(-1)),
            "link": _dense(link_logits, links.reshape(-1)),
            "colour": _dense(self.heads.colours(hidden).reshape(-1, len(COLOURS) + 1), colours.reshape(-1)),
            "glyph": _dense(glyph_logits, glyphs.reshape(-1)),
        }
        code = self.code(words, colours, links)
        far = self.code.distance(self._seen["merged"], code)
        known = ((words != IGNORE) & (colours != IGNORE) & (links != IGNORE).all(-1)).all(1)
        full = known & ((words > 0).any(1) | (colours > 0).any(1))
        parts["code"] = far[full].mean() + EMPTY * far[known & ~full].mean()
        with torch.no_grad():
            share = lambda logits, target: (logits.argmax(-1) == target)[target > 0].float().mean()  # noqa: E731
            seen = {k: v.detach() for k, v in parts.items()}
            seen["words_read"] = share(word_logits, words.reshape(-1))
            seen["links_read"] = share(link_logits, links.reshape(-1))
            seen["code_missed"] = far[full].sum() / self.code.distance(code[full], torch.zeros(1)).sum()
        return parts["word"] + parts["link"] + 0.5 * parts["colour"] + 0.5 * parts["glyph"] + parts["code"], seen


def _dense(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with empty cells weighted down, so that emptiness does not win."""
    each = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    filled, empty = target > 0, target == 0
    return each[filled].sum() / filled.sum().clamp(min=1) + EMPTY * each[empty].sum() / empty.sum().clamp(min=1)


def _window_order(visual: Any, grid: torch.Tensor) -> torch.Tensor:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

    config = visual.config
    order, _ = get_vision_window_index(
        grid, spatial_merge_size=config.spatial_merge_size, window_size=config.window_size, patch_size=config.patch_size
    )
    return order


@dataclass(frozen=True)
class Stage:
    """`vision` (the vision tower, on what stands where), `lookup` (the language tower, on symbolic pages), or `joint` (both, on pictures)."""

    name: str
    steps: int
    learning_rate: float

    @classmethod
    def of(cls, name: str, recipe: Base) -> Stage:
        return cls(name, getattr(recipe, f"{name}_steps"), getattr(recipe, f"{name}_learning_rate"))


class Network:
    """The model with the dense heads, and what a stage trains of it."""

    def __init__(self, recipe: Base, tokenizer: Qwen2Tokenizer, stage: str) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer)).float().train()
        self.heads = DenseHeads(self.model.config)
        self.code = Code(tokenizer, self.model.config.text_config.hidden_size, recipe.seed)
        self.dense = Dense(self.model.model.visual, self.heads, self.code)
        self.stage = stage
        every = {f"model.{k}": v for k, v in self.model.named_parameters()} | {
            f"heads.{k}": v for k, v in self.heads.named_parameters()
        }
        sees = lambda name: name.startswith(("model.model.visual.", "heads."))  # noqa: E731
        self.parameters = {k: v for k, v in every.items() if stage == "joint" or sees(k) == (stage == "vision")}

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        return self.dense(batch)


def learning_rate(step: int, stage: Stage, recipe: Base) -> float:
    """Warm-up, plateau, linear decay to a twentieth."""
    decay = max(1.0, stage.steps * recipe.decay_fraction)
    return stage.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps, max(0.05, (stage.steps - step) / decay))


def train(recipe: Base, work: Path, name: str, until: int | None = None, save_every: int = 100) -> None:
    """Train a stage from `work`'s newest checkpoint of it to step `until`; interruptible at any moment."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe.seed)
    stage = Stage.of(name, recipe)
    network = Network(recipe, tokenizer, name)
    if name == "joint":
        network.join(work)
    optimiser = _optimiser(network.parameters, recipe)
    step = _resume(work / f"{name}.safetensors", network.parameters, optimiser)
    stop = min(until or stage.steps, stage.steps)
    batches = Batches(recipe, tokenizer, name, step, stop)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)
    started, seen = time.time(), []
    for batch in loader:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, stage, recipe)
        loss, parts = network.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        seen.append({k: float(v) for k, v in parts.items()})
        if step % 20 == 0 or step == stop:
            _log(work, name, step, seen, time.time() - started)
            started, seen = time.time(), []
        if step % save_every == 0 or step == stop:
            _save(work / f"{name}.safetensors", recipe, step, network.parameters, optimiser)


def inputs(recipe: Base) -> dict[str, Any]:
    """What determines the trained base model, as JSON values: the key of its checkpoint folder."""
    values = {k: v for k, v in asdict(recipe).items() if k not in ("model", "dtype", "device")}
    vocabulary = hashlib.sha256(
        json.dumps(build_tokenizer(recipe.seed).get_vocab(), sort_keys=True).encode()
    ).hexdigest()
    return {"stage": "base_model", "recipe": values, "words": WORDS, "vocabulary": vocabulary}


def write_card(folder: Path, recipe: Base, log: pd.DataFrame, reading: pd.DataFrame) -> None:
    """The model card, README.md of `folder`: what it is, how it was trained, what it reads; numbers from this run."""
    hours = float((log.seconds * log.step.diff().fillna(log.step)).sum() / 3600)
    lines = "\n".join(f"| {r.view} | {r.evidence} | {r.accuracy:.1f} | {r.n} |" for r in reading.itertuples())
    config = json.loads((folder / "config.json").read_text())
    (folder / "README.md").write_text(f"""---
license: apache-2.0
library_name: transformers
---
# The embedded base model of awares

A `Qwen2_5_VLForConditionalGeneration` with {config["vision_config"]["depth"]} vision and {config["text_config"]["num_hidden_layers"]} language
layers, trained from scratch by `notebooks/00_base_model.ipynb` on scenes drawn by `awares.scenes`; no weights or data of anybody else. It reads
short printed words and numbers, sees coloured shapes and calls functions that its system message offers. It is a stand-in for a real VLM, so that the
whole method runs on a laptop, and good for nothing else: its world is the closed word list of `awares.lexicon`.

- Trained for {int(log.step.iloc[-1])} of {recipe.steps} steps on CPU ({hours:.1f} hours of wall clock), seed {recipe.seed}.
- Stored in bfloat16; the pipeline loads it in float32.
- It has never seen the crop tool.

Validation rows of the embedded suite, percent right:

| view | evidence | accuracy | rows |
|---|---|---:|---:|
{lines}
""")


def export(work: Path, recipe: Base, folder: Path) -> int:
    """Write the newest checkpoint of `work` as a Hugging Face model in bfloat16, with processor; returns its step.

    Raises AwaresError where there is no checkpoint.
    """
    from awares.model import make_processor, save_model

    if not (work / "state.safetensors").exists():
        raise AwaresError(f"{work} holds no checkpoint: run base training first")
    state = load_file(work / "state.safetensors")
    tokenizer = build_tokenizer(recipe.seed)
    network: Any = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer))
    prefix = "p.model."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    lacking = set(network.load_state_dict(weights, strict=False).missing_keys) - {
        "lm_head.weight"
    }  # tied to the embedding
    if lacking:
        raise AwaresError(
            f"{work / 'state.safetensors'} lacks {len(lacking)} weights, such as {min(lacking)}: train again"
        )
    network.tie_weights()
    save_model(network.to(torch.bfloat16), make_processor(tokenizer, min_pixels=TOKEN * TOKEN), folder)
    return int(state["t"])


def _log(work: Path, stage: str, step: int, seen: list[dict[str, float]], seconds: float) -> None:
    row: dict[str, Any] = {"stage": stage, "step": step, "seconds": round(seconds / len(seen), 3)} | {
        k: round(float(np.mean([s[k] for s in seen])), 4) for k in seen[0]
    }
    with open(work / "log.jsonl", "a") as log:
        log.write(json.dumps(row) + "\n")
    print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def _optimiser(params: dict[str, torch.nn.Parameter], recipe: Base) -> torch.optim.Optimizer:
    """AdamW; matrices decay, embeddings, norms and biases do not."""
    decayed = {k for k, v in params.items() if v.ndim > 1 and "embed" not in k}
    groups = [
        {"params": [params[k] for k in params if k in decayed], "weight_decay": recipe.weight_decay},
        {"params": [params[k] for k in params if k not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))  # `train` sets the rate


def _save(
    path: Path, recipe: Base, step: int, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """One safetensors file, replaced whole: weights, what the optimiser remembers, the step and the recipe."""
    state = {f"p.{k}": v.detach() for k, v in params.items()}
    for name, value in params.items():
        state |= {f"o.{name}|{k}": v for k, v in optimiser.state.get(value, {}).items()}
    state["t"] = torch.tensor(step)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in state.items()}, partial, {"recipe": json.dumps(asdict(recipe))})
    partial.replace(path)


def _resume(path: Path, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return 0
    state = load_file(path)
    if {k[2:] for k in state if k.startswith("p.")} != set(params):
        raise AwaresError(f"{path} belongs to another architecture; move it away or train in another folder")
    for name, value in params.items():
        value.data.copy_(state[f"p.{name}"])
        memory = {k.split("|")[1]: v for k, v in state.items() if k.startswith(f"o.{name}|")}
        if memory:
            optimiser.state[value] = memory
    return int(state["t"])
