"""Evaluation: which rows a score belongs to, means over benchmarks, paired differences, labels, files."""

from dataclasses import replace

import pandas as pd
import pytest
from conftest import trajectory
from PIL import Image

from awares.config import load_params
from awares.data.rows import make_dataset
from awares.errors import AwaresError
from awares.method import evaluation

PARAMS = load_params("mini", overrides={"evaluation.bootstrap": 200})


def rows(count):
    image, boxes = Image.new("RGB", (224, 112)), {"question_boxes": [], "answer_boxes": [[0, 0, 400, 100]]}
    plain = {"image": image, "question": "total?", "answers": ["12"], "source": "chartqa", "split": "train"}
    return make_dataset({"id": f"row-{number}", **plain, **boxes} for number in range(count))


def test_main_table_averages_over_benchmarks_not_rows():
    marks = {"score": [1.0, 1.0, 1.0, 0.0], "rtr": [0.2, 0.2, 0.2, 0.6]}
    scores = pd.DataFrame({"system": "awares", "benchmark": ["chartqa"] * 3 + ["pope"], **marks})
    table = evaluation.main_table(scores, PARAMS.evaluation).set_index("benchmark")
    assert table.loc["average", "accuracy"] == 50 and table.loc["average", "rtr"] == pytest.approx(0.4)
    assert table.loc["chartqa", "accuracy_low"] == 100 and table.n.tolist() == [3, 1, 4]


def test_scored_refuses_trajectories_of_other_rows():
    good = evaluation.scored("full", rows(1), [trajectory(tokens=64)])
    assert good.score.tolist() == [1.0] and good.rtr.tolist() == [1.0]
    with pytest.raises(AwaresError, match="row-0.*other"):
        evaluation.scored("full", rows(1), [trajectory("other")])


def test_label_rows_come_from_the_two_answers():
    half, full = [trajectory(answer="13"), trajectory()], [trajectory(), trajectory()]
    labelled = evaluation.label_rows(rows(2), half, full, PARAMS)
    assert labelled["label"][:] == ["HR", "LR"] and labelled["target_crops"][:] == [["top-left"], []]


def test_compare_is_paired():
    scores = pd.DataFrame({"score": [1.0, 0.0, 1.0, 0.0], "rtr": 0.5, "benchmark": "pope"})
    both = pd.concat([scores.assign(system="a"), scores.assign(system="b", rtr=1.0)])
    found = evaluation.compare(both, [("a", "b")], PARAMS.evaluation).squeeze()
    assert (found.difference, found.low, found.high, found.rtr) == (0, 0, 0, -0.5) and not found.significant


def test_the_same_answers_are_the_same_bytes_whatever_time_they_took(tmp_path):
    done = [trajectory("a"), trajectory("b", crops=("left",))]
    for name, seconds in (("quick", 0.1), ("slow", 9.0)):
        evaluation.save_trajectories(tmp_path / name, [replace(one, seconds=seconds) for one in done])
    assert (tmp_path / "quick").read_bytes() == (tmp_path / "slow").read_bytes()
    assert evaluation.load_trajectories(tmp_path / "slow") == [replace(one, seconds=0.0) for one in done]
    with pytest.raises(AwaresError, match="none.jsonl"):
        evaluation.load_trajectories(tmp_path / "none.jsonl")
