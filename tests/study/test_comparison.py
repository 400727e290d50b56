"""Systems and variants side by side: means over seeds, compared pairs, tables of variants."""

import math

import pandas as pd
import pytest

from awares.baselines import registry
from awares.config import load_params
from awares.errors import AwaresError
from awares.method.evaluation import AVERAGE
from awares.study import comparison
from awares.study.answers import Answers

PARAMS = load_params("mini")


def scores(**systems):
    """system -> {seed: marks of four rows}; two rows of either task."""
    rows = {"benchmark": ["docvqa", "docvqa", "pope", "pope"], "row_id": list("abcd"), "rtr": 0.5, "layer_rtr": 0.75}
    rows |= {"answer": "x", "call_status": "none"}
    parts = [
        pd.DataFrame({**rows, "score": marks}).assign(system=name, seed=seed)
        for name, seeds in systems.items()
        for seed, marks in seeds.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_a_trained_system_is_the_mean_over_its_seeds():
    found = scores(full={1: [1, 1, 1, 0]}, awares={1: [1, 0, 1, 1], 2: [1, 1, 0, 0]})
    both = Answers(PARAMS, found, pd.DataFrame(columns=["system", "seed"]), comparison.trainings(PARAMS))
    line = comparison.measures_table(both, {"main": "awares"}, ["accuracy", "rtr", "area"]).squeeze()
    assert (line.variant, line.seeds, line.accuracy, line.rtr) == ("main", 2, 62.5, 0.5) and math.isnan(line.area)
    assert line.accuracy_low < 62.5 < line.accuracy_high
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


def test_a_variant_is_judged_by_the_last_policy_that_it_changes():
    for name, judged in {"beta_0": ("awares", "grpo"), "visionthink": ("awares", "grpo")}.items():
        assert comparison.judged_by(load_params("mini", name)) == judged
    for name in ("turn", "labels_anls"):
        assert comparison.judged_by(load_params("mini", name)) == ("sft", "sft")
    folders = [load_params("mini", "no_area_cost").run_dir(stage).name for stage in ("curation", "sft", "grpo")]
    assert folders == ["main", "main-s1", "no_area_cost-s1"]  # it shares the stages that it leaves alone
    with pytest.raises(AwaresError, match="'main'"):
        comparison.judged_by(PARAMS)
