"""The reward holds Eq. 5 and 6 of PAPER §4, term by term."""

import math
from dataclasses import replace

import pytest

from awares.config import load_params
from awares.errors import AwaresError
from awares.method import rewards
from awares.method.crops import union_area

PARAMS = load_params()
WEIGHTS = {"alpha_miss": 2.0, "alpha_use": 0.25, "lambda_area": 0.01}  # the paper's


class FixedEncoder:
    """Unit vectors at a known angle: similarity of text n and m is cos(n - m)."""

    def similarity(self, predictions, answers):
        pairs = zip(predictions, answers, strict=True)
        return [max(math.cos(float(text) - float(one)) for one in accepted) for text, accepted in pairs]


def rollout(answer="7", accepted=("7",), label="LR", crops=()):
    return rewards.Rollout("r", "q?", None, accepted, label, answer, answer, crops, False, False)


@pytest.mark.parametrize(
    ("label", "crops", "expected"),
    [
        ("HR", (), 2.0), ("LR", (), 0.0), ("HR", ("all",), 0.26),  # alpha_miss, nothing, alpha_use and the area
        ("LR", ("top-left",), 0.2525), ("HR", ("top-left",), 0.2525),  # the cost of a call does not depend on the label
        ("HR", ("top-left", "top-right"), 0.255), ("HR", ("top", "top-left"), 0.255),  # the union
        ("HR", ("center", "top-left"), 0.25 + 0.01 * (0.25 + 0.25 - 0.0625)),
    ],
)  # fmt: skip
def test_tool_cost(label, crops, expected):
    assert sum(rewards.tool_cost(label, crops, **WEIGHTS)) == pytest.approx(expected)
    missed, used = label == "HR" and not crops, bool(crops)
    assert rewards.tool_cost(label, crops, 1, 1, 1) == (missed, used, union_area(crops))
    with pytest.raises(AwaresError, match="'hr'"):
        rewards.tool_cost("hr", crops, **WEIGHTS)


def test_the_reward_is_the_weighted_answer_less_the_cost(monkeypatch):
    monkeypatch.setattr(rewards, "load_encoder", lambda name: {PARAMS.grpo.embedder: FixedEncoder()}[name])
    context = rewards.RewardContext(PARAMS)
    played = [rollout("0", ["3"], "HR"), rollout("3", ["0", "2.5"], crops=("top",)), rollout("1", ["1"])]
    values = context.score(rewards.awares_reward, played)
    best = [math.cos(3), math.cos(0.5), 1.0]  # not clipped; the best of several accepted answers
    assert context.logged["answer"] == pytest.approx(best)
    assert context.logged["tool_cost"] == pytest.approx([2.0, 0.255, 0.0])
    assert context.shown["miss"] == [2.0, 0.0, 0.0] and context.shown["use"] == [0.0, 0.25, 0.0]
    costs = zip(best, [2.0, 0.255, 0.0], strict=True)
    assert values == pytest.approx([PARAMS.grpo.alpha_ans * answer - cost for answer, cost in costs])


def test_answer_rewards_of_the_ablations():
    predictions, answers = ["forty-one percent", "opem", "no"], [["41%"], ["open"], ["yes"]]
    for name, scores in (("anls", [0, 0.75, 0]), ("judge", [1, 0, 0])):  # letters, or meaning
        section = replace(PARAMS.grpo, answer_reward=name)
        assert rewards.score_answers(section, predictions, answers) == pytest.approx(scores)
