"""Ablations: which stages a variant shares, by which policy it is judged, how tables of variants come together."""

import pandas as pd
import pytest

from awares.config import load_params
from awares.errors import AwaresError
from awares.study import variants as ablations
from awares.study.tables import AVERAGE


def result(variant, accuracy, main):
    rows = [
        (name, task, value + task_gain)
        for name, value in ((variant, accuracy), ("main", main))
        for task, task_gain in (("docvqa", 1), (AVERAGE, 0))
    ]
    frame = pd.DataFrame(rows, columns=["system", "benchmark", "accuracy"])
    return frame.assign(accuracy_low=frame.accuracy - 1, accuracy_high=frame.accuracy + 1, rtr=0.4, n=10)


def write(folder, **tables):
    folder.mkdir(parents=True)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


def test_a_variant_shares_every_stage_that_it_leaves_alone():
    def of(name, stage):
        params = load_params("mini", name)
        return str(params.run_dir(stage).relative_to(params.path("runs/mini")))

    assert of("no_area_cost", "sft") == of("main", "sft") == "sft/main-s1"
    assert (
        of("no_area_cost", "grpo") == "grpo/no_area_cost-s1"
        and of("no_area_cost", "evaluation") == "evaluation/no_area_cost-s1"
    )
    assert of("weight_1", "curation") == "curation" and of("weight_1", "sft") == "sft/weight_1-s1"
    assert of("labels_anls", "curation") == "curation/labels_anls" and of("labels_anls", "data") == "data"


def test_what_a_variant_changes_says_which_policy_is_looked_at():
    assert ablations.judged_by(load_params("mini", "beta_0")) == ("awares", "grpo")
    assert ablations.judged_by(load_params("mini", "turn")) == ("sft", "sft")
    assert ablations.judged_by(load_params("mini", "labels_anls")) == ("sft", "sft")
    assert ablations.judged_by(load_params("mini", "visionthink")) == ("awares", "grpo")
    with pytest.raises(AwaresError, match="'main' changes no training"):
        ablations.judged_by(load_params("mini"))


def test_a_value_for_one_profile_leaves_the_other_alone():
    steps = {
        profile: [load_params(profile, name).grpo.max_steps for name in ("main", "grpo_only")]
        for profile in ("mini", "paper")
    }
    assert steps["mini"][1] == 3 * steps["mini"][0] and steps["paper"][0] == steps["paper"][1]


def test_tables_of_variants_stand_beside_the_main_line(tmp_path):
    folders = {
        name: write(tmp_path / name, result=result(name, value, 80.0))
        for name, value in (("turn", 70.0), ("weight_1", 75.0))
    }
    tables = ablations.gather(folders, "result")
    found = ablations.pick(tables, "system", ["turn", "weight_5", "weight_1"], "weight_5")
    average = found[found.benchmark == AVERAGE]
    assert average.variant.tolist() == ["turn", "weight_5", "weight_1"] and average.accuracy.tolist() == [70, 80, 75]
    fewer = ablations.pick(
        tables, "system", ["phased", "turn", "weight_5"], "weight_5"
    )  # phased is not listed, so not run
    assert fewer[fewer.benchmark == AVERAGE].variant.tolist() == ["turn", "weight_5"]
    with pytest.raises(AwaresError, match="none of phased, weight_5 is listed under ablations"):
        ablations.pick(tables, "system", ["phased", "weight_5"], "weight_5")
    with pytest.raises(AwaresError, match="variant phased has not been run; run `dvc repro ablations`"):
        ablations.gather({**folders, "phased": tmp_path / "phased"}, "result")


def test_sweeps_are_the_variants_that_change_one_number():
    main = load_params("mini")
    names = [name for listed in main.ablations.values() for name in listed]
    found = ablations.sweeps(main, {name: load_params("mini", name) for name in names})
    assert found["sft.tool_turn_weight"] == {"weight_1": 1.0, "main": 5.0, "weight_10": 10.0}
    assert found["grpo.beta"] == {"beta_0": 0.0, "main": 0.05, "beta_02": 0.2}
    assert not any(
        name in values for values in found.values() for name in ("turn", "reward_anls", "no_tool_cost", "grpo_only")
    )


def test_a_sweep_has_what_it_gained_and_what_it_cost(tmp_path):
    decisions = [
        pd.DataFrame({"policy": [name, "main"], "call_rate": [rate, 50.0], "area": [0.3, 0.4]})
        for name, rate in (("a", 20.0), ("b", 70.0))
    ]
    folders = {
        name: write(tmp_path / name, result=result(name, value, 80.0), cdp=cdp)
        for (name, value), cdp in zip((("a", 70.0), ("b", 75.0)), decisions, strict=True)
    }
    tables = [ablations.gather(folders, name) for name in ("result", "cdp")]
    swept = ablations.sweep_table(*tables, {"grpo.beta": {"a": 0.0, "main": 0.05, "b": 0.2}})
    assert swept.value.tolist() == [0.0, 0.05, 0.2] and swept.accuracy.tolist() == [70, 80, 75]
    assert swept.call_rate.tolist() == [20, 50, 70] and (swept.parameter == "grpo.beta").all()
