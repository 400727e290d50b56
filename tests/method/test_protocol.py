"""Calls are read when their meaning is clear, no box is invented, and conversations render to fixed bytes."""

import json
from types import SimpleNamespace

import pytest

from awares.config import load_params
from awares.errors import AwaresError
from awares.method import protocol
from awares.method.crops import CROPS
from awares.method.protocol import OURS, RELEASED, parse_call

CALL = '<tool_call>\n{"name": "crop", "arguments": {"regions": %s}}\n</tool_call>'


# Spellings that the table of both formats in data/test_released.py does not have
@pytest.mark.parametrize(
    ("text", "status", "crops"),
    [
        ('  <tool_call>{"name":"crop","arguments":{"regions":["left"]}}</tool_call>\n', "valid", "left"),
        (CALL % json.dumps(list(CROPS)), "valid", " ".join(CROPS)),
        ((CALL % '["right", "top').split("}")[0], "recovered", "right top"),
        (CALL % '["left half", "bottom_right"]', "recovered", "left bottom-right"),
        (CALL % '["left"], "zoom": 2', "recovered", "left"), ("top " + CALL % '["left"]', "recovered", "left"),
        (CALL % '["left"]' + CALL % '["top", "left"]', "recovered", "left top"),
        ("<tool_call>\n</tool_call>", "malformed", ""), (CALL % "null", "malformed", ""),
        *((text, "none", "") for text in ("42", "", "the left one", "Regions： north", "{5, 6}", "½ − ¾", "<b>")),
    ],
)  # fmt: skip
def test_calls_are_read(text: str, status: str, crops: str) -> None:
    call = parse_call(text)
    assert (call.status, call.crops) == (status, tuple(crops.split()))


def test_bad_crops_and_questions_are_never_rendered(tiny: SimpleNamespace) -> None:
    for crops in ([], ["top", "top"], ["nowhere"]):
        with pytest.raises(AwaresError, match="crops"):
            OURS.render_call(crops)
    for question in ("", "  ", "what <|image_pad|>?", "<tool_call>"):
        with pytest.raises(AwaresError, match="question"):
            protocol.user_messages(question, [None])
    with pytest.raises(AwaresError, match="2 crops requested but 1 crop images"):
        protocol.messages("q", None, ["top", "left"], [tiny.noise(56, 56, 0)])


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
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    out = tiny.processor.apply_chat_template(conversation(tiny), **options)
    masked = out["input_ids"][0][out["assistant_masks"][0].bool()]  # the assistant's words and nothing else
    assert tiny.processor.tokenizer.decode(masked) == OURS.render_call(["top", "left"]) + "<|im_end|>7<|im_end|>"


def test_a_tool_may_offer_fewer_regions():
    form = protocol.from_params(load_params("mini", overrides={"crops.offered": ["top", "all"]}))
    assert '"regions": ["top", "all"]' in form.system and "bottom" not in form.system
    cases = [(["top"], "valid", ("top",)), (["left"], "malformed", ()), (["top", "left"], "recovered", ("top",))]
    for crops, status, read in cases:
        assert parse_call(OURS.render_call(crops), form) == protocol.Call(read, status, OURS.render_call(crops))
    released = {"crops.offered": ["all"], "protocol.name": "released"}
    for wrong in ({"crops.offered": ["top"]}, {"crops.offered": ["box", "all"]}, released):
        with pytest.raises(AwaresError, match=r"crops\.offered|protocol\.name"):
            load_params("mini", overrides=wrong)


def test_the_prompt_may_come_from_a_file_and_the_images_are_the_released_ones(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(" Look.\n")
    form = protocol.from_params(load_params("mini", "released_eval", {"protocol.system_file": str(file)}))
    assert (form.name, form.system, form.geometry, form.offered) == ("released", "Look.", "released", tuple(CROPS))
    file.write_text("\n")
    for wrong, named in (
        ({"protocol.system_file": str(file)}, "prompt.txt"),
        ({"crops.offered": ["box"], "crops.geometry": "released"}, r"crops\.geometry released"),
        ({"crops.min_pixels": 4000, "crops.max_pixels": 3000}, r"crops\.max_pixels 3000 .* 4000"),
    ):
        with pytest.raises(AwaresError, match=named):
            protocol.from_params(load_params("mini", overrides=wrong))


# What the policy writes, and the regions that it means; the table in src/awares/README.md has more
TOP = '{"name": "crop", "arguments": {"regions": ["top"]}}'
LEFT = TOP.replace("top", "left")
SWAPPED = '{"arguments": {"regions": ["top"]}, "name": "crop"}'
CALLS = {
    '{"type": "function", "function": {"name": "crop", "arguments": "{\\"regions\\": [\\"top\\"]}"}}': ("top",),
    '{"name": "crop", "arguments": "{\'regions\': [\'top\']}"}': ("top",),
    "{‘name’: ‘crop’, ‘arguments’: {‘regions’: [‘top-left’]}}": ("top-left",),
    TOP.replace('"top"', '"“top”"'): ("top",),
    '｛"name"： "crop"， "arguments"： ｛"regions"： ［"top"、 "left"］｝｝': ("top", "left"),
    TOP.replace("crop", "functions.crop"): ("top",),
    TOP.replace('["top"]', "[«top»; ‹left›]"): ("top", "left"),
    TOP.replace('"top"', '"top"；"left"'): ("top", "left"),
    '<invoke name="crop"><parameter name="regions">top, left</parameter></invoke>': ("top", "left"),
    f"[{TOP}, {LEFT}]": ("top", "left"),
    TOP.replace("crop", "zoom") + LEFT: ("left",),
    SWAPPED + SWAPPED.replace("top", "left"): ("top", "left"),
}
NO_REGIONS = "0, 0, 500, 500|'0.5,0,5,7'|'0,0,500,500,3'|'-1,0,500,5'|5.5"
CALLS |= dict.fromkeys((TOP.replace('"top"', bad) for bad in NO_REGIONS.split("|")), ())
BOX = "150,400,600,700"
BOXES = f"{BOX}|150 400 600 700|150; 400; 600; 700|150.0,400,600,700|150.4, 399.6, 600.2, 700|box {BOX}"
BOXES += "|１５０，４００，６００，７００"
NO_BOXES = f"-{BOX}|−{BOX}|- 150, 400, 600, 700|{BOX},800|{BOX},.5|.5,{BOX}|nan,{BOX}|0.15,0.4,0.6,0.7|150,400,600,1700"
NO_BOXES += "|150,400,600,99999999999|1e2,400,600,700,800|150,400,600,1,000|150-400-600-700|600,400,150,700|150,400,600"
NO_BOXES += "|0.0,0.0,1.0,1.0|0,0,1,1"
FREE = protocol.from_params(load_params("mini", overrides={"crops.offered": ["box"]}))
BRACKETS = ('["%s"]', "[[%s]]", "[%s]", "['%s']")


@pytest.mark.parametrize(("written", "crops"), CALLS.items())
def test_a_call_whose_meaning_is_clear_is_not_lost(written: str, crops: tuple[str, ...]) -> None:
    for text in (f"<tool_call>\n{written}\n</tool_call>", f"<tool_call>{written}", written):
        for form in (OURS, RELEASED):
            found = parse_call(text, form)
            assert (found.crops, found.status) == (crops, "recovered" if crops else "malformed")


@pytest.mark.parametrize("box", [*BOXES.split("|"), *NO_BOXES.split("|")])
def test_a_box_is_rounded_or_malformed_but_never_another_box(box: str) -> None:
    crops = (BOX,) if box in BOXES.split("|") else ()
    for brackets in BRACKETS:
        found = parse_call(TOP.replace('["top"]', brackets % box), FREE)
        assert (found.crops, found.status) == (crops, "recovered" if crops else "malformed")
    for end in range(1, len(box)):  # a turn that was cut off within a number
        assert not parse_call(f'<tool_call>{TOP.split("[")[0]}["{box[:end]}', FREE).crops
