"""Systems and variants side by side: Table 1 with every system (PAPER §5, §6), ablations (Tables 3, 4, 7 to 10).

A variant changes a few parameters and repeats the stages that they decide. `06_ablations` tables one variant.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from awares.config import differences
from awares.data.rows import evaluation_rows
from awares.errors import AwaresValueError
from awares.method import evaluation
from awares.method.evaluation import AVERAGE
from awares.settings import DECIDES, MAIN_SYSTEMS, Evaluation, Params
from awares.study.publish import require
from awares.study.scores import EVALUATION, Runs, trained

MAIN = "main"  # the main line's name in the tables of a variant
TRAINED = {"sft": "sft", "awares": "grpo"}  # system -> the stage that trains it
ANSWER_COLUMNS = ["answer", "written", "crops", "call_status", "call_gap", "visual_tokens", "full_visual_tokens"]

File = tuple[str, int, Path]  # system or variant, training seed, its trajectories


def all_scores(params: Params) -> pd.DataFrame:
    """`answered` of the systems of Table 1 (every seed that was run), ``comparison`` and ``ablations.systems``."""
    compared = {name: params.run_dir("systems") / name / "trajectories.jsonl" for name in params.comparison.all}
    variants = {name: replace(params, variant=name) for name in params.ablations.get("systems", ())}
    compared |= {name: one.run_dir("evaluation") / "trajectories/awares.jsonl" for name, one in variants.items()}
    return answered(params, [*main_files(params), *((name, params.seed, path) for name, path in compared.items())])


def over_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """Columns system, benchmark, row_id, score, rtr, layer_rtr: each row's mean over training seeds."""
    keys = ["system", "benchmark", "row_id"]
    return scores.groupby(keys, sort=False)[["score", "rtr", "layer_rtr"]].mean().reset_index()


def answered(params: Params, files: Iterable[File]) -> pd.DataFrame:
    """The evaluation rows as every system of ``files`` has answered them, one line per system, seed and row.

    Columns system, seed, benchmark, row_id, score (0 to 1), rtr, layer_rtr, then ANSWER_COLUMNS (``written``: the text
    of each assistant turn). Raises AwaresFileError for a system that has not been run.
    """
    rows, found = evaluation_rows(params), []
    for system, seed, path in files:
        done = evaluation.load_trajectories(path)
        table = evaluation.scored(system, rows, done).assign(seed=seed)
        table["written"] = [[turn.text for turn in one.turns if turn.role == "assistant"] for one in done]
        for name in ("layer_rtr", "call_gap", "visual_tokens", "full_visual_tokens"):
            table[name] = [getattr(one, name) for one in done]
        found.append(table)
    first = ["system", "seed", "benchmark", "row_id", "score", "rtr", "layer_rtr"]
    return pd.concat(found, ignore_index=True)[[*first, *ANSWER_COLUMNS]]


def first_turns(files: Iterable[File]) -> pd.DataFrame:
    """Requests on the curated validation rows: system, seed, row_id, crops, call_status."""
    done = ((system, seed, one) for system, seed, path in files for one in evaluation.load_trajectories(path))
    found = [(system, seed, one.row_id, one.crops, one.call_status) for system, seed, one in done]
    return pd.DataFrame(found, columns=["system", "seed", "row_id", "crops", "call_status"])


def main_files(params: Params) -> list[File]:
    """Evaluation trajectories of Table 1's systems; with an unseen evaluation seed, on the rows that it draws."""
    names = {system: f"trajectories/{system}.jsonl" for system in MAIN_SYSTEMS}
    return [file for system, name in names.items() for file in _by_seed(params, system, "evaluation", name)]


def main_first_turns(params: Params) -> list[File]:
    """Validation trajectories of the trained policies of Table 1."""
    return [file for system, stage in TRAINED.items() for file in _by_seed(params, system, stage, "validation.jsonl")]


def _by_seed(params: Params, system: str, stage: str, name: str) -> list[File]:
    """A file per training seed; further seeds than the main one only where they have been run."""
    seeds = (params.seed, *(params.seeds if system in TRAINED else ()))
    files = [(system, seed, replace(params, seed=seed).run_dir(stage) / name) for seed in seeds]
    return files[:1] + [file for file in files[1:] if file[2].is_file()]


def systems_table(scores: pd.DataFrame, settings: Evaluation) -> pd.DataFrame:
    """`evaluation.main_table` of every system, a row's score being its mean over seeds, plus layer_rtr and seeds."""
    seeds, means = scores.groupby("system", sort=False).seed.nunique(), over_seeds(scores)
    table = evaluation.main_table(means, settings)
    inside = evaluation.main_table(means.assign(rtr=means.layer_rtr), settings)
    return table.assign(layer_rtr=inside.rtr, seeds=table.system.map(seeds))


def judged_by(params: Params) -> tuple[str, str]:
    """The system that a variant is judged by and the stage that trained it: awares, grpo if it changes GRPO, else sft.

    Raises AwaresValueError for a variant that changes no training.
    """
    touched = params.changed & DECIDES["grpo"]
    if not touched:
        raise AwaresValueError(f"variant {params.variant!r} changes no training: no ablation of params.yaml")
    return ("awares", "grpo") if "grpo" in touched else ("sft", "sft")


def gather(folders: Mapping[str, Path], name: str) -> pd.DataFrame:
    """The tables ``name`` of all variants (variant -> folder of its tables) in one, with a first column variant."""
    files = {variant: require(folder / f"{name}.csv", "ablations") for variant, folder in folders.items()}
    tables = {variant: pd.read_csv(file) for variant, file in files.items()}
    return pd.concat(tables, names=["variant"]).reset_index("variant").reset_index(drop=True)


def select_variants(tables: pd.DataFrame, column: str, wanted: Sequence[str], main: str) -> pd.DataFrame:
    """The rows of gathered ``tables`` for the variants ``wanted``, in that order; the main line is named ``main``.

    ``column`` names a policy in a variant's table. Every such table has the main line's row, too, scored at the same
    seed; that of the first wanted variant is taken. Raises AwaresValueError if params.yaml lists no wanted variant.
    """
    own = tables[tables[column] == tables.variant]
    ours = [name for name in wanted if name != main and (own.variant == name).any()]
    if not ours:
        raise AwaresValueError(f"none of {', '.join(wanted)} is listed under ablations in params.yaml")
    reference = tables[(tables[column] == MAIN) & (tables.variant == ours[0])].assign(variant=main)
    rows = pd.concat([own, reference])
    return pd.concat([rows[rows.variant == name] for name in wanted], ignore_index=True).drop(columns=column)


def recipe_table(results: pd.DataFrame, decisions: pd.DataFrame, wanted: Sequence[str], main: str) -> pd.DataFrame:
    """Table 8: variant, accuracy (percent) with its interval, rtr, call_rate (percent), area (share of the image)."""
    average = select_variants(results[results.benchmark == AVERAGE], "system", wanted, main)
    calls = select_variants(decisions, "policy", wanted, main)[["variant", "call_rate", "area"]]
    return average[["variant", "accuracy", "accuracy_low", "accuracy_high", "rtr"]].merge(calls, on="variant")


def sweep_table(
    results: pd.DataFrame, decisions: pd.DataFrame, main: Params, runs: Mapping[str, Params]
) -> pd.DataFrame:
    """Numbers that are a variant's only change, the main line's included: parameter, value, then as `recipe_table`."""
    found: dict[str, dict[str, float]] = {}
    for name, params in runs.items():
        changes = differences(main, params)
        if len(changes) == 1 and {type(value) for value in changes[0][1:]} <= {int, float}:
            found.setdefault(changes[0][0], {MAIN: changes[0][1]})[name] = changes[0][2]
    parts = []
    for values in found.values():
        table = recipe_table(results, decisions, sorted(values, key=values.__getitem__), MAIN)
        table.insert(0, "value", table.variant.map(values))
        parts.append(table)
    return pd.concat(parts, keys=found, names=["parameter"]).reset_index("parameter").reset_index(drop=True)


def effects(main: Params, runs: Mapping[str, Params]) -> pd.DataFrame:
    """Effect of each variant's change on mean accuracy (points) and RTR, with intervals over rows and training.

    A line against the main line, then one against each variant with a subset of its changes (not for the trained
    systems of Table 1). ``system``: the policy of Table 1 that is compared; ``change``: the parameters that differ.
    Raises AwaresFileError for a variant that has not been run.
    """
    system = {name: judged_by(params)[0] for name, params in runs.items()}
    changes = {name: {key: str(new) for key, _, new in differences(main, params)} for name, params in runs.items()}
    policies = {name: trained(MAIN, stage) for name, stage in TRAINED.items()}
    policies |= {name: trained(name, TRAINED[like], like) for name, like in system.items()}
    steps = {name: change for name, change in changes.items() if name not in main.ablations.get("systems", ())}
    pairs = [(name, MAIN) for name in runs]
    pairs += [(name, part) for name in steps for part in _parts_of(steps[name], steps) if system[part] == system[name]]
    read, records = Runs(main, policies), []
    for name, start in pairs:
        pair = (name, system[name] if start == MAIN else start)
        seeds, found = read.seeds(pair, EVALUATION), []
        for measure in ("accuracy", "rtr"):
            gain = read.estimate(measure, pair[0], seeds) - read.estimate(measure, pair[1], seeds)
            found.append((gain.value, *gain.interval(main.evaluation.level)))
        change = ", ".join(f"{key} {new}" for key, new in changes[name].items() if key not in changes.get(start, ()))
        (points, low, high), tokens = found
        records.append((name, system[name], start, change, points, low, high, not low <= 0 <= high, *tokens))
    columns = ["variant", "system", "against", "change", "difference", "low", "high", "significant"]
    return pd.DataFrame(records, columns=[*columns, "rtr", "rtr_low", "rtr_high"])


def _parts_of(whole: Mapping[str, str], changes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The variants whose changes are the largest parts of ``whole``."""
    parts = [name for name, change in changes.items() if change and change.items() < whole.items()]
    return [name for name in parts if not any(changes[name].items() < changes[other].items() for other in parts)]
