"""The released artefacts (PAPER §7): the parser's table, the released protocol from prompt to second turn, the dataset."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import published
import pytest

from awares import AwaRes
from awares.config import CROP_NAMES, load_params
from awares.data import released
from awares.engine.model import save_model
from awares.engine.rows import load_rows
from awares.errors import AwaresError
from awares.method import protocol, sft
from awares.method.crops import CROPS
from awares.method.grpo import build_grpo_trainer
from awares.method.rollout import Engine, Trajectory
from awares.study import curation_tables

ROOT = Path(__file__).parents[2]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def settings(**values):
    return load_params("mini", overrides=values, path=ROOT / "params.yaml")


# What the parser accepts and rejects: a turn, its status in our and in the released protocol, crops, note
SPELLINGS = """\
CROP(["top"]) | valid | recovered | top | our format
CROP(["bottom", "center"]) | valid | recovered | bottom, center | several, in the order asked
CROP(["all"]) | valid | recovered | all | the whole image
GET_CROPS: ['3'] | recovered | valid | bottom-right | the paper's format
GET_CROPS: ['0', '5'] | recovered | valid | top-left, top | several ids
GET_CROPS: ['all'] | recovered | valid | all | the whole image
GET_CROPS: ['0','5'] | recovered | recovered | top-left, top | no space
GET_CROPS:['0', '5'] | recovered | recovered | top-left, top | no space after the colon
GET_CROPS ['3'] | recovered | recovered | bottom-right | no colon, as the released evaluation asks
GET_CROPS: ["0", "5"] | recovered | recovered | top-left, top | double quotes
GET_CROPS: [0, 5] | recovered | recovered | top-left, top | numbers
GET_CROPS: [0,5,6,7] | recovered | recovered | top-left, top, bottom, left | four numbers
GET_CROPS: 5 | recovered | recovered | top | no list
GET_CROPS: ['top-left'] | recovered | recovered | top-left | a name for an id
GET_CROPS: ['5', '5'] | recovered | recovered | top | one twice
GET_CROPS: ['5', '9'] | recovered | recovered | top | an unknown id beside a known one
GET_CROPS: ['0', '5' | recovered | recovered | top-left, top | cut off
get_crops: ['8'] | recovered | recovered | right | small letters
It is too small. GET_CROPS: ['4'] | recovered | recovered | center | words before
CROP("top") | recovered | recovered | top | no list
CROP(["Upper left", "centre"]) | recovered | recovered | top-left, center | other words
CROP(["top", "top"]) | recovered | recovered | top | one twice
CROP(["left", "nowhere"]) | recovered | recovered | left | an unknown name beside a known one
<tool_call> {'name': 'crop', 'arguments': {'regions': ['right']}} </tool_call> | recovered | recovered | right | single quotes
<tool_call>top-left and right</tool_call> | recovered | recovered | top-left, right | no JSON
GET_CROPS: [] | malformed | malformed |  | no region
GET_CROPS: ['9'] | malformed | malformed |  | an unknown id
GET_CROPS | malformed | malformed |  | cut off too early
CROP([]) | malformed | malformed |  | no region
CROP(["nowhere"]) | malformed | malformed |  | an unknown name
CROP([[0, 0, 500, 500]]) | malformed | malformed |  | a box is no region
CROP(["0,0,500,500"]) | malformed | malformed |  | nor is its text
<tool_call> {"name": "zoom", "arguments": {"regions": ["top"]}} </tool_call> | malformed | malformed |  | another tool
top left | none | none |  | a place as an answer
['0', '5'] | none | none |  | a list as an answer
all | none | none |  | a word of the protocol as an answer
crop: wheat | none | none |  | a word that looks like a key
""".splitlines()


@pytest.mark.parametrize("line", SPELLINGS)
def test_the_table_of_accepted_and_rejected_strings(line: str) -> None:
    short, ours, released_form, crops, note = line.split(" | ")
    call_of = r'<tool_call> {"name": "crop", "arguments": {"regions": \1}} </tool_call>'
    printed = re.sub(r"CROP\((.*)\)", call_of, short)
    text = printed.replace("<tool_call> ", "<tool_call>\n").replace(" </tool_call>", "\n</tool_call>")
    for name, status in (("ours", ours), ("released", released_form)):
        call = protocol.parse_call(text, protocol.get_protocol(name))
        assert (call.status, ", ".join(call.crops)) == (status, crops)
        assert protocol.parse_call(text + "<|im_end|>", protocol.get_protocol(name)).status == status
    readme = (ROOT / "src" / "awares" / "README.md").read_text()
    assert f"| `{printed}` | {ours} | {released_form} | {crops} | {note} |" in readme


@pytest.mark.parametrize("crops", [(name,) for name in CROPS] + [("top-left", "center", "right"), ("all", "top")])
def test_what_the_released_protocol_renders_it_reads_as_valid(crops: tuple[str, ...]) -> None:
    text = protocol.RELEASED.render_call(crops)
    assert protocol.parse_call(text, protocol.RELEASED) == protocol.Call(crops, "valid", text)
    assert text.startswith(protocol.RELEASED.opening)


def test_the_released_format_is_the_papers() -> None:
    assert protocol.RELEASED.render_call(["top-left", "top"]) == "GET_CROPS: ['0', '5']"
    with pytest.raises(AwaresError, match="each once"):
        protocol.RELEASED.render_call(["top", "top"])


# The interaction


def test_a_released_conversation_renders_to_these_very_bytes(tiny: SimpleNamespace) -> None:
    messages = protocol.messages("How many?", None, ["top", "all"], None, "7", protocol.RELEASED)
    assert tiny.processor.apply_chat_template(messages, tokenize=False) == (
        f"<|im_start|>system\n{protocol.RELEASED_SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}How many?<|im_end|>\n"
        "<|im_start|>assistant\nGET_CROPS: ['5', 'all']<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}{IMAGE}<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n"
    )


def seen_by_the_model(tiny: SimpleNamespace, engine: Engine, crops: tuple[str, ...]) -> tuple[str, Trajectory]:
    """The text of everything up to the second answer, images folded to one placeholder, and the trajectory."""
    kept: list[str] = []
    finish = engine._trajectory

    def keeping(row: Any) -> Trajectory:
        kept.append(tiny.processor.tokenizer.decode(row.ids))
        return finish(row)

    engine._trajectory = keeping  # type: ignore[method-assign]
    [done] = engine.run([tiny.noise(112, 84, 1)], ["How many?"], forced=[crops])
    return re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", kept[0]), done


@pytest.mark.parametrize("name", ["ours", "released"])
def test_a_forced_call_shows_the_model_what_training_shows_it(tiny: SimpleNamespace, name: str) -> None:
    form = protocol.get_protocol(name)
    engine = Engine(tiny.model, tiny.processor, max_new_tokens=4, protocol=name)
    text, done = seen_by_the_model(tiny, engine, ("top", "center"))
    conversation = protocol.messages("How many?", None, ["top", "center"], protocol=form)
    expected = tiny.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text.startswith(expected)
    assert [turn.role for turn in done.turns][2:] == ["tool" if name == "ours" else "user", "assistant"]
    assert done.crops == ("top", "center") and len(done.turns[2].images) == 2 and done.turns[2].text == ""


def test_the_call_bias_acts_on_the_first_token_of_the_protocols_call(tiny: SimpleNamespace) -> None:
    for form in (protocol.OURS, protocol.RELEASED):
        engine = Engine(tiny.model, tiny.processor, max_new_tokens=3, protocol=form)
        first = tiny.processor.tokenizer(form.opening)["input_ids"][0]
        assert engine.decoder.call_token == first
        [done] = engine.run([tiny.noise(84, 84, 2)], ["q"], call_bias=1e6)
        assert tiny.processor.tokenizer.decode(first) in done.turns[1].text


def test_from_pretrained_takes_the_protocol_and_a_prompt_of_ones_own(tiny: SimpleNamespace, tmp_path: Path) -> None:
    save_model(tiny.model, tiny.processor, tmp_path / "policy")
    policy = AwaRes.from_pretrained(tmp_path / "policy", protocol="released", max_new_tokens=3)
    assert policy.engine.protocol == protocol.RELEASED
    assert policy.ask(tiny.noise(84, 84, 3), "q").turns[0].role == "user"
    with pytest.raises(AwaresError, match="unknown 'theirs', choose from ours, released"):
        AwaRes.from_pretrained(tmp_path / "policy", protocol="theirs")
    (tmp_path / "prompt.txt").write_text("Look closely.\n")
    params = settings(**{"protocol.name": "released", "protocol.system_file": str(tmp_path / "prompt.txt")})
    engine = Engine.from_params(tiny.model, tiny.processor, params, max_new_tokens=3)
    text, _ = seen_by_the_model(tiny, engine, ("top",))
    assert text.startswith("<|im_start|>system\nLook closely.<|im_end|>\n") and "GET_CROPS: ['5']" in text
    with pytest.raises(AwaresError, match="none.txt: no system prompt there; protocol.system_file"):
        protocol.from_params(settings(**{"protocol.system_file": "none.txt"}))


def test_sft_speaks_the_protocol_and_grpo_refuses_what_it_cannot(tiny: SimpleNamespace, tmp_path: Path) -> None:
    params = settings(**{"protocol.name": "released"})
    row = {"id": "a", "question": "q", "answers": ["x"], "label": "HR", "target_crops": ["top"]}
    text = tiny.processor.apply_chat_template(
        sft.conversation(row, "trajectory", None, protocol.from_params(params)), tokenize=False
    )
    assert "assistant\nGET_CROPS: ['5']<|im_end|>" in text and "tool_call" not in text
    rows = datasets.Dataset.from_list([row])
    with pytest.raises(AwaresError, match="protocol.name released"):
        build_grpo_trainer(params, rows, tiny.model, tiny.processor, tmp_path)


# The dataset


def test_the_released_dataset_gives_curated_rows(tiny: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    published.released(tmp_path / "hub", 12, 80_000)
    published.benchmarks(tmp_path / "hub", 2, 80_000)  # chartqa's first two pictures are those of rows 0 and 1
    places = {"data.hub_root": str(tmp_path / "hub"), "paths.runs": str(tmp_path / "runs")}
    params = settings(**{"curation.released": "awares", "data.validation_rows": 1, **places})
    curated = released.curate_released(params, tmp_path / "out")
    rows, held = curated["train"], curated["validation"]
    assert (
        len(held) == 5 and len(rows) == 5 and set(held["split"]) == {"validation"} and set(rows["split"]) == {"train"}
    )
    assert {int(row_id[-2:]) for row_id in [*rows["id"], *held["id"]]} == set(range(2, 12))
    assert rows["id"][:] != sorted(rows["id"])  # so that the first share of them is a fair one
    for row in [*rows, *held]:
        number = int(row["id"][-2:])
        crops = list(dict.fromkeys([CROP_NAMES[number % 9], "top"])) if number != 3 else ["all"]
        assert row["target_crops"] == (crops if number % 2 else [])
        assert row["label"] == ("HR" if number % 2 else "LR")
        assert row["question"] == "What is this?" and row["answers"] == [f"a {number}"]
        assert row["image"].size == (168, 112)  # the picture, not the crop
    reference = {"low_answer", "high_answer", "verdict", "label", "both_wrong", "target_crops", "oracle_answer_boxes"}
    assert reference <= set(rows.column_names) and curation_tables.judge_names(rows) == ["released"]
    read = load_rows(tmp_path / "out/train/dataset")
    values = {"sft.max_length": 8192, "protocol.max_new_tokens": 64}
    assert len(sft.plan_samples(read, tiny.processor, settings(**values))) == 5 * settings(**values).sft.epochs
    needed = sum(label == "HR" for label in read["label"])
    assert curation_tables.label_shares(read).set_index("judge").hr["released"] == 20 * needed > 0
    again = released.curate_released(params, tmp_path / "again")
    assert [again[split]["id"][:] for split in again] == [curated[split]["id"][:] for split in curated]
    with pytest.raises(AwaresError, match="curated.awares: 10 usable rows .*data.validation_rows"):
        released.curate_released(
            settings(**{"curation.released": "awares", "data.validation_rows": 2, **places}), tmp_path
        )


def test_pictures_held_out_of_the_released_dataset_do_not_come_back_in_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    published.released(tmp_path / "hub", 12, 80_000, pictures=6)  # every picture twice
    published.benchmarks(tmp_path / "hub", 2, 90_000)
    places = {"data.hub_root": str(tmp_path / "hub"), "paths.runs": str(tmp_path / "runs")}
    some = {"curation.released": "awares", "data.validation_rows": 2, "data.sources": ["chartqa"]}
    curated = released.curate_released(settings(**some, **places), tmp_path / "out")
    numbers = {split: {int(row_id[-2:]) for row_id in rows["id"]} for split, rows in curated.items()}
    assert len(numbers["validation"]) == 2
    assert numbers["train"] == {n for n in range(12) if n % 6 not in {held % 6 for held in numbers["validation"]}}


def test_an_unknown_name_and_an_unreadable_call_are_named(tmp_path: Path) -> None:
    with pytest.raises(AwaresError, match="curation.released: 'nothing' is not declared in .*awares"):
        released.curate_released(settings(**{"curation.released": "nothing"}), tmp_path)
    with pytest.raises(AwaresError, match=r"here, row 7: .*GET_CROPS: \?.*skip: \[7\]"):
        released.target_crops({"row": 7, "call": "GET_CROPS: ?"}, "here")
    with pytest.raises(AwaresError, match=r"here, row 8: .*skip: \[8\]"):
        released.target_crops({"row": 8, "call": "", "answers": ["GET_CROPS: ['5']"]}, "here")
