import json
from types import SimpleNamespace

import pytest
from trl import chat_template_utils as trl_templates

from awares.config import load_params
from awares.engine import chat_format
from awares.errors import AwaresError
from awares.method import protocol
from awares.method.crops import CROPS
from awares.method.protocol import OURS, parse_call

CALL = '<tool_call>\n{"name": "crop", "arguments": {"regions": %s}}\n</tool_call>'


# Spellings that the table of both formats in data/test_released.py does not have
@pytest.mark.parametrize(
    ("text", "status", "crops"),
    [
        (CALL % '["all"]' + "<|im_end|>", "valid", ("all",)),
        ('  <tool_call>{"name":"crop","arguments":{"regions":["left"]}}</tool_call>\n', "valid", ("left",)),
        (CALL % json.dumps(list(CROPS)), "valid", tuple(CROPS)),
        (CALL.replace('"', "'") % "['right']", "recovered", ("right",)),
        ((CALL % '["right", "top').split("}")[0], "recovered", ("right", "top")),
        (CALL % '["Upper left", "centre", "bottom_right"]', "recovered", ("top-left", "center", "bottom-right")),
        (CALL % '["left half", "full image"]', "recovered", ("left", "all")),
        (CALL % '["left"], "zoom": 2', "recovered", ("left",)),
        ("top " + CALL % '["left"]', "recovered", ("left",)),
        (CALL % '["left"]' + CALL % '["top", "left"]', "recovered", ("left", "top")),
        ('{"name": "crop", "arguments": {"regions": ["left"]}}', "recovered", ("left",)),
        ("<tool_call>top-left and right</tool_call>", "recovered", ("top-left", "right")),
        ("<tool_call>\n</tool_call>", "malformed", ()),
        (CALL % "null", "malformed", ()),
        (CALL % '["9"]', "malformed", ()),
        (CALL % "[[0, 0, 500, 500]]", "malformed", ()),
        (CALL % "[0.5]", "malformed", ()),
        ((CALL % '["top"]').replace('"crop"', '"zoom"'), "malformed", ()),
        ("GET_CROPS: []", "malformed", ()),
        ("<tool_call>" + "[" * 5000, "malformed", ()),
        *((text, "none", ()) for text in ("42", "", "the left one", "crop: wheat", "regions: north", "{5, 6}", "all")),
    ],
)
def test_calls_are_read(text: str, status: str, crops: tuple[str, ...]) -> None:
    call = parse_call(text)
    assert (call.status, call.crops) == (status, crops)


@pytest.mark.parametrize("crops", [(name,) for name in CROPS] + [("top-left", "center", "right")])
def test_what_is_rendered_parses_as_valid(crops: tuple[str, ...]) -> None:
    assert parse_call(OURS.render_call(crops)) == protocol.Call(crops, "valid", OURS.render_call(crops))


@pytest.mark.parametrize("crops", [[], ["top", "top"], ["nowhere"]])
def test_bad_crops_are_never_rendered(crops: list[str]) -> None:
    with pytest.raises(AwaresError, match="name one or more of top-left"):
        OURS.render_call(crops)


def test_answer_text_ends_with_the_turn() -> None:
    assert chat_format.answer_text(" 42 <|im_end|>\n<|im_start|>user") == "42"
    assert chat_format.answer_text("42<|endoftext|>") == "42"


@pytest.mark.parametrize("question", ["", "  ", "what <|image_pad|>?", "<tool_call>"])
def test_questions_that_would_break_the_format(question: str) -> None:
    with pytest.raises(AwaresError, match="question"):
        protocol.user_messages(question, [None])


# The chat template


def conversation(tiny: SimpleNamespace, answer: str | None = "7") -> list[dict]:
    crops = [tiny.noise(56, 56, 1), tiny.noise(84, 56, 2)]
    return protocol.messages("How many?", tiny.noise(84, 84, 0), ["top", "left"], crops, answer)


def test_a_conversation_renders_to_these_very_bytes(tiny: SimpleNamespace) -> None:
    text = tiny.processor.apply_chat_template(conversation(tiny), tokenize=False)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        f"<|im_start|>system\n{protocol.SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{image}How many?<|im_end|>\n"
        f"<|im_start|>assistant\n{OURS.render_call(['top', 'left'])}<|im_end|>\n"
        f"<|im_start|>user\n<tool_response>\n{image}{image}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n"
    )


def test_the_system_prompt_is_short_and_names_every_crop() -> None:
    assert len(protocol.SYSTEM.split()) <= 70
    assert all(f'"{name}"' in protocol.SYSTEM for name in CROPS)


def test_plain_conversations_render_as_in_stock_qwen(tiny: SimpleNamespace) -> None:
    plain = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    for messages in (plain, [{"role": "system", "content": "s"}, *plain]):
        for prompt in (False, True):
            ours, stock = (
                tiny.processor.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                for template in (chat_format.CHAT_TEMPLATE, trl_templates.qwen2_5_vl_chat_template)
            )
            assert ours == stock


def test_every_prefix_of_a_conversation_is_a_prefix_of_its_text(tiny: SimpleNamespace) -> None:
    messages = conversation(tiny)
    whole = tiny.processor.apply_chat_template(messages, tokenize=False)
    for length in range(1, len(messages)):
        assert whole.startswith(tiny.processor.apply_chat_template(messages[:length], tokenize=False))
    for length in (2, 4):  # where the assistant goes on
        part = tiny.processor.apply_chat_template(messages[:length], tokenize=False, add_generation_prompt=True)
        assert whole.startswith(part)


def test_the_assistant_mask_holds_the_assistants_words_and_nothing_else(tiny: SimpleNamespace) -> None:
    out = tiny.processor.apply_chat_template(
        conversation(tiny), tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    masked = out["input_ids"][0][out["assistant_masks"][0].bool()]
    assert tiny.processor.tokenizer.decode(masked) == OURS.render_call(["top", "left"]) + "<|im_end|>7<|im_end|>"


def test_the_tool_suffix_continues_the_call_exactly(tiny: SimpleNamespace) -> None:
    messages = conversation(tiny)
    called = tiny.processor.apply_chat_template(messages[:3], tokenize=False)
    whole = tiny.processor.apply_chat_template(messages[:4], tokenize=False, add_generation_prompt=True)
    assert called.rstrip("\n") + protocol.tool_suffix(tiny.processor, messages[3]) == whole


def test_trl_accepts_the_template_for_tools(tiny: SimpleNamespace) -> None:
    assert trl_templates.supports_tool_calling(tiny.processor)
    assert trl_templates.is_chat_template_prefix_preserving(tiny.processor)
    assert trl_templates.is_chat_template_stop_token_trained(tiny.processor)
    assert trl_templates.has_generation_markers(tiny.processor.chat_template)


def test_trl_reads_calls_and_answers_back(tiny: SimpleNamespace) -> None:
    tokenizer = tiny.processor.tokenizer

    def read(text: str) -> dict:
        prefix = tokenizer("<|im_start|>assistant\n")["input_ids"]
        return trl_templates.parse_response(tokenizer, tokenizer(text)["input_ids"], prefix=prefix)

    call = read(OURS.render_call(["top", "left"]) + "<|im_end|>")
    assert call["tool_calls"] == OURS.call_message(["top", "left"])["tool_calls"]
    assert read("blue<|im_end|>") == {"role": "assistant", "content": "blue"}
    assert "tool_calls" not in read("<tool_call>{oops</tool_call><|im_end|>")
    rendered = tiny.processor.apply_chat_template([{"role": "user", "content": "q"}, call], tokenize=False)
    assert rendered.endswith(f"<|im_start|>assistant\n{OURS.render_call(['top', 'left'])}<|im_end|>\n")


def test_messages_need_a_picture_for_every_crop(tiny: SimpleNamespace) -> None:
    with pytest.raises(AwaresError, match="2 crops requested but 1 crop images"):
        protocol.messages("q", None, ["top", "left"], [tiny.noise(56, 56, 0)])


@pytest.mark.parametrize(
    ("text", "status", "crops"),
    [
        (OURS.render_call(["150,400,600,700"]), "valid", ("150,400,600,700",)),
        (OURS.render_call(["0,0,1000,1000"]), "valid", ("0,0,1000,1000",)),
        ('<tool_call>{"name": "crop", "arguments": {"regions": [[150, 400, 600, 700]]}}</tool_call>', "recovered", ("150,400,600,700",)),
        ('<tool_call>{"name": "crop", "arguments": {"regions": ["150 400 600 700"', "recovered", ("150,400,600,700",)),
        ('<tool_call>{"name": "crop", "arguments": {"regions": ["600,400,150,700"]}}</tool_call>', "malformed", ()),
        ('<tool_call>{"name": "crop", "arguments": {"regions": ["150,400,600,1700"]}}</tool_call>', "malformed", ()),
        ('<tool_call>{"name": "crop", "arguments": {"regions": ["150,400,600"]}}</tool_call>', "malformed", ()),
        ('<tool_call>{"name": "zoom", "arguments": {"regions": ["150,400,600,700"]}}</tool_call>', "malformed", ()),
        (OURS.render_call(["top"]), "malformed", ()),
        ("150,400,600,700", "none", ()),
    ],
)  # fmt: skip
def test_free_boxes_are_read_where_they_are_offered(text, status, crops):
    form = protocol.from_params(load_params("mini", overrides={"crops.offered": ["box"]}))
    found = protocol.parse_call(text, form)
    assert (found.status, found.crops) == (status, crops)
    if "150,400,600,700" in crops:
        assert protocol.parse_call(text).crops == ()  # ten names are offered, and no boxes


def test_a_tool_may_offer_fewer_regions():
    form = protocol.from_params(load_params("mini", overrides={"crops.offered": ["top", "all"]}))
    assert '"regions": ["top", "all"]' in form.system and "bottom" not in form.system
    assert protocol.parse_call(OURS.render_call(["top"]), form).status == "valid"
    assert protocol.parse_call(OURS.render_call(["left"]), form) == protocol.Call(
        (), "malformed", OURS.render_call(["left"])
    )
    both = OURS.render_call(["top", "left"])
    assert protocol.parse_call(both, form) == protocol.Call(("top",), "recovered", both)
    for wrong in (["top"], ["box", "all"]):
        with pytest.raises(AwaresError, match="crops.offered"):
            load_params("mini", overrides={"crops.offered": wrong})
    with pytest.raises(AwaresError, match="crops.offered|protocol.name"):
        load_params("mini", overrides={"crops.offered": ["all"], "protocol.name": "released"})
