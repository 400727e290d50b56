"""The embedded suite and the base model's examples: determinism, one size of evidence, boxes, and the training format."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from awares.engine import chat_format
from awares.engine.model import load_processor, make_processor
from awares.method import crops, protocol
from awares.mini import base, pretrain, scenes
from awares.mini import vocabulary as lexicon


@pytest.fixture(scope="module")
def tokenizer():
    return base.build_tokenizer(0)


def test_every_word_has_one_label():
    assert len(base.WORDS) == len(set(base.WORDS))


def test_base_never_sees_the_crop_tool(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = base.text_example(rng)
        assert f'"name": "{protocol.TOOL_NAME}"' not in text.system + str(text.turns)


def test_every_protocol_token_is_alive_in_base_training(tokenizer):
    rng = np.random.default_rng(0)
    seen = {i for _ in range(1500) for i in pretrain.encode(base.text_example(rng), tokenizer)[0]}
    seen |= {i for text in lexicon.CANDID for i in tokenizer(text)["input_ids"]}  # system messages of pictures
    words = [
        protocol.SYSTEM,
        protocol.OURS.render_call(lexicon.PLACES),
        protocol.TOOL_ERROR,
        "<tool_response>\n\n</tool_response>",
    ]
    assert not [tokenizer.decode([i]) for text in words for i in tokenizer(text)["input_ids"] if i not in seen]


def test_the_shipped_tokenizer_reads_what_it_was_trained_to_read(tokenizer):
    """A `Qwen2Tokenizer` would replace the pattern of the saved file, and read 15 as 1 and 5."""
    shipped, rng = load_processor(Path(__file__).parents[2] / "data" / "base").tokenizer, np.random.default_rng(1)
    examples = [base.text_example(rng) for _ in range(200)]
    texts = ["$15", "12 and 36%", *(part for one in examples for turn in one.turns for part in (one.system, *turn))]
    assert [shipped(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    assert [shipped.decode(shipped(text)["input_ids"]) for text in texts] == texts


def test_training_format_is_the_chat_template(tokenizer):
    processor = make_processor(tokenizer, min_pixels=28 * 28)
    rng = np.random.default_rng(3)
    one = next(e for e in (base.example(rng, "joint") for _ in range(99)) if len(e.views) == 1 and e.turns)
    messages = protocol.user_messages(one.turns[0][0], [one.views[0].image], one.system)
    for index, (question, answer) in enumerate(one.turns):
        messages += [{"role": "user", "content": [{"type": "text", "text": question}]}] if index else []
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = pretrain.encode(one, tokenizer)
    assert list(found["input_ids"][0]) == ids
    assert [bool(m) for m in found["assistant_masks"][0]] == [label != base.IGNORE for label in labels]


def test_parts_come_as_the_result_of_a_call_that_is_not_learned(tokenizer):
    chat_format.install(tokenizer)
    rng = np.random.default_rng(3)
    called = [one for one in (base.example(rng, "joint") for _ in range(150)) if one.call]
    assert {one.late for one in called} >= {0, 1}
    for one in called:
        ids, labels = pretrain.encode(one, tokenizer)
        text = tokenizer.decode(ids).replace("<|image_pad|>", "")
        image = "<|vision_start|><|vision_end|>"
        question, answer = one.turns[one.late]
        shown = protocol.tool_suffix(tokenizer, protocol.OURS.reply([None] * (len(one.views) - 1)))
        shown = shown.replace("<|image_pad|>", "")
        assert (
            f"{image if one.late == 0 else ''}{question}<|im_end|>\n<|im_start|>assistant\n{one.call}<|im_end|>{shown}{answer}<|im_end|>"
            in text
        )
        assert text.count(image) == len(one.views)
        assert f'"name": "{protocol.TOOL_NAME}"' not in text
        learned = tokenizer.decode([i for i in labels if i != base.IGNORE])
        assert learned == "".join(f"{said}<|im_end|>" for _, said in one.turns)


def test_the_answer_that_a_call_was_made_for_is_told_apart(tokenizer):
    rng = np.random.default_rng(4)
    drawn = [one for one in (base.example(rng, "review") for _ in range(120)) if one.turns and one.views]
    assert {bool(one.call) for one in drawn} == {True, False}
    batch = pretrain.collate(drawn, tokenizer)
    for one, ids, called in zip(drawn, batch["input_ids"], batch["called"], strict=True):
        assert tokenizer.decode(ids[called]) == (f"{one.turns[one.late][1]}<|im_end|>" if one.call else "")


def test_an_answer_behind_a_call_is_looked_up_by_its_question(tokenizer):
    rng = np.random.default_rng(3)
    one = next(e for e in (base.example(rng, "joint") for _ in range(150)) if e.call and e.trails[e.late].by_word)
    batch = pretrain.collate([one], tokenizer)
    ids, pad = batch["input_ids"][0], tokenizer.convert_tokens_to_ids("<|image_pad|>")
    begin = tokenizer.decode(ids).index("</tool_response>")
    behind = [n for n, at in enumerate(batch["watch_positions"]) if len(tokenizer.decode(ids[: at + 1])) > begin]
    first = behind[0]
    told = tokenizer.decode(ids[batch["watch_subject"][first]]).split()
    assert told and set(told) <= set().union(*one.trails[one.late].subjects)
    assert set(ids[batch["watch_evidence"][first].any(0)].tolist()) - {ids[0].item()} == {
        pad
    }  # a row without it rests on the first


def test_the_argument_of_a_call_is_looked_up_and_the_rest_of_it_is_not(tokenizer):
    rng = np.random.default_rng(3)
    drawn = (base.example(rng, "joint") for _ in range(200))
    one = next(e for e in drawn if e.views and any(said.startswith(chat_format.TOOL_CALL) for _, said in e.turns))
    batch = pretrain.collate([one], tokenizer)
    ids = batch["input_ids"][0]
    words = [tokenizer.decode(token) for token in ids]
    looked_up = {at + 1 for at in batch["watch_positions"].tolist()}
    inside = False
    for at, word in enumerate(words):
        inside = inside and not word.startswith('"]')
        if batch["labels"][0, at] == base.IGNORE or word == chat_format.END_OF_TURN:
            assert at not in looked_up
        elif chat_format.TOOL_CALL in "".join(words[:at]).rsplit("<|im_start|>", 1)[-1]:
            assert inside or at not in looked_up
        inside = inside or (word.endswith('["') and batch["labels"][0, at] != base.IGNORE)
    first = next(at for at in sorted(looked_up) if words[at - 1].endswith('["'))
    assert first in looked_up


def test_a_call_asks_for_the_part_that_holds_the_evidence_which_may_be_too_small_to_read():
    rng, parts, small = np.random.default_rng(4), set(), 0
    while len(parts) < len(crops.CROPS) or not small:
        one = base.example(rng, "calls")
        asked = [t for t, (_, said) in enumerate(one.turns) if one.views and said.startswith(chat_format.TOOL_CALL)]
        told = [json.loads(one.turns[t][1].split("\n")[1])["arguments"] for t in asked]
        if not told or not {word for one in told for (word,) in one.values()} <= {*crops.CROPS}:
            continue
        for t, arguments in zip(asked, told, strict=True):
            ((part,),) = arguments.values()
            view, shown = one.views[0], one.trails[t].places[0][0]
            assert {index for index, _, _ in shown} == {0}  # the whole picture tells where, a part of it does not
            rows, columns = (size // 2 for size in view.words.shape)
            left, top, right, bottom = crops.CROPS[part]
            token_size = 1 / min(rows, columns)
            for _, token, line in shown:
                x, y = (token % columns + 0.5) / columns, (token // columns + 0.25 + 0.5 * line) / rows
                assert left - token_size <= x <= right + token_size and top - token_size <= y <= bottom + token_size
            parts.add(part)
            small += all(view.words[2 * (t // columns) + line, 2 * (t % columns)] == 0 for _, t, line in shown)


@pytest.mark.parametrize(
    ("boxes", "part"),
    [
        ([(10, 10, 40, 20)], "top-left"),
        ([(95, 95, 115, 105)], "center"),
        ([(10, 10, 40, 20), (150, 12, 190, 22)], "top"),
        ([(150, 12, 190, 22), (160, 180, 170, 190)], "right"),
        ([(10, 10, 40, 20), (160, 180, 170, 190)], "all"),
        ([(-1, 30, 8, 40)], "top-left"),
    ],
)
def test_the_part_that_holds_boxes_is_the_smallest_that_does(boxes, part):
    assert base._part(scenes.Scene(Image.new("RGB", (200, 200))), tuple(boxes)) == part


def test_the_parts_that_a_call_returns_answer_the_question_behind_it():
    rng, pairs, calls = np.random.default_rng(5), 0, 0
    while calls < 120:
        one = base.example(rng, "review")
        if one.call:
            calls += 1
            pairs += " and " in one.turns[one.late][1]
            for places in (word for part in one.trails[one.late].places for word in part if word):
                assert any(view > 0 for view, _, _ in places)  # not in the half-resolution view alone
    assert pairs > 0.08 * calls


def test_only_who_is_asked_to_says_that_print_is_too_small_and_only_of_half_views():
    rng, unread, read = np.random.default_rng(6), 0, 0
    while unread < 60 or read < 60:
        one = base.example(rng, "review")
        candid = any(one.system.startswith(told) for told in lexicon.CANDID)
        said = sum(answer == lexicon.UNREAD for _, answer in one.turns)
        assert not said or (candid and [view.scale for view in one.views] == [0.5])
        assert all(any(part) for (_, answer), trail in zip(one.turns, one.trails, strict=bool(one.views))
                   if answer == lexicon.UNREAD for part in trail.places)  # fmt: skip
        unread += said
        read += candid * (len(one.turns) - said)


@pytest.mark.parametrize(("twice", "counts"), [((), 6), (("count",), 8)])
def test_kinds_come_in_turn_and_some_of_them_twice(twice, counts):
    asked = [scenes.QA(kind, "?", ("1",), (), (), False) for kind in ("count", "field") for _ in range(20)]
    kinds = [qa.kind for qa in base._balanced(np.random.default_rng(0), asked, twice)]
    assert (len(kinds), kinds.count("count")) == (12, counts)


def test_patches_are_the_processors(tokenizer):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (168, 224, 3), dtype=np.uint8))
    found = make_processor(tokenizer, min_pixels=28 * 28).image_processor(images=[image], return_tensors="np")
    assert np.allclose(found["pixel_values"], pretrain.patchify(np.asarray(image)), atol=1e-6)


def test_dense_targets_stand_where_the_word_stands():
    scene = scenes.Scene(
        Image.new("RGB", (112, 112)), [scenes.Mark("anna", (30, 30, 60, 41), 14, chars=(("a", 33.0),))]
    )
    grid = base.view(scene).words
    assert grid[2].tolist() == [0, 0, base.WORD_ID["anna"], base.WORD_ID["anna"], 0, 0, 0, 0]
    assert (np.delete(grid, 2, axis=0) == 0).all()
    assert (base.view(scene, halve=True).words == 0).all()  # too small: nothing that can be read
    cut = base.view(scene, (0.375, 0.0, 1.0, 1.0)).words
    assert base.IGNORE in cut and not (cut > 0).any()  # part of a word: neither this word nor nothing
