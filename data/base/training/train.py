"""Train the embedded base model: ``python data/base/training/train.py --out runs/base_training`` (8 hours on two cores).

Seven stages from random weights (recipe.yaml): the lower half of the vision tower on glyphs; the whole tower on words, then
on what belongs to what; the language tower on symbolic pages, then on calls about them; both towers on images, twice.
``--begin review`` trains the shipped weights further instead. A stopped run continues from its last checkpoint.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from architecture import BASE, TOKEN, load_config
from awares.engine.model import load_model, make_processor, save_model
from awares.errors import AwaresError
from batches import Batches
from network import Network
from recipe import FILE, Recipe, Stage, load_recipe
from tokenizer import build_tokenizer

HEAD_STEPS, HEAD_RATE = 160, 4e-3  # of the new dense heads of finished weights
LOG_EVERY, SAVE_EVERY = 20, 100  # steps


def main(arguments: list[str] | None = None) -> None:
    """Run the stages of a recipe and write the model to ``<out>/model``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log.jsonl and the model")
    parser.add_argument("--recipe", type=Path, default=FILE, help="a recipe instead of recipe.yaml")
    parser.add_argument("--begin", choices=["glyphs", "joint", "review"], help="first stage, instead of the recipe's")
    parser.add_argument("--until", type=int, metavar="STEP", help="stop every stage at this step, for a trial")
    parser.add_argument("--weights", type=Path, default=BASE, help="finished model that joint or review starts from")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.begin)
        options.out.mkdir(parents=True, exist_ok=True)
        restart(recipe, options.weights, options.out)
        for stage in recipe.to_run():
            train(recipe, options.out, stage, options.until)
        model = options.out / "model"
        step = export(options.out, recipe, model)
    except (AwaresError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{model}: step {step} of stage {recipe.to_run()[-1].name}. To install it: cp {model}/* {BASE}")
    print("Then add its stages to data/base/training.json and run `dvc repro`: every result starts from these weights.")


def restart(recipe: Recipe, model: str | Path, work: Path) -> None:
    """Make the checkpoints that stage ``recipe.begin`` starts from, out of a finished ``model``; none for the first stage.

    A finished model has no dense heads: new ones are trained on it, while its own weights stay the same. Raises AwaresError
    for a model of another architecture.
    """
    stage = recipe.stages[recipe.begin]
    starts = [_checkpoint(work, name) for name in stage.starts_from]
    if all(path.exists() for path in starts):
        return
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe.seed)
    network = Network(recipe, tokenizer, stage)
    weights = load_model(model).state_dict()
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in network.model.state_dict().items()}:
        raise AwaresError(f"{model}: stage {stage.name} trains another architecture: use --begin glyphs")
    network.model.load_state_dict(weights)
    heads = [v for k, v in network.parameters.items() if k.startswith("heads.")]
    optimiser = torch.optim.AdamW(heads, betas=(0.9, 0.98), weight_decay=0.0)
    batches = Batches(recipe, tokenizer, recipe.stages["vision"], 0, HEAD_STEPS)
    for step, batch in enumerate(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1)):
        _set_rate(optimiser, HEAD_RATE * min(1.0, (step + 1) / 10, max(0.05, 2 * (1 - step / HEAD_STEPS))))
        network.dense.expect(batch)
        with torch.no_grad():
            network.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        loss, _ = network.dense(batch, recipe.stages["vision"].dense)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    state = {f"p.{k}": v.detach().contiguous() for k, v in network.parameters.items()}
    for path in starts:
        save_file(state, path)


def train(recipe: Recipe, work: Path, stage: Stage, until: int | None = None) -> None:
    """Train a stage from its newest checkpoint in ``work`` to step ``until``; it may be interrupted at any moment."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe.seed)
    network = Network(recipe, tokenizer, stage)
    path = _checkpoint(work, stage.name)
    if not path.exists():
        network.begin(work)
    optimiser = _optimiser(network.parameters, recipe)
    step = load_checkpoint(path, network.parameters, optimiser)
    stop = min(until or stage.steps, stage.steps)
    batches = Batches(recipe, tokenizer, stage, step, stop)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)
    started, seen = time.time(), []
    for batch in loader:
        _set_rate(optimiser, learning_rate(step, stage, recipe))
        loss, parts = network.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        seen.append({k: float(v) for k, v in parts.items()})
        if step % LOG_EVERY == 0 or step == stop:
            _log(work, stage.name, step, seen, time.time() - started)
            started, seen = time.time(), []
        if step % SAVE_EVERY == 0 or step == stop:
            save_checkpoint(path, recipe, step, network.parameters, optimiser)


def learning_rate(step: int, stage: Stage, recipe: Recipe) -> float:
    """Warm-up, plateau, linear decay to a twentieth."""
    decay = max(1.0, stage.steps * recipe.decay_fraction)
    return stage.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps, max(0.05, (stage.steps - step) / decay))


def export(work: Path, recipe: Recipe, folder: Path) -> int:
    """Write the newest checkpoint with both towers as a Hugging Face model in bfloat16, with processor; returns its step.

    Raises AwaresError if there is no such checkpoint.
    """
    both = [stage.name for stage in recipe.stages.values() if stage.trains == "both"]
    path = next((path for name in reversed(both) if (path := _checkpoint(work, name)).exists()), None)
    if path is None:
        raise AwaresError(f"{work}: no checkpoint of the stages {' and '.join(both)}: train them first")
    state = load_file(path)
    tokenizer = build_tokenizer(recipe.seed)
    network: Any = Qwen2_5_VLForConditionalGeneration(load_config(tokenizer))
    prefix = "p.model."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    missing = network.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise AwaresError(f"{path}: {len(missing)} weights are missing, such as {min(missing)}: train again")
    save_model(network.to(torch.bfloat16), make_processor(tokenizer, min_pixels=TOKEN * TOKEN), folder)
    return int(state["t"])


def save_checkpoint(
    path: Path, recipe: Recipe, step: int, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """Weights, optimiser state, step and recipe as one safetensors file, replaced atomically."""
    state = {f"p.{k}": v.detach() for k, v in params.items()}
    for name, value in params.items():
        state |= {f"o.{name}|{k}": v for k, v in optimiser.state.get(value, {}).items()}
    state["t"] = torch.tensor(step)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in state.items()}, partial, {"recipe": recipe.model_dump_json()})
    partial.replace(path)


def load_checkpoint(path: Path, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote and return the step, 0 without a file. AwaresError for other parameters."""
    if not path.exists():
        return 0
    state = load_file(path)
    if {k[2:] for k in state if k.startswith("p.")} != set(params):
        raise AwaresError(f"{path}: a checkpoint of another architecture: move it away or use another --out")
    for name, value in params.items():
        value.data.copy_(state[f"p.{name}"])
        moments = {k.split("|")[1]: v for k, v in state.items() if k.startswith(f"o.{name}|")}
        if moments:
            optimiser.state[value] = moments
    return int(state["t"])


def _checkpoint(work: Path, stage: str) -> Path:
    return work / f"{stage}.safetensors"


def _log(work: Path, stage: str, step: int, seen: list[dict[str, float]], seconds: float) -> None:
    row: dict[str, Any] = {"stage": stage, "step": step, "seconds": round(seconds / len(seen), 3)}
    row |= {k: round(float(np.mean([s[k] for s in seen])), 4) for k in seen[0]}
    with open(work / "log.jsonl", "a") as log:
        log.write(json.dumps(row) + "\n")
    print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def _optimiser(params: dict[str, torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; matrices decay, embeddings, norms and biases do not."""
    decayed = {k for k, v in params.items() if v.ndim > 1 and "embed" not in k}
    groups = [
        {"params": [params[k] for k in params if k in decayed], "weight_decay": recipe.weight_decay},
        {"params": [params[k] for k in params if k not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))  # `train` sets the rate


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


if __name__ == "__main__":
    main()
