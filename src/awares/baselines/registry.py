"""The compared systems by name: each takes a `SystemJob` and answers its rows with trajectories (PAPER §6).

A name is that of a function decorated with `awares.registry.system`. If the function takes a retained ratio, the
percentage of visual tokens follows its name: ``visionzip_50``, ``fastv_36.4``. src/awares/README.md adds one. Score it
like the others: ``evaluation.scored(name, rows, answer(name, SystemJob(engine, rows)))``.
"""

import copy
import hashlib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from awares.baselines import pruning
from awares.baselines.pruned_decode import LayerPruned, Pruned, PruningPlan, VisionPruned
from awares.engine.images import cap
from awares.engine.model import patch_grid
from awares.errors import AwaresValueError
from awares.method.crops import CROPS, area
from awares.method.rollout import Engine, Trajectory
from awares.registry import system

FASTV_LAYER = 2
SPARSEVLM_LAYERS = (2, 6, 15)
OWN = "awares.baselines.systems"  # the package of the user's systems, one file each


@dataclass(frozen=True)
class SystemJob:
    """The rows that a system answers, and the engine for it.

    ``engine`` has the weights that the system needs (`weights_of`). ``rows``: columns id, image, question (and label,
    target_crops for oracle_crop). ``policy``: the policy's trajectories of these rows, for random_crop. A pruner writes
    into ``left``, by row id, the visual tokens (in raster order) that are left at the end.
    """

    engine: Engine
    rows: Any  # datasets.Dataset or a mapping of columns
    policy: Sequence[Trajectory] | None = None
    seed: int = 0
    call_bias: float = 0.0
    left: dict[str, list[int]] = field(default_factory=dict)


System = Callable[..., list[Trajectory]]  # of a job, or of a job and a ratio


def answer(wanted: str | System, job: SystemJob) -> list[Trajectory]:
    """The trajectories of a system, by name or as a function, in the order of ``job.rows``."""
    function, ratio = parse(wanted)
    return function(job) if ratio is None else function(job, ratio)


def weights_of(wanted: str | System) -> str:
    """The weights that a system needs: base, sft or awares."""
    return getattr(parse(wanted)[0], "model", "base")


def parse(wanted: str | System) -> tuple[System, float | None]:
    """``visionzip_50`` -> (visionzip, 0.5), ``full`` -> (its function, None), a function -> (it, None).

    AwaresValueError for an unknown name, and for a percentage that is missing, superfluous or not in (0, 100].
    """
    name, ratio = wanted, None
    if isinstance(wanted, str):
        if wanted.isidentifier() and importlib.util.find_spec(f"{OWN}.{wanted}"):
            importlib.import_module(f"{OWN}.{wanted}")
        match = re.fullmatch(r"(.+)_(\d+(?:\.\d+)?)", wanted)
        if match and wanted not in system:
            name, ratio = match[1], float(match[2]) / 100
    function = system.find(name)
    parameter = inspect.signature(function).parameters.get("ratio")
    if ratio is not None and not parameter:
        raise AwaresValueError(f"system {wanted!r}: {name} takes no percentage, write {name}")
    if parameter and parameter.default is parameter.empty and not (ratio and ratio <= 1):
        raise AwaresValueError(f"system {wanted!r}: write {name}_50 for 50 percent of the visual tokens")
    return function, ratio


def matched(name: str, main: pd.DataFrame) -> str:
    """``visionzip_awares`` -> ``visionzip_36.4``: at AwaRes's average RTR in table ``main``. Other names as given."""
    if not name.endswith("_awares"):
        return name
    (rtr,) = main[(main.system == "awares") & (main.benchmark == "average")].rtr
    return f"{name.removesuffix('_awares')}_{100 * rtr:.1f}"


def _one_turn(job: SystemJob, view: str) -> list[Trajectory]:
    return job.engine.answer(job.rows["image"], job.rows["question"], view, row_ids=job.rows["id"])


def _two_turns(job: SystemJob, forced: list[tuple[str, ...]] | None) -> list[Trajectory]:
    columns = job.rows["image"], job.rows["question"]
    return job.engine.run(*columns, forced=forced, call_bias=job.call_bias, row_ids=job.rows["id"])


for _name, _view in {"full": "full", "half": "half", "no_image": "none"}.items():
    system(_name)(partial(_one_turn, view=_view))
for _name in ("sft", "awares"):  # a trained policy, by its own decisions
    system(_name, model=_name)(partial(_two_turns, forced=None))


@system("visionzip")
def visionzip(job: SystemJob, ratio: float) -> list[Trajectory]:
    """VisionZip: dominant tokens by the attention they receive, the others merged into a few contextual ones."""
    tokens = pruning.visionzip_tokens
    return _pruned(job, VisionPruned, select=lambda seen: tokens(seen.scores, seen.keys, seen.features, ratio))


@system("holov")
def holov(job: SystemJob, ratio: float) -> list[Trajectory]:
    """HoloV: quotas for contiguous chunks by attention and diversity; inside a chunk the top by attention."""
    return _pruned(job, VisionPruned, select=lambda seen: pruning.holov_tokens(seen.scores, seen.features, ratio))


@system("random_token")
def random_token(job: SystemJob, ratio: float) -> list[Trajectory]:
    """The control of the pruners: random tokens, drawn by the row's id."""
    tokens = partial(pruning.random_tokens, ratio=ratio, seed=job.seed)
    return _pruned(job, VisionPruned, select=lambda seen: tokens(seen.features, name=seen.name), attention=False)


@system("fastv")
def fastv(job: SystemJob, ratio: float) -> list[Trajectory]:
    """FastV: keep r from layer 2 of 28 (scaled) on, by the last text token's attention; ``layer_rtr`` exceeds r."""

    def plan(depth: int) -> PruningPlan:
        return PruningPlan({pruning.scaled_layers((FASTV_LAYER,), depth)[0]: ratio}, pruning.fastv_tokens, "last")

    return _pruned(job, LayerPruned, plan=plan)


@system("sparsevlm")
def sparsevlm(job: SystemJob, ratio: float) -> list[Trajectory]:
    """SparseVLM: layers 2, 6, 15 of 28 (scaled) by the raters' attention, with recycling; r is the mean over layers."""

    def plan(depth: int) -> PruningPlan:
        shares = pruning.geometric_schedule(ratio, pruning.scaled_layers(SPARSEVLM_LAYERS, depth), depth)
        return PruningPlan(shares, pruning.sparsevlm_tokens, "mean")

    return _pruned(job, LayerPruned, plan=plan)


def _pruned(job: SystemJob, decoder: Callable[..., Pruned], **how: Any) -> list[Trajectory]:
    """The full view through another ``decoder``, with the model, batches and limits of the job's engine."""
    engine, plain = copy.copy(job.engine), job.engine.decoder
    engine.decoder = pruned = decoder(plain.model, plain.processor, plain.max_new_tokens, **how)
    pruned.left = job.left
    return _one_turn(replace(job, engine=engine), "full")


def shares_left(job: SystemJob) -> pd.DataFrame:
    """Shares of tokens that a pruner left, by row: ``left`` of all, ``evidence`` of those that touch a box or nan."""
    processor, records = job.engine.processor, []
    merge = processor.image_processor.merge_size
    columns = (job.rows[name] for name in ("id", "image", "question_boxes", "answer_boxes"))
    for name, image, question_boxes, answer_boxes in zip(*columns, strict=True):
        height, width = (side // merge for side in patch_grid(cap(image, job.engine.max_side).size, processor))
        touched = np.zeros((height, width), dtype=bool)  # visual tokens that touch a box
        for x1, y1, x2, y2 in [*question_boxes, *answer_boxes]:
            touched[y1 * height // 1000 : -(-y2 * height // 1000), x1 * width // 1000 : -(-x2 * width // 1000)] = True
        there, flags = job.left[name], touched.flatten()
        shown = flags[there].sum() / flags.sum() if flags.any() else float("nan")
        records.append((len(there) / len(flags), shown))
    return pd.DataFrame(records, columns=["left", "evidence"])


@system("random_crop", model="awares")
def random_crop(job: SystemJob) -> list[Trajectory]:
    """The policy's calls, each crop replaced by another of the same area, drawn by ``job.seed`` and the row's id."""
    if job.policy is None or [one.row_id for one in job.policy] != list(job.rows["id"]):
        raise AwaresValueError("random_crop needs the policy's trajectories of the same rows: give SystemJob.policy")
    return _two_turns(job, [_random_crops(one.crops, one.row_id, job.seed) for one in job.policy])


def _random_crops(crops: Sequence[str], row_id: str, seed: int) -> tuple[str, ...]:
    rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big")])
    drawn: list[str] = []
    for crop in crops:
        alike = [other for other in CROPS if area(other) == area(crop) and other not in drawn]
        if not alike:
            raise AwaresValueError(f"random_crop, row {row_id}: no named crop has the area of {crop!r}")
        drawn.append(alike[rng.integers(len(alike))])
    return tuple(drawn)


@system("oracle_crop", model="awares")
def oracle_crop(job: SystemJob) -> list[Trajectory]:
    """The policy with the decisions of `evaluation.label_rows`: target crops if the label is HR, else no call."""
    try:
        labels, targets = job.rows["label"], job.rows["target_crops"]
    except KeyError as error:
        raise AwaresValueError(f"oracle_crop: rows lack the column {error}: use evaluation.label_rows") from error
    wanted = [tuple(crops) if label == "HR" else () for label, crops in zip(labels, targets, strict=True)]
    if "HR" in labels[:] and not any(wanted):
        raise AwaresValueError("oracle_crop: no row has evidence boxes: remove it from comparison.systems")
    return _two_turns(job, wanted)
