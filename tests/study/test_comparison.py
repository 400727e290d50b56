"""Systems and variants side by side: means over seeds, compared pairs, tables of variants."""

import pandas as pd
import pytest

from awares.baselines import registry
from awares.config import load_params
from awares.errors import AwaresError
from awares.method.evaluation import AVERAGE
from awares.study import comparison

PARAMS = load_params("mini")


def scores(**systems):
    """system -> {seed: marks of four rows}; two rows of either task."""
    rows = {"benchmark": ["docvqa", "docvqa", "pope", "pope"], "row_id": list("abcd"), "rtr": 0.5, "layer_rtr": 0.75}
    parts = [
        pd.DataFrame({**rows, "score": marks}).assign(system=name, seed=seed)
        for name, seeds in systems.items()
        for seed, marks in seeds.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_a_trained_system_is_the_mean_over_its_seeds():
    found = scores(full={1: [1, 1, 1, 0]}, awares={1: [1, 0, 1, 1], 2: [1, 1, 0, 0]})
    table = comparison.systems_table(found, PARAMS.evaluation)
    average = table[table.benchmark == AVERAGE].set_index("system")
    assert average.accuracy.to_dict() == pytest.approx({"full": 75.0, "awares": 62.5})
    assert average.seeds.to_dict() == {"full": 1, "awares": 2} and average.n.to_dict() == {"full": 4, "awares": 4}
    assert average.rtr["full"] == 0.5 and average.layer_rtr["full"] == 0.75
    wanted = ["system", "benchmark", "accuracy", "accuracy_low", "accuracy_high", "rtr", "n", "layer_rtr", "seeds"]
    assert list(table) == wanted


def test_every_compared_system_is_known_and_a_pruner_can_keep_as_much_as_the_policy():
    rows = {
        "system": ["awares", "awares", "full"],
        "benchmark": ["pope", "average", "average"],
        "rtr": [0.3, 0.3642, 1],
    }
    main = pd.DataFrame(rows)
    assert registry.matched("visionzip_awares", main) == "visionzip_36.4"
    assert registry.matched("visionzip_50", main) == "visionzip_50"
    assert registry.parse(registry.matched("random_token_awares", main))[1] == pytest.approx(0.364)
    for name in PARAMS.comparison.systems:
        registry.parse(registry.matched(name, main))


def test_a_system_that_has_not_answered_is_named(tmp_path):
    params = load_params("mini", overrides={"paths.runs": str(tmp_path)})
    with pytest.raises(AwaresError, match="data"):
        comparison.all_scores(params)


# Variants


def result(variant, accuracy, main):
    rows = [
        (name, task, value + gain)
        for name, value in ((variant, accuracy), ("main", main))
        for task, gain in (("docvqa", 1), (AVERAGE, 0))
    ]
    frame = pd.DataFrame(rows, columns=["system", "benchmark", "accuracy"])
    return frame.assign(accuracy_low=frame.accuracy - 1, accuracy_high=frame.accuracy + 1, rtr=0.4, n=10)


def write(folder, **tables):
    folder.mkdir(parents=True)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


def test_a_variant_is_judged_by_the_last_policy_that_it_changes():
    for name, judged in {"beta_0": ("awares", "grpo"), "visionthink": ("awares", "grpo")}.items():
        assert comparison.judged_by(load_params("mini", name)) == judged
    for name in ("turn", "labels_anls"):
        assert comparison.judged_by(load_params("mini", name)) == ("sft", "sft")
    folders = [load_params("mini", "no_area_cost").run_dir(stage).name for stage in ("curation", "sft", "grpo")]
    assert folders == ["main", "main-s1", "no_area_cost-s1"]  # it shares the stages that it leaves alone
    with pytest.raises(AwaresError, match="'main'"):
        comparison.judged_by(PARAMS)


def test_tables_of_variants_and_the_main_line(tmp_path):
    values = {"turn": 70.0, "weight_1": 75.0}
    folders = {name: write(tmp_path / name, result=result(name, value, 80.0)) for name, value in values.items()}
    tables = comparison.gather(folders, "result")
    for wanted, accuracies in (
        (["turn", "weight_5", "weight_1"], [70, 80, 75]),
        (["phased", "turn", "weight_5"], [70, 80]),
    ):
        found = comparison.select_variants(tables, "system", wanted, "weight_5")  # phased is not listed, so not run
        average = found[found.benchmark == AVERAGE]
        assert average.variant.tolist() == [name for name in wanted if name != "phased"]
        assert average.accuracy.tolist() == accuracies
    with pytest.raises(AwaresError, match="phased, weight_5"):
        comparison.select_variants(tables, "system", ["phased", "weight_5"], "weight_5")
    with pytest.raises(AwaresError, match="phased"):
        comparison.gather({**folders, "phased": tmp_path / "phased"}, "result")


def test_sweeps_are_the_variants_that_change_one_number(tmp_path):
    names = [name for listed in PARAMS.ablations.values() for name in listed]
    folders = {}
    for number, name in enumerate(names):
        cdp = pd.DataFrame({"policy": [name, "main"], "call_rate": [number, 50.0], "area": [0.3, 0.4]})
        folders[name] = write(tmp_path / name, result=result(name, number, 80.0), cdp=cdp)
    tables = [comparison.gather(folders, name) for name in ("result", "cdp")]
    swept = comparison.sweep_table(*tables, PARAMS, {name: load_params("mini", name) for name in names})
    weights = swept[swept.parameter == "sft.tool_turn_weight"]
    assert weights.variant.tolist() == ["weight_1", "main", "weight_10"] and weights.value.tolist() == [1, 5, 10]
    assert weights.accuracy.tolist() == weights.call_rate.replace(50, 80).tolist() and weights.accuracy.iloc[1] == 80
    assert swept[swept.parameter == "grpo.beta"].value.tolist() == [0.0, 0.05, 0.2]
    assert not {"turn", "reward_anls", "no_tool_cost", "grpo_only"} & set(swept.variant)
