"""Train the embedded base model: `python data/base/training/train.py --out runs/base_training`, 8 hours on two cores.

Seven stages from random weights (recipe.yaml): the lower half of the vision tower on glyphs; the whole tower on words,
then on links; the language tower on symbolic pages, then on calls about them; both towers on images, twice.
`--begin review` trains the shipped weights further. A stopped run continues from its last checkpoint.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from awares.engine.model import load_model, make_processor, save_model
from awares.errors import AwaresError
from batches import Batches
from network import Network
from recipe import BASE, FILE, Recipe, Stage, load_recipe
from targets import TOKEN

HEAD_STEPS, HEAD_RATE = 160, 4e-3  # of new dense heads on finished weights
LOG_EVERY, SAVE_EVERY = 20, 100  # steps
BETAS = (0.9, 0.98)


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
    except (AwaresError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    export(recipe, options.out)
    print(f"To install {options.out}/model: copy its files to {BASE}, extend training.json, run `dvc repro`.")


def restart(recipe: Recipe, model: str | Path, work: Path) -> None:
    """Make the checkpoints that stage ``recipe.begin`` starts from, out of a finished ``model``; none for `glyphs`.

    New dense heads are trained on its frozen weights. Raises AwaresError for a model of another architecture.
    """
    stage = recipe.stages[recipe.begin]
    starts = [work / f"{name}.pt" for name in stage.starts_from]
    if all(path.exists() for path in starts):
        return
    network = Network(recipe, stage)
    try:
        network.model.load_state_dict(load_model(model).state_dict())
    except RuntimeError as error:
        raise AwaresError(f"{model}: stage {stage.name} trains another architecture: use --begin glyphs") from error
    optimiser = torch.optim.AdamW(network.heads.parameters(), betas=BETAS, weight_decay=0.0)
    batches = Batches(recipe, network.tokenizer, recipe.stages["vision"], 0, HEAD_STEPS)
    for step, batch in enumerate(DataLoader(batches, batch_size=None, num_workers=1)):
        network.dense.expect(batch)
        with torch.no_grad():
            network.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        loss, _ = network.dense(batch, recipe.stages["vision"].dense)
        loss.backward()
        _update(optimiser, HEAD_RATE * min(1.0, (step + 1) / 10, max(0.05, 2 * (1 - step / HEAD_STEPS))))
    for path in starts:
        torch.save({"weights": network.trained}, path)


def train(recipe: Recipe, work: Path, stage: Stage, until: int | None = None) -> None:
    """Train a stage from its checkpoint in ``work``, if there is one; AwaresError for one of another architecture."""
    network, path, step = Network(recipe, stage), work / f"{stage.name}.pt", 0
    matrices = [w for name, w in network.trained.items() if w.ndim > 1 and "embed" not in name]
    others = [w for name, w in network.trained.items() if w.ndim <= 1 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=BETAS)
    if path.exists():
        state = torch.load(path)
        if state["weights"].keys() != network.trained.keys():
            raise AwaresError(f"{path}: a checkpoint of another architecture: move it away or use another --out")
        network.load_state_dict(state["weights"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    else:
        network.begin(work)
    stop = min(until or stage.steps, stage.steps)
    decay = max(1.0, stage.steps * recipe.decay_fraction)  # steps in which the rate falls to a twentieth
    batches = Batches(recipe, network.tokenizer, stage, step, stop)
    started, logged = time.time(), []
    for batch in DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4):
        loss, log = network.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.trained.values(), 1.0)
        rate = min(1.0, (step + 1) / recipe.warmup_steps, max(0.05, (stage.steps - step) / decay))
        _update(optimiser, stage.learning_rate * rate)
        step += 1
        logged.append({name: float(value) for name, value in log.items()})
        if step % LOG_EVERY == 0 or step == stop:
            row = {"stage": stage.name, "step": step, "seconds": round((time.time() - started) / len(logged), 3)}
            row |= {name: round(float(np.mean([one[name] for one in logged])), 4) for name in logged[0]}
            with open(work / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            started, logged = time.time(), []
        if step % SAVE_EVERY == 0 or step == stop:
            state = {"weights": network.trained, "optimiser": optimiser.state_dict(), "step": step}
            torch.save(state, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)


def export(recipe: Recipe, work: Path) -> None:
    """Write the weights of the last stage as a Hugging Face model in bfloat16, with its processor."""
    stage = recipe.to_run()[-1]
    network = Network(recipe, stage)
    network.load_state_dict(torch.load(work / f"{stage.name}.pt")["weights"])
    model = network.model.to(torch.bfloat16)
    save_model(model, make_processor(network.tokenizer, min_pixels=TOKEN * TOKEN), work / "model")


def _update(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
