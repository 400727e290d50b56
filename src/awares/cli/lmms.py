"""The six benchmarks through lmms-eval itself, by the plug-in `lmms_plugin`.

lmms-eval wants torchvision and so another build of torch: it runs as a program of an environment of its own, whose Python
``evaluation.lmms_eval`` names. Rows, prompts and metrics are lmms-eval's; the interaction, its crops and its price are ours.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from awares import policy
from awares.config import Params
from awares.data import sources
from awares.engine import decode, model
from awares.engine import jsonl as records
from awares.errors import AwaresError, AwaresFileError, AwaresValueError
from awares.method import protocol, rollout
from awares.training import checkpoints as training

TASKS = {
    "chartqa": "chartqa",
    "docvqa": "docvqa_val",
    "ocrbench": "ocrbench",
    "pope": "pope",
    "realworldqa": "realworldqa",
    "vstar": "vstar_bench",
}
COLUMNS = ["system", "benchmark", "task", "metric", "value", "rtr", "seconds", "n"]


def through_lmms_eval(
    system: str,
    model_path: Path,
    params: Params,
    out_dir: Path,
    tasks: Mapping[str, str] = TASKS,
    options: Sequence[str] = (),
) -> pd.DataFrame:
    """Scores of the policy at ``model_path`` by lmms-eval: a line per benchmark and metric, on lmms-eval's own scale.

    Columns as in ``COLUMNS``; rtr and seconds are means over samples, n counts them. ``tasks``: benchmark -> task of
    lmms-eval; ``options``: more of its command line. The samples stand in ``.checkpoints`` beside ``out_dir``, keyed by the
    policy and its settings: the same call after a kill goes on from them. AwaresFileError where the environment
    is missing, AwaresError with lmms-eval's last words where it fails.
    """
    python = params.path(params.evaluation.lmms_eval)
    if not python.is_file():
        raise AwaresFileError(
            f'evaluation.lmms_eval: no Python at {python}; make that environment as data/launch/README.md says, or set it to ""'
        )
    if protocol.from_params(params) != protocol.get_protocol(params.protocol.name):
        raise AwaresValueError(
            'evaluation.lmms_eval: the plug-in plays the interaction of protocol.name alone: set it to "", or leave protocol.system_file, '
            "crops.offered and crops.region_budget as they are"
        )
    modules = [str(part.__file__) for part in (decode, model, policy, rollout, sources)]
    code = [__file__, str(Path(__file__).with_name("lmms_plugin.py")), *modules]
    inputs = training.describe_inputs("evaluation", params, [], model_path, code)
    folder = training.checkpoint_folder(out_dir, {**inputs, "tasks": list(tasks.values()), "options": list(options)})
    samples = folder / "samples.jsonl"
    limits = params.protocol
    arguments = {
        "pretrained": model_path.resolve(),
        "dtype": params.base.dtype,
        "device": params.base.device,
        "protocol": limits.name,
        "call_bias": params.evaluation.call_bias,
        "max_new_tokens": limits.max_new_tokens,
        "token_budget": limits.token_budget,
        "max_side": params.crops.max_side,
        "log": samples.resolve(),
    }
    command = [str(python), "-m", "lmms_eval", "--model", "awares", "--tasks", ",".join(tasks.values())]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    command += [
        "--batch_size",
        "64",
        "--output_path",
        str(folder / "results"),
        *options,
    ]
    before = _written(folder)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # its progress goes to stderr
    fresh = _written(folder) - before
    if done.returncode or not fresh:  # it ends with 0 after most errors, too
        raise AwaresError(
            f"lmms-eval ended with {done.returncode} on {system}, {'with' if fresh else 'without'} results; what it printed tells why:\n"
            f"{done.stdout[-2000:]}"
        )
    _, results = max(fresh)
    return table(system, json.loads(results.read_text())["results"], pd.DataFrame(records.read_records(samples)), tasks)


def _written(folder: Path) -> set[tuple[int, Path]]:
    """(time, file) of every table of results that lmms-eval has written there."""
    return {(file.stat().st_mtime_ns, file) for file in folder.glob("results/**/*results.json")}


def table(
    system: str, results: Mapping[str, Mapping[str, object]], samples: pd.DataFrame, tasks: Mapping[str, str] = TASKS
) -> pd.DataFrame:
    """lmms-eval's ``results`` (task -> ``metric,filter`` -> value) and the plug-in's ``samples`` as one table."""
    of = (
        samples.drop_duplicates("sample", keep="last")
        .assign(task=samples["sample"].str.split("/").str[0])
        .groupby("task")
    )
    rows = []
    for benchmark, task in tasks.items():
        part = of.get_group(task)
        for key, value in results[task].items():
            metric = key.split(",")[0]
            if isinstance(value, int | float) and "," in key and not metric.endswith("_stderr"):
                price = part.rtr.mean(), part.seconds.mean(), len(part)
                rows.append((system, benchmark, task, metric, float(value), *price))
    return pd.DataFrame(rows, columns=COLUMNS)
