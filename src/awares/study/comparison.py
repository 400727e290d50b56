"""Table 1 with every system: the scores that the stages wrote, brought together (PAPER §5, §6)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd

from awares.config import SHUFFLED, SYSTEMS, Evaluation, Params, differences
from awares.data import rows as data
from awares.errors import AwaresFileError
from awares.method import evaluation
from awares.method.crops import coverage
from awares.method.metrics import bootstrap_interval
from awares.study.scores import EVALUATION, Runs
from awares.study.variants import MAIN, judged_by

TRAINED = {"sft": "sft", "awares": "grpo"}  # and the stage that trains it
CONTROL = "random_token"
SHOWN = 0.95  # share of a box from which a region shows it
ANSWERED = ["system", "seed", "benchmark", "row_id", "score", "rtr", "layer_rtr", "answer", "written", "crops", "call_status", "call_gap",
            "visual_tokens", "full_visual_tokens"]  # fmt: skip
EFFECTS = [
    "variant",
    "system",
    "against",
    "change",
    "difference",
    "low",
    "high",
    "significant",
    "rtr",
    "rtr_low",
    "rtr_high",
]


def all_scores(params: Params) -> pd.DataFrame:
    """One line per system, training seed and row, as `answered` has them.

    Systems: those of Table 1, of ``comparison`` and of ``ablations.systems``. ``seed`` is the main one for what is not trained;
    of a trained system every seed counts for which it has been run. Raises AwaresFileError naming what has not been run.
    """
    return answered(params, [*_main_places(params), *_other_places(params)])


def seed_scores(params: Params) -> pd.DataFrame:
    """`all_scores` of Table 1's systems alone; with an unseen evaluation seed, of the rows that it draws."""
    return answered(params, _main_places(params))


def over_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """Columns system, benchmark, row_id, score, rtr, layer_rtr: each row's mean over training seeds."""
    keys = ["system", "benchmark", "row_id"]
    return scores.groupby(keys, sort=False)[["score", "rtr", "layer_rtr"]].mean().reset_index()


def evidence_table(params: Params) -> pd.DataFrame:
    """What each pruner of ``comparison`` leaves, in percent: of all visual tokens, of those that show evidence.

    Columns system, left, evidence with its interval over rows, accuracy (of the rows with evidence, average of the tasks), n.
    """
    settings, records = params.evaluation, []
    for system in params.comparison.all:
        scores = pd.read_csv(params.run_dir("systems") / system / "scores.csv")
        if "evidence" not in scores or scores.evidence.isna().all():  # no pruner, or benchmarks without boxes
            continue
        scores = scores.dropna(subset="evidence")
        resampling = (settings.seed, settings.bootstrap, settings.level, scores.benchmark.tolist())
        found = bootstrap_interval(scores.evidence.tolist(), *resampling)
        left, accuracy = scores.groupby("benchmark")[["left", "score"]].mean().mean()
        values = {"left": left, "evidence": found.mean, "low": found.low, "high": found.high, "accuracy": accuracy}
        records.append({"system": system, **{k: 100 * v for k, v in values.items()}, "n": len(scores)})
    return pd.DataFrame(records, columns=["system", "left", "evidence", "low", "high", "accuracy", "n"])


def regions_table(scores: pd.DataFrame, rows: datasets.Dataset, params: Params) -> pd.DataFrame:
    """Whether the regions that each system of `all_scores` got show the evidence, at the main training seed, on the rows where it got any.

    Columns system, calls (rows), covered (percent of them whose every box lies in the regions to SHOWN) with its interval over rows,
    accuracy_covered and accuracy_elsewhere (percent right). ``rows``: the evaluation rows; those without boxes are left out.
    """
    settings, records = params.evaluation, []
    plain = rows.select_columns(["id", "question_boxes", "answer_boxes"])
    boxes = {one["id"]: [*one["question_boxes"], *one["answer_boxes"]] for one in plain}
    main = scores[(scores.seed == params.seed) & scores.crops.map(len).gt(0) & scores.row_id.map(boxes).map(len).gt(0)]
    for system, part in main.groupby("system", sort=False):
        pairs = zip(part.row_id, part.crops, strict=True)
        covered = np.array([all(coverage(tuple(box), names) >= SHOWN for box in boxes[row]) for row, names in pairs])
        found = bootstrap_interval(covered.tolist(), settings.seed, settings.bootstrap, settings.level)
        right = [100 * part.score[mask].mean() for mask in (covered, ~covered)]
        records.append((system, len(part), 100 * found.mean, 100 * found.low, 100 * found.high, *right))
    columns = ["system", "calls", "covered", "low", "high", "accuracy_covered", "accuracy_elsewhere"]
    return pd.DataFrame(records, columns=columns)


def answered(params: Params, places: Iterable[tuple[str, int, Path]]) -> pd.DataFrame:
    """The evaluation rows as every system of ``places`` (name, training seed, trajectories) has answered them.

    Columns system, seed, benchmark, row_id, score (0 to 1), rtr, layer_rtr, answer, written (the text of each assistant turn), crops,
    call_status, call_gap, visual_tokens, full_visual_tokens. Raises AwaresFileError naming what has not been run.
    """
    rows = data.evaluation_rows(params)
    found = []
    for system, seed, path in places:
        if not path.is_file():
            raise AwaresFileError(f"{path}: system {system} has not answered yet; run `dvc repro comparison`")
        done = evaluation.load_trajectories(path)
        table = evaluation.scored(system, rows, done)
        table["written"] = [[turn.text for turn in one.turns if turn.role == "assistant"] for one in done]
        for name in ("layer_rtr", "call_gap", "visual_tokens", "full_visual_tokens"):
            table[name] = [getattr(one, name) for one in done]
        found.append(table.assign(seed=seed))
    return pd.concat(found, ignore_index=True)[ANSWERED]


def first_turns(places: Iterable[tuple[str, int, Path]]) -> pd.DataFrame:
    """What the policies of ``places`` ask for on the curated validation rows: system, seed, row_id, crops, call_status."""
    found = [
        (system, seed, one.row_id, one.crops, one.call_status)
        for system, seed, path in places
        for one in evaluation.load_trajectories(path)
    ]
    return pd.DataFrame(found, columns=["system", "seed", "row_id", "crops", "call_status"])


def validation_places(params: Params) -> Iterator[tuple[str, int, Path]]:
    """System, seed and validation trajectories of the trained policies of Table 1; further seeds only where they are."""
    for system, stage in TRAINED.items():
        for seed in (params.seed, *params.seeds):
            path = replace(params, seed=seed).run_dir(stage) / "validation.jsonl"
            if seed == params.seed or path.is_file():
                yield system, seed, path


def _main_places(params: Params) -> Iterator[tuple[str, int, Path]]:
    """System, seed and trajectories of Table 1's systems; further seeds only where they are."""
    for system in SYSTEMS:
        yield system, params.seed, params.run_dir("evaluation") / "trajectories" / f"{system}.jsonl"
        for seed in params.seeds if system in TRAINED else ():
            path = replace(params, seed=seed).run_dir("evaluation") / "trajectories" / f"{system}.jsonl"
            if path.is_file():
                yield system, seed, path


def _other_places(params: Params) -> Iterator[tuple[str, int, Path]]:
    for system in params.comparison.all:
        yield system, params.seed, params.run_dir("systems") / system / "trajectories.jsonl"
    for system in params.ablations.get("systems", ()):
        folder = replace(params, variant=system).run_dir("evaluation")
        yield system, params.seed, folder / "trajectories" / "awares.jsonl"


def systems_table(scores: pd.DataFrame, settings: Evaluation) -> pd.DataFrame:
    """`evaluation.main_table` of every system, a row's score being its mean over seeds, plus layer_rtr and seeds."""
    seeds = scores.groupby("system", sort=False).seed.nunique()
    means = over_seeds(scores)
    table = evaluation.main_table(means, settings)
    inside = evaluation.main_table(means.assign(rtr=means.layer_rtr), settings)
    return table.assign(layer_rtr=inside.rtr, seeds=table.system.map(seeds))


def response_table(scores: pd.DataFrame, params: Params) -> pd.DataFrame:
    """Table 6 from `all_scores`, main training seed: system, benchmark, characters of the answer (mean), characters_sd, n."""
    main = scores[scores.seed == params.seed]
    lengths = main.assign(characters=main.answer.str.len())
    grouped = lengths.groupby(["system", "benchmark"], sort=False).characters
    return grouped.agg(characters="mean", characters_sd="std", n="count").reset_index()


def against(scores: pd.DataFrame, system: str, params: Params) -> pd.DataFrame:
    """`evaluation.compare` of ``system`` with each other one, at the main training seed."""
    main = scores[scores.seed == params.seed]
    others = [name for name in main.system.unique() if name != system]
    return evaluation.compare(main, [(system, name) for name in others], params.evaluation)


def against_control(scores: pd.DataFrame, params: Params) -> pd.DataFrame:
    """`evaluation.compare` of each pruner with the random choice of as many tokens."""
    names = list(scores.system.unique())
    controls = {name.removeprefix(CONTROL): name for name in names if name.startswith(f"{CONTROL}_")}
    pairs = [
        (name, controls[f"_{share}"])
        for name in names
        for stem, _, share in [name.rpartition("_")]
        if stem and f"_{share}" in controls and not name.startswith(CONTROL)
    ]
    return evaluation.compare(scores[scores.seed == params.seed], pairs, params.evaluation)


def against_shuffled(scores: pd.DataFrame, params: Params) -> pd.DataFrame:
    """`evaluation.compare` of each pruner with its own counts of tokens, with and without evidence, drawn."""
    names = set(scores.system)
    pairs = [(name.removesuffix(SHUFFLED), name) for name in scores.system.unique() if name.endswith(SHUFFLED)]
    pairs = [pair for pair in pairs if pair[0] in names]
    return evaluation.compare(scores[scores.seed == params.seed], pairs, params.evaluation)


def effects(main: Params, runs: Mapping[str, Params]) -> pd.DataFrame:
    """What the change of each variant does to average accuracy (points) and to RTR: a line against the main line, then one against
    each variant whose changes are a part of its own (a trained system of Table 1 is compared with the main line alone).

    Columns EFFECTS: ``system`` (of Table 1) is the trained policy that is looked at, ``change`` what sets the two apart. The intervals hold
    rows and the scatter of training (awares.measures). Raises AwaresFileError for a variant that has not been run.
    """
    system = {name: judged_by(params)[0] for name, params in runs.items()}
    changes = {name: {key: str(new) for key, _, new in differences(main, params)} for name, params in runs.items()}
    policies = {one: {EVALUATION: _answers(MAIN, one)} for one in TRAINED}
    policies |= {name: {EVALUATION: _answers(name, one), "like": one} for name, one in system.items()}
    read = Runs(main, policies)
    steps = {name: change for name, change in changes.items() if name not in main.ablations.get("systems", ())}
    starts = [
        (name, other) for name in steps for other in _parts_of(steps[name], steps) if system[other] == system[name]
    ]
    records = []
    for name, other in [*((name, MAIN) for name in runs), *starts]:
        pair = (name, system[name] if other == MAIN else other)
        seeds = read.seeds(pair, EVALUATION)
        values = []
        for measure in ("accuracy", "rtr"):
            a, b = (read.sample(measure, policy, seeds) for policy in pair)
            values.append(((a - b).value, *(a - b).interval(main.evaluation.level)))
        change = ", ".join(f"{key} {new}" for key, new in changes[name].items() if key not in changes.get(other, ()))
        (gain, low, high), rtr = values
        records.append((name, system[name], other, change, gain, low, high, not low <= 0 <= high, *rtr))
    return pd.DataFrame(records, columns=EFFECTS)


def _answers(variant: str, system: str) -> str:
    return f"evaluation/{variant}-s{{seed}}/trajectories/{system}.jsonl"


def _parts_of(whole: Mapping[str, str], changes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The variants whose changes are a part of ``whole``, less those that are a part of another such and those without any."""
    parts = [name for name, change in changes.items() if change and change.items() < whole.items()]
    return [name for name in parts if not any(changes[name].items() < changes[other].items() for other in parts)]
