"""The engine against its claims: reuse equals recomputation, batches equal single rows, tokens are the processor's."""

import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOOL_TOKENS
from PIL import Image
from torch import Tensor

from awares import AwaRes
from awares.engine import batches, chat_format, decode
from awares.engine.decode import Decoder
from awares.engine.model import save_model, visual_tokens
from awares.errors import AwaresError
from awares.method import crops, protocol
from awares.method.rollout import Engine, Trajectory

NAMES = list(crops.CROPS)


TIE = 1e-4  # where the two best logits are nearer than this, rounding may choose


def same(a: list[int], b: list[int], margin: float) -> bool:
    return a == b or margin < TIE


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two sets of logits; suppressed tokens are minus infinity in both."""
    assert torch.equal(torch.isinf(a), torch.isinf(b))
    return (a - b).nan_to_num().abs().max().item()


# Decoding, and going on from a cache


def random_images(tiny: SimpleNamespace, rng: np.random.Generator, count: int) -> list[Image.Image]:
    sides = rng.integers(1, 5, (count, 2)) * 28
    return [tiny.noise(int(width), int(height), int(rng.integers(1 << 30))) for width, height in sides]


def prompt_ids(tiny: SimpleNamespace, decoder: Decoder, question: str, image: Image.Image) -> list[int]:
    messages = protocol.messages(question, None)
    text = tiny.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return decoder.tokenize(text, [image.size])


def suffix_ids(tiny: SimpleNamespace, decoder: Decoder, images: list[Image.Image]) -> list[int]:
    message = protocol.OURS.reply([None] * len(images), None if images else protocol.TOOL_ERROR)
    return decoder.tokenize(protocol.tool_suffix(tiny.processor, message), [image.size for image in images])


def end_early(decoder: Decoder, tokens: list[list[int]]) -> None:
    """Make a token that some rows write early the end of a turn, so that rows end at different steps."""
    decoder.end = next(token for row in tokens for token in row[1:4] if any(token not in other for other in tokens))
    decoder.config.eos_token_id = decoder.end


@pytest.mark.parametrize("seed", range(8))
def test_reuse_equals_recomputation_in_mixed_batches_and_alone(tiny: SimpleNamespace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=6)
    images = [[image] for image in random_images(tiny, rng, 5)]
    rows = [prompt_ids(tiny, decoder, "q" * int(rng.integers(1, 40)), row[0]) for row in images]
    end_early(decoder, decoder.start(rows, images).tokens)
    first = decoder.start(rows, images)
    assert len({len(tokens) for tokens in first.tokens}) > 1

    picked = rng.permutation(5)[:4].tolist()
    new = [random_images(tiny, rng, count) for count in (1, 2, 3, 0)]  # the last row gets an error in words
    suffixes = [suffix_ids(tiny, decoder, crop_images) for crop_images in new]
    reused = decoder.extend(first.state, picked, suffixes, new)
    fresh = decoder.extend(first.state, picked, suffixes, new, reuse=False)
    assert difference(reused.first_logits, fresh.first_logits) < 1e-4
    assert all(map(same, reused.tokens, fresh.tokens, reused.margins))
    for row, index in enumerate(picked):
        alone = decoder.start([rows[index]], [images[index]])
        assert difference(alone.first_logits[0], first.first_logits[index]) < 1e-4
        assert same(alone.tokens[0], first.tokens[index], first.margins[index])
        if alone.tokens[0] != first.tokens[index]:
            continue
        second = decoder.extend(alone.state, [0], [suffixes[row]], [new[row]])
        assert difference(second.first_logits[0], reused.first_logits[row]) < 1e-4
        assert same(second.tokens[0], reused.tokens[row], reused.margins[row])


def test_margins_are_the_gaps_of_the_tokens_that_were_written(tiny: SimpleNamespace) -> None:
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=4)
    image = tiny.noise(56, 56, 0)
    output = decoder.start([prompt_ids(tiny, decoder, "q", image)], [[image]])
    state = output.state
    batch = dict(input_ids=state.ids, attention_mask=state.mask, mm_token_type_ids=state.types)
    pixels = tiny.processor.image_processor([image], return_tensors="pt")
    with torch.no_grad():
        logits = tiny.model(**batch, **pixels).logits[0, -5:-1]
    best = logits.masked_fill(torch.isinf(output.first_logits), float("-inf")).topk(2).values
    assert output.margins[0] == pytest.approx((best[:, 0] - best[:, 1]).min().item(), abs=1e-5)


def test_a_third_turn_can_follow_and_the_first_cache_stays_whole(tiny: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=4)
    images = [[image] for image in random_images(tiny, rng, 2)]
    first = decoder.start([prompt_ids(tiny, decoder, "qq", row[0]) for row in images], images)
    layer: Any = first.state.cache.layers[0]
    before = layer.keys.clone()
    new = [random_images(tiny, rng, 1), random_images(tiny, rng, 2)]
    suffixes = [suffix_ids(tiny, decoder, row) for row in new]
    second = decoder.extend(first.state, [1, 0], suffixes, new)
    third, fresh = (decoder.extend(second.state, [0, 1], suffixes, new, reuse=reuse) for reuse in (True, False))
    assert difference(third.first_logits, fresh.first_logits) < 1e-4
    assert torch.equal(layer.keys, before)


def test_positions_left_on_the_model_by_others_are_not_taken_for_this_batchs(tiny: SimpleNamespace) -> None:
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=4)
    images = [[tiny.noise(84, 56, 0)], [tiny.noise(112, 112, 1)]]
    first = decoder.start([prompt_ids(tiny, decoder, "q", row[0]) for row in images], images)
    suffix = suffix_ids(tiny, decoder, [])
    fresh = decoder.extend(first.state, [1], [suffix], [[]], reuse=False)
    tiny.model.model.rope_deltas = torch.tensor([[-40]])
    assert difference(decoder.extend(first.state, [1], [suffix], [[]]).first_logits, fresh.first_logits) < 1e-4


def test_the_model_cannot_write_an_image_placeholder(tiny: SimpleNamespace) -> None:
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=3)
    decoder.call_token = tiny.processor.image_token_id
    images = [[tiny.noise(56, 56, 0)]]
    output = decoder.start([prompt_ids(tiny, decoder, "q", images[0][0])], images, call_bias=[99.0])
    assert tiny.processor.image_token_id not in output.tokens[0]


def test_start_feeds_the_model_what_the_processor_makes(tiny: SimpleNamespace) -> None:
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=1)
    images = [tiny.noise(84, 56, 0), tiny.noise(112, 28, 1)]
    texts = [
        tiny.processor.apply_chat_template(
            protocol.messages(question, None), tokenize=False, add_generation_prompt=True
        )
        for question in ("short", "rather longer")
    ]
    batch = tiny.processor(text=texts, images=images, padding=True, return_tensors="pt")
    rows = [decoder.tokenize(text, [image.size]) for text, image in zip(texts, images, strict=True)]
    state = decoder.start(rows, [[image] for image in images]).state
    assert torch.equal(state.ids[:, :-1], batch["input_ids"])
    assert torch.equal(state.mask[:, :-1], batch["attention_mask"])
    assert torch.equal(state.types[:, :-1], batch["mm_token_type_ids"])
    assert torch.equal(torch.cat(state.grids), batch["image_grid_thw"])


def test_the_checkpoints_own_generation_settings_do_not_leak_in(tiny: SimpleNamespace, monkeypatch) -> None:
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=8)
    image = tiny.noise(56, 56, 0)
    rows = [prompt_ids(tiny, decoder, "q", image)]
    expected = decoder.start(rows, [[image]]).tokens
    for name, value in {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0, "max_length": 5}.items():
        monkeypatch.setattr(tiny.model.generation_config, name, value)
    assert decoder.start(rows, [[image]]).tokens == expected


# The engine, with a model rigged to write the call that its question asks for


class Rigged(decode.FirstToken):
    """In the first turn, questions ``do X`` make the model write the call X; else it may not write tool tokens."""

    tokenizer: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None:
            self.known = input_ids.shape[1]
        scores = super().__call__(input_ids, scores)
        scores[:, unwritten(self.tokenizer)] = float("-inf")
        for row, ids in enumerate(input_ids):
            text = self.tokenizer.decode(ids)
            order = re.search(r"do (.*?)<\|im_end\|>", text)
            if order and "<tool_response>" not in text:
                wanted = self.tokenizer(script(order.group(1)) + "<|im_end|>")["input_ids"]
                scores[row] = float("-inf")
                scores[row, wanted[min(input_ids.shape[1] - self.known, len(wanted) - 1)]] = 0.0
        return scores


def unwritten(tokenizer) -> list[int]:
    """Tokens that the engine suppresses (placeholders) and that the rigged model does not write of itself."""
    return tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", *TOOL_TOKENS])


def script(order: str) -> str:
    return "<tool_call>oops" if order == "malformed" else protocol.OURS.render_call(order.split(","))


@pytest.fixture
def rigged(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(Rigged, "tokenizer", tiny.processor.tokenizer)
    monkeypatch.setattr(decode, "FirstToken", Rigged)
    return tiny


class Insisting(decode.FirstToken):
    """The call token is the likeliest everywhere."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.token] = scores.max() + 1
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("reuse", [True, False])
def test_the_second_turn_cannot_call(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, reuse: bool) -> None:
    monkeypatch.setattr(decode, "FirstToken", Insisting)
    free, forced, silent = engine(tiny, reuse=reuse).run(
        rows_of(tiny, ["a", "b", "c"]), ["a", "b", "c"], forced=[None, ("top",), ()]
    )
    assert free.call_status == "malformed" and "<tool_call>" in free.turns[1].text
    assert [one.turns[-1].role for one in (free, forced, silent)] == ["assistant"] * 3
    assert not any("<tool_call>" in one.turns[-1].text for one in (free, forced, silent))


ORDERS = [
    "do top-left",
    "plain",
    "do center,bottom",
    "do malformed",
    "plainer still",
    "do all",
    "do left,top-right,top",
]


def rows_of(tiny: SimpleNamespace, orders: list[str]) -> list[Image.Image]:
    return [tiny.noise(112 + 56 * (i % 3), 112 + 56 * (i % 2), i) for i in range(len(orders))]


def engine(tiny: SimpleNamespace, **options) -> Engine:
    return Engine(tiny.model, tiny.processor, **{"max_new_tokens": 16, **options})


def reference(tiny: SimpleNamespace, image: Image.Image, question: str, names: list[str]) -> str:
    """The answer by the plain path of the libraries: the whole conversation through processor and generate, one row."""
    pictures = [crops.cut(image, name) for name in names]
    messages = protocol.messages(question, crops.low_resolution(image), names, pictures)
    batch = tiny.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    forbidden = unwritten(tiny.processor.tokenizer)
    ids = tiny.model.generate(**batch, do_sample=False, max_new_tokens=16, suppress_tokens=forbidden)
    return chat_format.answer_text(tiny.processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :]))


def test_answers_equal_the_libraries_plain_path_row_by_row(rigged: SimpleNamespace) -> None:
    images = rows_of(rigged, ORDERS)
    trajectories = engine(rigged).run(images, ORDERS)
    for image, order, trajectory in zip(images, ORDERS, trajectories, strict=True):
        if order != "do malformed":
            names = order[3:].split(",") if order.startswith("do") else []
            assert trajectory.answer == reference(rigged, image, order, names)


@pytest.mark.parametrize("reuse", [True, False])
def test_batches_of_one_and_of_many_give_the_same(rigged: SimpleNamespace, reuse: bool) -> None:
    orders = [f"{order}" if order.startswith("do") else f"{order} {i}" for i, order in enumerate(ORDERS * 2)]
    images = rows_of(rigged, orders)
    alone = engine(rigged, token_budget=1).run(images, orders)
    together = engine(rigged, token_budget=100_000, reuse=reuse).run(images, orders)
    for one, other in zip(alone, together, strict=True):
        assert one.margin > TIE  # else other images must be taken
        assert (one.answer, one.crops, one.call_status) == (other.answer, other.crops, other.call_status)
        assert one.turns == other.turns
        assert one.call_logprob == pytest.approx(other.call_logprob, abs=1e-4)


def test_results_keep_the_order_of_the_rows_across_windows(rigged: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setattr("awares.engine.batches.WINDOW", 3)
    trajectories = engine(rigged).run(rows_of(rigged, ORDERS), ORDERS, row_ids=[f"r{i}" for i in range(len(ORDERS))])
    assert [trajectory.row_id for trajectory in trajectories] == [f"r{i}" for i in range(len(ORDERS))]
    assert [trajectory.turns[0].text for trajectory in trajectories] == ORDERS


def test_visual_tokens_are_counted_by_turn_after_the_processor(rigged: SimpleNamespace) -> None:
    image = rigged.noise(224, 168, 0)
    called, plain = engine(rigged).run([image, image], ["do top-left,right", "plain"])
    count = rigged.processor.image_processor([image], return_tensors="pt")["image_grid_thw"].prod().item() // 4
    assert called.full_visual_tokens == count == 48
    pieces = [crops.low_resolution(image), crops.cut(image, "top-left"), crops.cut(image, "right")]
    low, first, second = (visual_tokens(piece.size, rigged.processor) for piece in pieces)
    assert [turn.visual_tokens for turn in called.turns] == [low, 0, first + second, 0] == [12, 0, 36, 0]
    assert called.turns[2].images == (pieces[1].size, pieces[2].size)
    assert (called.visual_tokens, called.rtr) == (48, 1.0)
    assert (plain.visual_tokens, plain.rtr, len(plain.turns)) == (12, 0.25, 2)


def test_text_tokens_add_up_to_the_processors_sequence(rigged: SimpleNamespace) -> None:
    image = rigged.noise(224, 168, 0)
    (called,) = engine(rigged).run([image], ["do top-left,right"])
    names = ["top-left", "right"]
    pictures = [crops.cut(image, name) for name in names]
    messages = protocol.messages("do top-left,right", crops.low_resolution(image), names, pictures)
    ids = rigged.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)[0]
    assert sum(turn.text_tokens + turn.visual_tokens for turn in called.turns[:3]) == len(ids)


def test_large_images_are_opened_few_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr("awares.engine.batches.WINDOW", 4)
    monkeypatch.setattr("awares.engine.batches.WINDOW_PIXELS", 100 * 100)
    sides = [10, 10, 10, 10, 10, 100, 80, 80, 10]
    assert list(batches.windows(sides, lambda side: side**2)) == [[10, 10, 10, 10], [10, 100], [80, 80], [10]]


def test_turn_two_encodes_the_crops_only_and_feeds_the_new_tokens_only(rigged: SimpleNamespace, monkeypatch) -> None:
    encoded: list[int] = []
    fed: list[int] = []
    encode = rigged.model.model.get_image_features

    def watched(pixels: Tensor, grid: Tensor, **options: Any) -> Any:
        encoded.append(len(grid))
        return encode(pixels, grid, **options)

    monkeypatch.setattr(rigged.model.model, "get_image_features", watched)
    embed = rigged.model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda module, inputs, output: fed.append(inputs[0].shape[1]))
    (trajectory,) = engine(rigged).run([rigged.noise(224, 168, 0)], ["do top-left,right"])
    hook.remove()
    assert encoded == [1, 2]
    prefills = [length for length in fed if length > 1]
    user, call, tool, _ = trajectory.turns
    assert prefills[0] == user.text_tokens + user.visual_tokens
    assert prefills[1] == tool.text_tokens + tool.visual_tokens + 1  # the end of the call was not in the cache yet
    assert len(prefills) == 2


def test_a_malformed_call_is_answered_with_words_and_never_with_an_image(rigged: SimpleNamespace) -> None:
    image = rigged.noise(112, 112, 0)
    trajectory, other = engine(rigged).run([image, image], ["do malformed", "do top"])
    assert (trajectory.call_status, trajectory.crops) == ("malformed", ())
    assert [turn.role for turn in trajectory.turns] == ["user", "assistant", "tool", "assistant"]
    assert trajectory.turns[2].text == protocol.TOOL_ERROR
    assert trajectory.turns[2].images == () and trajectory.rtr == 0.25
    assert trajectory.answer == trajectory.turns[3].text
    assert other.call_status == "valid"


def test_a_call_that_runs_out_of_tokens_is_closed_before_the_tool_speaks(rigged: SimpleNamespace, monkeypatch) -> None:
    seen: list[str] = []
    extend = Decoder.extend

    def watched(self: Decoder, state: Any, picked: Any, suffixes: Any, *rest: Any, **named: Any) -> Any:
        seen.extend(self.text(suffix) for suffix in suffixes)
        return extend(self, state, picked, suffixes, *rest, **named)

    monkeypatch.setattr(Decoder, "extend", watched)
    (trajectory,) = engine(rigged, max_new_tokens=5).run([rigged.noise(112, 112, 0)], ["do top-left,right"])
    assert (trajectory.call_status, trajectory.crops[:1]) == ("recovered", ("top-left",))
    assert seen[0].startswith("<|im_end|>\n<|im_start|>user\n<tool_response>")


def generated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes (rows, tokens with the answer) of every generation from now on."""
    shapes: list[tuple[int, int]] = []
    generate = Decoder._generate

    def watched(self, state, features, *rest):
        shapes.append((state.ids.shape[0], state.ids.shape[1] + self.max_new_tokens))
        return generate(self, state, features, *rest)

    monkeypatch.setattr(Decoder, "_generate", watched)
    return shapes


def test_batches_stay_within_the_token_budget_and_share_rows_of_both_kinds(rigged, monkeypatch) -> None:
    shapes = generated(monkeypatch)
    engine(rigged, token_budget=2000).run(rows_of(rigged, ORDERS * 2), ORDERS * 2)
    assert all(rows == 1 or rows * tokens <= 2000 for rows, tokens in shapes)
    assert max(rows for rows, _ in shapes) > 2
    shapes.clear()
    engine(rigged, token_budget=100_000).run(rows_of(rigged, ORDERS), ORDERS)
    assert [rows for rows, _ in shapes] == [7, 5]  # all first turns at once, then those that called


def test_forced_decisions(rigged: SimpleNamespace) -> None:
    image = rigged.noise(224, 168, 0)
    forced = [("center", "bottom"), (), None, ("all",)]
    free = engine(rigged).run([image], ["do center,bottom"])[0]
    trajectories = engine(rigged).run([image] * 4, ["do center,bottom", "plain", "plain", "plain"], forced=forced)
    assert [trajectory.crops for trajectory in trajectories] == [("center", "bottom"), (), (), ("all",)]
    assert [trajectory.call_status for trajectory in trajectories] == ["forced", "none", "none", "forced"]
    assert (trajectories[0].answer, trajectories[0].turns) == (free.answer, free.turns)
    assert trajectories[3].answer == reference(rigged, image, "plain", ["all"])
    assert trajectories[0].call_logprob is None and trajectories[2].call_logprob is not None


def test_the_bias_moves_the_call_decision_alone(tiny: SimpleNamespace) -> None:
    images, questions = rows_of(tiny, ["a"] * 6), [f"question {i}" for i in range(6)]
    runs = {bias: engine(tiny, max_new_tokens=8).run(images, questions, call_bias=bias) for bias in (-99.0, 0.0, 99.0)}
    assert all(trajectory.call_status == "none" for trajectory in runs[-99.0])
    assert all(trajectory.turns[1].text.startswith("<tool_call>") for trajectory in runs[99.0])
    unbiased = [trajectory.call_logprob for trajectory in runs[0.0]]
    for bias in (-99.0, 99.0):
        assert [trajectory.call_logprob for trajectory in runs[bias]] == pytest.approx(unbiased, abs=1e-5)
    assert [t.answer for t in runs[0.0]] == [t.answer for t in runs[-99.0]]  # no row was near a call


def test_a_row_that_may_not_call_does_not(tiny: SimpleNamespace, monkeypatch) -> None:
    eager = engine(tiny, max_new_tokens=8)
    run = eager.run([tiny.noise(112, 112, 0)] * 2, ["q", "q"], forced=[(), None], call_bias=1e9)
    assert [t.call_status for t in run] == ["none", "malformed"]


@pytest.mark.parametrize("view, expected", [("full", 24), ("half", 6), ("none", 0), ("half+crops", 6 + 6 + 12)])
def test_single_turn_views(tiny: SimpleNamespace, view: str, expected: int) -> None:
    image = tiny.noise(168, 112, 0)
    chosen = [("top-left", "right")] if view == "half+crops" else None
    (trajectory,) = engine(tiny, max_new_tokens=8).answer([image], ["q?"], view=view, crops=chosen)
    assert (trajectory.visual_tokens, trajectory.full_visual_tokens) == (expected, 24)
    assert [turn.role for turn in trajectory.turns] == ["user", "assistant"] and trajectory.call_status == "none"
    pictures = {"full": [image], "half": [crops.low_resolution(image)], "none": []}.get(
        view, [crops.low_resolution(image), crops.cut(image, "top-left"), crops.cut(image, "right")]
    )
    messages = protocol.user_messages("q?", pictures)
    batch = tiny.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = tiny.model.generate(**batch, do_sample=False, max_new_tokens=8)
    assert protocol.PLAIN_SYSTEM in tiny.processor.tokenizer.decode(batch["input_ids"][0])
    assert trajectory.turns[0].text_tokens + expected == batch["input_ids"].shape[1]
    assert trajectory.answer == chat_format.answer_text(
        tiny.processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :])
    )


def test_large_images_are_capped_first(tiny: SimpleNamespace) -> None:
    (trajectory,) = engine(tiny, max_new_tokens=2, max_side=224).answer([tiny.noise(448, 336, 0)], ["q"], view="full")
    assert trajectory.turns[0].images == ((224, 168),)


def test_trajectories_survive_json(rigged: SimpleNamespace) -> None:
    for trajectory in engine(rigged).run(rows_of(rigged, ORDERS), ORDERS):
        assert Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict()))) == trajectory


def test_a_training_model_is_handed_back_as_it_was(tiny: SimpleNamespace) -> None:
    tiny.model.train()
    try:
        engine(tiny, max_new_tokens=2).run([tiny.noise(56, 56, 0)], ["q"])
        assert tiny.model.training and tiny.model.model.rope_deltas is None
    finally:
        tiny.model.eval()


def test_bad_input_is_named_by_row(tiny: SimpleNamespace) -> None:
    good = tiny.noise(56, 56, 0)
    with pytest.raises(AwaresError, match="row b: 20x56 px"):
        engine(tiny).run([good, Image.new("RGB", (20, 56))], ["q", "q"], row_ids=["a", "b"])
    with pytest.raises(AwaresError, match="row 0: question is empty"):
        engine(tiny).run([good], [" "])
    with pytest.raises(AwaresError, match="1 questions but 2 images"):
        engine(tiny).run([good, good], ["q"])
    with pytest.raises(AwaresError, match="name one or more of top-left"):
        engine(tiny).run([good], ["q"], forced=[("nowhere",)])
    with pytest.raises(AwaresError, match="view 'low'"):
        engine(tiny).answer([good], ["q"], view="low")
    with pytest.raises(AwaresError, match="give crops"):
        engine(tiny).answer([good], ["q"], view="half+crops")
    assert engine(tiny).run([], []) == []


# The library front


def test_ask_takes_a_path_or_an_image_and_tells_what_it_saw(tiny: SimpleNamespace, tmp_path) -> None:
    save_model(tiny.model, tiny.processor, tmp_path / "policy")
    image = tiny.noise(112, 112, 0)
    image.save(tmp_path / "page.png")
    policy = AwaRes.from_pretrained(tmp_path / "policy", max_new_tokens=8)
    asked, again = policy.ask(tmp_path / "page.png", "what?"), policy.ask(image, "what?")
    assert (asked.answer, asked.crops, asked.turns) == (again.answer, again.crops, again.turns)
    assert (asked.visual_tokens, asked.full_visual_tokens, asked.rtr) == (4, 16, 0.25)
    assert policy.ask(image, "what?", call_bias=99.0).call_status == "malformed"
    with pytest.raises(FileNotFoundError, match="no image file .*none.png"):
        policy.ask(tmp_path / "none.png", "what?")
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        AwaRes.from_pretrained(tmp_path / "absent")


def test_an_adapter_folder_finds_its_base_beside_itself(tiny: SimpleNamespace, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    from awares.engine.model import load_model

    save_model(tiny.model, tiny.processor, tmp_path / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_model(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "../base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    image = tiny.noise(112, 112, 0)
    by_name = AwaRes.from_pretrained(tmp_path / "adapter", max_new_tokens=8).ask(image, "q")
    by_hand = AwaRes.from_pretrained(tmp_path / "base", tmp_path / "adapter", max_new_tokens=8).ask(image, "q")
    plain = AwaRes.from_pretrained(tmp_path / "base", max_new_tokens=8).ask(image, "q")
    assert by_name.answer == by_hand.answer != plain.answer


# What batches share


def test_a_batch_passes_the_common_beginning_through_the_model_once(tiny: SimpleNamespace, monkeypatch) -> None:
    """And then gives what padding alone gives: first logits, tokens, and what a second turn makes of the cache."""
    rng = np.random.default_rng(3)
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=5)
    images = [[image] for image in random_images(tiny, rng, 6)]
    rows = [prompt_ids(tiny, decoder, "q" * int(rng.integers(1, 40)), row[0]) for row in images]
    new = [random_images(tiny, rng, count) for count in (1, 2)]
    suffixes = [suffix_ids(tiny, decoder, crop_images) for crop_images in new]
    fed: list[int] = []
    embed = tiny.model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda module, inputs, output: fed.append(inputs[0].numel()))
    shared = decoder.start(rows, images)
    saved = fed[:]
    after = decoder.extend(shared.state, [4, 1], suffixes, new)
    monkeypatch.setattr(decode, "SHARE_FROM", 10**9)
    fed.clear()
    padded = decoder.start(rows, images)
    hook.remove()
    common = rows[0].index(tiny.processor.image_token_id)
    assert saved[0] == common and saved[0] + saved[1] == fed[0] - 5 * common
    assert difference(shared.first_logits, padded.first_logits) < 1e-4
    assert all(map(same, shared.tokens, padded.tokens, padded.margins))
    fresh = decoder.extend(padded.state, [4, 1], suffixes, new, reuse=False)
    assert difference(after.first_logits, fresh.first_logits) < 1e-4


def test_equal_rows_without_images_keep_a_token_of_their_own(tiny: SimpleNamespace) -> None:
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=4)
    row = decoder.tokenize("<|im_start|>user\n" + "long " * 80 + "<|im_end|>\n<|im_start|>assistant\n")
    together, alone = decoder.start([row] * 3, [[]] * 3), decoder.start([row], [[]])
    assert difference(together.first_logits, alone.first_logits.expand(3, -1)) < 1e-4


def test_images_are_encoded_in_portions_of_whole_images(tiny: SimpleNamespace, monkeypatch) -> None:
    rng = np.random.default_rng(5)
    decoder = Decoder(tiny.model, tiny.processor, max_new_tokens=2)
    images = [random_images(tiny, rng, count) for count in (2, 0, 3, 1)]
    whole, grids = decoder._encode(images)
    calls: list[int] = []
    encode = tiny.model.get_image_features

    def watched(patches: Tensor, grid: Tensor) -> Any:
        calls.append(len(patches))
        return encode(patches, grid)

    monkeypatch.setattr(tiny.model, "get_image_features", watched)
    decoder.vision_patches = 40
    parts, same_grids = decoder._encode(images)
    sizes = [int(grid.prod()) for row in grids for grid in row]
    assert sum(calls) == sum(sizes) and len(calls) > 1
    assert all(count <= 40 or count in sizes for count in calls)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(whole, parts, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grids, same_grids, strict=True))
