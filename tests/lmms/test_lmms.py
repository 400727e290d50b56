"""The plug-in under lmms-eval, and our metrics next to lmms-eval's. Run by `make lmms`, in its own environment."""

import importlib
import json
import os
import subprocess
import sys

import datasets
import pytest
from conftest import ROOT

pytest.importorskip("lmms_eval", reason="lives in its own environment: make lmms")

from awares.cli import lmms as benchmarks
from awares.config import load_params
from awares.data.rows import make_split
from awares.engine.images import join_strip
from awares.engine.model import load_model, load_processor
from awares.errors import AwaresError
from awares.method import metrics
from awares.method.protocol import PLAIN_SYSTEM, get_protocol
from awares.method.rollout import Engine

TASKS = str(ROOT / "tests" / "lmms" / "tasks")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TEXTS = dict.fromkeys(("question", "answer", "type"), datasets.Value("string"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Six rows of the embedded suite, the last of them with two images, as the offline task reads them."""
    params = load_params("mini", overrides={"evaluation.rows": 5}, path=ROOT / "params.yaml")
    found = [row for row in make_split(params, "evaluation") if row["source"] == "chartqa"][:5]
    records = [{"images": [row["image"]], "question": row["question"], "answer": row["answers"][0]} for row in found]
    records.append({**records[0], "images": [found[0]["image"], found[1]["image"]]})
    records, folder = [{**one, "type": "human_test"} for one in records], tmp_path_factory.mktemp("offline")
    features = datasets.Features({"images": datasets.List(datasets.Image()), **TEXTS})
    datasets.Dataset.from_list(records, features=features).to_parquet(folder / "offline.parquet")
    return folder, records


def test_lmms_eval_runs_the_policy_on_an_offline_task(rows):
    folder, records = rows
    arguments = f"pretrained={ROOT / 'data' / 'base'},dtype=float32,device=cpu,max_new_tokens=32,log=samples.jsonl"
    (folder / "prompt.txt").write_text(PLAIN_SYSTEM)
    arguments += ",token_budget=8192,system=prompt.txt,geometry=released,min_pixels=784,max_pixels=47040"
    command = [sys.executable, "-m", "lmms_eval", "--model", "awares", "--tasks", "awares_offline"]
    command += ["--model_args", arguments]
    command += ["--include_path", TASKS, "--batch_size", "4", "--output_path", "out", "--log_samples"]
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(folder / "hub")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    logged = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [one["id"] for one in logged] == [f"awares_offline/test/{n}" for n in range(6)]
    assert all(0 < one["rtr"] <= 1.1 and one["seconds"] > 0 for one in logged)
    model = load_model(ROOT / "data" / "base")
    form = get_protocol("ours", PLAIN_SYSTEM, geometry="released")
    processor = load_processor(ROOT / "data" / "base", (784, 47040))  # at most 60 visual tokens
    engine = Engine(model, processor, max_new_tokens=32, token_budget=8192, protocol=form)
    pictures = [one["images"][0] if len(one["images"]) == 1 else join_strip(one["images"]) for one in records]
    own = engine.run(pictures, [one["question"] for one in records])
    assert [one["answer"] for one in logged] == [one.answer for one in own]
    assert [one["full_visual_tokens"] for one in logged] == [one.full_visual_tokens for one in own]
    assert max(one.full_visual_tokens for one in own) <= 60
    log = folder / "samples.jsonl"
    log.write_bytes(log.read_bytes()[:-9])  # as a kill leaves it
    subprocess.run(command, cwd=folder, env=environment, check=True)
    assert [json.loads(line)["answer"] for line in log.read_text().splitlines()] == [one.answer for one in own]
    results = min(folder.glob("out/**/*results.json"), key=lambda file: file.stat().st_mtime)
    scores = [metrics.relaxed_accuracy(one.answer, [row["answer"]]) for one, row in zip(own, records, strict=True)]
    found = json.loads(results.read_text())["results"]["awares_offline"]["relaxed_overall,none"]
    assert found == pytest.approx(sum(scores) / len(scores))


def test_the_evaluation_notebook_scores_a_policy_through_lmms_eval(rows, monkeypatch):
    folder, records = rows
    overrides = {"evaluation.lmms_eval": sys.executable}
    params = load_params("mini", overrides=overrides, path=ROOT / "params.yaml")
    for name, value in {**OFFLINE, "HF_HOME": str(folder / "hub")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    given = "awares", ROOT / "data" / "base", params, folder / "evaluation" / "main"
    options = ["--include_path", TASKS]
    table = benchmarks.through_lmms_eval(*given, {"chartqa": "awares_offline"}, options)
    assert list(table.columns) == benchmarks.LMMS_COLUMNS
    row = table.set_index("metric").loc["relaxed_overall"]
    assert (row.benchmark, row.task, row.n) == ("chartqa", "awares_offline", len(records))
    assert 0 <= row.value <= 1 and 0 < row.rtr <= 1.1 and row.seconds > 0
    again = benchmarks.through_lmms_eval(*given, {"chartqa": "awares_offline"}, options)
    assert again.equals(table)  # all from the log
    overrides["base.launch"] = "data/launch/2cpu.yaml"
    two = load_params("mini", overrides=overrides, path=ROOT / "params.yaml")
    both = benchmarks.through_lmms_eval(*given[:2], two, given[3], {"chartqa": "awares_offline"}, options)
    assert both.drop(columns="seconds").equals(table.drop(columns="seconds"))  # of all samples, by two processes
    assert len(list(folder.glob("evaluation/.checkpoints/*/samples.*.jsonl"))) == 2
    (samples,) = folder.glob("evaluation/.checkpoints/*/samples.jsonl")
    samples.write_text("my notes")
    with pytest.raises(AwaresError, match="(?s)lmms-eval.*something other than samples"):
        benchmarks.through_lmms_eval(*given, {"chartqa": "awares_offline"}, options)
    missing = load_params("mini", overrides={"evaluation.lmms_eval": "nowhere/python"}, path=ROOT / "params.yaml")
    with pytest.raises(AwaresError, match="evaluation.lmms_eval.*nowhere/python"):
        benchmarks.through_lmms_eval("awares", ROOT / "data" / "base", missing, folder / "x")


# prediction | answer
PAIRS = [
    tuple(line.split(" | "))
    for line in (
        "41 | 41", "41 | 43", "40.1 | 41", "0 | 0", "0.01 | 0", "41% | 0.41", "41% | 41", "-5 | 5", "Yes | yes",
        " yes  | yes", "yes, it is | yes", "no | yes", " | yes", "two | 2", "Left. | left", "left of it | left",
        "The Sign | sign", "sign\nshop | Sign shop", "kitten | sitting", "abc | abd", "a | b", "12 kg | 12kg", "A | A",
        "(A) | A", "answer: B | B", "B. red | B", "it is C | C", "D) blue | D", "none | A",
        "the answer is B | B", "Bicycle | B", "x ^ 2 | x^2", "X^2 | x^2", "2. | 2", "stop-sign | stop sign",
        "Paris France | paris  france",
    )
]  # fmt: skip


def theirs(task, name="utils"):
    return importlib.import_module(f"lmms_eval.tasks.{task}.{name}")


@pytest.mark.parametrize(("prediction", "answer"), PAIRS)
def test_metrics_equal_those_of_lmms_eval(prediction, answer):
    from lmms_eval.api.metrics import anls

    chart = theirs("chartqa").chartqa_process_results({"type": "human_test", "answer": answer}, [prediction])
    assert metrics.relaxed_accuracy(prediction, [answer]) == chart["relaxed_overall"]
    assert metrics.anls(prediction, [answer]) == pytest.approx(anls([answer], [prediction])["anls"])
    formula = "Please write out the expression of the formula in the image using LaTeX format."
    for dataset, question in (("IIIT5K", "what is written in the image?"), ("HME100k", formula)):
        row = {"answer": answer, "dataset": dataset, "question_type": "Regular Text Recognition"}
        ocr = theirs("ocrbench").ocrbench_process_results(row, [prediction])
        assert metrics.ocr_accuracy(prediction, [answer], question) == ocr["ocrbench_accuracy"]["score"]
    real = theirs("realworldqa").realworldqa_process_results({"answer": answer}, [prediction])
    assert metrics.score("realworldqa", prediction, [answer]) == real["exact_match"]
    if answer.lower() in ("yes", "no"):
        pope = theirs("pope").pope_process_results({"answer": answer, "question_id": 1}, [prediction])
        assert metrics.pope_accuracy(prediction, [answer]) == pope["pope_accuracy"]["score"]
    if answer in ("A", "B", "C", "D"):
        row = {"label": answer, "category": "direct_attributes", "question_id": 1, "text": "q"}
        vstar = theirs("vstar_bench").vstar_process_results(row, [prediction])
        assert metrics.score("vstar", prediction, [answer]) == vstar["vstar_overall_acc"]["score"]
