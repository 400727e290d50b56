"""Verdicts follow from effect and interval alone, on rows that stages wrote; a claim without its runs is undecided."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import TASKS, trajectory
from PIL import Image

from awares.config import load_params
from awares.data.rows import make_dataset
from awares.engine import jsonl
from awares.engine.rows import save_rows
from awares.errors import AwaresError
from awares.method import evaluation
from awares.study import claims, comparison, scores
from awares.study.scores import Estimate, trained

PER_TASK = 20
POLICIES = {
    "full": {"evaluation": "evaluation/main-s{main}/trajectories/full.jsonl"},
    "awares": trained("main", "grpo"),
    "sft": trained("main", "sft"),
    "variant": trained("variant", "grpo", like="awares"),
    "oracle": {"validation": "curation/main/validation/dataset"},
    "pruner": {"evaluation": "systems/pruner/scores.csv"},
    "judge_anls": {"curation": "curation/main/train/dataset", "judge": "anls"},
    "judge_other": {"curation": "curation/main/train/dataset", "judge": "other"},
}


def row(name, source, split):
    image = Image.new("RGB", (56, 56))
    boxes = {"question_boxes": [], "answer_boxes": [[0, 0, 400, 400]]}
    return {"id": name, "image": image, "question": "q?", "answers": ["yes"], "source": source, **boxes, "split": split}


class World:
    """Runs in a folder, as the stages leave them."""

    def __init__(self, folder):
        paths = {"paths.runs": str(folder / "runs"), "paths.reports": str(folder / "reports")}
        self.params = load_params("mini", overrides={**paths, "evaluation.bootstrap": 500})
        self.folder, self.runs = folder, folder / "runs" / "mini"
        self.rows = make_dataset([row(f"{task}-{n}", task, "evaluation") for n in range(PER_TASK) for task in TASKS])
        save_rows(self.rows, self.runs / "data" / "main" / "evaluation")

    def policy(self, path, marks, answer="", **more):
        """Answers to the evaluation rows; ``marks``: right or wrong, one per row."""
        said = [answer or ("yes" if mark else "no") for mark in marks]
        done = [trajectory(*one, **more) for one in zip(self.rows["id"], said, strict=True)]
        jsonl.write_records(self.runs / path, [one.to_dict() for one in done])
        return done

    def main(self, system, marks, seed=1, **more):
        return self.policy(f"evaluation/main-s{seed}/trajectories/{system}.jsonl", marks, **more)

    def pruner(self, change=lambda table: table, **more):
        table = evaluation.scored("pruner", self.rows, self.policy("x.jsonl", marks(1), **more))
        (self.runs / "systems" / "pruner").mkdir(parents=True, exist_ok=True)
        change(table).to_csv(self.runs / "systems" / "pruner" / "scores.csv", index=False)

    def curated(self, split, labels, target, verdicts=()):
        made = make_dataset(row(f"{split}-{n}", "chartqa", split) for n in range(len(labels)))
        made = made.add_column("label", labels).add_column("target_crops", target)
        if verdicts:
            made = made.add_column("verdict", [2 if label == "HR" else 0 for label in labels])
        for judge, values in dict(verdicts).items():
            made = made.add_column(f"verdict_{judge}", values)
        save_rows(made, self.runs / "curation" / "main" / split / "dataset")

    def turns(self, path, requests, statuses=None):
        statuses = statuses or ["valid" if crops else "none" for crops in requests]
        done = enumerate(zip(requests, statuses, strict=True))
        made = [trajectory(f"validation-{n}", "yes", crops, status).to_dict() for n, (crops, status) in done]
        jsonl.write_records(self.runs / path / "validation.jsonl", made)

    def decide(self, predicate):
        """The finding of one claim, its files read anew: an expression, >, < or within, and a margin."""
        expression, side, margin = re.fullmatch(r"(.*) (>|<|within) (\S+)", predicate).groups()
        side = {">": "above", "<": "below"}.get(side, side)
        return SimpleNamespace(**claims.decide(expression, side, float(margin), scores.Runs(self.params, POLICIES)))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def marks(share, seed=0):
    return np.random.default_rng(seed).random(PER_TASK * len(TASKS)) < share


def calling(calls, of):
    return [["top"]] * calls + [[]] * (of - calls)


@pytest.mark.parametrize(
    ("low", "high", "side", "margin", "expected"),
    [
        (0.1, 2.0, "above", 0, "holds"),
        (-2.0, -0.1, "above", 0, "does not hold"),
        (0.0, 2.0, "above", 0, "undecided"),  # the margin itself is not left out
        (-0.4, 2.0, "above", -0.5, "holds"),
        (-2.0, -0.1, "below", 0, "holds"),
        (0.1, 2.0, "below", 0, "does not hold"),
        (-0.9, 0.9, "within", 1, "holds"),
        (-1.1, 0.9, "within", 1, "undecided"),
        (1.1, 3.0, "within", 1, "does not hold"),
        (-3.0, -1.1, "within", 1, "does not hold"),
        (np.nan, np.nan, "within", 1, "undecided"),
    ],
)
def test_verdict_from_interval_side_and_margin(low, high, side, margin, expected):
    assert claims.verdict(low, high, side, margin) == expected


def test_a_difference_is_decided_by_the_interval_of_the_differences_table(world):
    done = {"full": world.main("full", marks(0.5)), "awares": world.main("awares", marks(0.9, 1))}
    gain = "accuracy(awares) - accuracy(full)"
    found = world.decide(f"{gain} > 0")
    assert (found.verdict, found.seeds, found.note) == ("holds", 1, "") and found.effect > found.low > 0
    assert world.decide(f"{gain} < 0").verdict == "does not hold"
    assert world.decide(f"{gain} > {found.effect}").verdict == "undecided"
    assert world.decide(f"{gain} within 99").verdict == "holds"
    assert world.decide("accuracy(awares, pope) - accuracy(full, pope) > 0").effect != found.effect
    table = pd.concat([evaluation.scored(name, world.rows, one) for name, one in done.items()])
    expected = evaluation.compare(table, [("awares", "full")], world.params.evaluation).squeeze()
    assert (found.effect, found.low, found.high) == pytest.approx((expected.difference, expected.low, expected.high))


# Training seeds


def test_seeds_in_common_are_pooled_and_widen_the_interval(world):
    world.main("full", marks(0.7))
    for seed, share in ((1, 0.7), (2, 0.95), (3, 0.45)):
        world.main("awares", marks(share), seed)
    found = world.decide("accuracy(awares) - accuracy(full) > 0")
    one_by_one = [100 * (marks(share).mean() - marks(0.7).mean()) for share in (0.7, 0.95, 0.45)]
    assert found.seeds == 3 and found.effect == pytest.approx(np.mean(one_by_one))
    assert found.high - found.low > 15 and found.verdict == "undecided"  # rows alone would leave a few points


def test_few_trainings_follow_student_and_are_paired(world):
    """Against scipy: the mean of three seeds is t(2), and the mean of differences that of the differences."""
    settings = dataclasses.replace(world.params.evaluation, bootstrap=40_000)
    runs, still = scores.Runs(dataclasses.replace(world.params, evaluation=settings), {}), np.zeros(40_000)
    a, b = np.array([1.0, 2.0, 4.0]), np.array([0.5, 2.5, 3.0])
    pooled_a, pooled_b = (runs._pool([(v, v + still) for v in values]) for values in (a, b))
    for values, sample in ((a, pooled_a), (a - b, pooled_a - pooled_b)):
        low, high = scipy.stats.t.interval(0.95, 2, loc=values.mean(), scale=values.std(ddof=1) / 3**0.5)
        assert sample.value == pytest.approx(values.mean())
        assert sample.interval(0.95) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_only_seeds_that_both_have_count(world):
    world.curated("validation", ["HR", "LR"] * 10, [["top"], []] * 10)
    for seed in (1, 2):
        world.turns(f"grpo/main-s{seed}", [["top"], []] * 10)
    world.turns("sft/main-s3", [["top"]] * 20)
    assert "no training seed in common" in world.decide("call_rate(awares) - call_rate(sft) < 0").note
    world.turns("sft/main-s2", [["top"]] * 20)
    found = world.decide("call_rate(awares) - call_rate(sft) < 0")
    assert (found.seeds, found.effect, found.verdict) == (1, -50, "holds")
    assert world.decide("call_rate(awares) - call_rate(oracle) < 0").seeds == 2  # the oracle was not trained


def test_one_training_is_as_uncertain_as_the_main_lines_are_apart(world):
    """A variant at one seed, a main line whose seeds call on 10, 20 and 30 of 40 rows: a deviation of 25 points."""
    world.curated("validation", ["HR", "LR"] * 20, [["top"], []] * 20)
    for seed, calls in ((1, 20), (2, 10), (3, 30)):
        world.turns(f"grpo/main-s{seed}", calling(calls, 40))
    world.turns("grpo/variant-s1", [["top"]] * 40)
    found = world.decide("call_rate(variant) - call_rate(awares) > 0")
    assert (found.seeds, found.effect, found.verdict) == (1, 50, "undecided")
    # Two trainings, 25 points each, estimated from three; the rows (50 % of 40, 7.9 points) hardly add to that
    assert found.high - found.low == pytest.approx(2 * scipy.stats.t.ppf(0.975, 2) * 2**0.5 * 25, rel=0.15)
    for seed in (2, 3):
        world.turns(f"grpo/main-s{seed}", calling(20, 40))
    assert world.decide("call_rate(variant) - call_rate(awares) > 0").verdict == "holds"
    # Recall is 100 % at every seed, which is known to half a row
    for place in ("grpo/main-s1", "grpo/main-s2", "grpo/main-s3", "grpo/variant-s1"):
        world.turns(place, [["top"], []] * 20)
    alike = world.decide("recall(awares) - recall(variant) > -1")
    assert alike.effect == 0 and alike.low < -1 < 1 < alike.high and alike.verdict == "undecided"


# Quantities


def test_the_hardest_of_several_decides_with_a_stricter_far_end(world):
    world.main("full", marks(1), tokens=64)
    world.main("awares", marks(1), tokens=32, text="call, then answer", answer="yes" * 4)
    world.pruner(tokens=48)
    assert world.decide("[rtr(awares) - rtr(full), rtr(awares) - rtr(pruner)] < 0").effect == -0.25
    assert world.decide("[rtr(awares) - rtr(full), rtr(awares) - rtr(pruner)] > 0").effect == -0.5
    assert world.decide("rtr(awares) < 0.51").verdict == "holds"
    assert world.decide("characters(awares) / characters(full) > 2").effect == 4  # a call is no answer (Table 6)
    assert "scores.csv has no characters" in world.decide("characters(awares) / characters(pruner) > 2").note

    rng = np.random.default_rng(0)
    draws = [Estimate(0.0, rng.standard_normal(40_000)) for _ in range(4)]
    strict = scipy.stats.norm.ppf(1 - 0.025 / 4)
    assert claims.hardest(draws, "above", 0.95)[1:] == pytest.approx((-1.96, strict), abs=0.15)
    assert claims.hardest(draws, "below", 0.95)[1:] == pytest.approx((-strict, 1.96), abs=0.15)


def test_measures_are_the_diagnostics(world):
    rng = np.random.default_rng(4)
    labels = rng.choice(["LR", "HR"], 60).tolist()
    target = [[["top"], ["left"], ["all"]][n % 3] if name == "HR" else [] for n, name in enumerate(labels)]
    options = [[], ["top"], ["left"], ["bottom-right"], ["all"]]
    requests = [options[n] for n in rng.integers(0, 5, 60)]
    statuses = [("valid" if n % 4 else "recovered") if names else "none" for n, names in enumerate(requests)]
    world.curated("validation", labels, target)
    world.turns("grpo/main-s1", requests, statuses)
    expected = evaluation.cdp_diagnostics(labels, requests, target)
    for name in (*scores.SHARES, "area"):
        found = world.decide(f"{name}(awares) > 0")
        assert found.effect == pytest.approx(expected[name] * (1 if name == "area" else 100))
        assert found.low < found.effect < found.high
    calls = [names for names in requests if names]
    done = evaluation.load_trajectories(world.runs / "grpo/main-s1/validation.jsonl")
    shares = {"whole_of_calls": calls.count(["all"]) / len(calls), "whole_image": calls.count(["all"]) / 60}
    shares |= {"valid": evaluation.format_table({"awares": done}).valid.item() / 100}
    for name, share in shares.items():
        assert world.decide(f"{name}(awares) > 0").effect == pytest.approx(100 * share) and share < 1
    assert world.decide("hr(oracle) > 0").effect == pytest.approx(100 * labels.count("HR") / 60)
    assert "has no valid" in world.decide("valid(oracle) > 0").note
    distance = 100 * abs(len(calls) - labels.count("HR")) / 60
    assert world.decide("abs(call_rate(awares) - call_rate(oracle)) > -1").effect == pytest.approx(distance)

    call, hr = np.array([bool(names) for names in requests]), np.array([name == "HR" for name in labels])
    found = world.decide('correlation(awares, "call_rate", "hr") > 0')
    assert found.effect == pytest.approx(np.corrcoef(call, hr)[0, 1]) and found.verdict == "undecided"
    perfect = world.decide('correlation(oracle, "call_rate", "hr") > 0')
    assert (perfect.effect, perfect.verdict) == (pytest.approx(1), "holds") and perfect.high <= 1


def test_agreement_of_judges(world):
    labels = ["HR", "LR", "LR", "HR"] * 50
    verdicts = {"anls": [2, 0, 2, 0] * 50, "other": [2, 1, 0, 2] * 50}
    world.curated("train", labels, [["top"] if name == "HR" else [] for name in labels], verdicts)
    assert world.decide("agreement(judge_anls) > 95").effect == 50
    perfect = world.decide("agreement(judge_other) > 95")
    apart = world.decide("agreement(judge_anls) - agreement(judge_other) < 0")  # both read the same rows
    assert (perfect.effect, perfect.verdict, apart.effect, apart.verdict) == (100, "holds", -50, "holds")


def test_a_share_without_an_exception_is_not_certain_but_an_area_is(world):
    for count, said in ((40, "undecided"), (200, "holds")):  # 0.025 ** (1 / 40) is 0.912, 0.025 ** (1 / 200) is 0.982
        world.curated("validation", ["HR"] * count, [["all"]] * count)
        world.turns("sft/main-s1", [["all"]] * count)
        found = world.decide("valid(sft) > 96")
        assert (found.effect, found.verdict) == (100, said) and found.low < found.high == 100
    assert 97.5 < found.low < 99.5
    size, share = world.decide("area(sft) > 0"), world.decide("whole_of_calls(sft) > 0")
    assert (size.low, size.high) == (1, 1) and 95 < share.low < share.high == 100


def test_a_policy_that_never_calls_decides_nothing_about_its_calls(world):
    world.curated("validation", ["HR", "LR"] * 10, [["top"], []] * 10)
    world.turns("grpo/main-s1", [[]] * 20)
    world.turns("sft/main-s1", calling(1, 20))
    never, once = (world.decide(f"precision({name}) > 0") for name in ("awares", "sft"))
    assert never.verdict == "undecided" and np.isnan(never.effect) and "too few rows" in never.note
    assert once.verdict == "undecided" and once.effect == 100 and np.isnan(once.low)


def test_time_ratios_come_from_the_latency_page(world):
    file = world.params.report_dir() / "latency" / "ratios.csv"
    assert "ratios.csv is not there" in world.decide("time_ratio(escalate_full, awares) > 1").note
    file.parent.mkdir(parents=True)
    lines = [("escalate_full", "awares", 1, 2.0, 1.5, 2.5), ("escalate_full", "awares", "best", 0.1, 0.1, 0.1)]
    columns = ["system", "over", "batch", "ratio", "ratio_low", "ratio_high"]
    pd.DataFrame(lines, columns=columns).to_csv(file, index=False)
    found = world.decide("time_ratio(escalate_full, awares) > 1")
    assert (found.effect, found.low, found.high, found.seeds, found.verdict) == (2, 1.5, 2.5, 1, "holds")
    assert "no half over awares" in world.decide("time_ratio(half, awares) > 1").note


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop(columns="rtr"),
        lambda table: table.assign(score=2.0),
        lambda table: table.assign(rtr="much"),
        lambda table: table.iloc[::-1],
        lambda table: pd.DataFrame(),
    ],
)
def test_malformed_scores_are_errors(world, change):
    world.main("full", marks(1))
    world.pruner(change)
    with pytest.raises(AwaresError, match="pruner/scores.csv"):
        world.decide("rtr(full) - rtr(pruner) > 0")


def test_malformed_trajectories_are_errors(world):
    place = world.runs / "evaluation" / "main-s1" / "trajectories" / "full.jsonl"
    for line in ({"row_id": "chartqa-0"}, trajectory("other", "yes").to_dict()):
        jsonl.write_records(place, [line])
        with pytest.raises(AwaresError, match="main-s1/trajectories/full.jsonl"):
            world.decide("rtr(full) > 0")
    world.curated("validation", ["HR"] * 3, [["top"]] * 3)
    world.turns("sft/main-s1", [["top"]] * 2)
    with pytest.raises(AwaresError, match="sft/main-s1/validation.jsonl"):
        world.decide("call_rate(sft) > 0")


# The claims of the paper


@pytest.mark.parametrize("text", ["accuracy(awares", "nonsense(awares)", "1 / 0", "open('x')"])
def test_an_expression_that_cannot_be_computed_is_named(world, text):
    world.main("awares", marks(1))
    with pytest.raises(AwaresError, match="claims.csv"):
        world.decide(f"{text} > 0")


def test_every_policy_is_in_a_claim_and_every_claim_has_a_source():
    texts = claims.read_claims()
    assert set(texts.holds) == {"above", "below", "within"}
    used = set(re.findall(r"\w+", " ".join(texts.expression))) | set(claims.PRUNERS)
    assert used >= set(claims.CLAIMED_POLICIES)
    assert not texts[["claim", "quantity"]].duplicated().any() and not texts.id.duplicated().any()
    assert texts[["section", "claim", "quantity"]].ne("").all(axis=None)
    tables = pd.read_csv(load_params().path("data/paper/tables.csv")).table
    assert set(" ".join(texts.tables).split()) <= set(tables)


def test_without_any_run_every_claim_is_undecided_and_says_why(world):
    folder = world.folder / "tables"
    table = claims.save_claims(world.params, folder)
    assert list(pd.read_csv(folder / "claims.csv").columns) == claims.CLAIM_COLUMNS == list(table.columns)[:8]
    assert set(table.verdict) == {"undecided"} and table.effect.isna().all() and (table.seeds == 0).all()
    notes = pd.read_csv(folder / "claims_notes.csv")
    assert len(notes) == len(table) and notes.note.str.endswith("is not there").all()


# Effects of variants


def test_effects_of_variants_on_the_main_line_and_on_the_variant_that_they_extend(world):
    right = {"main": 0.8, "weight_1": 0.7, "turn": 0.3, "no_tool_cost": 0.8, "no_area_cost": 0.8, "grpo_only": 0.8}
    paths, names = world.params.paths, [name for name in right if name != "main"]
    runs = {name: dataclasses.replace(load_params("mini", name), paths=paths) for name in names}
    for name, share in right.items():
        for system in ("sft", "awares"):
            tokens = 32 if name == "no_tool_cost" else 16
            world.policy(f"evaluation/{name}-s1/trajectories/{system}.jsonl", marks(share), tokens=tokens)
    found = comparison.effects(world.params, runs).set_index(["variant", "against"])
    pairs = [*((name, "main") for name in runs), ("turn", "weight_1"), ("no_tool_cost", "no_area_cost")]
    assert list(found.index) == pairs
    assert found.system.tolist() == ["sft", "sft", "awares", "awares", "awares", "sft", "awares"]
    turn, step = found.loc[("turn", "main")], found.loc[("turn", "weight_1")]
    assert turn.difference == pytest.approx(100 * (marks(0.3).mean() - marks(0.8).mean()))
    assert turn.low < turn.difference < turn.high < 0 and turn.significant and turn.rtr == turn.rtr_high == 0
    assert step.change == "sft.level turn"
    assert found.change[("grpo_only", "main")].startswith("grpo.cold_start False, grpo.epochs 3.0, grpo.max_steps 144")
    assert step.difference == pytest.approx(100 * (marks(0.3).mean() - marks(0.7).mean()))
    assert found.loc[("no_tool_cost", "main")].rtr == 0.25 and not found.loc[("grpo_only", "main")].significant
    (world.runs / "evaluation" / "turn-s1" / "trajectories" / "sft.jsonl").unlink()
    with pytest.raises(AwaresError, match="evaluation/turn-s1/trajectories/sft.jsonl"):
        comparison.effects(world.params, runs)
