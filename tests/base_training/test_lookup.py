"""How the embedded base model is taught to look: the code of a visual token, the two look-up layers, where attention is told to go."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from awares.config import load_params
from awares.engine.model import make_processor, save_model
from awares.errors import AwaresError
from awares.mini import base, lookup, pretrain, scenes
from awares.mini import vocabulary as lexicon
from awares.training import checkpoints as training


@pytest.fixture(scope="module")
def tokenizer():
    return base.build_tokenizer(0)


@pytest.fixture(scope="module")
def code(tokenizer):
    return lookup.Code(tokenizer, 192)


def nearest(table, vector):
    return int((torch.nn.functional.normalize(table[1:], dim=-1) @ vector).argmax()) + 1


def token(code, top, bottom):
    """The code of one visual token from (word, subject) of its upper and of its lower patches."""
    ids = [base.WORD_ID[w] if w else 0 for w, _ in (top, top, bottom, bottom)]
    links = [[base.SUBJECT_ID[s] if s else 0, 0] for _, s in (top, top, bottom, bottom)]
    return code(torch.tensor([ids]), torch.zeros(1, 4, dtype=torch.long), torch.tensor([links]))[0]


def test_a_token_tells_what_stands_in_each_row_and_whose_it_is(code):
    both = token(code, ("42", "anna"), ("quito", "total"))
    for row, (word, subject) in enumerate([("42", "anna"), ("quito", "total")]):
        assert base.WORDS[nearest(code.words, both @ code.own_turns[row].T) - 1] == word
        assert base.SUBJECTS[nearest(code.subjects, both @ code.subject_turns[row].T) - 1] == subject
    assert token(code, (None, None), (None, None)).abs().max() == 0
    assert code.distance(both[None], both[None]).item() == 0


def test_each_kind_of_content_keeps_to_its_room(code):
    page = token(code, ("42", None), (None, None))  # only what stands in the upper row
    for others in (*code.subject_turns, code.own_turns[1]):
        assert (page @ others.T).abs().max() < 1e-3
    assert [int(torch.linalg.matrix_rank(turn)) for turn in (*code.subject_turns, *code.own_turns)] == [48] * 4


def test_filters_begin_equally_loud(tokenizer):
    network = pretrain.Network(load_params("mini").base, tokenizer, "glyphs")
    visual = network.model.model.visual
    rng = np.random.default_rng(0)
    patches = np.concatenate(
        [pretrain.patchify(np.asarray(base.example(rng, "glyphs").views[0].image)) for _ in range(8)]
    )
    pretrain._whiten(visual, patches)
    seen = visual.patch_embed(torch.from_numpy(patches))
    loudness = torch.linalg.eigvalsh(seen.T @ seen / len(seen))
    assert 0.5 < loudness.min() and loudness.max() < 1.01


def test_a_stage_begins_with_what_the_ones_before_it_learned(tokenizer, tmp_path):
    recipe = load_params("mini").base
    first = pretrain.Network(recipe, tokenizer, "glyphs")
    assert len(first.model.model.visual.blocks) == 4
    pretrain._save(
        tmp_path / "glyphs.safetensors", recipe, 1, first.parameters, torch.optim.SGD(first.parameters.values())
    )
    second = pretrain.Network(recipe, tokenizer, "words")
    second.begin(tmp_path)
    learned, kept = (n.model.model.visual.blocks[3].mlp.gate_proj.weight for n in (first, second))
    assert torch.equal(learned, kept) and torch.equal(first.heads.glyphs.weight, second.heads.glyphs.weight)


def test_a_finished_model_is_trained_further_under_new_heads(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "HEAD_STEPS", 2)
    recipe = load_params("mini", overrides={"base.begin": "review", "base.stages.vision.work": 400}).base
    torch.manual_seed(3)
    finished = Qwen2_5_VLForConditionalGeneration(base.tiny_config(tokenizer))
    save_model(finished, make_processor(tokenizer), tmp_path / "model")
    pretrain.reopen(recipe, tmp_path / "model", tmp_path)
    assert pretrain.stages(recipe) == ["review"]
    torch.manual_seed(recipe.seed)
    network = pretrain.Network(recipe, tokenizer, "review")
    fresh = network.heads.words.weight.clone()
    network.begin(tmp_path)
    for name, value in finished.state_dict().items():
        assert torch.equal(network.model.state_dict()[name], value), name
    assert not torch.equal(network.heads.words.weight, fresh)


def test_a_model_of_another_architecture_is_not_trained_further(tiny, tmp_path):
    save_model(tiny.model, tiny.processor, tmp_path / "model")
    with pytest.raises(
        AwaresError, match=r"not of the architecture that stage review trains: set base\.begin to glyphs"
    ):
        pretrain.reopen(replace(load_params("mini").base, begin="review"), tmp_path / "model", tmp_path)


def test_the_card_of_a_model_that_was_trained_further_tells_the_whole_training(tmp_path):
    (tmp_path / "training.json").write_text('[{"stage": "joint", "steps": 3, "planned": 3, "hours": 2.0}]')
    log = pd.DataFrame({"stage": "review", "step": [20, 40], "seconds": [90.0, 90.0]})
    recipe = load_params("mini", overrides={"base.begin": "review", "base.stages.review.steps": 50}).base
    told = [
        (one["stage"], one["steps"], one["planned"], one["hours"]) for one in pretrain.history(log, recipe, tmp_path)
    ]
    assert told == [("joint", 3, 3, 2.0), ("review", 40, 50, 1.0)]


def test_what_is_not_known_is_written_as_nothing(code):
    words = torch.tensor([[base.WORD_ID["42"], base.IGNORE, 0, 0]])
    nothing = torch.zeros(1, 4, dtype=torch.long)
    links = torch.full((1, 4, base.LINKS), base.IGNORE)
    known = code(words.clamp(min=0), nothing, torch.zeros_like(links))
    assert torch.equal(code(words, nothing, links), known)


def test_the_value_layer_starts_by_matching_the_subject_and_copying_the_value(tokenizer, code):
    model = Qwen2_5_VLForConditionalGeneration(base.tiny_config(tokenizer))
    lookup.prepare(model, code)
    layer = model.model.language_model.layers[lookup.VALUE_LAYER].self_attn
    unit = lambda x: x / x.square().mean(-1, keepdim=True).sqrt()  # noqa: E731 (what the norm before the layer does)
    looked, named = [], []
    rng = np.random.default_rng(0)
    for _ in range(20):
        words = rng.choice([w for w in base.WORDS if w.isalpha()], 4, replace=False).tolist()
        subjects = rng.choice(base.SUBJECTS, 4, replace=False).tolist()
        page = torch.stack([token(code, (words[i], subjects[i]), (words[i - 1], subjects[i - 1])) for i in range(4)])
        keys, values = (project(unit(page)).unflatten(1, (2, 3, -1)) for project in (layer.k_proj, layer.v_proj))
        for index, subject in enumerate(subjects):
            queries = layer.q_proj(unit(code.subjects[base.SUBJECT_ID[subject]])).unflatten(
                0, (2, 3, -1)
            )  # (row, head, d)
            for row, expected in enumerate([index, (index + 1) % 4]):  # the lower row of the next token holds it too
                looked.append(
                    (torch.einsum("hd,nhd->hn", queries[row], keys[:, row]).argmax(-1) == expected)
                    .float()
                    .mean()
                    .item()
                )
                heads = torch.zeros(2, 3, 32)
                heads[row] = values[expected, row]
                answer = model.lm_head(layer.o_proj(heads.flatten()))
                named.append(
                    int(np.argmax([answer[tokenizer.convert_tokens_to_ids(word)].item() for word in words])) == index
                )
    assert np.mean(looked) > 0.85 and np.mean(named) > 0.9  # chance: 0.25


def test_watch_reads_the_attention_that_the_model_has(tokenizer):
    torch.manual_seed(0)
    network = pretrain.Network(load_params("mini").base, tokenizer, "lookup")
    model, length = network.model.eval(), 12
    ids = torch.randint(20, 900, (2, length))
    targets = {
        "rows": torch.tensor([0, 1]),
        "positions": torch.tensor([7, 9]),
        "subject": torch.arange(length).expand(2, -1).remainder(3).eq(0),
        "evidence": torch.arange(length).expand(2, 2, -1).remainder(4).eq(0),
    }
    network.watch.expect(targets)
    model.model.language_model(input_ids=ids)
    loss, found = network.watch.found()
    model.model.language_model.config._attn_implementation = "eager"
    attentions = model.model.language_model(input_ids=ids, output_attentions=True).attentions
    shares = {}
    for layer, target in (
        (lookup.SUBJECT_LAYER, targets["subject"][:, None]),
        (lookup.VALUE_LAYER, targets["evidence"]),
    ):
        rows = attentions[layer][targets["rows"], :, targets["positions"]]  # (N, H, T)
        shares[layer] = (rows * target.repeat_interleave(6 // target.shape[1], 1)).sum(-1)
    expected = -sum(s.unflatten(1, (2, 3)).mean(-1).log().mean() for s in shares.values())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found["evidence_found"].item() == pytest.approx(shares[lookup.VALUE_LAYER].mean().item(), rel=1e-4)


def test_attention_is_sent_to_the_token_that_shows_the_next_word(tokenizer):
    rng = np.random.default_rng(5)
    items = [base.example(rng, "lookup") for _ in range(30)]
    batch = pretrain.collate(items, tokenizer)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    checked = 0
    for n, (row, position) in enumerate(
        zip(batch["watch_rows"].tolist(), batch["watch_positions"].tolist(), strict=True)
    ):
        assert batch["labels"][row, position + 1] != base.IGNORE
        assert not batch["watch_evidence"][n, :, position + 1 :].any()
        word = tokenizer.decode([batch["input_ids"][row, position + 1]]).strip()
        grid = np.concatenate(
            [pretrain._merge_order(v.words, 1).reshape(-1, 2, 2) for v in items[row].views]
        )  # (tokens, row, column)
        pads = (batch["input_ids"][row] == pad).nonzero()[:, 0]
        if word not in base.WORD_ID or word in base.lex.SHAPES:
            continue
        seen = {
            int(w)
            for line in range(2)
            for i, p in enumerate(pads)
            if batch["watch_evidence"][n, line, p]
            for w in grid[i, line]
        }
        if seen and word not in "0123456789":  # counts are not printed
            assert base.WORD_ID[word] in seen, (word, [base.WORDS[w - 1] for w in seen if w > 0])
            checked += 1
    assert checked > 60


def answers_loss(sure, tokens, unread=7, vocabulary=9):
    """`doubted` of two answers of two tokens, 1 2 and 3 4; the model gives ``sure`` to the right token where it is not told another one."""
    target, answers = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 5, 5])
    logits = torch.zeros(4, vocabulary).scatter_(1, target[:, None], sure)
    for place, token, height in tokens:
        logits[place, token] = height
    logits.requires_grad_()
    loss = pretrain.doubted(logits, target, answers, unread)
    loss.sum().backward()
    return loss.detach(), torch.nn.functional.cross_entropy(logits, target, reduction="none").detach(), logits.grad


def test_an_answer_that_the_model_would_misread_gives_way_to_saying_so():
    loss, plain, _ = answers_loss(30.0, [])
    assert torch.allclose(loss, plain, atol=1e-5)  # sure of all: nothing changes
    loss, plain, slope = answers_loss(30.0, [(3, 6, 60.0)])  # wrong at the last token: the first one should admit it
    assert torch.equal(loss[:2], plain[:2]) and loss[3] < 1e-5 < plain[3] and loss[2] > 25
    assert slope[2, 7] < -0.9 and slope[3].abs().max() < 1e-5
    loss, plain, _ = answers_loss(30.0, [(1, 6, 60.0)])  # an answer that may not be doubted
    assert torch.equal(loss[:2], plain[:2]) and torch.allclose(loss[2:], plain[2:], atol=1e-5)
    _, _, slope = answers_loss(0.0, [(2, 3, 4.0), (2, 7, 4.0), (3, 4, 30.0)])
    share = torch.tensor(
        [0.0] * 7 + [4.0]
    ).exp()  # what it would say, had it to commit itself: 3, or one of seven others
    doubt = 7 / (7 + share[-1])
    said = torch.softmax(torch.tensor([0.0, 0, 0, 4, 0, 0, 0, 4, 0]), 0)
    assert torch.allclose(slope[2, 7], said[7] - doubt, atol=1e-5)
    assert torch.allclose(slope[2, 3], said[3] - (1 - doubt), atol=1e-5)


def test_only_readable_answers_of_candid_conversations_are_doubted(tokenizer):
    found = []
    rng = np.random.default_rng(3)
    while len(found) < 40:
        one = base.example(rng, "review")
        found += [one] if one.views and one.turns else []
    assert {one.candid for one in found} == {True, False}
    batch = pretrain.collate(found, tokenizer)
    seen = 0
    for one, numbers, labels in zip(found, batch["candid"], batch["labels"], strict=True):
        told = [answer for _, answer in one.turns if one.candid and answer != lexicon.UNREAD]
        names = [int(name) for name in numbers[numbers > 0].unique_consecutive()]
        assert [tokenizer.decode(labels[numbers == name]) for name in names] == [f"{text}<|im_end|>" for text in told]
        seen += len(names)
    assert seen == len(batch["candid"][batch["candid"] > 0].unique()) > 20


def test_leads_go_from_a_value_to_the_words_that_lead_to_it():
    rng = np.random.default_rng(2)
    for name in ("ledger", "page"):
        one = base.view(scenes.paint(name, rng, (224, 336)))
        shown, links = one.words.flatten(), one.links.reshape(-1, base.LINKS)
        right = [
            base.SUBJECTS[links[value, slot] - 1] == base.WORDS[shown[source] - 1] for slot, value, source in one.leads
        ]
        assert len(right) > 20 and np.mean(right) > 0.95


def test_glance_reads_the_attention_that_the_vision_tower_has(tokenizer):
    torch.manual_seed(0)
    network = pretrain.Network(load_params("mini").base, tokenizer, "vision")
    visual, rng = network.model.model.visual, np.random.default_rng(2)
    views = [base.view(scenes.paint(name, rng, (224, 336))) for name in ("ledger", "page")]
    batch = pretrain.collate([base.Example([one]) for one in views], tokenizer)
    network.dense.expect(batch)
    attention, seen = visual.blocks[-1].attn, {}

    def hook(_module, arguments, named):
        seen.update(named, hidden=arguments[0] if arguments else named["hidden_states"])

    attention.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    loss, share = network.dense.glance.found()
    query, key, _ = (
        attention.qkv(seen["hidden"]).detach().reshape(len(seen["hidden"]), 3, 5, -1).permute(1, 2, 0, 3)
    )  # (H, P, d)
    cos, sin = seen["position_embeddings"]
    query, key = (
        part.transpose(0, 1)
        for part in apply_rotary_pos_emb_vision(query.transpose(0, 1), key.transpose(0, 1), cos, sin)
    )
    order = pretrain._window_order(visual, batch["image_grid_thw"]).tolist()
    where = {
        4 * token + i: 4 * place + i for place, token in enumerate(order) for i in range(4)
    }  # processor's patch -> tower's
    size = 16 * 24
    found = {}
    for picture, slot, value, source in batch["leads"].tolist():
        found.setdefault((slot, where[picture * size + value]), set()).add(where[picture * size + source])
    shares = []
    for (slot, value), sources in found.items():
        own = range(value // size * size, value // size * size + size)
        for head in (range(3), range(3, 5))[slot]:
            scores = (key[head, list(own)] @ query[head, value]) * 32**-0.5
            shares.append((slot, value, float(scores.softmax(-1)[[s - own[0] for s in sources]].sum())))
    means = {(slot, value): np.mean([s for a, b, s in shares if (a, b) == (slot, value)]) for slot, value, _ in shares}
    assert share.item() == pytest.approx(np.mean(list(means.values())), rel=1e-4)
    assert loss.item() == pytest.approx(-np.mean(np.log(list(means.values()))), rel=1e-4)


def test_links_lead_from_a_value_to_its_subject_and_to_the_word_before():
    scene = scenes.draw("signs", np.random.default_rng(4), (336, 336))
    two = next(qa for qa in scene.qas if " " in qa.answers[0])
    first, second = base.marks_in(scene, two.answer_boxes[0])
    found = {link.mark: link for link in base.links(scene)}
    assert found[first].names == (two.subject,) and found[second].names == (two.subject, first.text)
    assert found[second].sources[1] == ((first.box, True),)
    view = base.view(scene)
    ys, xs = view.cells(second.box, True)
    assert view.links[ys[0], xs[0]].tolist() == [base.SUBJECT_ID[two.subject], base.SUBJECT_ID[first.text]]


def test_a_later_start_is_keyed_by_the_weights_that_it_begins_with(tmp_path):
    """Else a second run of the last stage would find the first one's checkpoint and train nothing."""
    recipe = load_params("mini").base
    folders = [tmp_path / name for name in ("once", "again")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    once, again = (pretrain.inputs(replace(recipe, begin="review"), folder) for folder in folders)
    assert once != again and once == pretrain.inputs(replace(recipe, begin="review"), folders[0])
    assert pretrain.inputs(recipe, folders[0]) == pretrain.inputs(recipe, folders[1])  # from the first stage on
    assert once["code"] == training.code_of(*(str(part.__file__) for part in (pretrain, base, lexicon, lookup, scenes)))
