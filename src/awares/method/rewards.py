"""The reward of multi-turn GRPO (PAPER §4): pure functions, one float per completion.

R_ans of Eq. 5 and the tool's cost (Eq. 6) are here; what is made of them (the weighted sum, Eq. 7's advantages, Eq. 8's clipped objective
with its KL term) is TRL's.
"""

from collections.abc import Callable, Sequence

from awares.config import Grpo
from awares.engine.embedding import SentenceEncoder, load_encoder
from awares.errors import AwaresValueError
from awares.method.crops import union_area
from awares.method.judges import HR, LR, SemanticJudge
from awares.method.metrics import anls

# R_ans of a batch: predictions and, for each, its accepted answers
AnswerReward = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]


def answer_similarity(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], encoder: SentenceEncoder
) -> list[float]:
    """R_ans: cosine of the sentence embeddings of prediction and answer, -1 to 1, not clipped.

    Where a row accepts several answers, the best counts; with one it is the paper's reward.
    """
    return encoder.similarity(predictions, answers)


def answer_anls(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """R_ans of the ANLS ablation (Table 4): 0 to 1, the best over the accepted answers."""
    return [anls(prediction, accepted) for prediction, accepted in zip(predictions, answers, strict=True)]


def answer_judge(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """R_ans of the judge ablation (Table 4): 1 where the semantic judge calls the answer right, else 0."""
    return SemanticJudge().scores([""] * len(predictions), predictions, answers)


# grpo.answer_reward -> R_ans with these parameters
ANSWER_REWARDS: dict[str, Callable[[Grpo], AnswerReward]] = {
    "similarity": lambda grpo: lambda p, a: answer_similarity(p, a, load_encoder(grpo.embedder)),
    "anls": lambda grpo: answer_anls,
    "judge": lambda grpo: answer_judge,
}


def tool_cost(label: str, crops: Sequence[str], alpha_miss: float, alpha_use: float, lambda_area: float) -> float:
    """Eq. 6, C_tool(C, y): ``alpha_miss`` for an HR row without a call, ``alpha_use + lambda_area * ||C||`` for a call.

    An LR row without a call costs nothing. ||C|| is the share of the image that the *union* of the crops covers, 0 to
    1. ``crops``: the requested crops, () where the policy did not call or the call was malformed. Raises AwaresError
    for another label than LR or HR.
    """
    if label not in (LR, HR):
        raise AwaresValueError(f"label {label!r}: a curated row is {LR} or {HR}")
    if crops:
        return alpha_use + lambda_area * union_area(tuple(crops))
    return alpha_miss if label == HR else 0.0


SMALL = 0.5  # ERGO's weight of a region that covers no more than SMALL_AREA of the image
SMALL_AREA = 0.6
FORMAT = 0.5  # VisionThink's weight of a well-formed completion
DISCOUNT = 0.9  # of accuracy, for escalating, or for a group that hardly ever need not
RARE = 0.2


def escalation_discounts(marks: Sequence[float], called: Sequence[bool], group: int) -> list[float]:
    """VisionThink's accuracy reward (PAPER §6) from ``marks`` of 0 or 1, in runs of ``group`` completions of one prompt.

    A completion that called keeps 0.9 of its mark. One that was right without keeps 0.9 as well where, of the group's right completions,
    some but fewer than one in five were right without: there luck is likelier than sight.
    """
    if group < 2 or len(marks) % group:
        raise AwaresValueError(f"{len(marks)} rewards cannot be split into groups of {group}: 2 or more, all full")
    found = []
    for start in range(0, len(marks), group):
        part = list(zip(marks[start : start + group], called[start : start + group], strict=True))
        right = sum(mark > 0 for mark, _ in part)
        direct = sum(mark > 0 and not call for mark, call in part)
        lucky = right > 0 and 0 < direct / right < RARE
        found += [mark * (DISCOUNT if call or lucky else 1.0) for mark, call in part]
    return found
