"""Base training: the examples as they were drawn, the losses, stages that continue."""

import hashlib
import json

import numpy as np
import pytest
import torch

import batches
import examples
import network as networks
import train
from awares.engine.model import load_model, load_processor, make_processor, save_model
from awares.errors import AwaresError
from awares.method import protocol
from recipe import BASE, load_recipe
from targets import IGNORE
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


def test_training_format_is_the_chat_template(tokenizer):
    processor = make_processor(tokenizer, min_pixels=28 * 28)
    rng = np.random.default_rng(3)
    one = next(e for e in iter(lambda: examples.example(rng, RECIPE.stages["joint"]), None) if len(e.views) == 1)
    messages = protocol.user_messages(one.turns[0][0], [one.views[0].image], one.system)
    for index, (question, answer) in enumerate(one.turns):
        messages += [{"role": "user", "content": [{"type": "text", "text": question}]}] if index else []
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = batches.encode(one, tokenizer)
    assert list(found["input_ids"][0]) == ids
    assert [bool(m) for m in found["assistant_masks"][0]] == [label != IGNORE for label in labels]
    pixels = processor.image_processor(images=[one.views[0].image], return_tensors="np")["pixel_values"]
    assert np.allclose(pixels, batches.patchify(np.asarray(one.views[0].image)), atol=1e-6)


def test_watch_reads_the_attention_of_the_model():
    network = networks.Network(RECIPE, RECIPE.stages["lookup"])
    language, length = network.model.eval().model.language_model, 12
    ids, spots = torch.randint(20, 900, (2, length)), torch.arange(length)
    expected = {"rows": torch.tensor([0, 1]), "positions": torch.tensor([7, 9])}
    expected |= {"subject": spots.expand(2, -1) % 3 == 0, "evidence": spots.expand(2, 2, -1) % 4 == 0}
    network.watch.expect(expected)
    language(input_ids=ids)
    loss, found = network.watch.found()
    language.config._attn_implementation = "eager"
    maps = language(input_ids=ids, output_attentions=True).attentions
    shares = []
    for layer, target in ((1, expected["subject"][:, None]), (3, expected["evidence"])):
        rows = maps[layer][expected["rows"], :, expected["positions"]]  # (N, H, T)
        shares.append((rows * target.repeat_interleave(6 // target.shape[1], 1)).sum(-1))
    nats = -sum(share.unflatten(1, (2, 3)).mean(-1).log().mean() for share in shares)
    assert loss.item() == pytest.approx(nats.item(), rel=1e-4)
    assert found["evidence_found"].item() == pytest.approx(shares[1].mean().item(), rel=1e-4)


def answers_loss(sure, logits_at):
    """`doubted` of two answers, tokens 1 2 and 3 4: logit ``sure`` for the right token, others at (place, token)."""
    target, answers = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 5, 5])
    logits = torch.zeros(4, 9).scatter_(1, target[:, None], sure)
    for place, height in logits_at.items():
        logits[place] = height
    logits.requires_grad_()
    loss = networks.doubted(logits, target, answers, unread=7)
    loss.sum().backward()
    return loss.detach(), torch.nn.functional.cross_entropy(logits, target, reduction="none").detach(), logits.grad


def test_an_answer_that_the_model_would_misread_becomes_unclear():
    loss, plain, _ = answers_loss(30.0, {})
    assert torch.allclose(loss, plain, atol=1e-5)  # sure of all: nothing changes
    loss, plain, slope = answers_loss(30.0, {(3, 6): 60.0})  # wrong at the last token: the first one should admit it
    assert torch.equal(loss[:2], plain[:2]) and loss[3] < 1e-5 < plain[3] and loss[2] > 25
    assert slope[2, 7] < -0.9 and slope[3].abs().max() < 1e-5
    _, _, slope = answers_loss(0.0, {(2, 3): 4.0, (2, 7): 4.0, (3, 4): 30.0})
    doubt = 7 / (7 + np.exp(4.0))  # if it commits itself: token 3, or one of seven others
    said = torch.softmax(torch.tensor([0.0, 0, 0, 4, 0, 0, 0, 4, 0]), 0)
    assert slope[2, 7].item() == pytest.approx(said[7].item() - doubt, abs=1e-5)
    assert slope[2, 3].item() == pytest.approx(said[3].item() - (1 - doubt), abs=1e-5)


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


def test_finished_weights_are_trained_further_under_new_heads(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HEAD_STEPS", 2)
    recipe = load_recipe(small(tmp_path, "review"))
    train.restart(recipe, BASE, tmp_path)
    assert [stage.name for stage in recipe.to_run()] == ["review"]
    network = networks.Network(recipe, recipe.stages["review"])
    fresh = network.heads["word"].weight.clone()
    network.begin(tmp_path)
    assert all(torch.equal(network.model.state_dict()[k], v) for k, v in load_model(BASE).state_dict().items())
    assert not torch.equal(network.heads["word"].weight, fresh)
    save_model(tiny.model, tiny.processor, tmp_path / "other")
    with pytest.raises(AwaresError, match="other: .*review"):
        train.restart(recipe, tmp_path / "other", tmp_path / "again")
