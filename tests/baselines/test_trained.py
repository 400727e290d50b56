"""The rewards of the trained rivals, VisionThink, ERGO and AdaptVision, on rollouts whose value is known by hand."""
# ruff: noqa: F811 (fixtures of test_grpo)

from types import SimpleNamespace

import pytest
from test_grpo import FREE, TOOL, WHOLE, called, play, read, said, settings, world  # noqa: F401

from awares import registry
from awares.baselines.trained import escalation_discounts
from awares.errors import AwaresError
from awares.method import crops, protocol, rewards


def terms(params, played, reader=None):  # ``reader``: in the place of the base model
    context = rewards.RewardContext(params)
    if reader:
        context.__dict__["base"] = SimpleNamespace(answer=reader)
    context.score(registry.reward.find(params.grpo.reward), played)
    return context.logged["answer"], context.logged["tool_cost"]


def test_visionthink_pays_for_being_right_without_a_call_and_for_form():
    form = protocol.from_params(settings(**WHOLE))
    called_all, not_offered = ([said("", [called(name)]), TOOL, said("7")] for name in ("all", "top"))
    completions = [said("7")], called_all, [said("8")], not_offered
    answer, cost = terms(settings(**WHOLE), [read(one, form) for one in completions])
    assert answer == pytest.approx([1.0, 0.9, 0.0, 1.0]) and cost == [-0.5, -0.5, -0.5, 0.0]


def test_ergo_pays_for_a_region_that_is_enough_and_small(tiny):
    params, seen, picture = settings(**FREE), [], tiny.noise(224, 168, 0)

    def reader(images, questions):
        seen.extend(zip([image.size for image in images], questions, strict=True))
        return [SimpleNamespace(answer=text) for text in ("7", "8", "7")]

    # right, enough and small; right and small; enough; right without a region
    small, large = (said("", [called(box)]) for box in ("0,0,500,500", "0,0,1000,800"))
    completions = [small, TOOL, said("7")], [small, TOOL, said("7")], [large, TOOL, said("8")], [said("7")]
    form, row = protocol.from_params(params), {"question": "what?", "full_image": picture}
    answer, cost = terms(params, [read(one, form, **row) for one in completions], reader)
    assert answer == pytest.approx([2.5, 1.5, 1.0, 1.0]) and cost == [-1.0, -1.0, -1.0, 0.0]
    half, shrunk = (crops.cut(picture, box, 0.25).size for box in ("0,0,500,500", "0,0,1000,800"))
    assert half == (picture.width // 2, picture.height // 2)
    assert shrunk[0] * shrunk[1] == pytest.approx(0.25 * picture.width * picture.height, rel=0.05)
    assert seen == [(half, "what?"), (half, "what?"), (shrunk, "what?")]
    other = settings(**{**FREE, "grpo.reward": "adaptvision", "grpo.generations": 4, "grpo.batch_size": 8})
    answer, cost = terms(other, [read(one, form, **row) for one in completions], reader)
    assert answer == pytest.approx([0.9 + 1 - 0.125, 0.9 - 0.125, 1 - 0.4, 1.0]) and cost == [-0.5] * 4


def test_visionthink_discounts_calls_and_rare_direct_answers():
    called = [False, True, True, True, True, True] * 2
    lucky, often = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    found = escalation_discounts([*lucky, *often], called, 6)
    assert found == pytest.approx([0.9] * 6 + [1.0, 0.9, 0, 0, 0, 0])  # 1 of 6 right ones was direct, then 1 of 2
    assert escalation_discounts([0.0, 1.0], [False, False], 2) == [0.0, 1.0]
    with pytest.raises(AwaresError, match="groups of 6"):
        escalation_discounts([1.0] * 7, [False] * 7, 6)


@pytest.mark.parametrize(
    "changes, call, offered", [(WHOLE, "all", '["all"]'), (FREE, "0,0,500,1000", '["left,top,right,bottom"]')]
)
def test_a_policy_with_other_regions_is_trained_on_them_alone(world, play, changes, call, offered):
    _, batch = play(settings(**changes, **{"base.model": str(world.policy)}), call=(call,))
    prompt = world.processor.tokenizer.decode(batch["prompt_ids"][0])
    assert f'"regions": {offered}' in prompt and "top-left" not in prompt
    assert batch["num_images"] == [2 if i in (1, 4) else 1 for i in range(8)]
