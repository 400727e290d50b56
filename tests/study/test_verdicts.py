"""Verdicts keep their error rates on data with a known truth, noise never helps, and policies are compared in pairs."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import TASKS

from awares.config import differences, load_params
from awares.errors import AwaresError
from awares.method import evaluation
from awares.study import answers, claims, comparison, verdicts
from awares.study.answers import ORACLE, Answers, Estimate
from awares.study.verdicts import FAILS, HOLDS, SAME, UNDECIDED, Effect

PARAMS = load_params("mini")
PER_TASK = 50
ROWS = [f"{task}-{n}" for n in range(PER_TASK) for task in TASKS]
UNREADABLE = "accuracy(awares | nonsense(awares) | 1 / 0 | open('x') | accuracy(awares) - rtr(sft, pope)"


def simulated(rng, trainings, spreads, truth=0.0, rows=300):
    """An effect of ``truth`` from simulated differences; spreads of trainings, of rows, and of each cell."""
    shapes = (trainings, 1), (1, rows), (trainings, rows)
    of_training, of_row, of_cell = (rng.normal(0, *one) for one in zip(spreads, shapes, strict=True))
    return Estimate(truth + of_training + of_row + of_cell, np.repeat(np.arange(6), rows // 6), 0.0, {}).effect()


@pytest.mark.parametrize(
    ("trainings", "spreads"), [(1, (0, 0.5, 0.5)), (3, (0.05, 1, 0.3)), (3, (0, 0, 1)), (6, (0.03, 0.7, 0.7))]
)
def test_a_false_verdict_is_as_rare_and_a_true_one_as_frequent_as_stated(trainings, spreads):
    rng, n, rows = np.random.default_rng(0), 500, 300
    spread, of_row, of_cell = spreads
    by_rows = (of_row**2 / rows + (trainings == 1) * of_cell**2 / rows) ** 0.5
    by_trainings = ((spread**2 + of_cell**2 / rows) / trainings) ** 0.5 if trainings > 1 else 0.0
    true = Effect(0.0, by_rows, by_trainings, trainings - 1)
    least, within = (verdicts.weigh([true], side, 0, 0, 0.95).detectable for side in ("above", "within"))

    def share(wanted, truth, side="above", margin=0.0, same=0.0):
        made = ([simulated(rng, trainings, spreads, truth)] for _ in range(n))
        found = (verdicts.weigh(one, side, margin, same, 0.95).statements for one in made)
        return np.mean([[name for name, p in each if p <= 0.05][:1] == [wanted] for each in found])

    rare = 0.025 + 3 * (0.025 * 0.975 / n) ** 0.5
    assert share(HOLDS, 0.0) <= rare and share(FAILS, 0.0, "below") <= rare
    assert share(SAME, within, "within", within) <= rare and share(FAILS, within, "within", within) <= rare
    assert share(HOLDS, least, same=least / 2) == pytest.approx(0.8, abs=0.09)
    assert share(SAME, 0.0, "within", within) == pytest.approx(0.8, abs=0.09)


def test_the_interval_is_students_for_trainings_and_normal_for_rows():
    gains = np.array([0.5, -0.5, 1.0])
    effect = Estimate(np.tile(gains[:, None], 12), np.repeat([0, 1], 6), 0.0, {}).effect()
    expected = scipy.stats.t.interval(0.95, 2, loc=gains.mean(), scale=gains.std(ddof=1) / 3**0.5)
    assert effect.interval(0.95) == pytest.approx(expected)
    assert effect.p(0.0) == pytest.approx(scipy.stats.ttest_1samp(gains, 0).pvalue)
    only_rows = Effect(2.0, 1.0)
    assert only_rows.interval(0.95) == pytest.approx((2 - 1.96, 2 + 1.96), abs=1e-3)
    assert only_rows.p(0.0) == pytest.approx(2 * scipy.stats.norm.sf(2))
    unknown = Effect(100.0, 1.0, 1.0, 0)  # one training of a kind of which nothing else is known
    assert unknown.p(0.0) == 1 and unknown.interval(0.95) == (-np.inf, np.inf)


@pytest.mark.parametrize(
    ("values", "side", "margin", "same", "expected"),
    [  # standard error 0.1; of several effects the worst decides, more strictly if it refutes
        ([0.3], "above", 0, 0, HOLDS), ([0.1], "above", 0, 0, UNDECIDED), ([-0.3], "above", 0, 0, FAILS),
        ([-0.3], "below", 0, 0, HOLDS), ([-0.3], "above", -0.6, 0, HOLDS), ([0.1], "above", 0, 0.5, SAME),
        ([0.3], "above", 0, 0.9, HOLDS),  # a direction is more than a difference that does not matter
        ([0.1], "within", 0.5, 0, SAME), ([0.9], "within", 0.5, 0, FAILS), ([0.45], "within", 0.5, 0, UNDECIDED),
        ([0.3, 5.0], "above", 0, 0, HOLDS), ([0.1, 5.0], "above", 0, 0, UNDECIDED),
        ([-0.21, 5.0], "above", 0, 0, UNDECIDED), ([-0.3, 5.0], "above", 0, 0, FAILS),
        ([0.3, -5.0], "below", 0, 0, FAILS),
    ],
)  # fmt: skip
def test_verdicts(values, side, margin, same, expected):
    found = verdicts.weigh([Effect(value, 0.1) for value in values], side, margin, same, 0.95)
    assert verdicts.decide([found], 0.95) == [expected]
    assert found.value == (max(values) if side == "below" else min(values))


@pytest.mark.parametrize("side", ["above", "below", "within"])
def test_noise_never_makes_a_claim_pass_more_easily(side):
    rng = np.random.default_rng(1)
    for _ in range(60):
        draws = range(rng.integers(1, 4))
        effects = [Effect(rng.normal(), rng.uniform(0.01, 1), rng.uniform(0.01, 1), 2, 3) for _ in draws]
        noisier = [replace(one, rows=one.rows * 1.5, trainings=one.trainings * 2) for one in effects]
        margin, same = rng.uniform(0.2, 1), rng.uniform(0, 1)
        quiet, loud = (verdicts.weigh(each, side, margin, same, 0.95) for each in (effects, noisier))
        assert [name for name, _ in quiet.statements] == [name for name, _ in loud.statements]
        for (_, before), (_, after) in zip(quiet.statements, loud.statements, strict=True):
            assert before <= after + 1e-9
        assert loud.low <= quiet.low <= quiet.value <= quiet.high <= loud.high and quiet.detectable < loud.detectable


def test_false_discoveries_are_controlled_over_all_claims():
    """Benjamini and Hochberg's own example, and a study of 30 claims of which 20 have no effect."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, *[0.6] * 4]
    assert (verdicts.adjusted(p) <= 0.05).sum() == 4 and np.isnan(verdicts.adjusted([0.5, np.nan])[1])
    rng, false, made = np.random.default_rng(2), [], 0
    for _ in range(150):
        truth = np.repeat([0.0, 3.5], [20, 10])
        found = [verdicts.weigh([Effect(value, 1.0)], "above", 0, 0, 0.95) for value in rng.normal(truth, 1)]
        verdict = np.array(verdicts.decide([*found, verdicts.Judgement()], 0.95))
        assert verdict[-1] == UNDECIDED
        decided = verdict[:-1] != UNDECIDED
        false.append(decided[truth == 0].sum() / max(1, decided.sum()))
        made += decided.sum()
    assert np.mean(false) <= 0.05 + 3 * np.std(false) / 150**0.5 and made > 1000


def answered(system, right, seed=1, rows=ROWS, rtr=0.5, status="none", answer="yes"):
    """The answers of ``system``: a score for each row."""
    columns = {"system": system, "seed": seed, "row_id": rows, "score": np.asarray(right, float), "rtr": rtr}
    columns |= {"call_status": status, "answer": answer, "benchmark": [name.split("-")[0] for name in rows]}
    return pd.DataFrame({**columns, "crops": [["top"] if status == "valid" else []] * len(rows)})


def turned(system, requests, seed=1):
    columns = {"system": system, "seed": seed, "row_id": [f"v-{n}" for n in range(len(requests))], "crops": requests}
    return pd.DataFrame({**columns, "call_status": "none"})


def study(*tables, turns=(), trained=(), params=PARAMS, **options):
    kinds = {"sft": ("sft",), "awares": ("sft", "grpo"), "after": ("sft", "grpo:after"), "own": ("sft:own",)}
    empty = pd.DataFrame({"system": [], "seed": []})
    return Answers(params, pd.concat([empty, *tables]), pd.concat([empty, *turns]), kinds | dict(trained), **options)


def marks(share, seed=0):
    return np.random.default_rng(seed).random(len(ROWS)) < share


def gain(found, a="awares", b="full", measure="accuracy"):
    (effect,) = claims.evaluate(f"{measure}({a}) - {measure}({b})", found)
    return effect


def test_rows_are_paired_and_stratified():
    one, other = marks(0.8), marks(0.6, 1)
    found = gain(study(answered("awares", one), answered("full", other), alone=True))
    apart = 100 * (one.astype(float) - other)
    assert found.value == pytest.approx(apart.mean()) and found.seeds == 1 and found.trainings == 0
    by_task = [apart[place::6] for place in range(6)]
    spread = sum(part.var(ddof=1) / PER_TASK for part in by_task) / 36
    assert found.rows**2 == pytest.approx(spread + answers.PLUS * (100 / len(ROWS)) ** 2)
    same = gain(study(answered("awares", one), answered("full", one), alone=True))
    assert same.value == 0 and 0.2 < same.reach(0.025) < 1.5  # rows that do not differ are no proof that none would
    only = study(answered("awares", one), answered("full", other))
    (charts,) = claims.evaluate("accuracy(awares, chartqa, pope) - accuracy(full, chartqa, pope)", only)
    assert charts.value == pytest.approx(np.mean([apart[TASKS.index(name) :: 6] for name in ("chartqa", "pope")]))


def test_seeds_are_paired_and_only_those_that_both_have_count():
    start, after = {1: 0.5, 2: 0.7, 3: 0.9}, {1: 0.6, 2: 0.8, 3: 1.0, 4: 0.1}
    tables = [answered("sft", marks(share, seed), seed) for seed, share in start.items()]
    tables += [answered("awares", marks(share, seed), seed) for seed, share in after.items()]
    found = gain(study(*tables), "awares", "sft")
    each = [100 * (marks(after[seed], seed).mean() - marks(start[seed], seed).mean()) for seed in start]
    assert found.seeds == 3 and found.free == 2 and found.value == pytest.approx(np.mean(each))
    assert found.trainings == pytest.approx(np.std(each, ddof=1) / 3**0.5) and found.trainings < 3  # levels: 20
    assert gain(study(*tables, answered("full", marks(0.5))), "awares").seeds == 4
    with pytest.raises(answers.MissingRows, match="no training seed in common"):
        gain(study(tables[0], tables[-1]), "awares", "sft")


def test_rows_of_several_draws_are_pooled_where_both_have_them():
    new = [f"{name}-unseen" for name in ROWS]
    more = [answered("awares", marks(1), rows=new), answered("full", marks(0), rows=new)]
    tables = [answered(name, marks(0.5)) for name in ("awares", "full", "own")]
    both = study(*tables, *more)
    assert gain(both).value == pytest.approx(50) and gain(both, "own").value == 0
    assert both.common(("awares", "full"))[1].size == 2 * len(ROWS) == 2 * both.common(("awares", "own"))[1].size
    assert gain(study(*tables, *tables, *more)).value == pytest.approx(50)  # a row that is published twice counts once


def test_one_training_varies_as_much_as_the_main_line_and_shares_its_cold_start():
    """RTRs of SFT 0.30, 0.40, 0.50 and of AwaRes 0.28, 0.34, 0.40: GRPO takes off 0.02, 0.06, 0.10."""
    tables = [answered("sft", marks(0.5), seed, rtr=0.2 + 0.1 * seed) for seed in (1, 2, 3)]
    tables += [answered("awares", marks(0.5), seed, rtr=0.22 + 0.06 * seed) for seed in (1, 2, 3)]
    tables += [answered(name, marks(0.5), rtr=0.35) for name in ("after", "own", "full", "whole")]
    found = study(*tables, trained={"whole": ("all:whole",)})
    for a, b, variance in (
        ("after", "awares", 2 * 0.04**2),  # two trainings of GRPO on one SFT policy
        ("after", "sft", 0.04**2),
        ("own", "sft", 2 * 0.1**2),  # two trainings of SFT
        ("after", "full", 0.04**2 + 0.1**2),
        ("whole", "full", 0.06**2),
    ):
        effect = gain(found, a, b, "rtr")
        assert (effect.seeds, effect.free) == (1, 2) and effect.trainings**2 == pytest.approx(variance), (a, b)
    alone = study(tables[0], answered("own", marks(0.5), rtr=0.1))
    finding = claims.claims_table(alone, pd.DataFrame([claim("rtr(own) - rtr(sft)", "below")])).iloc[0]
    assert (finding.verdict, finding.low) == (UNDECIDED, -np.inf) and "one training" in finding.note
    assert gain(study(tables[0], answered("own", marks(0.5), rtr=0.1), alone=True), "own", "sft", "rtr").p(0) < 0.01


def claim(expression, side="above", margin=0.0, **more):
    usual = {"margin": margin, "same": 0.0, "decided_by": "", "reason": ""}
    return {"expression": expression, "holds": side, **usual, **more}


def test_measures_of_first_turns_are_the_diagnostics():
    rng = np.random.default_rng(4)
    labels = rng.choice(["LR", "HR"], 60).tolist()
    target = [[["top"], ["left"], ["all"]][n % 3] if name == "HR" else [] for n, name in enumerate(labels)]
    options = [[], ["top"], ["left"], ["bottom-right"], ["all"]]
    requests = [options[n] for n in rng.integers(0, 5, 60)]
    oracle = turned(ORACLE, target).assign(label=labels)
    found = study(turns=[turned("awares", requests), oracle], alone=True)
    for name, value in evaluation.cdp_diagnostics(labels, requests, target).items():
        if name in answers.MEASURES:
            (effect,) = claims.evaluate(f"{name}(awares)", found)
            assert effect.value == pytest.approx(value * answers.MEASURES[name][1])
    calls = [names for names in requests if names]
    (whole,) = claims.evaluate("whole_of_calls(awares)", found)
    (share,) = claims.evaluate("hr(oracle)", found)
    assert whole.value == pytest.approx(100 * calls.count(["all"]) / len(calls)) and share.value > 30
    # The error of a ratio is that of its bootstrap
    draws = [rng.integers(0, 60, 60) for _ in range(2000)]
    picked = [sum(requests[n] == ["all"] for n in at) / sum(bool(requests[n]) for n in at) for at in draws]
    assert whole.rows == pytest.approx(np.hypot(100 * np.std(picked), 200 / len(calls)), rel=0.1)
    (ratio,) = claims.evaluate("call_rate(awares) / recall(oracle)", found)
    assert ratio.value == pytest.approx(len(calls) / 60) and ratio.rows < 0.2
    never = study(turns=[turned("awares", [[]] * 60), oracle], alone=True)
    with pytest.raises(answers.MissingRows, match="precision of awares is undefined"):
        claims.evaluate("precision(awares)", never)


@pytest.mark.parametrize("text", UNREADABLE.split(" | "))
def test_an_expression_that_cannot_be_computed_is_named(text):
    with pytest.raises(AwaresError, match=r"claims\.csv"):
        claims.evaluate(text, study(answered("awares", marks(1)), answered("sft", marks(1))))


def test_every_claim_states_its_quantity_margin_and_source():
    texts = claims.read_claims()
    assert set(texts.holds) <= {"above", "below", "within"} and set(texts.decided_by) == {"", "generator", "arithmetic"}
    assert not texts.id.duplicated().any() and texts[["section", "claim", "quantity"]].ne("").all(axis=None)
    tables = pd.read_csv(PARAMS.path("data/paper/tables.csv")).table
    assert set(" ".join(texts.tables).split()) <= set(tables)
    direction = texts[(texts.same > 0) & (texts.id != "beats_visionthink")]
    assert direction.same.to_numpy() == pytest.approx(direction.paper.abs() / 2, abs=1e-3)  # half of the paper's effect
    assert ((texts.same == 0) | (texts.margin == 0)).all()


def test_claims_without_answers_are_not_decidable_and_say_why(tmp_path):
    params = load_params("mini", overrides={"paths.reports": str(tmp_path)})
    table = claims.claims_table(comparison.published(params), claims.read_claims())
    assert {*claims.CLAIM_COLUMNS, *claims.NOTES} <= {*table}
    assert set(table.verdict) == {UNDECIDED} and table.effect.isna().all() and table.note.ne("").all()


def test_claims_are_judged_together_and_the_generators_alone():
    tables = [answered("full", marks(0.5)), answered("awares", marks(0.56, 1)), answered("half", marks(0.1))]
    found = study(*tables, alone=True)
    texts = [claim("accuracy(awares) - accuracy(full)"), *[claim("rtr(awares) - rtr(full)")] * 20]
    texts.insert(1, claim("accuracy(full) - accuracy(half)", decided_by="generator"))
    table = claims.claims_table(found, pd.DataFrame(texts))
    assert table.verdict[1] == HOLDS and table.q[1] == table.p[1]
    assert table.p[0] < 0.1 and table.q[0] == pytest.approx(min(1, 21 * table.p[0])) and table.verdict[0] == UNDECIDED


def test_the_gap_is_split_by_need_and_call():
    full, half = [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]
    own, calls = [0, 1, 0, 1, 1, 0], ["none", "valid", "valid", "none", "none", "none"]
    rows = [f"pope-{n}" for n in range(60)]
    tables = [answered(name, one * 10, rows=rows) for name, one in (("full", full), ("half", half), ("awares", own))]
    tables[2]["crops"] = [["top"] if call == "valid" else [] for call in calls] * 10
    table = comparison.gap_table(study(*tables, alone=True), "awares").set_index("part")
    assert table.rows.tolist() == [10, 10, 10, 10, 20, 60] and table.right.tolist() == [0, 100, 0, 100, 50, 50]
    assert table.points.tolist() == pytest.approx([-100 / 6, 0, -100 / 6, 0, 100 / 6, -100 / 6])
    assert table.points[:-1].sum() == pytest.approx(table.points.iloc[-1]) and (table.low < table.points).all()


def test_effects_of_variants_on_the_main_line():
    right = {"sft": 0.8, "awares": 0.8, "turn": 0.3, "no_tool_cost": 0.8, "grpo_only": 0.7}
    runs = {name: load_params("mini", name) for name in [*right][2:]}
    tables = [answered(name, marks(share), rtr=0.5 + 0.25 * (name == "no_tool_cost")) for name, share in right.items()]
    near = marks(0.8) ^ (np.arange(len(ROWS)) < 3)
    tables += [answered(name, near, seed) for name in ("sft", "awares") for seed in (2, 3)]
    kinds = comparison.trainings(PARAMS)
    found = Answers(PARAMS, pd.concat(tables), pd.DataFrame({"system": [], "seed": []}), kinds)
    table = comparison.difference_table(found, [(name, comparison.judged_by(one)[0]) for name, one in runs.items()])
    table = table.set_index("a")
    assert table.b.to_dict() == {"turn": "sft", "no_tool_cost": "awares", "grpo_only": "awares"}
    assert table.difference["turn"] == pytest.approx(100 * (marks(0.3).mean() - marks(0.8).mean()))
    assert table.significant.tolist() == [True, False, True] and (table.seeds == 1).all()
    assert table.rtr["no_tool_cost"] == 0.25
    changes = [(key, new) for key, _, new in differences(PARAMS, runs["turn"])]
    assert changes == [("sft.level", "turn"), ("sft.tool_turn_weight", 1.0)]
    assert kinds["no_area_cost"] == ("sft", "grpo:no_area_cost") and kinds["grpo_only"] == ("all:grpo_only",)
    assert kinds["labels_anls"] == ("sft:labels_anls",) and kinds["visionthink"] == ("all:visionthink",)
