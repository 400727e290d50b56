"""Rows from users: one bad row has its error and costs no other row, at every entry point that takes rows."""

import io
import json

import pytest
from PIL import Image

from awares.cli import batch
from awares.cli import main as cli
from awares.config import load_params
from awares.data import rows as data_rows
from awares.engine.jsonl import read_records
from awares.errors import AwaresError
from awares.method.rollout import Engine

SETTINGS = {"policy": "p", "call_bias": 0.0}
GOOD = {"image": "page.png", "question": "what is it?", "answers": ["a"], "question_boxes": [[0, 0, 500, 500]]}


def with_values(**values):
    return json.dumps({**GOOD, **values})


def huge_png():
    """A PNG header that promises 20,000 x 20,000 px."""
    file = io.BytesIO()
    Image.new("1", (28, 28)).save(file, format="PNG")
    content = bytearray(file.getvalue())
    content[16:24] = (20000).to_bytes(4, "big") * 2
    return bytes(content)


LINES = {  # name -> line, whether `ask` answers it, whether it is a training row
    "plain": (with_values(), True, True),
    "a number as id": (with_values(id=7), True, True),
    "unknown key": (with_values(colour="red"), True, False),
    "boolean as id": (with_values(id=True), False, False),
    "no image": (json.dumps({"question": "q", "answers": ["a"]}), False, False),
    "number as image": (with_values(image=7), False, False),
    "missing image": (with_values(image="none.png"), False, False),
    "folder as image": (with_values(image="."), False, False),
    "long name": (with_values(image="x" * 5000), False, False),
    "data URL": (with_values(image="data:image/png;base64," + "A" * 21000), False, False),
    "null byte in the name": (with_values(image="page\0.png"), False, False),
    "text as image": (with_values(image="rows.jsonl"), False, False),
    "huge picture": (with_values(image="huge.png"), False, False),
    "cut picture": (with_values(image="cut.png"), False, False),
    "small picture": (with_values(image="small.png"), False, False),
    "empty question": (with_values(question=" "), False, False),
    "list as question": (with_values(question=["q"]), False, False),
    "control token": (with_values(question="a <|im_end|> b"), False, True),
    "half a surrogate pair": (with_values(question="\ud83d ?"), False, False),
    "long question": (with_values(question="what " * 15000), False, True),
    "no object": ("[1, 2]", False, False),
    "no JSON": ('{"image": "page.png",', False, False),
    "nested": ("[" * 100_000, False, False),
    "wrong encoding": (with_values(question="caf").encode() + b"\xe9", False, False),
    "no answers": (with_values(answers=[]), True, False),
    "empty answer": (with_values(answers=[""]), True, False),
    "box edge": (with_values(question_boxes=[[0, 0, 99999999999, 5]]), True, False),
    "box out of order": (with_values(question_boxes=[[500, 0, 100, 500]]), True, False),
    "three numbers": (with_values(answer_boxes=[[1, 2, 3]]), True, False),
    "fraction in a box": (with_values(answer_boxes=[[0.5, 0, 10, 10]]), True, False),
    "another split": (with_values(split="test"), True, False),
}


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.noise(84, 84, 1).save(tmp_path / "page.png")
    tiny.noise(20, 20, 1).save(tmp_path / "small.png")
    whole = (tmp_path / "page.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "huge.png").write_bytes(huge_png())
    lines = [line if isinstance(line, bytes) else line.encode() for line, _, _ in LINES.values()]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path


def places(results):
    return {name: f"rows-{number}" for number, name in enumerate(results, start=1)} | {"a number as id": "7"}


def test_a_batch_answers_every_row_that_can_be_answered(folder, tiny):
    engine, out = Engine(tiny.model, tiny.processor, max_new_tokens=2), folder / "out.jsonl"
    counts = batch.run_batch(folder / "rows.jsonl", None, out, engine, SETTINGS)
    records = read_records(out)
    found = dict(zip(LINES, records, strict=True))
    assert {name: "error" not in record for name, record in found.items()} == {
        name: answered for name, (_, answered, _) in LINES.items()
    }
    assert counts["errors"] == sum(not answered for _, answered, _ in LINES.values())
    assert found["a number as id"]["row_id"] == "7"
    assert max(len(record.get("error", "")) for record in records) < 600
    again = batch.run_batch(folder / "rows.jsonl", None, out, engine, SETTINGS)
    assert again["done_before"] == len(LINES) - counts["errors"]


def test_a_training_file_lists_all_its_bad_rows_at_once(folder):
    faults: list[str] = []
    kept = data_rows.read_jsonl_rows(folder / "rows.jsonl", faults)
    assert kept["id"][:] == ["rows-1", "7", *(places(LINES)[name] for name in ("control token", "long question"))]
    bad = [number for number, (_, _, trained) in enumerate(LINES.values(), start=1) if not trained]
    assert [f"line {number}" in fault for number, fault in zip(bad, faults, strict=True)] == [True] * len(bad)
    with pytest.raises(AwaresError, match="rows.jsonl, line 3") as error:
        data_rows.read_jsonl_rows(folder / "rows.jsonl")
    assert str(error.value).count("rows.jsonl, line") == data_rows.MOST_FAULTS and "more" in str(error.value)


def test_rows_without_boxes_are_refused_before_any_work_if_the_oracle_needs_them(tmp_path, tiny):
    tiny.noise(84, 84, 1).save(tmp_path / "page.png")
    file = tmp_path / "bare.jsonl"
    file.write_text(with_values(id="first", question_boxes=[]) + "\n" + with_values(id="second") + "\n")
    params = load_params(overrides={"data.sources": [str(file)], "data.train_rows": 9})
    with pytest.raises(AwaresError, match=r"bare.jsonl.*first.*curation.oracle"):
        data_rows.make_split(params, "train")
    served = load_params(overrides={"data.sources": [str(file)], "curation.oracle": "qwen3_vl"})
    assert len(data_rows.make_split(served, "train")) == 2


def test_eval_scores_the_good_rows_and_names_the_others(folder, tiny, capsys, monkeypatch):
    engine = Engine(tiny.model, tiny.processor, max_new_tokens=2)
    policy = type("Policy", (), {"engine": engine})()
    monkeypatch.setattr(cli.Eval, "load", lambda self, **_: (policy, "tiny"))
    code = cli.main(["eval", str(folder / "rows.jsonl"), "--json"])
    shown = capsys.readouterr()
    table = json.loads(shown.out)["table"]
    assert code == 1 and [row["n"] for row in table] == [2] * len(table)
    assert "line 3" in shown.err and "control token" in shown.err and "tokens" in shown.err


class Fragile:
    """An engine that fails on one row, with an exception that is no AwaresError."""

    max_side = 2000

    def run(self, images, questions, call_bias=0.0, row_ids=None):
        if "bad" in questions:
            raise RuntimeError("a library failed")
        return [f"answer to {question}" for question in questions]


def test_an_unexpected_error_is_that_rows_error():
    found = batch.run_rows(Fragile(), [None] * 3, ["a", "bad", "c"], ["1", "2", "3"], 0.0)
    assert found[0] == "answer to a" and found[2] == "answer to c"
    assert found[1].row_id == "2" and "row 2" in found[1].reason and "a library failed" in found[1].reason


@pytest.mark.parametrize("address", ["https://host/a.png", "data:image/png;base64,AAAA", "s3://bucket/a.png"])
def test_an_address_is_refused_as_it_was_written(address, capsys):
    assert cli.main(["ask", address, "what?"]) == 1
    assert address in capsys.readouterr().err
