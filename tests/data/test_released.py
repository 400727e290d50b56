"""The released artefacts (PAPER §7): the parser's table, the released protocol in both turns, the dataset."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import published
import pytest

from awares import AwaRes
from awares.config import load_params
from awares.data import released
from awares.engine.model import save_model
from awares.engine.rows import load_rows
from awares.errors import AwaresError
from awares.method import protocol, sft
from awares.method.crops import CROPS
from awares.method.grpo import build_grpo_trainer
from awares.method.rollout import Engine, Trajectory
from awares.settings import CROP_NAMES
from awares.study import curation_tables

ROOT = Path(__file__).parents[2]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TABLE = re.findall(r"^\| `(.+)` \| (\w+) \| (\w+) \| ([a-z, -]*) \|", (ROOT / "src/awares/README.md").read_text(), re.M)


def settings(**values: Any) -> Any:
    return load_params("mini", overrides=values, path=ROOT / "params.yaml")


@pytest.mark.parametrize(("printed", "ours", "released_form", "crops"), TABLE)
def test_the_readmes_table_of_accepted_and_rejected_strings(
    printed: str, ours: str, released_form: str, crops: str
) -> None:
    text = printed.replace("<tool_call> ", "<tool_call>\n").replace(" </tool_call>", "\n</tool_call>")
    for name, status in (("ours", ours), ("released", released_form)):
        for turn in (text, text + "<|im_end|>"):
            call = protocol.parse_call(turn, protocol.get_protocol(name))
            assert (call.status, ", ".join(call.crops)) == (status, crops.strip())


def test_the_table_has_every_kind_of_string() -> None:
    assert len(TABLE) >= 35 and {ours for _, ours, *_ in TABLE} == {"valid", "recovered", "malformed", "none"}


@pytest.mark.parametrize("crops", [(name,) for name in CROPS] + [("top-left", "center", "right"), ("all", "top")])
def test_what_the_released_protocol_renders_it_reads_as_valid(crops: tuple[str, ...]) -> None:
    text = protocol.RELEASED.render_call(crops)
    assert protocol.parse_call(text, protocol.RELEASED) == protocol.Call(crops, "valid", text)
    assert text.startswith(protocol.RELEASED.opening)


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
def test_inference_shows_the_model_what_training_shows_it(tiny: SimpleNamespace, name: str) -> None:
    form = protocol.get_protocol(name)
    engine = Engine(tiny.model, tiny.processor, max_new_tokens=3, protocol=name)
    text, done = seen_by_the_model(tiny, engine, ("top", "center"))
    conversation = protocol.messages("How many?", None, ["top", "center"], protocol=form)
    expected = tiny.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text.startswith(expected) and done.crops == ("top", "center") and len(done.turns[2].images) == 2
    assert [turn.role for turn in done.turns][2:] == ["tool" if name == "ours" else "user", "assistant"]
    [biased] = engine.run([tiny.noise(84, 84, 2)], ["q"], call_bias=1e6)
    first = tiny.processor.tokenizer(form.opening)["input_ids"][0]
    assert tiny.processor.tokenizer.decode(first) in biased.turns[1].text


def test_a_policy_and_an_engine_take_the_protocol_and_a_prompt_of_the_user(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    save_model(tiny.model, tiny.processor, tmp_path / "policy")
    policy = AwaRes.from_pretrained(tmp_path / "policy", protocol="released", max_new_tokens=3)
    assert policy.engine.protocol == protocol.RELEASED
    with pytest.raises(AwaresError, match="theirs"):
        AwaRes.from_pretrained(tmp_path / "policy", protocol="theirs")
    (tmp_path / "prompt.txt").write_text("Look closely.\n")
    params = settings(**{"protocol.name": "released", "protocol.system_file": str(tmp_path / "prompt.txt")})
    text, _ = seen_by_the_model(tiny, Engine.from_params(tiny.model, tiny.processor, params), ("top",))
    assert text.startswith("<|im_start|>system\nLook closely.<|im_end|>\n") and "GET_CROPS: ['5']" in text
    with pytest.raises(AwaresError, match="none.txt"):
        protocol.from_params(settings(**{"protocol.system_file": "none.txt"}))


def test_sft_speaks_the_protocol_and_grpo_refuses_what_it_cannot(tiny: SimpleNamespace, tmp_path: Path) -> None:
    params = settings(**{"protocol.name": "released"})
    row = {"id": "a", "question": "q", "answers": ["x"], "label": "HR", "target_crops": ["top"]}
    said = sft.conversation(row, "trajectory", None, protocol.from_params(params))
    assert "assistant\nGET_CROPS: ['5']<|im_end|>" in tiny.processor.apply_chat_template(said, tokenize=False)
    with pytest.raises(AwaresError, match="protocol.name"):
        build_grpo_trainer(params, datasets.Dataset.from_list([row]), tiny.model, tiny.processor, tmp_path)


@pytest.fixture
def curate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    places = {"data.hub_root": str(tmp_path / "hub"), "paths.runs": str(tmp_path / "runs"), "sft.max_length": 8192}

    def curate(**values: Any) -> Any:
        params = settings(**{"curation.released": "awares", **places, **values})
        return params, released.curate_released(params, tmp_path / "out")

    return curate


def test_the_released_dataset_gives_curated_rows(tiny: SimpleNamespace, tmp_path: Path, curate: Any) -> None:
    published.released(tmp_path / "hub", 12, 80_000)
    published.benchmarks(tmp_path / "hub", 2, 80_000)  # chartqa's first two pictures are those of rows 0 and 1
    params, curated = curate(**{"data.validation_rows": 1, "protocol.max_new_tokens": 64})
    rows, held = curated["train"], curated["validation"]
    assert len(held) == len(rows) == 5 and {*held["split"]} == {"validation"} and {*rows["split"]} == {"train"}
    assert {int(row_id[-2:]) for row_id in [*rows["id"], *held["id"]]} == set(range(2, 12))
    assert rows["id"][:] != sorted(rows["id"])  # so that the first share of them is a fair one
    for row in [*rows, *held]:
        number = int(row["id"][-2:])
        crops = list(dict.fromkeys([CROP_NAMES[number % 9], "top"])) if number != 3 else ["all"]
        assert row["target_crops"] == (crops if number % 2 else [])
        assert row["label"] == ("HR" if number % 2 else "LR")
        assert row["question"] == "What is this?" and row["answers"] == [f"a {number}"]
        assert row["image"].size == (168, 112)  # the picture, not the crop
    read = load_rows(tmp_path / "out/train/dataset")
    assert curation_tables.judge_names(rows) == ["released"]
    assert len(sft.plan_samples(read, tiny.processor, params)) == 5 * params.sft.epochs
    assert {split: part["id"][:] for split, part in curate(**{"data.validation_rows": 1})[1].items()} == {
        split: part["id"][:] for split, part in curated.items()
    }
    with pytest.raises(AwaresError, match=r"curated.awares: .*data.validation_rows"):
        curate(**{"data.validation_rows": 2})


def test_pictures_held_out_of_the_released_dataset_do_not_come_back_in_training(tmp_path: Path, curate: Any) -> None:
    published.released(tmp_path / "hub", 12, 80_000, pictures=6)  # every picture twice
    published.benchmarks(tmp_path / "hub", 2, 90_000)
    _, curated = curate(**{"data.validation_rows": 2, "data.sources": ["chartqa"]})
    numbers = {split: {int(row_id[-2:]) for row_id in rows["id"]} for split, rows in curated.items()}
    assert len(numbers["validation"]) == 2
    assert numbers["train"] == {n for n in range(12) if n % 6 not in {held % 6 for held in numbers["validation"]}}


def test_an_unknown_name_and_an_unreadable_call_are_named(curate: Any) -> None:
    with pytest.raises(AwaresError, match="curation.released: 'nothing' .*awares"):
        curate(**{"curation.released": "nothing"})
    for row, call, answer in ((7, "GET_CROPS: ?", "x"), (8, "", "GET_CROPS: ['5']")):
        with pytest.raises(AwaresError, match=rf"here, row {row}: .*skip: \[{row}\]"):
            released.target_crops({"row": row, "call": call, "answers": [answer]}, "here")
