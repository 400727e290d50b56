"""The released artefacts (PAPER §7): the parser's table, the released protocol in both turns, the dataset."""

import re

import datasets
import published
import pytest
from conftest import ROOT, overriding

from awares.data import released
from awares.engine.rows import load_rows
from awares.errors import AwaresError
from awares.method import protocol, sft
from awares.method.grpo import build_grpo_trainer
from awares.method.rollout import Engine
from awares.settings import CROP_NAMES
from awares.study import curation_tables

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TABLE = re.findall(r"^\| `(.+)` \| (\w+) \| (\w+) \| ([a-z, -]*) \|", (ROOT / "src/awares/README.md").read_text(), re.M)
RELEASED = {"protocol.name": "released"}
settings = overriding({})


def test_the_readmes_table_of_accepted_and_rejected_strings():
    assert len(TABLE) >= 35 and {ours for _, ours, *_ in TABLE} == {"valid", "recovered", "malformed", "none"}
    for printed, *statuses, crops in TABLE:
        text = printed.replace("<tool_call> ", "<tool_call>\n").replace(" </tool_call>", "\n</tool_call>")
        for name, status in zip(("ours", "released"), statuses, strict=True):
            for turn in (text, text + "<|im_end|>"):
                call = protocol.parse_call(turn, protocol.get_protocol(name))
                assert (call.status, ", ".join(call.crops)) == (status, crops.strip()), printed
    for crops in [*((name,) for name in CROP_NAMES), ("top-left", "center", "right"), ("all", "top")]:
        text = protocol.RELEASED.render_call(crops)
        assert protocol.parse_call(text, protocol.RELEASED) == protocol.Call(crops, "valid", text)


def test_inference_and_training_show_the_model_the_same_released_conversation(tiny, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Look closely.\n")
    params, kept = settings(**RELEASED, **{"protocol.system_file": str(tmp_path / "prompt.txt")}), []
    form, engine = protocol.from_params(params), Engine.from_params(tiny.model, tiny.processor, params)
    finish = engine._trajectory
    monkeypatch.setattr(engine, "_trajectory", lambda row: (kept.append(row.ids), finish(row))[1])
    [done] = engine.run([tiny.noise(112, 84, 1)], ["How many?"], forced=[("top", "all")])
    assert [turn.role for turn in done.turns][2:] == ["user", "assistant"] and len(done.turns[2].images) == 2
    expected = (
        "<|im_start|>system\nLook closely.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}How many?<|im_end|>\n"
        "<|im_start|>assistant\nGET_CROPS: ['5', 'all']<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}{IMAGE}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", tiny.processor.tokenizer.decode(kept[0])).startswith(expected)
    row = {"id": "a", "question": "How many?", "answers": ["7"], "label": "HR", "target_crops": ["top", "all"]}
    said = sft.conversation(row, "trajectory", None, form)
    assert tiny.processor.apply_chat_template(said, tokenize=False) == expected + "7<|im_end|>\n"
    with pytest.raises(AwaresError, match="protocol.name"):
        build_grpo_trainer(params, datasets.Dataset.from_list([row]), tiny.model, tiny.processor, tmp_path)
    with pytest.raises(AwaresError, match="none.txt"):
        protocol.from_params(settings(**{"protocol.system_file": "none.txt"}))
    with pytest.raises(AwaresError, match="theirs"):
        Engine(tiny.model, tiny.processor, protocol="theirs")


@pytest.fixture
def curate(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    places = {"data.hub_root": str(tmp_path / "hub"), "paths.runs": str(tmp_path / "runs"), "sft.max_length": 8192}

    def curate(**values):
        params = settings(**{"curation.released": "awares", "data.validation_rows": 1, **places, **values})
        return params, released.curate_released(params, tmp_path / "out")

    return curate


def test_the_released_dataset_gives_curated_rows(tiny, tmp_path, curate):
    published.released(tmp_path / "hub", 12, 80_000)
    published.benchmarks(tmp_path / "hub", 2, 80_000)  # chartqa's first two pictures are those of rows 0 and 1
    params, curated = curate(**{"protocol.max_new_tokens": 64})
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
    assert all(part["id"][:] == curated[split]["id"][:] for split, part in curate()[1].items())
    with pytest.raises(AwaresError, match=r"curated.awares: .*data.validation_rows"):
        curate(**{"data.validation_rows": 2})


def test_pictures_held_out_of_the_released_dataset_do_not_come_back_in_training(tmp_path, curate):
    published.released(tmp_path / "hub", 12, 80_000, pictures=6)  # every picture twice
    published.benchmarks(tmp_path / "hub", 2, 90_000)
    _, curated = curate(**{"data.validation_rows": 2, "data.sources": ["chartqa"]})
    train, held = ({int(row_id[-2:]) for row_id in curated[split]["id"]} for split in ("train", "validation"))
    assert len(held) == 2 and train == {n for n in range(12) if n % 6 not in {one % 6 for one in held}}


def test_an_unknown_name_and_an_unreadable_call_are_named(curate):
    with pytest.raises(AwaresError, match="curation.released: 'nothing' .*awares"):
        curate(**{"curation.released": "nothing"})
    for row, call, answer in ((7, "GET_CROPS: ?", "x"), (8, "", "GET_CROPS: ['5']")):
        with pytest.raises(AwaresError, match=rf"here, row {row}: .*skip: \[{row}\]"):
            released.target_crops({"row": row, "call": call, "answers": [answer]}, "here")
