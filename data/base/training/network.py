"""The network that base training trains: the model, its dense heads, and the loss of each stage."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

from awares.mini import vocabulary as lex
from batches import patchify
from examples import example
from look_up import SPREAD, VALUE_LAYER, Code, Glance, Watch, prepare
from recipe import BASE, Recipe, Stage
from targets import CHARS, IGNORE, LINKS, SUBJECTS, TRAITS, WORDS, Tensors
from tokenizer import build_tokenizer

BLUR = 0.8  # at most, in embeddings
BOUNDS = (0.3, 0.5, 0.7)  # of a side: the edges of the places in `vocabulary.place`
WEIGHTS = {"glyph": 0.5, "early": 1, "word": 1, "trait": 0.5, "link": 1, "glance": 0.5, "code": 1, "misread": 1}
# head -> its size, where in the vision tower it reads, its targets, and its share of right cells in the log.
# Glyphs are read half-way up, words also before the last block, which can then carry them to their values.
HEADS = {
    "glyph": (4 * (1 + len(CHARS)), "middle", "glyphs", "glyphs_read"),
    "early": (1 + len(WORDS), "early", "words", ""),
    "word": (1 + len(WORDS), "late", "words", "words_read"),
    "trait": (1 + len(TRAITS), "late", "traits", ""),
    "link": (LINKS * (1 + len(SUBJECTS)), "late", "links", "links_read"),
}
EMPTY = 0.25  # weight of cells that show nothing


class Network(torch.nn.Module):
    """The model and its heads, drawn from the recipe's seed; ``trained``: the parameters that the stage trains."""

    def __init__(self, recipe: Recipe, stage: Stage) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.recipe, self.stage, self.tokenizer = recipe, stage, build_tokenizer(recipe.seed)
        self.unread = self.tokenizer(lex.UNREAD, add_special_tokens=False)["input_ids"][0]
        config: Any = Qwen2_5_VLConfig.from_pretrained(BASE)
        config.text_config.vocab_size = len(self.tokenizer)
        self.model = Qwen2_5_VLForConditionalGeneration(config).float().train()
        visual: Any = self.model.model.visual
        language: Any = self.model.model.language_model
        width = language.config.hidden_size
        sizes = {name: (visual.config.hidden_size, size) for name, (size, *_) in HEADS.items()}
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(*size) for name, size in sizes.items()})
        self.code = Code(self.tokenizer, width, recipe.seed)
        self.dense = Dense(visual, self.heads, self.code)
        if stage.asks:
            self.watch = Watch(language)
            prepare(self.model, self.code)
        else:
            _spread(visual)
        if stage.name == "glyphs":
            del visual.blocks[visual.config.depth // 2 + 1 :]  # no head reads above
        self.placing = torch.nn.Linear(width, 2 * (len(BOUNDS) + 1))
        language.layers[VALUE_LAYER].register_forward_pre_hook(self._catch, with_kwargs=True)
        self.trained = dict(self.named_parameters())
        if stage.trains != "both":
            sees = {name for name in self.trained if name.startswith(("model.model.visual.", "heads."))}
            self.trained = {k: v for k, v in self.trained.items() if (k in sees) == (stage.trains == "vision")}

    def begin(self, work: Path) -> None:
        """Load what the stages before this one left in ``work``."""
        if self.stage.name == "glyphs":
            rng = np.random.default_rng(self.recipe.seed)
            views = [view for _ in range(90) for view in example(rng, self.stage).views]
            _whiten(self.model.model.visual, np.concatenate([patchify(np.asarray(v.image)) for v in views]))
        for stage in self.stage.starts_from:
            weights = torch.load(work / f"{stage}.pt")["weights"]
            for name in self.trained.keys() & weights.keys():
                self.trained[name].data.copy_(weights[name])

    def loss(self, batch: Tensors) -> tuple[Tensor, Tensors]:
        """The loss of a batch, and the values to log."""
        if self.stage.trains != "language" and "glance" in self.stage.dense:
            self.dense.expect(batch)
        total, log = torch.zeros(()), Tensors()
        if self.stage.asks:
            total, log = self._answers(batch)
        else:
            self.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        if self.stage.trains == "language":
            return total, log
        seen, more = self.dense(batch, self.stage.dense)
        return total + seen, log | more

    def _answers(self, batch: Tensors) -> tuple[Tensor, Tensors]:
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        inputs: dict[str, Any] = {name: batch[name] for name in names}
        if self.stage.trains == "both":
            inputs["pixel_values"] = batch["pixel_values"]
        else:
            # the code (tokens, D) of each picture, blurred as an imperfect vision tower would write it
            code = self.code(*(batch[name].unflatten(0, (-1, 4)) for name in ("words", "traits", "links")))
            pictures = code.split((batch["image_grid_thw"].prod(1) // 4).tolist())
            blurred: Any = tuple(one + BLUR * SPREAD * torch.rand(()) * torch.randn_like(one) for one in pictures)
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=blurred)}
        self.watch.expect({k.removeprefix("watch_"): v for k, v in batch.items() if k.startswith("watch_")})
        hidden = self.model.model(**inputs).last_hidden_state  # (B, T, D)
        learned = batch["labels"][:, 1:] != IGNORE
        target, called, candid = (batch[name][:, 1:][learned] for name in ("labels", "called", "candid"))  # (N,)
        logits = self.model.lm_head(hidden[:, :-1][learned])  # (N, V)
        weights = 1 + (self.stage.after_call_weight - 1) * called.float()
        answer = (weights * doubted(logits, target, candid, self.unread)).sum() / weights.sum()
        place = self._placed(batch)
        missed, found = self.watch.found()
        hits = (logits.argmax(-1) == target).float().mean()
        log = {"answer": answer.detach(), "place": place.detach(), "answer_tokens": hits, **found}
        return answer + missed + place, log

    def _catch(self, _module: Any, arguments: Any, named: Any) -> None:
        self._before_value = arguments[0] if arguments else named["hidden_states"]

    def _placed(self, batch: Tensors) -> Tensor:
        """Cross-entropy of the part of its picture in which a visual token lies, read before the value layer."""
        shown = batch["mm_token_type_ids"] == 1
        if not shown.any():
            return torch.zeros(())
        logits = self.placing(self._before_value[shown]).unflatten(-1, (2, -1))  # (N, axis, part)
        targets = []
        for _, rows, columns in batch["image_grid_thw"].tolist():
            middles = [(torch.arange(n // 2) + 0.5) / (n // 2) for n in (rows, columns)]
            targets.append(torch.cartesian_prod(*(torch.bucketize(m, torch.tensor(BOUNDS)) for m in middles)))
        return F.cross_entropy(logits.flatten(0, 1), torch.cat(targets).flatten())


class Dense:
    """The losses on a forward pass of the vision tower; hooks catch the output of three blocks and of the merger."""

    def __init__(self, visual: Any, heads: torch.nn.ModuleDict, code: Code) -> None:
        self.visual, self.heads, self.code = visual, heads, code
        self._seen: Tensors = {}
        depth = visual.config.depth
        for name, place in {"middle": depth // 2, "early": depth - 2, "late": depth - 1}.items():
            visual.blocks[place].register_forward_hook(partial(self._catch, name))  # (P, Dv) in window order
        visual.merger.register_forward_hook(partial(self._catch, "merged"))  # (P/4, D) in window order
        self.glance = Glance(visual)

    def expect(self, batch: Tensors) -> None:
        """Set where the last block should attend; to be called before the forward pass."""
        targets = []
        for picture, grid in enumerate(batch["image_grid_thw"]):
            tokens = torch.argsort(self.window_order(grid[None]))  # place of each token of the processor's order
            place = (4 * tokens[:, None] + torch.arange(4)).flatten()  # of each patch
            link, value, source = batch["leads"][batch["leads"][:, 0] == picture, 1:].unbind(1)
            targets.append(torch.zeros(LINKS, len(place), len(place), dtype=torch.bool))
            targets[-1][link, place[value], place[source]] = True
        self.glance.expect(targets)

    def window_order(self, grid: Tensor) -> Tensor:
        """(P/4,): the visual tokens in the order in which the vision tower computes them."""
        names = ("spatial_merge_size", "window_size", "patch_size")
        return get_vision_window_index(grid, **{name: getattr(self.visual.config, name) for name in names})[0]

    def __call__(self, batch: Tensors, names: tuple[str, ...]) -> tuple[Tensor, Tensors]:
        """The weighted sum of the losses ``names`` (of WEIGHTS) after a forward pass, and the values to log."""
        order = self.window_order(batch["image_grid_thw"])
        targets = {name: batch[name].unflatten(0, (-1, 4))[order] for name in ("words", "traits", "links", "glyphs")}
        cells = targets["words"], targets["traits"], targets["links"]
        total, log = torch.zeros(()), {}
        for name in names:
            if name == "code":
                loss, log["code_missed"] = self._written(*cells)
            elif name == "misread":
                loss = self.code.misread(self._seen["merged"], *cells)
            elif name == "glance":
                loss, log["sources_found"] = self.glance.found()
            else:
                _, place, kind, read = HEADS[name]
                target = targets[kind].flatten()
                logits = self.heads[name](self._seen[place]).reshape(len(target), -1)
                loss = _cross_entropy(logits, target)
                if read:
                    log[read] = (logits.detach().argmax(-1) == target)[target > 0].float().mean()
            total = total + WEIGHTS[name] * loss
            log[name] = loss.detach()
        return total, log

    def _catch(self, name: str, _module: Any, _inputs: Any, output: Tensor) -> None:
        # blocks put out sums of any scale
        self._seen[name] = output if name == "merged" else F.rms_norm(output, output.shape[-1:])

    def _written(self, words: Tensor, traits: Tensor, links: Tensor) -> tuple[Tensor, Tensor]:
        """Distance of the visual tokens from their code, where all that they show is known; and its relative size."""
        code = self.code(words, traits, links)
        far = self.code.distance(self._seen["merged"], code)
        known = ((words != IGNORE) & (traits != IGNORE) & (links != IGNORE).all(-1)).all(1)
        full = known & (
            (words > 0).any(1) | (traits > 0).any(1) | (links > 0).any((1, 2))
        )  # links: of illegible values, too
        missed = far.detach()[full].sum() / self.code.distance(code[full], torch.zeros(1)).sum()
        return far[full].mean() + EMPTY * far[known & ~full].mean(), missed


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over filled cells plus the weighted mean over empty ones, so that the many empty cells do not dominate."""
    each = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    filled, empty = target > 0, target == 0
    return each[filled].sum() / filled.sum().clamp(min=1) + EMPTY * each[empty].sum() / empty.sum().clamp(min=1)


def doubted(logits: Tensor, target: Tensor, answers: Tensor, unread: int) -> Tensor:
    """Cross-entropy (N,) of ``logits`` (N, V) with ``target`` (N,), where the right answer may be that it is unclear.

    Tokens with the same number in ``answers`` (N,), sorted, are an answer that may be doubted; 0: none. The target of
    such an answer is ``unread``, the token that says so, with the probability that the model would misread it.
    """
    each = F.cross_entropy(logits, target, reduction="none")
    names, place = answers.unique(return_inverse=True)
    first = torch.ne(answers, answers.roll(1)) & (answers > 0)
    first[:1] = answers[:1] > 0
    with torch.no_grad():
        admitted = F.log_softmax(logits[first], -1)[:, unread]
        right = -each.detach()
        right[first] -= torch.log1p(-admitted.exp().clamp(max=1 - 1e-6))  # given that the model does not say unclear
        doubt = 1 - torch.zeros(len(names)).index_add_(0, place, right).exp().clamp(max=1)  # of each answer
        doubt[names == 0] = 0
        doubt = doubt[place]
    said = F.cross_entropy(logits, torch.full_like(target, unread), reduction="none")
    return (1 - doubt) * each + doubt * torch.where(first, said, torch.zeros(()))


def _spread(visual: Any) -> None:
    """Draw the blocks' matrices at the scale of their widths: transformers' 0.02 is too small for this narrow tower."""
    for name, weight in visual.blocks.named_parameters():
        if weight.ndim == 2:
            branches = 2 * visual.config.depth if name.endswith(("attn.proj.weight", "down_proj.weight")) else 1
            torch.nn.init.normal_(weight, std=(weight.shape[1] * branches) ** -0.5)


def _whiten(visual: Any, patches: np.ndarray) -> None:
    """Begin with filters that scale the strongest components of ``patches`` (P, 3·2·14·14) alike: print is faint."""
    filters = visual.patch_embed.proj.weight  # (Dv, 3, 2, 14, 14)
    seen = torch.from_numpy(patches).double()
    loudness, components = torch.linalg.eigh(seen.T @ seen / len(seen))
    loudness, components = loudness[-len(filters) :], components[:, -len(filters) :]
    turn = torch.linalg.qr(torch.randn(len(filters), len(filters), dtype=torch.float64))[0]
    floor = 0.01 * loudness[len(filters) // 2]
    with torch.no_grad():
        filters.copy_((turn @ ((loudness + floor).rsqrt()[:, None] * components.T)).reshape(filters.shape))
