"""The network that base training trains: the model, its dense heads, and the losses of each stage."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

from architecture import IGNORE, LINKS, DenseHeads, load_config
from awares.mini import vocabulary as lex
from batches import patchify
from examples import example
from look_up import SPREAD, VALUE_LAYER, Code, Glance, Watch, prepare
from recipe import Recipe, Stage

BLUR = 0.8  # at most, in embeddings
BOUNDS = (0.3, 0.5, 0.7)  # of a side: what `lexicon.place` tells apart
# weights of the dense losses
DENSE = {"glyph": 0.5, "early": 1, "word": 1, "trait": 0.5, "link": 1, "glance": 0.5, "code": 1, "misread": 1}
# the head of a dense loss, where in the vision tower it reads, and what its log says
HEADS = {
    "glyph": ("glyphs", "middle", "glyphs_read"),
    "early": ("early", "early", ""),
    "word": ("words", "late", "words_read"),
    "trait": ("traits", "late", ""),
    "link": ("links", "late", "links_read"),
}
EMPTY = 0.25  # weight of cells where nothing stands


class Network:
    """The model with the dense heads, and what a stage trains of it."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stage: Stage) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration(load_config(tokenizer)).float().train()
        self.heads = DenseHeads(self.model.config.vision_config.hidden_size)
        self.code = Code(tokenizer, self.model.config.text_config.hidden_size, recipe.seed)
        self.dense = Dense(self.model.model.visual, self.heads, self.code)
        self.recipe, self.stage = recipe, stage
        self.unread = tokenizer(lex.UNREAD, add_special_tokens=False)["input_ids"][0]
        visual: Any = self.model.model.visual
        if stage.asks:
            self.watch = Watch(self.model)
            prepare(self.model, self.code)
        else:
            _spread(visual)
        if stage.name == "glyphs":
            del visual.blocks[visual.config.depth // 2 + 1 :]  # above, nothing is read off yet
        self.placing = torch.nn.Linear(self.model.config.text_config.hidden_size, 2 * (len(BOUNDS) + 1))
        language: Any = self.model.model.language_model
        language.layers[VALUE_LAYER].register_forward_pre_hook(self._catch, with_kwargs=True)
        every = {f"model.{k}": v for k, v in self.model.named_parameters()} | {
            f"heads.{k}": v for k, v in self.heads.named_parameters()
        }
        every |= {f"placing.{k}": v for k, v in self.placing.named_parameters()}
        sees = lambda name: name.startswith(("model.model.visual.", "heads."))  # noqa: E731
        self.parameters = {
            k: v for k, v in every.items() if stage.trains == "both" or sees(k) == (stage.trains == "vision")
        }

    def begin(self, work: Path) -> None:
        """Take what the stages before this one left in `work`."""
        if self.stage.name == "glyphs":
            rng = np.random.default_rng(self.recipe.seed)
            views = [view for _ in range(90) for view in example(rng, self.stage).views]
            _whiten(self.model.model.visual, np.concatenate([patchify(np.asarray(v.image)) for v in views]))
        for stage in self.stage.starts_from:
            state = load_file(work / f"{stage}.safetensors")
            for name, value in self.parameters.items():
                if f"p.{name}" in state:
                    value.data.copy_(state[f"p.{name}"])

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and what to log."""
        if self.stage.trains != "language" and "glance" in self.stage.dense:
            self.dense.expect(batch)
        if not self.stage.asks:
            self.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
            return self.dense(batch, self.stage.dense)
        total, parts = self._answers(batch)
        if self.stage.trains == "language":
            return total, parts
        seen, more = self.dense(batch, self.stage.dense)
        return total + seen, parts | more

    def _answers(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs: dict[str, Any] = {
            k: batch[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        }
        if self.stage.trains == "both":
            inputs["pixel_values"] = batch["pixel_values"]
        else:
            symbols: Any = self._symbols(batch)  # declared as one tensor, taken as one a picture
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=symbols)}
        self.watch.expect({k.removeprefix("watch_"): v for k, v in batch.items() if k.startswith("watch_")})
        hidden = self.model.model(**inputs).last_hidden_state  # (B, T, D)
        target = batch["labels"][:, 1:]
        learned = target != IGNORE
        logits = self.model.lm_head(hidden[:, :-1][learned])  # (N, V): answers only, the rest would be wasted work
        weights = 1 + (self.stage.after_call_weight - 1) * batch["called"][:, 1:][learned].float()
        each = doubted(logits, target[learned], batch["candid"][:, 1:][learned], self.unread)
        answer = (weights * each).sum() / weights.sum()
        place = self._placed(batch)
        missed, found = self.watch.found()
        hits = (logits.argmax(-1) == target[learned]).float().mean()
        return answer + missed + place, {
            "answer": answer.detach(),
            "place": place.detach(),
            "answer_tokens": hits,
            **found,
        }

    def _catch(self, _module: Any, arguments: Any, named: Any) -> None:
        self._before_value = arguments[0] if arguments else named["hidden_states"]

    def _placed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of telling, from a visual token before the value layer, in which part of its picture it lies."""
        shown = batch["mm_token_type_ids"] == 1
        if not shown.any():
            return torch.zeros(())
        logits = self.placing(self._before_value[shown]).unflatten(-1, (2, -1))  # (N, axis, part)
        bounds = torch.tensor(BOUNDS)
        targets = []
        for _, rows, columns in batch["image_grid_thw"].tolist():
            middles = [(torch.arange(n // 2) + 0.5) / (n // 2) for n in (rows, columns)]
            targets.append(torch.cartesian_prod(*(torch.bucketize(middle, bounds) for middle in middles)))
        return F.cross_entropy(logits.flatten(0, 1), torch.cat(targets).flatten())

    def _symbols(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The code of each picture, (tokens, D), blurred: what a vision tower that reads imperfectly would write."""
        by_token = lambda t: t.reshape(-1, 4, *t.shape[1:])  # noqa: E731
        code = self.code(by_token(batch["words"])[..., 0], by_token(batch["traits"])[..., 0], by_token(batch["links"]))
        pictures = code.split((batch["image_grid_thw"].prod(1) // 4).tolist())
        blur = lambda picture: picture + BLUR * SPREAD * torch.rand(()) * torch.randn_like(picture)  # noqa: E731
        return tuple(blur(picture) for picture in pictures)


class Dense:
    """The losses on what the vision tower sees; hooks catch what three of its blocks and its merger put out, in window order."""

    def __init__(self, visual: Any, heads: DenseHeads, code: Code) -> None:
        self.visual, self.heads, self.code = visual, heads, code
        self._seen: dict[str, torch.Tensor] = {}
        depth = visual.config.depth
        for name, place in {"middle": depth // 2, "early": depth - 2, "late": depth - 1}.items():  # (P, Dv)
            visual.blocks[place].register_forward_hook(partial(self._catch, name))
        visual.merger.register_forward_hook(partial(self._catch, "merged"))  # (P/4, D)
        self.glance = Glance(visual)

    def expect(self, batch: dict[str, torch.Tensor]) -> None:
        """To be called before the forward pass of the vision tower: where its last block should look."""
        tokens = torch.argsort(
            _window_order(self.visual, batch["image_grid_thw"])
        )  # of the processor's order -> place in the tower
        leads, targets, start = batch["leads"], [], 0
        for picture, size in enumerate(batch["image_grid_thw"].prod(1).tolist()):
            place = (tokens[start : start + size // 4, None] - start) * 4 + torch.arange(4)
            target = torch.zeros(LINKS, size, size, dtype=torch.bool)
            mine = leads[leads[:, 0] == picture, 1:]
            target[mine[:, 0], place.flatten()[mine[:, 1]], place.flatten()[mine[:, 2]]] = True
            targets.append(target)
            start += size // 4
        self.glance.expect(targets)

    def _catch(self, name: str, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        self._seen[name] = (
            output if name == "merged" else F.rms_norm(output, output.shape[-1:])
        )  # blocks put out sums of any size

    def _in_order(self, batch: dict[str, torch.Tensor], *names: str) -> list[torch.Tensor]:
        order = _window_order(self.visual, batch["image_grid_thw"])  # (P/4,)
        return [batch[k].reshape(len(order), 4, *batch[k].shape[1:])[order] for k in names]

    def __call__(
        self, batch: dict[str, torch.Tensor], asked: tuple[str, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The losses ``asked`` for, of DENSE, after a forward pass of the vision tower, and what to log."""
        words, traits, links, glyphs = self._in_order(batch, "words", "traits", "links", "glyphs")
        words, traits = words[..., 0], traits[..., 0]
        targets = {"glyph": glyphs, "early": words, "word": words, "trait": traits, "link": links}
        total = torch.zeros(())
        seen: dict[str, torch.Tensor] = {}
        for name in asked:
            if name == "code":
                loss = self._written(words, traits, links, seen)
            elif name == "misread":
                loss = self.code.misread(self._seen["merged"], words, traits, links)
            elif name == "glance":
                loss, seen["sources_found"] = self.glance.found()
            else:
                head, place, read = HEADS[name]
                target = targets[name].flatten()
                logits = getattr(self.heads, head)(self._seen[place]).reshape(len(target), -1)
                loss = _dense(logits, target)
                if read:
                    seen[read] = _share(logits, target)
            total = total + DENSE[name] * loss
            seen[name] = loss.detach()
        return total, seen

    def _written(
        self, words: torch.Tensor, traits: torch.Tensor, links: torch.Tensor, seen: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """How far the visual tokens are from their code, where all that they show is known."""
        code = self.code(words, traits, links)
        far = self.code.distance(self._seen["merged"], code)
        known = ((words != IGNORE) & (traits != IGNORE) & (links != IGNORE).all(-1)).all(1)
        full = known & (
            (words > 0).any(1) | (traits > 0).any(1) | (links > 0).any((1, 2))
        )  # also a value too small to read
        seen["code_missed"] = far.detach()[full].sum() / self.code.distance(code[full], torch.zeros(1)).sum()
        return far[full].mean() + EMPTY * far[known & ~full].mean()


def _share(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of the cells where something stands, how many are named rightly."""
    return (logits.detach().argmax(-1) == target)[target > 0].float().mean()


def _dense(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with empty cells weighted down, so that emptiness does not win."""
    each = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    filled, empty = target > 0, target == 0
    return each[filled].sum() / filled.sum().clamp(min=1) + EMPTY * each[empty].sum() / empty.sum().clamp(min=1)


def _window_order(visual: Any, grid: torch.Tensor) -> torch.Tensor:
    config = visual.config
    order, _ = get_vision_window_index(
        grid, spatial_merge_size=config.spatial_merge_size, window_size=config.window_size, patch_size=config.patch_size
    )
    return order


def doubted(logits: torch.Tensor, target: torch.Tensor, answers: torch.Tensor, unread: int) -> torch.Tensor:
    """Cross-entropy (N,) of ``logits`` (N, V) with ``target`` (N,), where an answer may also be that it cannot be read.

    Tokens with the same number in ``answers`` (N,), in order, are an answer that may be doubted; 0: none of it. Such an answer gives way to
    ``unread``, the first token of saying so, with the probability that the model itself would misread it, had it to commit itself.
    """
    each = F.cross_entropy(logits, target, reduction="none")
    if not answers.any():
        return each
    names, place = answers.unique(return_inverse=True)
    first = torch.ones_like(answers, dtype=torch.bool)
    first[1:] = answers[1:] != answers[:-1]
    first &= answers > 0
    with torch.no_grad():
        admitted = F.log_softmax(logits[first], -1)[:, unread]
        right = -each.detach()
        right[first] -= torch.log1p(-admitted.exp().clamp(max=1 - 1e-6))  # of the answers that commit themselves
        doubt = 1 - torch.zeros(len(names)).index_add_(0, place, right).exp().clamp(max=1)  # of each answer
        doubt[names == 0] = 0
        doubt = doubt[place]
    unsaid = torch.full_like(target, unread)
    said = torch.where(first, F.cross_entropy(logits, unsaid, reduction="none"), torch.zeros(()))
    return (1 - doubt) * each + doubt * said


def _spread(visual: Any) -> None:
    """Draw the blocks' matrices at the scale of their widths: at transformers' 0.02 a tower as narrow as this one barely speaks."""
    for name, weight in visual.blocks.named_parameters():
        if weight.ndim == 2:
            branch_end = name.endswith(("attn.proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(
                weight, std=(weight.shape[1] * (2 * visual.config.depth if branch_end else 1)) ** -0.5
            )


def _whiten(visual: Any, patches: np.ndarray) -> None:
    """Begin with filters that make the strongest components of `patches` (P, 3·2·14·14) equally loud: print is faint beside paper."""
    filters = visual.patch_embed.proj.weight  # (Dv, 3, 2, 14, 14)
    seen = torch.from_numpy(patches).double()
    loudness, components = torch.linalg.eigh(seen.T @ seen / len(seen))
    loudness, components = loudness[-len(filters) :], components[:, -len(filters) :]
    turn = torch.linalg.qr(torch.randn(len(filters), len(filters), dtype=torch.float64))[0]
    floor = 0.01 * loudness[len(filters) // 2]
    with torch.no_grad():
        filters.copy_((turn @ ((loudness + floor).rsqrt()[:, None] * components.T)).reshape(filters.shape))
