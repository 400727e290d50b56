"""Base training: the examples as they were drawn, the losses, stages that continue."""

import hashlib
import json

import pytest
import torch

import batches
import train
from awares.engine.model import load_model, load_processor
from awares.errors import AwaresError
from awares.method import protocol
from recipe import BASE, load_recipe
from tokenizer import build_tokenizer

RECIPE = load_recipe()
# sha256 of three batches, without pixels
DRAWS = {"vision": "7f7b06175263e559", "calls": "0cfcde637a0b4d83", "review": "61c5f367ea16dbcc"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(0)


@pytest.mark.parametrize("stage", DRAWS)
def test_the_recipe_draws_the_same_examples_as_ever(tokenizer, stage):
    """A change here means that the shipped weights cannot be trained again."""
    drawn = hashlib.sha256()
    for batch in batches.Batches(RECIPE, tokenizer, RECIPE.stages[stage], 3, 6):
        for name in sorted(batch.keys() - {"pixel_values"}):
            drawn.update(name.encode() + batch[name].numpy().tobytes())
    assert drawn.hexdigest()[:16] == DRAWS[stage]


def test_the_shipped_tokenizer_is_that_of_the_training(tokenizer):
    shipped = load_processor(BASE).tokenizer
    assert shipped.get_vocab() == tokenizer.get_vocab()
    for text in ("$15", "12 and 36%", protocol.SYSTEM):  # a `Qwen2Tokenizer` would read 15 as 1 and 5
        assert shipped(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert shipped.decode(shipped(text)["input_ids"]) == text


def small(tmp_path, begin):
    stages = {name: stage.model_dump() | {"steps": 2, "work": 400} for name, stage in RECIPE.stages.items()}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE.model_dump() | {"stages": stages, "begin": begin}))
    return path


def test_all_stages_are_trained_and_a_stopped_one_continues(tmp_path, capsys):
    path = small(tmp_path, "glyphs")
    train.main(["--recipe", str(path), "--out", str(tmp_path)])
    assert sum(weight.numel() for weight in load_model(tmp_path / "model").parameters()) > 5e6
    assert (tmp_path / "model/model.safetensors").stat().st_size < 20e6 and str(BASE) in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in log] == list(RECIPE.stages)
    recipe, again = load_recipe(path), tmp_path / "again"
    again.mkdir()
    for until in (1, None):
        train.train(recipe, again, recipe.stages["glyphs"], until)
    once, stopped = (torch.load(folder / "glyphs.pt")["weights"] for folder in (tmp_path, again))
    assert all(torch.equal(once[key], stopped[key]) for key in once)
    (again / "words.pt").write_bytes((tmp_path / "glyphs.pt").read_bytes())
    with pytest.raises(AwaresError, match="words.pt"):
        train.train(recipe, again, recipe.stages["words"])
