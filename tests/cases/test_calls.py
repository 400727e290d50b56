"""Calls in unusual spellings are read when their meaning is clear; no box is invented; no text raises."""

import pytest
from inputs import BOX, BOXES, CALLS, NO_BOXES, TOP

from awares.config import load_params
from awares.method import protocol
from awares.method.grpo import read_calls
from awares.method.protocol import OURS, RELEASED, parse_call

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


@pytest.mark.parametrize("text", ["a “quoted” word", "“regions”: three", "Regions： north", "½ − ¾", "<b>top</b>"])
def test_an_answer_is_no_call(text: str) -> None:
    assert parse_call(text) == protocol.Call((), "none", text)


def test_grpo_reads_what_trl_served() -> None:
    def call(name: str, regions: object) -> dict:
        return {"name": name, "arguments": {"regions": regions}}

    assert read_calls([call("crop", ["“top”"])], OURS).crops == ("top",)
    for refused in (call("Crop", ["top"]), {"name": "crop", "arguments": '{"regions": ["top"]}'}):
        assert read_calls([refused], OURS).status == "malformed"  # TRL has shown an error, not a crop
    assert read_calls([call("crop", [[150.4, 400, 600, 700]])], FREE).crops == (BOX,)
    assert read_calls([call("crop", [[-150, 400, 600, 700]])], FREE).status == "malformed"
