"""Verdicts follow from effect and interval alone, on rows that stages wrote; what is not there leaves a claim undecided."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import yaml
from PIL import Image

from awares.config import TASKS, find_file, load_params
from awares.data import rows as data
from awares.engine import jsonl as records
from awares.errors import AwaresError
from awares.method import evaluation
from awares.method.rollout import Trajectory, Turn
from awares.study import claims, comparison, diagnostics
from awares.study import scores as measures
from awares.study.scores import Runs

PER_TASK = 20
POLICIES = {
    "full": {"evaluation": "evaluation/main-s{main}/trajectories/full.jsonl"},
    "awares": {
        "evaluation": "evaluation/main-s{seed}/trajectories/awares.jsonl",
        "validation": "grpo/main-s{seed}/validation.jsonl",
    },
    "sft": {"validation": "sft/main-s{seed}/validation.jsonl"},
    "variant": {"validation": "grpo/variant-s{seed}/validation.jsonl", "like": "awares"},
    "oracle": {"validation": "curation/validation/dataset"},
    "pruner": {"evaluation": "systems/pruner/scores.csv"},
    "judge_anls": {"curation": "curation/train/dataset", "judge": "anls"},
    "judge_other": {"curation": "curation/train/dataset", "judge": "other"},
}
CLAIM = {"id": "x", "claim": "words", "section": "4.5", "tables": ["table1"], "quantity": "words", "margin": 0}
ACCURACY = {"kind": "difference", "measure": "accuracy", "a": "awares", "b": "full"}


def row(name, source, split):
    image = Image.new("RGB", (56, 56))
    boxes = {"question_boxes": [], "answer_boxes": [[0, 0, 400, 400]]}
    return {"id": name, "image": image, "question": "q?", "answers": ["yes"], "source": source, **boxes, "split": split}


def trajectory(name, right, crops=(), status="none", tokens=16, text="yes", answer=None):
    turns = (Turn("user", "q", ((28, 28),), tokens, 9), Turn("assistant", text, (), 0, 2))
    return Trajectory(name, answer or ("yes" if right else "no"), tuple(crops), status, turns, tokens, 64, 0.1, 1.0)


class World:
    """Runs and reports in a folder of their own, as the stages would leave them."""

    def __init__(self, folder):
        paths = {"paths.runs": str(folder / "runs"), "paths.reports": str(folder / "reports")}
        self.params = load_params("mini", overrides={**paths, "evaluation.bootstrap": 500})
        self.folder, self.runs = folder, folder / "runs" / "mini"
        made = [row(f"{task}-{n}", task, "evaluation") for n in range(PER_TASK) for task in TASKS]
        self.rows = data.from_rows(made)
        data.save_rows(self.rows, self.runs / "data" / "evaluation")

    def policy(self, path, marks, **more):
        """Answers to the evaluation rows; ``marks``: right or wrong, one per row."""
        done = [trajectory(name, mark, **more) for name, mark in zip(self.rows["id"], marks, strict=True)]
        records.write_records(self.runs / path, [one.to_dict() for one in done])
        return done

    def curated(self, split, labels, target, verdicts=()):
        made = data.from_rows(row(f"{split}-{n}", "chartqa", split) for n in range(len(labels)))
        made = made.add_column("label", labels).add_column("target_crops", target)
        if verdicts:
            made = made.add_column("verdict", [2 if label == "HR" else 0 for label in labels])
        for judge, values in dict(verdicts).items():
            made = made.add_column(f"verdict_{judge}", values)
        data.save_rows(made, self.runs / "curation" / split / "dataset")

    def turns(self, path, requests, statuses):
        done = zip(requests, statuses, strict=True)
        made = [trajectory(f"validation-{n}", True, crops, status) for n, (crops, status) in enumerate(done)]
        records.write_records(self.runs / path, [one.to_dict() for one in made])

    def decide(self, **claim):
        """The one line of claims_table for a claim of these keys."""
        file = self.folder / "claims.yaml"
        file.write_text(yaml.safe_dump({"policies": POLICIES, "claims": [{**CLAIM, **claim}]}), encoding="utf-8")
        return claims.claims_table(self.params, file).squeeze()


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def marks(share, seed=0):
    return np.random.default_rng(seed).random(PER_TASK * len(TASKS)) < share


# The verdict


@pytest.mark.parametrize(
    ("low", "high", "holds", "margin", "expected"),
    [
        (0.1, 2.0, "above", 0, "holds"),
        (-2.0, -0.1, "above", 0, "does not hold"),
        (-0.1, 2.0, "above", 0, "undecided"),
        (0.0, 2.0, "above", 0, "undecided"),  # the margin itself is not left out
        (-0.4, 2.0, "above", -0.5, "holds"),
        (-2.0, -0.1, "below", 0, "holds"),
        (0.1, 2.0, "below", 0, "does not hold"),
        (0.3, 0.3, "below", 0.3, "undecided"),
        (-0.9, 0.9, "within", 1, "holds"),
        (-1.1, 0.9, "within", 1, "undecided"),
        (1.1, 3.0, "within", 1, "does not hold"),
        (-3.0, -1.1, "within", 1, "does not hold"),
        (-3.0, 3.0, "within", 1, "undecided"),
        (np.nan, np.nan, "above", 0, "undecided"),
        (np.nan, np.nan, "within", 1, "undecided"),
    ],
)
def test_verdict_from_interval_side_and_margin(low, high, holds, margin, expected):
    assert claims.verdict(low, high, holds, margin) == expected


def test_a_difference_holds_fails_or_stays_open(world):
    world.policy("evaluation/main-s1/trajectories/full.jsonl", marks(0.5))
    world.policy("evaluation/main-s1/trajectories/awares.jsonl", marks(0.9, 1))
    found = world.decide(**ACCURACY, holds="above")
    assert (found.verdict, found.seeds, found.note) == ("holds", 1, "") and found.effect > found.low > 0
    assert world.decide(**ACCURACY, holds="below").verdict == "does not hold"
    assert world.decide(**{**ACCURACY, "margin": float(found.effect)}, holds="above").verdict == "undecided"
    assert world.decide(**{**ACCURACY, "benchmarks": ["pope"]}, holds="above").effect != found.effect


def test_the_interval_is_that_of_the_differences_table(world):
    full = world.policy("evaluation/main-s1/trajectories/full.jsonl", marks(0.8))
    mine = world.policy("evaluation/main-s1/trajectories/awares.jsonl", marks(0.7, 1))
    scores = pd.concat([evaluation.scored(n, world.rows, d) for n, d in (("full", full), ("awares", mine))])
    expected = evaluation.compare(scores, [("awares", "full")], world.params.evaluation).squeeze()
    found = world.decide(**ACCURACY, holds="above")
    assert (found.effect, found.low, found.high) == pytest.approx((expected.difference, expected.low, expected.high))


def test_what_has_not_been_run_is_undecided_and_named(world):
    world.policy("evaluation/main-s1/trajectories/full.jsonl", marks(0.5))
    found = world.decide(**ACCURACY, holds="above")
    assert (found.verdict, found.seeds) == ("undecided", 0) and np.isnan([found.effect, found.low, found.high]).all()
    assert found.note.endswith("evaluation/main-s1/trajectories/awares.jsonl is not there")


def test_seeds_in_common_are_pooled_and_widen_the_interval(world):
    world.policy("evaluation/main-s1/trajectories/full.jsonl", marks(0.7))
    for seed, share in ((1, 0.7), (2, 0.95), (3, 0.45)):
        world.policy(f"evaluation/main-s{seed}/trajectories/awares.jsonl", marks(share))
    found = world.decide(**ACCURACY, holds="above")
    one_by_one = [100 * (marks(share).mean() - marks(0.7).mean()) for share in (0.7, 0.95, 0.45)]
    assert found.seeds == 3 and found.effect == pytest.approx(np.mean(one_by_one))
    assert found.high - found.low > 15  # rows alone would leave a few points: the seeds differ by fifty
    assert found.verdict == "undecided"


def test_few_trainings_are_read_with_student_and_paired(world):
    """Against scipy: what three seeds say of their mean is t(2), and of a mean of differences as of the differences."""
    params = dataclasses.replace(
        world.params, evaluation=dataclasses.replace(world.params.evaluation, bootstrap=40_000)
    )
    runs, still = measures.Runs(params, {}), np.zeros(40_000)
    a, b = np.array([1.0, 2.0, 4.0]), np.array([0.5, 2.5, 3.0])
    for values, sample in (
        (a, runs._pool([(v, v + still) for v in a])),
        (a - b, runs._pool([(v, v + still) for v in a]) - runs._pool([(v, v + still) for v in b])),
    ):
        low, high = scipy.stats.t.interval(0.95, 2, loc=values.mean(), scale=values.std(ddof=1) / 3**0.5)
        assert sample.value == pytest.approx(values.mean())
        assert sample.interval(0.95) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_trainings_of_one_sign_do_not_decide_by_themselves(world):
    world.policy("evaluation/main-s1/trajectories/full.jsonl", marks(0.5), tokens=64)
    for seed, tokens in ((1, 46), (2, 56), (3, 60)):
        world.policy(f"evaluation/main-s{seed}/trajectories/awares.jsonl", marks(0.5), tokens=tokens)
    found = world.decide(kind="difference", measure="rtr", a="awares", b="full", holds="below")
    assert found.effect < 0 < found.high and found.verdict == "undecided"


def test_a_share_alike_at_every_seed_is_not_certain(world):
    world.curated("validation", ["HR", "LR"] * 10, [["top"], []] * 10)
    for place in ("sft/main-s1", "grpo/main-s1", "grpo/main-s2"):
        world.turns(f"{place}/validation.jsonl", [["top"], []] * 10, ["valid", "none"] * 10)
    recall = {"kind": "difference", "measure": "recall", "a": "awares", "b": "variant", "holds": "above", "margin": -1}
    world.turns("grpo/variant-s1/validation.jsonl", [["top"], []] * 10, ["valid", "none"] * 10)
    found = world.decide(**recall)
    assert found.effect == 0 and found.low < -1 < 1 < found.high and found.verdict == "undecided"


def test_the_end_that_any_of_several_could_reach_is_stricter():
    rng = np.random.default_rng(0)
    several = [measures.Sample(0.0, rng.standard_normal(40_000)) for _ in range(4)]
    value, low, high = measures.worst(several, smallest=True, level=0.95)
    assert value == 0 and low == pytest.approx(-1.96, abs=0.1)
    assert high == pytest.approx(scipy.stats.norm.ppf(1 - 0.025 / 4), abs=0.15)
    assert measures.worst(several, smallest=False, level=0.95)[1:] == pytest.approx((-high, -low), abs=0.2)
    assert measures.worst(several[:1], smallest=True, level=0.95)[1:] == several[0].interval(0.95)


def test_only_seeds_that_both_have_count(world):
    world.curated("validation", ["HR", "LR"] * 10, [["top"], []] * 10)
    for seed in (1, 2):
        world.turns(f"grpo/main-s{seed}/validation.jsonl", [["top"], []] * 10, ["valid", "none"] * 10)
    calls = {"kind": "difference", "measure": "call_rate", "a": "awares", "b": "sft", "holds": "below"}
    world.turns("sft/main-s3/validation.jsonl", [["top"]] * 20, ["valid"] * 20)
    assert "no training seed in common" in world.decide(**calls).note
    world.turns("sft/main-s2/validation.jsonl", [["top"]] * 20, ["valid"] * 20)
    found = world.decide(**calls)
    assert (found.seeds, found.effect, found.verdict) == (1, -50, "holds")
    assert world.decide(**{**calls, "b": "oracle"}).seeds == 2  # the oracle was not trained


def test_effects_of_variants_on_the_main_line_and_on_what_they_go_on_from(world):
    right = {"main": 0.8, "weight_1": 0.7, "turn": 0.3, "no_tool_cost": 0.8, "no_area_cost": 0.8, "beta_0": 0.8}
    runs = {
        name: dataclasses.replace(load_params("mini", name), paths=world.params.paths)
        for name in right
        if name != "main"
    }
    for name, share in right.items():
        for system in ("sft", "awares"):
            costs = {"tokens": 32 if name == "no_tool_cost" else 16}
            world.policy(f"evaluation/{name}-s1/trajectories/{system}.jsonl", marks(share), **costs)
    found = comparison.effects(world.params, runs).set_index(["variant", "against"])
    assert list(found.index) == [
        *((name, "main") for name in runs), ("turn", "weight_1"), ("no_tool_cost", "no_area_cost")]  # fmt: skip
    assert found.system.tolist() == ["sft", "sft", "awares", "awares", "awares", "sft", "awares"]
    turn = found.loc[("turn", "main")]
    assert turn.difference == pytest.approx(100 * (marks(0.3).mean() - marks(0.8).mean()))
    assert turn.low < turn.difference < turn.high < 0 and turn.significant and turn.rtr == turn.rtr_high == 0
    step = found.loc[("turn", "weight_1")]
    assert step.change == "sft.level turn" and step.difference == pytest.approx(
        100 * (marks(0.3).mean() - marks(0.7).mean())
    )
    assert found.loc[("no_tool_cost", "main")].rtr == 0.25 and not found.loc[("beta_0", "main")].significant
    for seed, share in ((2, 0.3), (3, 1.0)):  # trainings of the main line that are far apart
        world.policy(f"evaluation/main-s{seed}/trajectories/sft.jsonl", marks(share))
    wider = comparison.effects(world.params, runs).set_index(["variant", "against"]).loc[("turn", "main")]
    assert wider.difference == turn.difference and wider.high - wider.low > 100 and not wider.significant
    (world.runs / "evaluation" / "turn-s1" / "trajectories" / "sft.jsonl").unlink()
    with pytest.raises(AwaresError, match="evaluation/turn-s1/trajectories/sft.jsonl is not there"):
        comparison.effects(world.params, runs)


# The kinds


def test_rtr_and_the_worst_of_several(world):
    world.policy("evaluation/main-s1/trajectories/full.jsonl", marks(1), tokens=64)
    world.policy(
        "evaluation/main-s1/trajectories/awares.jsonl", marks(1), tokens=32, text="call, then answer", answer="yes" * 4
    )
    pruner = evaluation.scored("pruner", world.rows, world.policy("x.jsonl", marks(1), tokens=48))
    (world.runs / "systems" / "pruner").mkdir(parents=True)
    pruner.to_csv(world.runs / "systems" / "pruner" / "scores.csv", index=False)
    both = {"kind": "difference", "measure": "rtr", "a": "awares", "b": ["full", "pruner"]}
    assert world.decide(**both, holds="below").effect == -0.25  # the thriftiest is the hardest to undercut
    assert world.decide(**both, holds="above").effect == -0.5
    assert world.decide(kind="level", measure="rtr", a="awares", holds="below", margin=0.51).verdict == "holds"
    length = {"kind": "ratio", "measure": "characters", "a": "awares", "holds": "above", "margin": 2}
    assert world.decide(**length, b="full").effect == 4  # a call is no answer (Table 6)
    assert world.decide(**length, b="pruner").note.endswith("systems/pruner/scores.csv does not tell characters")


def decisions(world):
    rng = np.random.default_rng(4)
    labels = rng.choice(["LR", "HR"], 60).tolist()
    target = [[["top"], ["left"], ["all"]][n % 3] if name == "HR" else [] for n, name in enumerate(labels)]
    options = [[], ["top"], ["left"], ["bottom-right"], ["all"]]
    requests = [options[n] for n in rng.integers(0, 5, 60)]
    world.curated("validation", labels, target)
    statuses = [("valid" if n % 4 else "recovered") if names else "none" for n, names in enumerate(requests)]
    world.turns("grpo/main-s1/validation.jsonl", requests, statuses)
    return labels, requests, target


def test_levels_are_the_diagnostics(world):
    labels, requests, target = decisions(world)
    expected = dataclasses.asdict(diagnostics.cdp_diagnostics(labels, requests, target))
    level = {"kind": "level", "a": "awares", "holds": "above"}
    for name in ("call_rate", "precision", "recall", "f1", "fpr", "exact", "relaxed", "area"):
        found = world.decide(**level, measure=name)
        assert found.effect == pytest.approx(expected[name] * (1 if name == "area" else 100))
        assert found.low < found.effect < found.high
    calls = [names for names in requests if names]
    assert world.decide(**level, measure="whole_of_calls").effect == pytest.approx(
        100 * calls.count(["all"]) / len(calls)
    )
    assert world.decide(**level, measure="whole_image").effect == pytest.approx(100 * calls.count(["all"]) / 60)
    done = evaluation.load_trajectories(world.runs / "grpo/main-s1/validation.jsonl")
    form = evaluation.form_table({"awares": done}).valid.item()
    assert world.decide(**level, measure="valid").effect == pytest.approx(form) and form < 100
    assert world.decide(**{**level, "a": "oracle"}, measure="hr").effect == pytest.approx(100 * labels.count("HR") / 60)
    assert "does not tell valid" in world.decide(**{**level, "a": "oracle"}, measure="valid").note


def test_correlation_of_call_and_label(world):
    labels, requests, _ = decisions(world)
    related = {"kind": "correlation", "x": "call_rate", "y": "hr", "holds": "above"}
    call, hr = np.array([bool(names) for names in requests]), np.array([name == "HR" for name in labels])
    found = world.decide(**related, a="awares")
    assert found.effect == pytest.approx(np.corrcoef(call, hr)[0, 1]) and found.verdict == "undecided"
    perfect = world.decide(**related, a="oracle")
    assert (perfect.effect, perfect.verdict) == (pytest.approx(1), "holds")


def test_order_and_closer(world):
    world.curated("validation", ["HR"] * 8 + ["LR"] * 32, [["top"]] * 8 + [[]] * 32)
    for path, calls in (("sft/main-s1", 30), ("grpo/main-s1", 12)):
        requests = [["top"]] * calls + [[]] * (40 - calls)
        world.turns(f"{path}/validation.jsonl", requests, ["valid"] * calls + ["none"] * (40 - calls))
    steps = {"kind": "order", "measure": "call_rate", "holds": "above"}
    found = world.decide(**steps, of=["sft", "awares", "oracle"])
    assert (found.effect, found.verdict) == (10, "holds")
    assert world.decide(**steps, of=["oracle", "awares", "sft"]).verdict == "does not hold"
    near = {"kind": "closer", "measure": "call_rate", "to": "oracle", "holds": "above"}
    assert world.decide(**near, a="awares", b="sft").effect == pytest.approx(55 - 10)
    assert world.decide(**near, a="sft", b="awares").verdict == "does not hold"


def test_agreement_of_judges(world):
    labels = ["HR", "LR", "LR", "HR"] * 50
    verdicts = {"anls": [2, 0, 2, 0] * 50, "other": [2, 1, 0, 2] * 50}
    world.curated("train", labels, [["top"] if name == "HR" else [] for name in labels], verdicts)
    agree = {"kind": "level", "measure": "agreement", "holds": "above", "margin": 95}
    assert world.decide(**agree, a="judge_anls").effect == 50
    perfect = world.decide(**agree, a="judge_other")
    assert (perfect.effect, perfect.verdict) == (100, "holds")
    # Both read the same rows
    apart = world.decide(
        **{**agree, "kind": "difference", "holds": "below", "margin": 0}, a="judge_anls", b="judge_other"
    )
    assert (apart.effect, apart.verdict) == (-50, "holds")


def test_a_share_without_an_exception_is_not_certain(world):
    for count, said in ((40, "undecided"), (200, "holds")):  # 0.025 ** (1 / 40) is 0.912, 0.025 ** (1 / 200) is 0.982
        world.curated("validation", ["HR"] * count, [["top"]] * count)
        world.turns("sft/main-s1/validation.jsonl", [["top"]] * count, ["valid"] * count)
        found = world.decide(kind="level", measure="valid", a="sft", holds="above", margin=96)
        assert (found.effect, found.verdict) == (100, said) and found.low < found.high == 100
    assert 97.5 < found.low < 99.5


def test_one_training_is_as_uncertain_as_the_main_lines_are_apart(world):
    """A variant at one seed against a main line whose three seeds ask for 10, 20 and 30 of 40: a standard deviation of 25 points."""
    world.curated("validation", ["HR", "LR"] * 20, [["top"], []] * 20)
    for seed, calls in ((1, 20), (2, 10), (3, 30)):
        asked = [["top"]] * calls + [[]] * (40 - calls)
        world.turns(f"grpo/main-s{seed}/validation.jsonl", asked, ["valid"] * calls + ["none"] * (40 - calls))
    world.turns("grpo/variant-s1/validation.jsonl", [["top"]] * 40, ["valid"] * 40)
    calls = {"kind": "difference", "measure": "call_rate", "a": "variant", "b": "awares", "holds": "above"}
    found = world.decide(**calls)
    assert (found.seeds, found.effect, found.verdict) == (1, 50, "undecided")
    # Two trainings, 25 points each, estimated from three; the rows of one of them (50 % of 40, 7.9 points) hardly add to that
    assert found.high - found.low == pytest.approx(2 * scipy.stats.t.ppf(0.975, 2) * 2**0.5 * 25, rel=0.15)
    world.turns("grpo/main-s3/validation.jsonl", [["top"]] * 20 + [[]] * 20, ["valid"] * 20 + ["none"] * 20)
    world.turns("grpo/main-s2/validation.jsonl", [["top"]] * 20 + [[]] * 20, ["valid"] * 20 + ["none"] * 20)
    assert world.decide(**calls).verdict == "holds"


def test_a_policy_that_never_calls_decides_nothing_about_its_calls(world):
    world.curated("validation", ["HR", "LR"] * 10, [["top"], []] * 10)
    world.turns("grpo/main-s1/validation.jsonl", [[]] * 20, ["none"] * 20)
    found = world.decide(kind="level", measure="precision", a="awares", holds="above")
    assert found.verdict == "undecided" and np.isnan(found.effect) and "too few rows" in found.note
    world.turns("sft/main-s1/validation.jsonl", [["top"]] + [[]] * 19, ["valid"] + ["none"] * 19)
    once = world.decide(kind="level", measure="precision", a="sft", holds="above")
    assert once.verdict == "undecided" and once.effect == 100 and np.isnan(once.low)


def test_an_area_that_never_varies_is_certain_and_a_share_is_not(world):
    """Twenty calls for the whole image: the next one may be another, but their area is what it is."""
    world.curated("validation", ["HR"] * 20, [["all"]] * 20)
    world.turns("sft/main-s1/validation.jsonl", [["all"]] * 20, ["valid"] * 20)
    area, share = (
        world.decide(kind="level", measure=name, a="sft", holds="above") for name in ("area", "whole_of_calls")
    )
    assert (area.low, area.high) == (1, 1) and 80 < share.low < share.high == 100


def test_cells_of_our_own_tables(world):
    file = world.params.report_dir() / "latency" / "ratios.csv"
    faster = {"kind": "cell", "table": "latency/ratios.csv", "column": "ratio", "holds": "above", "margin": 1}
    faster |= {"row": {"system": "visionthink", "batch": 1}}
    assert world.decide(**faster).note.endswith("latency/ratios.csv is not there")
    file.parent.mkdir(parents=True)
    table = pd.DataFrame(
        [("awares", 1, 0.5, 0.4, 0.6), ("awares", "best", 0.1, 0.1, 0.1), ("visionthink", 1, 2.0, 1.5, 2.5)],
        columns=["system", "batch", "ratio", "ratio_low", "ratio_high"],
    )
    table.to_csv(file, index=False)
    found = world.decide(**faster)
    assert (found.effect, found.low, found.high) == pytest.approx((2, 1.5, 2.5)) and found.verdict == "holds"
    assert world.decide(**{**faster, "row": {"system": "awares", "batch": "best"}}).verdict == "does not hold"
    assert "has no ratio for system half" in world.decide(**{**faster, "row": {"system": "half"}}).note
    with pytest.raises(AwaresError, match="2 rows for system awares, one wanted"):
        world.decide(**{**faster, "row": {"system": "awares"}})
    with pytest.raises(AwaresError, match=r"ratios\.csv: column millis, millis_low, millis_high missing"):
        world.decide(**{**faster, "column": "millis"})


# Files that are there and are wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="rtr"), "scores.csv: column rtr missing; scores have benchmark, row_id, score, rtr"),
        (lambda t: t.assign(score=2.0), "scores.csv, row chartqa-0: score is 2.0, not a number from 0 to 1"),
        (lambda t: t.assign(rtr=np.nan), "scores.csv, row chartqa-0: rtr is nan"),
        (lambda t: t.assign(rtr="much"), "scores.csv, row chartqa-0: rtr is much"),
        (lambda t: pd.concat([t, t.head(1)]), "scores.csv: row chartqa-0 stands twice"),
        (lambda t: t.iloc[::-1], "hold different rows"),
        (lambda t: t.head(3), "hold different rows"),
    ],
)
def test_malformed_scores_are_errors(world, change, message):
    done = world.policy("evaluation/main-s1/trajectories/full.jsonl", marks(1))
    file = world.runs / "systems" / "pruner" / "scores.csv"
    file.parent.mkdir(parents=True)
    change(evaluation.scored("pruner", world.rows, done)).to_csv(file, index=False)
    with pytest.raises(AwaresError, match=message):
        world.decide(kind="difference", measure="rtr", a="full", b="pruner", holds="above")


def test_other_malformed_inputs_are_errors(world):
    file = world.runs / "systems" / "pruner" / "scores.csv"
    file.parent.mkdir(parents=True)
    file.write_text("", encoding="utf-8")
    level = {"kind": "level", "measure": "rtr", "holds": "above"}
    with pytest.raises(AwaresError, match="scores.csv is not a table"):
        world.decide(**level, a="pruner")
    place = world.runs / "evaluation" / "main-s1" / "trajectories" / "full.jsonl"
    records.write_records(place, [{"row_id": "chartqa-0"}])
    with pytest.raises(AwaresError, match="full.jsonl: a line is no trajectory"):
        world.decide(**level, a="full")
    records.write_records(place, [trajectory("other", True).to_dict()])
    with pytest.raises(AwaresError, match="not those of the rows that are there"):
        world.decide(**level, a="full")


# claims.yaml


def test_the_claims_of_the_paper():
    policies, found = claims.load_claims()
    assert len(found) >= 25 and len({claim.id for claim in found}) == len(found)
    assert {claim.kind for claim in found} >= {"level", "difference", "ratio", "order", "closer", "correlation"}
    used = {name for claim in found for name in claim.policies}
    assert used == set(policies), "a policy that no claim is about"


def test_no_verdict_stands_in_the_file():
    raw = yaml.safe_load(find_file(Path(claims.FILE)).read_text(encoding="utf-8"))
    assert set(raw) == {"policies", "claims"}
    for claim in raw["claims"]:
        assert not {"verdict", "effect", "low", "high", "seeds"} & set(claim)
        assert not {claims.HOLDS, claims.FAILS, claims.UNDECIDED} & set(map(str, claim.values()))


def test_without_any_run_every_claim_is_undecided_and_says_why(world):
    folder = world.folder / "tables"
    table = claims.save_claims(world.params, folder)
    assert list(pd.read_csv(folder / "claims.csv").columns) == claims.COLUMNS == list(table.columns)[:8]
    assert set(table.verdict) == {"undecided"} and table.effect.isna().all() and (table.seeds == 0).all()
    notes = pd.read_csv(folder / "claims_notes.csv")
    assert len(notes) == len(table) and notes.note.str.endswith("is not there").all()


def test_reasons_belong_to_claims_that_fail(world, tmp_path, monkeypatch):
    _, found = claims.load_claims()
    ids = [claim.id for claim in found]
    claims.load_reasons(ids, "data/paper/reasons.yaml")
    table = pd.DataFrame({"id": ids[:3], "verdict": [claims.FAILS, claims.HOLDS, claims.FAILS], "note": ""})
    table = table.reindex(columns=[*claims.COLUMNS, "id", "tables", "holds", "margin", "note"]).assign(note="")
    monkeypatch.setattr(claims, "claims_table", lambda *_: table.copy())
    (tmp_path / "reasons.yaml").write_text(f"{ids[0]}: small\n  models\n{ids[1]}: never shown\n")
    said = claims.save_claims(world.params, tmp_path / "tables", tmp_path / "claims.yaml").note.tolist()
    assert said == ["small models", "", ""]
    (tmp_path / "reasons.yaml").write_text("nosuch: text\n")
    with pytest.raises(AwaresError, match="reasons.yaml: unknown claim 'nosuch'"):
        claims.load_reasons(ids, tmp_path / "reasons.yaml")


BASE = {**CLAIM, **ACCURACY, "holds": "above"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "holds"}, "verdict missing or unknown"),
        ({"kind": "guess"}, "unknown kind 'guess', choose from level, difference"),
        ({"holds": "mostly"}, "unknown holds 'mostly'"),
        ({"section": "13"}, "unknown section '13'"),
        ({"section": 4.5}, "section must be text, not 4.5"),
        ({"tables": ["table12"]}, "unknown tables 'table12'"),
        ({"measure": "luck"}, "unknown measure 'luck'"),
        ({"a": "gpt"}, "unknown policy 'gpt'"),
        ({"a": "oracle"}, "policy oracle has no path for evaluation rows"),
        ({"b": []}, "there is nothing to compare with"),
        ({"margin": "0"}, "margin must be a number"),
        ({"measure": ["accuracy"]}, "measure must be text"),
        ({"benchmarks": ["mmmu"]}, "unknown benchmarks 'mmmu'"),
        ({"measure": "recall", "benchmarks": ["pope"]}, "benchmarks missing or unknown"),
        ({"holds": "within"}, "within needs a margin above 0"),
        ({"quantity": ""}, "quantity must be text"),
    ],
)
def test_a_fault_names_the_claim(world, change, message):
    with pytest.raises(AwaresError, match=rf"claim 1 \(x\): .*{message}"):
        world.decide(**{**BASE, **change})


def test_faults_of_the_whole_file(tmp_path):
    file = tmp_path / "claims.yaml"
    for raw, message in (
        ({"claims": []}, "must hold policies"),
        ({"policies": POLICIES, "claims": [BASE, BASE]}, "id 'x' stands twice"),
        ({"policies": POLICIES, "claims": [BASE, {**BASE, "id": "y"}]}, "claim 'words' stands twice"),
        ({"policies": {"full": {"test": "x"}}, "claims": []}, "policy full: unknown key test"),
        ({"policies": {"full": {"evaluation": "{variant}/x"}}, "claims": []}, "policy full: unknown part"),
        ({"policies": {"full": {"evaluation": "x", "like": "half"}}, "claims": []}, "policy full: like must name"),
        ({"policies": {**POLICIES, "full": {"evaluation": "x", "like": "sft"}}, "claims": []}, "full: like must name"),
    ):
        file.write_text(yaml.safe_dump(raw), encoding="utf-8")
        with pytest.raises(AwaresError, match=message):
            claims.load_claims(file)


def test_policies_need_a_path(world):
    with pytest.raises(AwaresError, match="policy sft has no evaluation rows"):
        Runs(world.params, POLICIES).path("sft", "evaluation", 1)
