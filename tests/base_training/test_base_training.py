"""Base training: its conversations and dense targets, the look-up code, the losses on attention, stages that continue."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

import batches
import examples
import look_up
import network as networks
import targets
import train
from awares.engine.model import load_model, load_processor, make_processor, save_model
from awares.errors import AwaresError
from awares.method import crops, protocol
from awares.mini import scenes
from awares.mini import vocabulary as lexicon
from recipe import BASE, load_recipe
from targets import IGNORE, SUBJECT_ID, SUBJECTS, WORD_ID, WORDS
from tokenizer import build_tokenizer

RECIPE = load_recipe()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(0)


def drawn(stage, seed):
    """Endless examples of a stage."""
    rng = np.random.default_rng(seed)
    while True:
        yield examples.example(rng, RECIPE.stages[stage])


# Conversations


def test_every_protocol_token_is_trained_and_the_crop_tool_is_never_seen(tokenizer):
    rng = np.random.default_rng(0)
    texts = [examples.text_example(rng) for _ in range(1500)]
    assert not [one for one in texts if f'"name": "{protocol.TOOL_NAME}"' in one.system + str(one.turns)]
    seen = {i for one in texts for i in batches.encode(one, tokenizer)[0]}
    seen |= {i for text in lexicon.CANDID for i in tokenizer(text)["input_ids"]}  # system messages of pictures
    words = [protocol.SYSTEM, protocol.OURS.render_call(lexicon.PLACES), protocol.TOOL_ERROR]
    words.append("<tool_response>\n\n</tool_response>")
    assert not [tokenizer.decode([i]) for text in words for i in tokenizer(text)["input_ids"] if i not in seen]


def test_the_shipped_tokenizer_is_that_of_the_training(tokenizer):
    """A `Qwen2Tokenizer` would replace the pattern of the saved file and read 15 as 1 and 5."""
    shipped = load_processor(BASE).tokenizer
    assert shipped.get_vocab() == tokenizer.get_vocab()
    for text in ("$15", "12 and 36%", protocol.SYSTEM):
        assert shipped(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert shipped.decode(shipped(text)["input_ids"]) == text


def test_training_format_is_the_chat_template(tokenizer):
    processor = make_processor(tokenizer, min_pixels=28 * 28)
    one = next(e for e in drawn("joint", 3) if len(e.views) == 1 and e.turns)
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


def test_parts_arrive_as_the_result_of_a_call_that_is_not_learned(tokenizer):
    source = drawn("joint", 3)
    called = [one for one in (next(source) for _ in range(100)) if one.call]
    assert {one.late for one in called} >= {0, 1}
    picture = "<|vision_start|><|vision_end|>"
    for one in called:
        ids, labels = batches.encode(one, tokenizer)
        text = tokenizer.decode(ids).replace("<|image_pad|>", "")
        question, answer = one.turns[one.late]
        result = protocol.tool_suffix(tokenizer, protocol.OURS.reply([None] * (len(one.views) - 1)))
        asked = f"{picture if one.late == 0 else ''}{question}<|im_end|>\n<|im_start|>assistant\n{one.call}<|im_end|>"
        assert f"{asked}{result.replace('<|image_pad|>', '')}{answer}<|im_end|>" in text
        assert text.count(picture) == len(one.views)
        learned = tokenizer.decode([i for i in labels if i != IGNORE])
        assert learned == "".join(f"{said}<|im_end|>" for _, said in one.turns)


def test_answers_behind_a_call_and_answers_that_may_be_doubted_are_marked(tokenizer):
    source = drawn("review", 4)
    found = [one for one in (next(source) for _ in range(60)) if one.turns and one.views]
    assert {bool(one.call) for one in found} == {one.candid for one in found} == {True, False}
    batch = batches.collate(found, tokenizer)
    rows = zip(found, *(batch[name] for name in ("input_ids", "labels", "called", "candid")), strict=True)
    for one, ids, labels, called, numbers in rows:
        assert tokenizer.decode(ids[called]) == (f"{one.turns[one.late][1]}<|im_end|>" if one.call else "")
        doubted = [f"{answer}<|im_end|>" for _, answer in one.turns if one.candid and answer != lexicon.UNREAD]
        names = numbers[numbers > 0].unique_consecutive()
        assert [tokenizer.decode(labels[numbers == name]) for name in names] == doubted


def test_the_argument_of_a_call_is_the_part_that_holds_the_evidence():
    parts = set()
    for one in drawn("calls", 4):
        for (_, said), trail in zip(one.turns, one.trails, strict=False):
            words = json.loads(said.split("\n")[1])["arguments"].values() if said.startswith("<tool_call>") else []
            for part in (word for values in words for word in values if word in crops.CROPS):
                shown = trail.places[0][0]
                assert {index for index, _ in shown} == {0}  # the whole picture shows where, a part does not
                rows, columns = (size // 2 for size in one.views[0].grid)
                left, top, right, bottom = crops.CROPS[part]
                slack = 1 / min(rows, columns)
                for _, patch in shown:
                    x = (patch // 4 % columns + 0.5) / columns
                    y = (patch // 4 // columns + 0.25 + 0.5 * (patch % 4 // 2)) / rows
                    assert left - slack <= x <= right + slack and top - slack <= y <= bottom + slack
                parts.add(part)
        if parts == {*crops.CROPS}:
            break


def test_the_parts_that_a_call_returns_answer_its_question_and_only_candid_half_views_are_unread():
    calls = unread = read = 0
    for one in drawn("review", 5):
        said = sum(answer == lexicon.UNREAD for _, answer in one.turns)
        assert not said or (one.candid and [view.scale for view in one.views] == [0.5])
        unread, read, calls = unread + said, read + one.candid * (len(one.turns) - said), calls + bool(one.call)
        for places in (word for part in one.trails[one.late].places for word in part if word) if one.call else ():
            assert any(view > 0 for view, _ in places)  # not in the half-resolution view alone
        if min(unread, read, calls) >= 40:
            break


# Dense targets


def test_dense_targets_are_where_the_word_is():
    mark = scenes.Mark("anna", (30, 30, 60, 41), 14, chars=(("a", 33.0),))
    scene = scenes.Scene(Image.new("RGB", (112, 112)), [mark])
    view = targets.view(scene)
    assert view.words.nonzero()[0].tolist() == [view.index(2, 2), view.index(2, 3)]
    assert {*view.words} == {0, WORD_ID["anna"]} and (view.glyphs > 0).sum() == 1
    assert (targets.view(scene, halve=True).words == 0).all()  # too small to read
    cut = targets.view(scene, (0.375, 0.0, 1.0, 1.0)).words
    assert IGNORE in cut and not (cut > 0).any()  # part of a word: neither this word nor nothing


def test_attention_is_sent_to_the_token_that_shows_the_next_word(tokenizer):
    source = drawn("lookup", 5)
    items = [next(source) for _ in range(30)]
    batch = batches.collate(items, tokenizer)
    checked = 0
    for row, position, target in zip(*(batch[f"watch_{k}"] for k in ("rows", "positions", "evidence")), strict=True):
        assert batch["labels"][row, position + 1] != IGNORE and not target[:, position + 1 :].any()
        word = tokenizer.decode([batch["input_ids"][row, position + 1]]).strip()
        words = np.concatenate([view.words for view in items[row].views]).reshape(-1, 2, 2)  # token, row of patches
        pads = (batch["input_ids"][row] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).nonzero()[:, 0]
        seen = {int(w) for line in range(2) for i, p in enumerate(pads) if target[line, p] for w in words[i, line]}
        if seen and word in WORD_ID and word not in lexicon.SHAPES and word not in "0123456789":  # counts: not printed
            assert WORD_ID[word] in seen, word
            checked += 1
    assert checked > 60


# The code and the losses


def test_a_token_holds_word_and_subject_of_either_row_apart(tokenizer):
    code = look_up.Code(tokenizer, 192, 0)

    def token(*rows):
        """The code of one visual token from (word, subject) of its upper and of its lower patches."""
        ids = [WORD_ID.get(word, 0) for word, _ in rows for _ in range(2)]
        links = [[SUBJECT_ID.get(subject, 0), 0] for _, subject in rows for _ in range(2)]
        return code(torch.tensor([ids]), torch.zeros(1, 4, dtype=torch.long), torch.tensor([links]))[0]

    def nearest(table, vector):
        return int((torch.nn.functional.normalize(table[1:], dim=-1) @ vector).argmax())

    both = token(("42", "anna"), ("quito", "total"))
    for row, (word, subject) in enumerate([("42", "anna"), ("quito", "total")]):
        assert WORDS[nearest(code.words, both @ code.own_turns[row].T)] == word
        assert SUBJECTS[nearest(code.subjects, both @ code.subject_turns[row].T)] == subject
    assert token(("", ""), ("", "")).abs().max() == 0 == code.distance(both[None], both[None]).item()
    upper = token(("42", ""), ("", ""))
    for others in (*code.subject_turns, code.own_turns[1]):
        assert (upper @ others.T).abs().max() < 1e-3


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
    layers = {look_up.SUBJECT_LAYER: expected["subject"][:, None], look_up.VALUE_LAYER: expected["evidence"]}
    for layer, target in layers.items():
        rows = maps[layer][expected["rows"], :, expected["positions"]]  # (N, H, T)
        shares.append((rows * target.repeat_interleave(6 // target.shape[1], 1)).sum(-1))
    nats = -sum(share.unflatten(1, (2, 3)).mean(-1).log().mean() for share in shares)
    assert loss.item() == pytest.approx(nats.item(), rel=1e-4)
    assert found["evidence_found"].item() == pytest.approx(shares[1].mean().item(), rel=1e-4)


def test_glance_reads_the_attention_of_the_vision_tower(tokenizer):
    network = networks.Network(RECIPE, RECIPE.stages["vision"])
    visual = network.model.model.visual
    view = targets.view(scenes.paint("ledger", np.random.default_rng(2), (224, 336)))
    batch = batches.collate([examples.Example([view])], tokenizer)
    network.dense.expect(batch)
    attention, seen = visual.blocks[-1].attn, {}

    def hook(_module, arguments, named):
        seen.update(named, hidden=arguments[0] if arguments else named["hidden_states"])

    attention.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        loss, share = network.dense.glance.found()
        query, key, _ = attention.qkv(seen["hidden"]).unflatten(1, (3, 5, -1)).unbind(1)  # (P, H, d)
    query, key = apply_rotary_pos_emb_vision(query, key, *seen["position_embeddings"])
    maps = torch.einsum("nhd,phd->hnp", query, key).mul(32**-0.5).softmax(-1)
    order = network.dense.window_order(batch["image_grid_thw"]).tolist()
    where = {4 * token + i: 4 * place + i for place, token in enumerate(order) for i in range(4)}  # patch in the tower
    sources: dict = {}
    for _, slot, value, source in batch["leads"].tolist():
        sources.setdefault((slot, where[value]), set()).add(where[source])
    heads = {0: slice(0, 3), 1: slice(3, 5)}
    shares = np.array([maps[heads[slot], v][:, list(s)].sum(-1).mean().item() for (slot, v), s in sources.items()])
    assert share.item() == pytest.approx(shares.mean(), rel=1e-4)
    assert loss.item() == pytest.approx(-np.log(shares).mean(), rel=1e-4)


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
    loss, plain, _ = answers_loss(30.0, {(1, 6): 60.0})  # an answer that may not be doubted
    assert torch.equal(loss[:2], plain[:2]) and torch.allclose(loss[2:], plain[2:], atol=1e-5)
    _, _, slope = answers_loss(0.0, {(2, 3): 4.0, (2, 7): 4.0, (3, 4): 30.0})
    doubt = 7 / (7 + np.exp(4.0))  # if it commits itself: token 3, or one of seven others
    said = torch.softmax(torch.tensor([0.0, 0, 0, 4, 0, 0, 0, 4, 0]), 0)
    assert slope[2, 7].item() == pytest.approx(said[7].item() - doubt, abs=1e-5)
    assert slope[2, 3].item() == pytest.approx(said[3].item() - (1 - doubt), abs=1e-5)


# Stages


def small(tmp_path, begin):
    """A recipe file with few and small steps."""
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
    (tmp_path / "again").mkdir()
    with pytest.raises(AwaresError, match="other: .*review"):
        train.restart(recipe, tmp_path / "other", tmp_path / "again")
