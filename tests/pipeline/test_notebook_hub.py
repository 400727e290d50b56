"""Every notebook under profile paper: hub ids pointed at local copies in the published schemas, judge, oracle and base model at real local servers,
both trainings in two processes. What needs CUDA, vLLM or the hub itself is not proven here.

The policies of the main line stand in for those that further trainings would bring: under a variant's name, the policy of the *other* stage, so
that the variant's numbers are known.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import nbformat
import pandas as pd
import published
import pytest
import test_notebooks
import yaml
from conftest import TASKS, under_other_names
from faulty_server import ServerProcess

from awares.bench.latency import TIMED_SYSTEMS
from awares.config import MAIN_SYSTEMS
from awares.engine.model import save_model
from awares.engine.rows import load_rows
from awares.method.evaluation import AVERAGE
from awares.study import publish

ROOT = Path(__file__).parents[2]
KEYS = {"AWARES_API_KEY": "sk-planted-paper-0b7d", "HF_TOKEN": "hf_planted_paper_4e8c"}
SMOKE = {key: value for key, value in test_notebooks.SMOKE.items() if not key.startswith("curation.")}
SMOKE |= {
    "data.train_rows": 6,
    "data.validation_rows": 2,
    "base.device": "cpu",
    "base.dtype": "float32",
    "base.launch": "data/launch/2cpu.yaml",
    "curation.chunk_rows": 16,
    "protocol.max_new_tokens": 12,
    "curation.max_new_tokens": 12,
    "protocol.token_budget": 4096,
    "sft.per_device_batch_size": 2,
    "sft.share": 1.0,
    "sft.epochs": 3,
    "sft.learning_rate": 1.0e-2,  # enough that some calls name a crop, and that GRPO's policy answers otherwise than the cold start's
    "grpo.learning_rate": 3.0e-2,
}
NUMBERS = ["accuracy", "rtr", "n"]
# lmms-eval lives in another environment, where `make lmms` runs it; here a program that writes what it would write
LMMS_EVAL = """
import json, sys
from pathlib import Path
assert sys.argv[1:3] == ["-m", "lmms_eval"]
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
given = dict(pair.split("=", 1) for pair in options["--model_args"].split(","))
assert options["--model"] == "awares" and (Path(given["pretrained"]) / "model.safetensors").is_file()
tasks = options["--tasks"].split(",")
lines = [json.dumps({"id": f"{task}/test/{n}", "rtr": 0.25 + n / 2, "seconds": 0.1}) for task in tasks for n in (0, 1)]
Path(given["log"]).write_text("\\n".join(lines) + "\\n")
results = Path(options["--output_path"], "run", "0_results.json")
results.parent.mkdir(parents=True, exist_ok=True)
values = {"score,none": 0.5, "score_stderr,none": 0.1, "alias": "one"}
results.write_text(json.dumps({"results": {task: values for task in tasks}}))
"""

pytestmark = pytest.mark.notebooks


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The base model, copies of all datasets, and where the servers of data/served.yaml are to be looked for."""
    made = tmp_path_factory.mktemp("paper")
    save_model(tiny.model, tiny.processor, made / "base")
    published.everything(made / "hub", count=12, tests=2)
    declared = yaml.safe_load((ROOT / "data" / "served.yaml").read_text())
    declared["models"]["base"]["model"] = str(made / "base")
    (made / "served.yaml").write_text(yaml.safe_dump(declared))
    program = made / "lmms_eval"
    program.write_text(f"#!{sys.executable}\n{LMMS_EVAL}")
    program.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def servers(folder):
    """The base model behind our own server, and one that plays both judges and the oracle; their addresses, by variable."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("AWARES_API_KEY", None)
    base = str(folder / "base")
    options = ["--mode", "chat", "--model", base, "--port", "0", "--name", base]
    command = [sys.executable, "-m", "awares", "serve", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    judging = ServerProcess("judging_server.py", folder / "server.jsonl", "rigged")
    names = ("LLAMA", "DEEPSEEK", "QWEN3_VL")
    yield {
        "AWARES_BASE_URL": process.stdout.readline().split()[-1],
        **{f"AWARES_{name}_URL": judging.url for name in names},
    }
    judging.stop()
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def line(folder, servers):
    """The whole main line, once for all tests of this file, on this checkout's own code."""
    places = {"data.hub_root": folder / "hub", "curation.served_file": folder / "served.yaml"}
    places |= {"evaluation.lmms_eval": folder / "lmms_eval"}
    made = test_notebooks.Line(folder, {**SMOKE, **{key: str(path) for key, path in places.items()}}, "paper")
    settings = {"PYTHONPATH": str(ROOT / "src"), "HF_DATASETS_CACHE": str(folder / "cache"), "NO_PROXY": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**settings, **servers, **KEYS}.items():
            patch.setenv(name, value)
        for name, stage in publish.STAGES.items():
            made.run(name, stage)
        yield made


def shown(executed):
    """All that the cells of an executed notebook show, as text."""
    cells = nbformat.read(executed, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(str(output.get("data", output.get("text", ""))) for output in outputs)


# The main line


def test_data(line):
    stage = line.params.run_dir("data")
    rows = {split: load_rows(stage / split) for split in ("train", "validation", "evaluation")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 30, "validation": 10, "evaluation": 12}
    assert set(rows["evaluation"]["source"]) == set(TASKS)
    records = [json.loads(text) for text in (stage / "manifest.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [row_id for part in rows.values() for row_id in part["id"]]
    assert all(record["hub"] and record["commit"].startswith("local:") for record in records)
    text = (stage / "notebook.ipynb").read_text()
    assert "HuggingFaceM4/ChartQA" in text and "of benchmarks" in text


def test_curation(line, folder):
    curated = load_rows(line.params.run_dir("curation") / "train" / "dataset")
    assert {"verdict_llama", "verdict_deepseek", "verdict_anls"} <= set(curated.column_names)
    assert {"LR", "HR"} == set(curated["label"])
    order = line.table("curation", "judge_order").set_index("judge")
    assert order.loc["llama", "same"] == 100 and order.loc["llama", "n"] == len(curated)
    kept = sorted(path.name for path in (folder / "runs" / "paper" / ".replies").iterdir() if path.suffix == ".jsonl")
    assert kept == ["base.jsonl", "deepseek.jsonl", "llama.jsonl", "qwen3_vl.jsonl"]


def test_main_table_and_report(line):
    table = line.table("evaluation", "table1_main")
    assert set(table.benchmark) == {*TASKS, AVERAGE} and set(table.system) == set(MAIN_SYSTEMS)
    tables = line.params.report_dir() / "tables"
    for stage in ("crop_distribution", "curation", "evaluation", "operating_curve"):
        for written in (line.params.run_dir(stage) / "tables").glob("*.csv"):
            assert (tables / written.name).read_bytes() == written.read_bytes()
    assert pd.read_csv(tables / "checks.csv").check.is_unique
    knobs = pd.read_csv(tables / "table11_hyperparameters.csv", dtype=str).set_index("parameter")
    assert knobs.loc["gradient_checkpointing"].tolist() == ["True", "True"]  # the profile's own, like
    assert knobs.loc["crop_token_budget", "grpo"] == "10404" and "launch" not in knobs.index
    assert {file.stem for file in publish.publish(line.params)} == set(publish.STAGES)


def test_lmms_eval_scores_both_policies(line):
    table = line.table("evaluation", "lmms_eval")
    assert [(row.system, row.benchmark) for row in table.itertuples()] == list(product(("sft", "awares"), TASKS))
    assert (
        set(table.metric) == {"score"} and set(table.value) == {0.5} and set(table.rtr) == {0.5} and set(table.n) == {2}
    )


# What stands beside it


@pytest.fixture(scope="module")
def ablations(line):
    """Every variant's tables: two of them written by the notebook, the others copies under their names."""
    swapped = {"weight_1": ("sft", "grpo"), "no_area_cost": ("grpo", "sft")}
    folders = {}
    for name, (stage, other) in swapped.items():
        merged = line.with_values(name).run_dir(stage) / "merged"
        shutil.copytree(line.params.run_dir(other) / "merged", merged)
        folders[name] = line.run("06_ablations", "evaluation", variant=name).parent
        shutil.copy(line.params.run_dir(stage) / "validation.jsonl", merged.parent)
    under_other_names(line, folders)
    return folders


@pytest.mark.parametrize("name, system, other", [("weight_1", "sft", "awares"), ("no_area_cost", "awares", "sft")])
def test_a_variant_is_scored_like_the_policy_that_it_is(line, ablations, name, system, other):
    main = line.table("evaluation", "table1_main").set_index("system")
    assert main.loc["sft", NUMBERS].to_numpy().tolist() != main.loc["awares", NUMBERS].to_numpy().tolist()
    result = pd.read_csv(ablations[name] / "tables" / "result.csv").set_index("system")
    assert result.loc["main", NUMBERS].to_numpy().tolist() == main.loc[system, NUMBERS].to_numpy().tolist()
    assert result.loc[name, NUMBERS].to_numpy().tolist() == main.loc[other, NUMBERS].to_numpy().tolist()


def test_ablations_stand_together(line, ablations):
    executed = line.run("06_ablations_summary", "ablations")
    tables = line.params.report_dir() / "ablations"
    effects = pd.read_csv(tables / "effects.csv")
    effects = effects[effects.against == "main"].set_index("variant")
    assert set(effects.index) == {name for names in line.params.ablations.values() for name in names}
    assert effects.change["no_area_cost"] == "grpo.lambda_area 0.0"
    written = [pd.read_csv(path / "tables" / "difference.csv").difference[0] for path in ablations.values()]
    assert effects.difference[[*ablations]].tolist() == pytest.approx(written, abs=1e-3)
    assert pd.read_csv(tables / "table10_labels.csv").variant.unique().tolist() == ["labels_anls", "llama"]
    text = shown(executed)
    assert text.count("measured here (profile paper)") == text.count("published (") == 6


def test_latency(line):
    line.run("07_latency", "latency", **{"latency.pruners": ["visionzip"], "latency.rows": 3})
    tables = line.params.report_dir() / "latency"
    table = pd.read_csv(tables / "table5_latency.csv", dtype={"batch": str})
    assert sorted(zip(table.system, table.batch, strict=True)) == sorted(
        (system, batch) for system in TIMED_SYSTEMS for batch in ("1", "best")
    )
    place = table.set_index(["system", "batch"])
    assert (place.ms > 0).all() and (place.loc["awares"].gflops < place.loc["awares_naive"].gflops).all()
    main = line.table("evaluation", "table1_main")
    rtr = (
        main[main.benchmark == AVERAGE].set_index("system").rtr
    )  # two rows a task: the mean over rows is that over tasks
    for system in ("full", "half", "awares"):
        assert place.rtr[system, "1"] == pytest.approx(rtr[system], abs=1e-3)
    times = pd.read_csv(line.params.run_dir("latency") / "times.csv")
    assert set(times.rows) == {3} and set(times.token_budget) == {1, 4096}
    assert set(pd.read_csv(tables / "pruners.csv").system) == {"full", "visionzip_100", "visionzip_70", "visionzip_50"}


def test_plan_finds_what_is_there_and_what_is_not(line, servers, monkeypatch):
    monkeypatch.setenv("AWARES_DEEPSEEK_URL", servers["AWARES_BASE_URL"])
    missing = {"base.device": "cuda", "base.launch": "data/launch/8gpu.yaml", "evaluation.lmms_eval": "nowhere/python"}
    text = shown(line.run("08_plan", "plan", **missing))
    hub = [f"dataset {path.parent.name}/{path.name}" for path in Path(line.params.data.hub_root).glob("*/*")]
    assert len(hub) == 11 and all(name in text for name in hub)
    assert f"base: {line.params.base.model}" in text and "llama: meta-llama/Llama-3.3-70B-Instruct" in text
    assert "8 GPUs here, for data/launch/8gpu.yaml" in text and "name another file in base.launch" in text
    assert "start it with --served-model-name deepseek-ai/DeepSeek-V3.2" in text  # another model is served there
    assert re.search(r"\*\*3 of \d+ missing\*\*", text)
    assert "248 requests to servers" in text  # 40 rows: two views, two judges in both orders, boxes for about a fifth


def test_means_over_seeds(line):
    elsewhere = {"evaluation.seed": line.params.evaluation.unseen_seed}
    line.run("05_evaluation", "evaluation", **elsewhere)
    for other in ({}, elsewhere):
        own = line.with_values(**other).run_dir("evaluation")
        for seed in (2, 3):
            shutil.copytree(own, line.with_values(seed=seed, **other).run_dir("evaluation"))
    line.run("09_seeds", "seeds")
    tables = line.params.report_dir() / "seeds"
    means = pd.read_csv(tables / "table1_seeds.csv").set_index(["system", "benchmark"])
    main = line.table("evaluation", "table1_main").set_index(["system", "benchmark"])
    row = ("awares", AVERAGE)
    assert means.accuracy[row] == pytest.approx(main.accuracy[row], abs=1e-3) and (means.seeds == 3).all()
    fresh = line.with_values(**elsewhere).run_dir("evaluation")
    rows = load_rows(line.params.run_dir("data") / "evaluation")
    asked = [json.loads(text)["row_id"] for text in (fresh / "trajectories" / "awares.jsonl").read_text().splitlines()]
    assert sorted(asked) == sorted(rows["id"])  # the benchmarks are scored whole, so these are all there are
    assert pd.read_csv(tables / "table1_unseen.csv").accuracy.equals(pd.read_csv(tables / "table1_seeds.csv").accuracy)


def test_systems_are_compared_and_claims_decided(line, ablations):
    asked = {"comparison.systems": ["visionzip_50", "random_crop"]}
    for name in asked["comparison.systems"]:
        executed = line.run("10_systems", "systems", **{"comparison.systems": [name]})
        shutil.move(executed, executed.parent / name / "notebook.ipynb")
    main = line.params.run_dir("evaluation") / "trajectories"
    for system in line.params.ablations["systems"]:
        copy = line.with_values(system).run_dir("evaluation") / "trajectories"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(main, copy)
    line.run("11_comparison", "comparison", **asked)
    tables = line.params.report_dir() / "tables"
    systems = pd.read_csv(tables / "table1_systems.csv")
    assert set(systems.system) == {*MAIN_SYSTEMS, *asked["comparison.systems"], *line.params.ablations["systems"]}
    average = systems[systems.benchmark == AVERAGE].set_index("system")
    assert average.rtr["visionzip_50"] == pytest.approx(0.5, abs=0.02)
    assert average.loc["visionthink", NUMBERS].tolist() == average.loc["awares", NUMBERS].tolist()
    claims = pd.read_csv(tables / "claims_notes.csv").set_index("id")
    assert set(claims.verdict) <= {"holds", "does not hold", "undecided"} and len(claims) >= 25
    assert (
        "(judge embedding): the rows have no verdicts of this judge" in claims.note["judges_agree"]
    )  # the profile hears others
    assert pd.read_csv(tables / "claims.csv").effect.notna().sum() > 20
    assert (
        len(publish.publish(line.with_values(**asked), "comparison")) == 4
    )  # the page, and a notebook for it and each system


# Last: it looks at all that the others wrote


def test_no_key_is_left_behind(line, folder):
    files = [path for part in ("runs", "reports") for path in (folder / part).rglob("*") if path.is_file()]
    assert len(files) > 50 and line.printed.stat().st_size > 0
    for key in KEYS.values():
        assert not [path for path in (*files, line.printed) if key.encode() in path.read_bytes()]
