"""Compared systems that we train (PAPER §6, §8): rewards of VisionThink, ERGO and AdaptVision, and ERGO's judge."""

from collections.abc import Sequence

from awares.config import Params
from awares.engine.images import MIN_SIDE, resize
from awares.errors import AwaresValueError
from awares.method.crops import cut, union_area
from awares.method.judges import HIGH_BETTER, Judge, Verdict, build_judge
from awares.method.rewards import RewardContext, Rollout, weighted_sum
from awares.registry import judge, reward

FORMAT = 0.5  # VisionThink: for a well-formed completion
DISCOUNT = 0.9  # of accuracy, for a call, or for an answer in a group that hardly ever succeeds without one
RARE = 0.2
SMALL = 0.5  # ERGO: for a region that covers at most SMALL_AREA of the image
SMALL_AREA = 0.6
AREA_PRICE = 0.5  # AdaptVision: of a region that is the whole image; assumed


@reward("visionthink")
def visionthink_reward(rollouts: Sequence[Rollout], context: RewardContext) -> Sequence[float]:
    """Discounted accuracy, plus 0.5 for a well-formed completion (logged as a negative ``tool_cost``)."""
    marks = context.answer_reward(rollouts)
    answer = escalation_discounts(marks, [bool(one.crops) for one in rollouts], context.params.grpo.generations)
    return weighted_sum(context, answer, [-FORMAT if _well_formed(one) else 0.0 for one in rollouts])


def escalation_discounts(marks: Sequence[float], called: Sequence[bool], group: int) -> list[float]:
    """VisionThink's accuracy reward from ``marks`` of 0 or 1, in runs of ``group`` completions of one prompt.

    A call leaves 0.9 of the mark. So does luck: fewer than one in five of the group's right completions made no call.
    """
    if group < 2 or len(marks) % group:
        raise AwaresValueError(f"{len(marks)} rewards do not fill groups of {group}: give full groups of 2 or more")
    discounted = []
    for start in range(0, len(marks), group):
        part = list(zip(marks[start : start + group], called[start : start + group], strict=True))
        right = sum(mark > 0 for mark, _ in part)
        direct = sum(mark > 0 and not call for mark, call in part)
        lucky = right > 0 and 0 < direct / right < RARE
        discounted += [mark * (DISCOUNT if call or lucky else 1.0) for mark, call in part]
    return discounted


@reward("ergo")
def ergo_reward(rollouts: Sequence[Rollout], context: RewardContext) -> Sequence[float]:
    """Accuracy, sufficiency and size of the region, plus 1 for a well-formed call (logged as a negative ``tool_cost``).

    The frozen base model judges sufficiency: it sees only the crop and the question. A small region adds 0.5.
    """
    answer = context.answer_reward(rollouts)
    for index, mark in sufficient(rollouts, context).items():
        answer[index] += mark + SMALL * (union_area(rollouts[index].crops) <= SMALL_AREA)
    return weighted_sum(context, answer, [-1.0 if one.crops and _well_formed(one) else 0.0 for one in rollouts])


@reward("adaptvision")
def adaptvision_reward(rollouts: Sequence[Rollout], context: RewardContext) -> Sequence[float]:
    """VisionThink's outcome and form; a call adds the sufficiency of its region less 0.5 times its area.

    With ``grpo.advantage: turn``, which credits decision and answer separately, as AdaptVision's DTPO does.
    """
    marks = context.answer_reward(rollouts)
    answer = escalation_discounts(marks, [bool(one.crops) for one in rollouts], context.params.grpo.generations)
    for index, mark in sufficient(rollouts, context).items():
        answer[index] += mark - AREA_PRICE * union_area(rollouts[index].crops)
    return weighted_sum(context, answer, [-FORMAT if _well_formed(one) else 0.0 for one in rollouts])


def sufficient(rollouts: Sequence[Rollout], context: RewardContext) -> dict[int, float]:
    """R_ans of the frozen base model from the first region alone, by the index of each rollout that called."""
    places = [index for index, one in enumerate(rollouts) if one.crops]
    callers = [rollouts[index] for index in places]
    section = context.params.crops  # pieces are enlarged as by the image processor
    pieces = [cut(one.full_image, one.crops[0], section.region_budget, section.margin) for one in callers]
    pieces = [resize(piece, max(piece.width, MIN_SIDE), max(piece.height, MIN_SIDE)) for piece in pieces]
    read = context.base.answer(pieces, [one.question for one in callers]) if callers else []
    return dict(zip(places, context.answer_reward(callers, [one.answer for one in read]), strict=True))


def _well_formed(rollout: Rollout) -> bool:
    return bool(rollout.answer) and not rollout.malformed and not rollout.overflow


class AlwaysJudge(Judge):
    """Labels every row HR, for ERGO, which requests a region whatever the question."""

    def compare(self, low: float, high: float) -> Verdict:
        return Verdict(HIGH_BETTER, low, high, max(low, high) < self.correct_threshold)


@judge("always")
def always(params: Params) -> Judge:
    """The scores of the semantic judge, verdict 2 on every row."""
    return AlwaysJudge("always", build_judge("semantic", params).score)
