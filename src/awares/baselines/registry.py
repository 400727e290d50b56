"""The systems of the comparison by name: each takes a `Job` and answers its rows with trajectories (PAPER §6).

A name is that of a function registered with `system`, with the share of visual tokens kept in percent behind it
where the function takes one: ``visionzip_50``, ``fastv_36.4``, ``holov_50_shuffled``. A new system is one such function, in
a file of its name in ``src/awares/systems`` ::

    @system("low_contrast")
    def low_contrast(job: Job) -> list[Trajectory]:
        pale = [ImageEnhance.Contrast(image).enhance(0.5) for image in job.rows["image"]]
        return job.engine.answer(pale, job.rows["question"], row_ids=job.rows["id"])

and is then scored as the others are: ``evaluation.scored(name, rows, answer(name, Job(engine, rows)))``.
"""

import copy
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from awares.baselines import pruning
from awares.baselines.pruned_decode import LayerPruned, Plan, Pruned, Seen, VisionPruned
from awares.baselines.pruning import Selection
from awares.config import SHUFFLED
from awares.engine.images import cap
from awares.engine.model import patch_grid
from awares.errors import AwaresValueError
from awares.method.crops import CROPS, area
from awares.method.rollout import Engine, Trajectory

DEPTH = 28  # decoder layers of Qwen2.5-VL-7B, which the layers below refer to
FASTV_LAYER = 2
SPARSEVLM_LAYERS = (2, 6, 15)
OWN = "awares.baselines.systems"  # the package of systems of your own, a file each


@dataclass(frozen=True)
class Job:
    """What a system is to answer, and with what.

    ``engine``: holds the weights that the system asks for (`System.model`). ``rows``: columns id, image, question (and
    label, target_crops for oracle_crop). ``policy``: the policy's trajectories of these rows, for random_crop. A pruner
    writes into ``left``, by row id, which visual tokens (in raster order) are there at the end.
    """

    engine: Engine
    rows: Any  # datasets.Dataset or a mapping of columns
    policy: Sequence[Trajectory] | None = None
    seed: int = 0
    call_bias: float = 0.0
    left: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """``answer(job)``, or ``answer(job, ratio)`` if ``takes_ratio``. ``model``: whose weights: base, sft or awares."""

    name: str
    answer: Callable[..., list[Trajectory]]
    model: str
    takes_ratio: bool


SYSTEMS: dict[str, System] = {}


def system(name: str, model: str = "base", takes_ratio: bool = False) -> Callable[[Any], Any]:
    """Register the decorated function as the system ``name``; AwaresValueError if that name is taken."""

    def register(function: Callable[..., list[Trajectory]]) -> Callable[..., list[Trajectory]]:
        if name in SYSTEMS:
            raise AwaresValueError(f"system {name!r} is there already: choose another name")
        SYSTEMS[name] = System(name, function, model, takes_ratio)
        return function

    return register


def parse(name: str) -> tuple[System, float | None]:
    """``visionzip_50`` -> (VisionZip, 0.5), ``full`` -> (full, None). AwaresValueError with all names for another."""
    _load_own(name)
    match = re.fullmatch(rf"(.+)_(\d+(?:\.\d+)?)({SHUFFLED})?", name)
    if name in SYSTEMS:
        found, ratio = SYSTEMS[name], None
    elif match and match[1] + (match[3] or "") in SYSTEMS:
        found, ratio = SYSTEMS[match[1] + (match[3] or "")], float(match[2]) / 100
    else:
        raise AwaresValueError(
            f"system {name!r}: use one of {', '.join(map(_form, SYSTEMS.values()))} (50 = percent of tokens kept)"
        )
    if found.takes_ratio and not (ratio and ratio <= 1):
        raise AwaresValueError(f"system {name!r} keeps a share of the tokens: write {_form(found)} for 50 percent")
    if ratio is not None and not found.takes_ratio:
        raise AwaresValueError(f"system {name!r}: {found.name} takes no percentage, write {found.name}")
    return found, ratio


def matched(name: str, main: Any) -> str:
    """``visionzip_awares`` -> ``visionzip_36.4``, the pruner at AwaRes' own average RTR in the table ``main``; another name as it is."""
    if not name.endswith("_awares"):
        return name
    (rtr,) = main[(main.system == "awares") & (main.benchmark == "average")].rtr
    return f"{name.removesuffix('_awares')}_{100 * rtr:.1f}"


def answer(name: str, job: Job) -> list[Trajectory]:
    """The trajectories of the system ``name``, in the order of ``job.rows``."""
    found, ratio = parse(name)
    return found.answer(job) if ratio is None else found.answer(job, ratio)


def _load_own(name: str) -> None:
    """Let src/awares/systems/<name>.py register its system, if there is such a file."""
    if name in SYSTEMS or not name.isidentifier() or importlib.util.find_spec(f"{OWN}.{name}") is None:
        return
    importlib.import_module(f"{OWN}.{name}")
    if name not in SYSTEMS:
        raise AwaresValueError(f'src/awares/systems/{name}.py registers no system of its name: write @system("{name}")')


def _form(one: System) -> str:
    """How the system is written, at 50 percent if it takes any."""
    stem = one.name.removesuffix(SHUFFLED)
    return f"{stem}_50{one.name.removeprefix(stem)}" if one.takes_ratio else one.name


# The base model and the policies


@system("full")
def full(job: Job) -> list[Trajectory]:
    """The base model on the full image."""
    return _one_turn(job, job.engine, "full")


@system("half")
def half(job: Job) -> list[Trajectory]:
    """The base model on the half-resolution image."""
    return _one_turn(job, job.engine, "half")


@system("no_image")
def no_image(job: Job) -> list[Trajectory]:
    """The base model on the question alone."""
    return _one_turn(job, job.engine, "none")


@system("sft", model="sft")
@system("awares", model="awares")
def policy(job: Job) -> list[Trajectory]:
    """A trained policy, by its own decisions."""
    return _two_turns(job, None)


# Training-free pruning before the language model


@system("visionzip", takes_ratio=True)
def visionzip(job: Job, ratio: float) -> list[Trajectory]:
    """VisionZip: dominant tokens by the attention they receive, the others merged into a few contextual ones."""
    return _before(job, lambda seen: pruning.visionzip(seen.scores, seen.keys, seen.features, ratio))


@system("holov", takes_ratio=True)
def holov(job: Job, ratio: float) -> list[Trajectory]:
    """HoloV: quotas for contiguous chunks by attention and diversity, inside a chunk the top by attention."""
    return _before(job, lambda seen: _kept(seen, pruning.holov(seen.scores, seen.features, ratio)))


@system("random_token", takes_ratio=True)
def random_token(job: Job, ratio: float) -> list[Trajectory]:
    """The pruners' control: tokens drawn at random, by the row's id."""

    def draw(seen: Seen) -> Selection:
        return _kept(seen, pruning.random_tokens(len(seen.features), ratio, seen.name, job.seed))

    return _before(job, draw, attention=False)


@system("visionzip_shuffled", takes_ratio=True)
def visionzip_shuffled(job: Job, ratio: float) -> list[Trajectory]:
    """VisionZip's control: it keeps as much of the evidence and of the rest, but which tokens of either is drawn."""
    return _shuffled(job, lambda seen: pruning.visionzip(seen.scores, seen.keys, seen.features, ratio).kept)


@system("holov_shuffled", takes_ratio=True)
def holov_shuffled(job: Job, ratio: float) -> list[Trajectory]:
    """HoloV's control of the same kind."""
    return _shuffled(job, lambda seen: pruning.holov(seen.scores, seen.features, ratio))


# Training-free pruning inside the language model


@system("fastv", takes_ratio=True)
def fastv(job: Job, ratio: float) -> list[Trajectory]:
    """FastV: behind layer 2 of 28 (scaled to depth) the share r is left, by the last text token's attention there.

    r is the share left at the end; `Trajectory.layer_rtr` is larger, since the first layers hold every token.
    """
    return _inside(job, lambda depth: fastv_plan(ratio, depth))


@system("sparsevlm", takes_ratio=True)
def sparsevlm(job: Job, ratio: float) -> list[Trajectory]:
    """SparseVLM: pruning behind layers 2, 6 and 15 of 28 (scaled to depth) by the raters' attention, with recycling.

    r is the *mean over the layers*, as in its paper, which counts retained tokens so; each stage keeps the same share
    of what the one before had left. Recycled tokens count. `Trajectory.rtr` and `.layer_rtr` differ by rounding only.
    """
    return _inside(job, lambda depth: sparsevlm_plan(ratio, depth))


@system("sparsevlm_shuffled", takes_ratio=True)
def sparsevlm_shuffled(job: Job, ratio: float) -> list[Trajectory]:
    """SparseVLM's control: behind each of its layers as much of the evidence and of the rest, but drawn which, and nothing is recycled."""
    evidence = _evidence_flags(job)

    def redraw(kept: Tensor, numbers: Tensor, name: str) -> Tensor:
        return pruning.shuffled(kept, evidence[name][numbers], f"{name}/{len(numbers)}", job.seed)

    return _inside(job, lambda depth: replace(sparsevlm_plan(ratio, depth), redraw=redraw))


def fastv_plan(ratio: float, depth: int) -> Plan:
    """Where FastV drops tokens in a language model of ``depth`` layers; AwaresValueError for fewer than two."""
    return Plan({_layers((FASTV_LAYER,), depth)[0]: ratio}, pruning.fastv, "last")


def sparsevlm_plan(ratio: float, depth: int) -> Plan:
    """Where SparseVLM drops tokens; AwaresValueError where ``ratio`` is below the share of the first, full layers."""
    shares = pruning.geometric_schedule(ratio, _layers(SPARSEVLM_LAYERS, depth), depth)
    return Plan(shares, pruning.sparsevlm, "mean")


# Controls of the policy


@system("random_crop", model="awares")
def random_crop(job: Job) -> list[Trajectory]:
    """The policy calls where it did, but each of its crops is replaced by a random one of the same area.

    The crops of a call stay different, so the tokens stay the same; ``job.seed`` and the row's id decide.
    """
    if job.policy is None or [one.row_id for one in job.policy] != list(job.rows["id"]):
        raise AwaresValueError("random_crop needs the policy's trajectories of the same rows: give Job.policy")
    return _two_turns(job, [_random_crops(one.crops, one.row_id, job.seed) for one in job.policy])


NO_BOXES = "no row has boxes of its evidence (public benchmarks have none): leave it out of comparison.systems"


@system("oracle_crop", model="awares")
def oracle_crop(job: Job) -> list[Trajectory]:
    """The policy's answers with the decisions of `evaluation.label_rows`: the target crops of a row with label HR, no call for LR."""
    try:
        labels, targets = job.rows["label"], job.rows["target_crops"]
    except KeyError as error:
        raise AwaresValueError(f"oracle_crop: rows lack the column {error}: take evaluation.label_rows'") from error
    wanted = [tuple(crops) if label == "HR" else () for label, crops in zip(labels, targets, strict=True)]
    if "HR" in labels[:] and not any(wanted):
        raise AwaresValueError(f"oracle_crop: {NO_BOXES}")
    return _two_turns(job, wanted)


# What a pruner has left


def shares_left(job: Job) -> pd.DataFrame:
    """What is there at the end of each row of a ``job`` that a pruner has answered, as shares from 0 to 1.

    Columns ``left``: of all visual tokens; ``evidence``: of those that touch a question or answer box, nan without boxes.
    """
    records = []
    for name, flags in zip(job.rows["id"], _evidence(job), strict=True):
        there = job.left[name]
        shown = flags[there].sum() / flags.sum() if flags.any() else float("nan")
        records.append((len(there) / len(flags), shown))
    return pd.DataFrame(records, columns=["left", "evidence"])


def _evidence(job: Job) -> Iterator[np.ndarray]:
    """One flag for each visual token of a row, in raster order: whether it touches a box."""
    processor = job.engine.processor
    merge = processor.image_processor.merge_size
    for image, *boxes in zip(job.rows["image"], job.rows["question_boxes"], job.rows["answer_boxes"], strict=True):
        height, width = (side // merge for side in patch_grid(cap(image, job.engine.max_side).size, processor))
        flags = np.zeros((height, width), dtype=bool)
        for x1, y1, x2, y2 in [*boxes[0], *boxes[1]]:
            flags[y1 * height // 1000 : -(-y2 * height // 1000), x1 * width // 1000 : -(-x2 * width // 1000)] = True
        yield flags.flatten()


# Helpers


def _one_turn(job: Job, engine: Engine, view: str) -> list[Trajectory]:
    return engine.answer(job.rows["image"], job.rows["question"], view, row_ids=job.rows["id"])


def _two_turns(job: Job, forced: list[tuple[str, ...]] | None) -> list[Trajectory]:
    columns = job.rows["image"], job.rows["question"]
    return job.engine.run(*columns, forced=forced, call_bias=job.call_bias, row_ids=job.rows["id"])


def _before(job: Job, select: Callable[[Seen], Selection], attention: bool = True) -> list[Trajectory]:
    return _with_decoder(job, VisionPruned, select, attention)


def _evidence_flags(job: Job) -> dict[str, Tensor]:
    """`_evidence` by row id, for a shuffled control; AwaresValueError where no row has boxes."""
    flags = list(_evidence(job))
    if not any(some.any() for some in flags):
        raise AwaresValueError(f"a shuffled control: {NO_BOXES}")
    return dict(zip(job.rows["id"], map(torch.from_numpy, flags), strict=True))


def _shuffled(job: Job, choose: Callable[[Seen], Tensor]) -> list[Trajectory]:
    evidence = _evidence_flags(job)

    def draw(seen: Seen) -> Selection:
        shows = evidence[seen.name.rpartition("/")[0]]
        return _kept(seen, pruning.shuffled(choose(seen).cpu(), shows, seen.name, job.seed))

    return _before(job, draw)


def _inside(job: Job, plan: Callable[[int], Plan]) -> list[Trajectory]:
    return _with_decoder(job, LayerPruned, plan)


def _with_decoder(job: Job, kind: Callable[..., Pruned], *how: Any) -> list[Trajectory]:
    """The full view through a decoder of its own; model, batches and limits are those of the job's engine."""
    engine, plain = copy.copy(job.engine), job.engine.decoder
    engine.decoder = pruned = kind(plain.model, plain.processor, plain.max_new_tokens, *how)
    pruned.left = job.left
    return _one_turn(job, engine, "full")


def _kept(seen: Seen, kept: Any) -> Selection:
    kept = kept.to(seen.features.device)
    return Selection(kept, seen.features[kept])


def _layers(layers: Sequence[int], depth: int) -> list[int]:
    scaled = pruning.scaled_layers(layers, DEPTH, depth)
    if not scaled:
        raise AwaresValueError(f"pruning inside a language model of {depth} layer(s): it needs two or more")
    return scaled


def _random_crops(crops: Sequence[str], row_id: str, seed: int) -> tuple[str, ...]:
    name = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big")
    rng = np.random.default_rng([seed, name])
    drawn: list[str] = []
    for crop in crops:
        alike = [other for other in CROPS if area(other) == area(crop) and other not in drawn]
        if not alike:
            raise AwaresValueError(
                f"random_crop, row {row_id}: no named crop is as large as {crop!r}: it wants a policy of named crops"
            )
        drawn.append(alike[rng.integers(len(alike))])
    return tuple(drawn)
