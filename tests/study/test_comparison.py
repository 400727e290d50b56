"""The comparison: every system's scores brought together, means over seeds, who is compared with whom."""

import pandas as pd
import pytest
from datasets import Dataset

from awares.baselines import registry as baselines
from awares.config import load_params
from awares.errors import AwaresError
from awares.study import comparison
from awares.study.tables import AVERAGE


def scores(**systems):
    """system -> {seed: marks of four rows}; two rows of either task."""
    parts = [
        pd.DataFrame(
            {
                "benchmark": ["docvqa", "docvqa", "pope", "pope"],
                "row_id": list("abcd"),
                "score": marks,
                "rtr": 0.5,
                "layer_rtr": 0.75,
            }
        ).assign(system=name, seed=seed)
        for name, seeds in systems.items()
        for seed, marks in seeds.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_a_trained_system_is_the_mean_over_its_seeds():
    params = load_params("mini")
    table = comparison.systems_table(
        scores(full={1: [1, 1, 1, 0]}, awares={1: [1, 0, 1, 1], 2: [1, 1, 0, 0]}), params.evaluation
    )
    average = table[table.benchmark == AVERAGE].set_index("system")
    assert average.accuracy.to_dict() == pytest.approx({"full": 75.0, "awares": 62.5})
    assert average.seeds.to_dict() == {"full": 1, "awares": 2} and average.n.to_dict() == {"full": 4, "awares": 4}
    assert average.rtr["full"] == 0.5 and average.layer_rtr["full"] == 0.75
    wanted = ["system", "benchmark", "accuracy", "accuracy_low", "accuracy_high", "rtr", "n", "layer_rtr", "seeds"]
    assert list(table) == wanted


def test_systems_are_paired_at_the_main_seed_and_pruners_with_their_own_control():
    params = load_params("mini")
    one = {1: [1, 1, 1, 1]}
    found = scores(
        awares={1: [1, 1, 1, 0], 2: [0, 0, 0, 0]},
        visionzip_50=one,
        fastv_70=one,
        random_token_50={1: [0, 0, 1, 1]},
        random_token_70=one,
        random_token_awares=one,
    )
    against = comparison.against(found, "awares", params)
    assert against.b.tolist() == [
        "visionzip_50", "fastv_70", "random_token_50", "random_token_70", "random_token_awares"]  # fmt: skip
    assert against.difference[0] == pytest.approx(-25)
    control = comparison.against_control(found, params)
    assert list(zip(control.a, control.b, control.difference, strict=True)) == [
        ("visionzip_50", "random_token_50", pytest.approx(50)), ("fastv_70", "random_token_70", 0)]  # fmt: skip


def test_the_length_of_a_response_is_that_of_its_answer():
    """Table 6: the paper's characters leave no room for calls."""
    table = scores(awares={1: [1] * 4, 2: [1] * 4}).assign(answer=["seventy", "twelve", "no", "yes!"] * 2)
    found = comparison.response_table(table, load_params("mini")).set_index("benchmark")
    assert found.characters.to_dict() == {"docvqa": 6.5, "pope": 3.0} and found.n.tolist() == [2, 2]
    assert found.characters_sd["docvqa"] == pytest.approx(2**0.5 / 2)


def test_a_pruner_is_paired_with_its_shuffled_control():
    found = scores(holov_50={1: [1, 0, 0, 0]}, holov_50_shuffled={1: [1, 1, 0, 0]}, fastv_50_shuffled={1: [1, 1, 1, 1]})
    (row,) = comparison.against_shuffled(found, load_params("mini")).to_dict("records")
    assert (row["a"], row["b"], row["difference"]) == ("holov_50", "holov_50_shuffled", pytest.approx(-25))


def test_a_pruner_is_run_at_the_share_that_the_policy_keeps():
    main = pd.DataFrame(
        {"system": ["awares", "awares", "full"], "benchmark": ["pope", "average", "average"], "rtr": [0.3, 0.3642, 1.0]}
    )
    assert baselines.matched("visionzip_awares", main) == "visionzip_36.4"
    assert baselines.matched("visionzip_50", main) == "visionzip_50"
    assert baselines.parse(baselines.matched("random_token_awares", main))[1] == pytest.approx(0.364)


def test_what_pruners_leave_of_the_evidence_is_tabled(tmp_path):
    params = load_params(
        "mini",
        overrides={"paths.runs": str(tmp_path), "comparison.systems": ["visionzip_50", "random_crop", "fastv_50"]},
    )
    plain = pd.DataFrame(
        {"benchmark": ["pope", "pope", "vstar"], "row_id": list("abc"), "score": [1, 0, 1], "rtr": 0.5}
    )
    shares = {"left": [0.5, 0.5, 0.5], "evidence": [0.25, 0.75, None]}
    tables = {
        "visionzip_50": plain.assign(**shares),
        "random_crop": plain,
        "fastv_50": plain.assign(left=0.5, evidence=None),
    }
    for system, table in tables.items():
        folder = tmp_path / "mini" / "systems" / system
        folder.mkdir(parents=True)
        table.to_csv(folder / "scores.csv", index=False)
    (found,) = comparison.evidence_table(params).to_dict("records")
    assert (found["system"], found["left"], found["evidence"], found["n"]) == ("visionzip_50", 50, 50, 2)
    assert found["low"] == 25 and found["high"] == 75 and found["accuracy"] == 50


def test_regions_that_show_the_evidence_are_told_from_those_that_do_not():
    params = load_params("mini")
    boxes = [[[0, 0, 400, 400]], [[600, 600, 900, 900]], [[0, 0, 900, 900]], []]
    rows = Dataset.from_dict({"id": list("abcd"), "question_boxes": [[]] * 4, "answer_boxes": boxes})
    found = scores(full={1: [1, 1, 1, 1]}, awares={1: [1, 0, 0, 1], 2: [1, 1, 1, 1]})
    asked = {"awares": [("top-left",), ("0,0,500,950",), ("left", "right"), ("top",)]}
    found["crops"] = [crops for name in ("full", "awares", "awares") for crops in asked.get(name, [()] * 4)]
    (one,) = comparison.regions_table(found, rows, params).to_dict("records")
    assert (one["system"], one["calls"], one["accuracy_elsewhere"]) == ("awares", 3, 0)
    assert one["covered"] == pytest.approx(200 / 3) and one["accuracy_covered"] == 50 and one["low"] < one["high"]


def test_every_name_that_is_compared_is_a_system():
    main = pd.DataFrame({"system": ["awares"], "benchmark": ["average"], "rtr": [0.4]})
    for name in load_params("mini").comparison.systems:
        baselines.parse(baselines.matched(name, main))


def test_a_system_that_has_not_answered_is_named(tmp_path):
    params = load_params("mini", overrides={"paths.runs": str(tmp_path)})
    (tmp_path / "mini" / "data").mkdir(parents=True)
    with pytest.raises(AwaresError, match="data"):
        comparison.all_scores(params)
