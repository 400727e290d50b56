"""The engine against its claims: reuse equals recomputation, batches equal single rows, tokens are the processor's."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TOOL_TOKENS
from PIL import Image
from torch import Tensor

from awares.engine import chat_format, decode, images
from awares.engine.decode import Decoder
from awares.engine.model import visual_tokens
from awares.errors import AwaresError
from awares.method import crops, protocol
from awares.method.rollout import Engine

NAMES = list(crops.CROPS)
TIE = 1e-4  # if the two best logits are nearer than this, rounding may decide
ORDERS = ["do top-left", "plain", "do center,bottom", "do malformed", "plainer", "do all", "do left,top-right,top"]


class Rigged(decode.FirstToken):
    """In the first turn, questions ``do X`` make the model write the call X; else it may not write tool tokens."""

    tokenizer: Any = None
    lift = 0.0  # of the call token's first logit

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None:
            self.known = input_ids.shape[1]
            scores[:, self.token] += self.lift
        scores = super().__call__(input_ids, scores)
        scores[:, self.forbidden()] = float("-inf")
        for row, ids in enumerate(input_ids):
            text = self.tokenizer.decode(ids)
            order = "" if "<tool_response>" in text else self.order(text, ids[self.known :].tolist())
            if order:
                wanted = self.tokenizer(script(order) + "<|im_end|>")["input_ids"]
                scores[row] = float("-inf")
                scores[row, wanted[min(input_ids.shape[1] - self.known, len(wanted) - 1)]] = 0.0
        return scores

    def order(self, text: str, written: list[int]) -> str:
        return "".join(re.findall(r"do (.*?)<\|im_end\|>", text))

    def forbidden(self) -> list[int]:
        return unwritten(self.tokenizer)


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
    images, questions = rows_of(tiny, ["a", "b", "c"]), ["a", "b", "c"]
    free, forced, silent = engine(tiny, reuse=reuse).run(images, questions, forced=[None, ("top",), ()])
    assert free.call_status == "malformed" and "<tool_call>" in free.turns[1].text
    assert [one.turns[-1].role for one in (free, forced, silent)] == ["assistant"] * 3
    assert not any("<tool_call>" in one.turns[-1].text for one in (free, forced, silent))


def rows_of(tiny: SimpleNamespace, orders: list[str]) -> list[Image.Image]:
    return [tiny.noise(112 + 56 * (i % 3), 112 + 56 * (i % 2), i) for i in range(len(orders))]


def engine(tiny: SimpleNamespace, **options) -> Engine:
    return Engine(tiny.model, tiny.processor, **{"max_new_tokens": 16, **options})


def by_the_libraries(tiny: Any, messages: list[dict], forbidden: list[int] | None, limit: int) -> tuple[int, str]:
    """Prompt length and answer of the plain path: the whole conversation through processor and generate, one row."""
    batch = tiny.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    length = batch["input_ids"].shape[1]
    ids = tiny.model.generate(**batch, do_sample=False, max_new_tokens=limit, suppress_tokens=forbidden)
    return length, chat_format.answer_text(tiny.processor.tokenizer.decode(ids[0, length:]))


def test_answers_equal_the_libraries_plain_path_row_by_row(rigged: SimpleNamespace) -> None:
    images, forbidden = rows_of(rigged, ORDERS), unwritten(rigged.processor.tokenizer)
    for image, order, done in zip(images, ORDERS, engine(rigged).run(images, ORDERS), strict=True):
        if order != "do malformed":
            names = order[3:].split(",") if order.startswith("do") else []
            pictures = [crops.cut(image, name) for name in names]
            messages = protocol.messages(order, crops.low_resolution(image), names, pictures)
            length, answer = by_the_libraries(rigged, messages, forbidden, 16)
            assert done.answer == answer
            assert sum(turn.text_tokens + turn.visual_tokens for turn in done.turns[:-1]) == length


@pytest.mark.parametrize("reuse", [True, False])
def test_batches_of_one_and_of_many_give_the_same(rigged: SimpleNamespace, reuse: bool, monkeypatch) -> None:
    images, ids = rows_of(rigged, ORDERS), [f"r{i}" for i in range(len(ORDERS))]
    together = engine(rigged, token_budget=100_000, reuse=reuse).run(images, ORDERS, row_ids=ids)
    monkeypatch.setattr("awares.engine.decode.WINDOW", 3)
    alone = engine(rigged, token_budget=1).run(images, ORDERS, row_ids=ids)
    assert [one.row_id for one in alone] == [one.row_id for one in together] == ids
    for one, other in zip(alone, together, strict=True):
        assert one.margin > TIE  # else the test needs other images
        assert (one.answer, one.crops, one.turns) == (other.answer, other.crops, other.turns)
        assert one.call_logprob == pytest.approx(other.call_logprob, abs=1e-4)


def test_visual_tokens_are_counted_by_turn_after_the_processor(rigged: SimpleNamespace) -> None:
    image = rigged.noise(224, 168, 0)
    called, plain, malformed = engine(rigged).run([image] * 3, ["do top-left,right", "plain", "do malformed"])
    count = rigged.processor.image_processor([image], return_tensors="pt")["image_grid_thw"].prod().item() // 4
    assert called.full_visual_tokens == count == 48
    pieces = [crops.low_resolution(image), crops.cut(image, "top-left"), crops.cut(image, "right")]
    low, first, second = (visual_tokens(piece.size, rigged.processor) for piece in pieces)
    assert [turn.visual_tokens for turn in called.turns] == [low, 0, first + second, 0] == [12, 0, 36, 0]
    assert called.turns[2].images == (pieces[1].size, pieces[2].size) and (called.visual_tokens, called.rtr) == (48, 1)
    assert (plain.visual_tokens, plain.rtr, len(plain.turns)) == (12, 0.25, 2)
    assert (malformed.call_status, malformed.crops, malformed.rtr) == ("malformed", (), 0.25)
    error, last = malformed.turns[2:]  # a message and no image
    assert (error.role, error.text, error.images) == ("tool", protocol.TOOL_ERROR, ()) and malformed.answer == last.text


def test_batches_stay_within_the_token_budget_and_share_rows_of_both_kinds(rigged, monkeypatch) -> None:
    shapes: list[tuple[int, int]] = []  # rows, tokens with the answer
    generate = Decoder._generate

    def watched(self, state, features, *rest):
        shapes.append((state.ids.shape[0], state.ids.shape[1] + self.max_new_tokens))
        return generate(self, state, features, *rest)

    monkeypatch.setattr(Decoder, "_generate", watched)
    engine(rigged, token_budget=2000).run(rows_of(rigged, ORDERS * 2), ORDERS * 2)
    assert all(rows == 1 or rows * tokens <= 2000 for rows, tokens in shapes)
    assert max(rows for rows, _ in shapes) > 2
    shapes.clear()
    engine(rigged, token_budget=100_000).run(rows_of(rigged, ORDERS), ORDERS)
    assert [rows for rows, _ in shapes] == [7, 5]  # turn 1 of all rows at once, then turn 2 of those that called


def test_forced_decisions(rigged: SimpleNamespace) -> None:
    image = rigged.noise(224, 168, 0)
    free, whole = engine(rigged).run([image] * 2, ["do center,bottom", "do all"])
    questions, forced = ["do center,bottom", "plain", "plain", "do all"], [("center", "bottom"), (), None, ("all",)]
    done = engine(rigged).run([image] * 4, questions, forced=forced)
    assert [one.crops for one in done] == [("center", "bottom"), (), (), ("all",)]
    assert [one.call_status for one in done] == ["forced", "none", "none", "forced"]
    assert (done[0].answer, done[0].turns, done[3].turns) == (free.answer, free.turns, whole.turns)
    assert done[0].call_logprob is None and done[2].call_logprob is not None


@pytest.mark.parametrize("view, expected", [("full", 24), ("half", 6), ("none", 0), ("half+crops", 6 + 6 + 12)])
def test_single_turn_views(tiny: SimpleNamespace, view: str, expected: int) -> None:
    image = tiny.noise(336, 224, 0)
    chosen = [("top-left", "right")] if view == "half+crops" else None
    (done,) = engine(tiny, max_new_tokens=8, max_side=168).answer([image], ["q?"], view=view, crops=chosen)
    assert (done.visual_tokens, done.full_visual_tokens) == (expected, 24)  # of the capped image, 168 x 112 px
    assert [turn.role for turn in done.turns] == ["user", "assistant"] and done.call_status == "none"
    full = images.cap(image, 168)
    low = crops.low_resolution(full)
    both = [low, crops.cut(full, "top-left"), crops.cut(full, "right")]
    pictures = {"full": [full], "half": [low], "none": [], "half+crops": both}[view]
    messages = protocol.user_messages("q?", pictures)
    assert messages[0]["content"][0]["text"] == protocol.PLAIN_SYSTEM
    length, answer = by_the_libraries(tiny, messages, None, 8)
    assert (done.turns[0].text_tokens + expected, done.answer) == (length, answer)


def test_the_model_cannot_write_an_image_placeholder(tiny: SimpleNamespace) -> None:
    one = engine(tiny, max_new_tokens=3)
    one.decoder.call_token = tiny.processor.image_token_id
    (done,) = one.run([tiny.noise(56, 56, 0)], ["q"], call_bias=99.0)
    assert "<|image_pad|>" not in done.turns[1].text


def test_a_training_model_is_handed_back_as_it_was(tiny: SimpleNamespace) -> None:
    tiny.model.train()
    try:
        engine(tiny, max_new_tokens=2).run([tiny.noise(56, 56, 0)], ["q"])
        assert tiny.model.training and tiny.model.model.rope_deltas is None
    finally:
        tiny.model.eval()


@pytest.mark.parametrize(
    ("sides", "question", "options", "message"),
    [
        ([(56, 56), (20, 56)], "q", {"row_ids": ["a", "b"]}, "row b: 20x56 px"),
        ([(56, 56)], " ", {}, "row 0: question"), ([(56, 56)], "q", {"row_ids": ["a", "b"]}, "2 row_ids"),
        ([(56, 56)], "q", {"forced": [("nowhere",)]}, "nowhere"), ([(56, 56)], "q", {"view": "low"}, "view 'low'"),
        ([(56, 56)], "q", {"view": "half+crops"}, "crops"),
    ],
)  # fmt: skip
def test_bad_input_is_named_by_row(tiny: SimpleNamespace, sides, question, options, message) -> None:
    run = engine(tiny).answer if "view" in options else engine(tiny).run
    with pytest.raises(AwaresError, match=message):
        run([Image.new("RGB", side) for side in sides], [question] * len(sides), **options)
    assert engine(tiny).run([], []) == []
