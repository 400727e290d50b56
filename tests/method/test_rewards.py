"""The reward holds Eq. 5 to 7 of PAPER §4, term by term."""

import math
from pathlib import Path

import pytest

from awares.config import load_params
from awares.errors import AwaresError
from awares.method import rewards
from awares.method.crops import CROPS, union_area

PARAMS = Path(__file__).parents[2] / "params.yaml"
WEIGHTS = {"alpha_miss": 2.0, "alpha_use": 0.25, "lambda_area": 0.01}  # the paper's


@pytest.fixture(scope="module")
def grpo():
    return load_params(path=PARAMS).grpo


class FixedEncoder:
    """Unit vectors at a known angle: similarity of text n and m is cos(n - m)."""

    name = "fixed"

    def similarity(self, predictions, answers):
        return [
            max(math.cos(float(p) - float(a)) for a in accepted)
            for p, accepted in zip(predictions, answers, strict=True)
        ]


@pytest.mark.parametrize(
    ("label", "crops", "expected"),
    [
        ("HR", (), 2.0),  # alpha_miss
        ("LR", (), 0.0),
        ("LR", ("top-left",), 0.25 + 0.01 * 0.25),
        ("HR", ("top-left",), 0.25 + 0.01 * 0.25),  # the cost of a call does not depend on the label
        ("HR", ("all",), 0.26),
        ("HR", ("top-left", "top-right"), 0.25 + 0.01 * 0.5),
        ("HR", ("top", "top-left"), 0.25 + 0.01 * 0.5),  # the union: what is covered twice counts once
        ("HR", ("center", "top-left"), 0.25 + 0.01 * (0.25 + 0.25 - 0.0625)),
    ],
)
def test_tool_cost(label, crops, expected):
    assert rewards.tool_cost(label, crops, **WEIGHTS) == pytest.approx(expected)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_weight_of_the_tool_cost_acts_alone(weight):
    only = {**dict.fromkeys(WEIGHTS, 0.0), weight: 3.0}
    for label in ("LR", "HR"):
        for crops in [(), *((name,) for name in CROPS), ("left", "top")]:
            missed, used = label == "HR" and not crops, bool(crops)
            expected = {"alpha_miss": missed, "alpha_use": used, "lambda_area": union_area(crops)}[weight]
            assert rewards.tool_cost(label, crops, **only) == pytest.approx(3.0 * expected)


def test_tool_cost_refuses_an_unknown_label():
    with pytest.raises(AwaresError, match="LR or HR"):
        rewards.tool_cost("hr", (), **WEIGHTS)


def test_answer_similarity_is_the_best_cosine():
    found = rewards.answer_similarity(["0", "3"], [["1"], ["0", "2.5"]], FixedEncoder())
    assert found == pytest.approx([math.cos(1), math.cos(0.5)])
    assert rewards.answer_similarity(["0"], [["3"]], FixedEncoder())[0] < 0


def test_answer_rewards_of_the_ablations(grpo):
    predictions, answers = ["forty-one percent", "opem", "no"], [["41%"], ["open"], ["yes"]]
    anls = rewards.ANSWER_REWARDS["anls"](grpo)(predictions, answers)
    judge = rewards.ANSWER_REWARDS["judge"](grpo)(predictions, answers)
    assert anls == pytest.approx([0, 0.75, 0])  # sees letters, not meaning
    assert judge == [1, 0, 0]


def test_similarity_reward_uses_the_embedder_of_the_parameters(grpo, monkeypatch):
    asked = []
    monkeypatch.setattr(rewards, "load_encoder", lambda name: asked.append(name) or FixedEncoder())
    assert rewards.ANSWER_REWARDS["similarity"](grpo)(["0"], [["1"]]) == pytest.approx([math.cos(1)])
    assert asked == [grpo.embedder]


def test_escalation_is_discounted_and_so_is_rare_luck():
    """VisionThink's reward, by hand: two groups of six."""
    called = [False, True, True, True, True, True] * 2
    lucky, often = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    found = rewards.escalation_discounts([*lucky, *often], called, 6)
    assert found == pytest.approx([0.9] * 6 + [1.0, 0.9, 0, 0, 0, 0])  # 1 of 6 right ones was direct, then 1 of 2
    assert rewards.escalation_discounts([0.0, 1.0], [False, False], 2) == [0.0, 1.0]
    with pytest.raises(AwaresError, match="cannot be split into groups of 6"):
        rewards.escalation_discounts([1.0] * 7, [False] * 7, 6)
