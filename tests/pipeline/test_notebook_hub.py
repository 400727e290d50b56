"""The main line under profile paper: hub ids with local copies in the published schemas, SFT in two processes, and a
server process for each judge, oracle, base model and policy, started and stopped by the stages. CUDA, vLLM and the hub
itself are not covered here."""

import re
import sys
from itertools import product
from pathlib import Path

import nbformat
import pandas as pd
import published
import pytest
import yaml
from chat_server import fake_vllm
from conftest import TASKS
from line import ROOT, SMOKE, Line

from awares.engine.jsonl import read_records
from awares.engine.model import save_model
from awares.engine.rows import load_rows
from awares.method.evaluation import AVERAGE
from awares.settings import MAIN_SYSTEMS
from awares.study import publish

KEYS = {"AWARES_API_KEY": "sk-planted-paper-0b7d", "HF_TOKEN": "hf_planted_paper_4e8c"}
VALUES = {key: value for key, value in SMOKE.items() if not key.startswith("curation.")} | yaml.safe_load("""
{data.train_rows: 6, data.validation_rows: 2, base.device: cpu, base.dtype: float32, sft.launch: data/launch/2cpu.yaml,
 curation.chunk_rows: 16, curation.max_new_tokens: 12, curation.judges: [llama, anls], base.launch: "",
 crops.max_pixels: 1605632, protocol.token_budget: 4096, sft.per_device_batch_size: 2, sft.share: 1.0}
""")
# lmms-eval lives in another environment, where `make lmms` runs it; this program writes what it would write
LMMS_EVAL = """
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
given = dict(pair.split("=", 1) for pair in options["--model_args"].split(","))
assert (Path(given["pretrained"]) / "model.safetensors").is_file()
lines = [json.dumps({"id": f"{task}/0", "rtr": 0.5, "seconds": 0.1}) for task in options["--tasks"].split(",")]
Path(given["log"]).write_text("\\n".join([*lines, ""]))
Path(options["--output_path"]).mkdir(parents=True, exist_ok=True)
results = {"results": {task: {"score,none": 0.5} for task in options["--tasks"].split(",")}}
Path(options["--output_path"], "0_results.json").write_text(json.dumps(results))
"""

pytestmark = pytest.mark.notebooks


@pytest.fixture(scope="module")
def line(tiny, tmp_path_factory):
    """The whole main line, once for all tests of this file, on this checkout's code and copies of all datasets."""
    folder = tmp_path_factory.mktemp("paper")
    save_model(tiny.model, tiny.processor, folder / "base")
    published.everything(folder / "hub", count=12, tests=2)
    declared = yaml.safe_load((ROOT / "data" / "served.yaml").read_text())
    declared["models"]["base"]["model"] = str(folder / "base")
    declared["python"] = str(fake_vllm(folder, "node"))
    (folder / "served.yaml").write_text(yaml.safe_dump(declared))
    (folder / "lmms_eval").write_text(f"#!{sys.executable}\n{LMMS_EVAL}")
    (folder / "lmms_eval").chmod(0o755)
    places = {"data.hub_root": folder / "hub", "curation.served_file": folder / "served.yaml"}
    places |= {"evaluation.lmms_eval": folder / "lmms_eval"}
    values = {**VALUES, **{key: str(path) for key, path in places.items()}}
    made = Line(folder, values, "paper", PROCESSOR=str(folder / "base"), **KEYS)
    made.run_main_line()
    return made


def test_the_stages_start_and_stop_their_servers_never_two_at_once_and_curate(line):
    events = [one for one in read_records(line.folder / "server.jsonl") if "flags" in one]
    starts, stops = events[::2], events[1::2]
    assert [one["text"] for one in events] == ["started", "stopped"] * len(starts)
    assert [one["pid"] for one in starts] == [one["pid"] for one in stops]
    assert [one["time"] for one in events] == sorted(one["time"] for one in events)
    names = []
    for flags in (one["flags"] for one in starts):
        path = Path(flags[flags.index("--model") + 1])
        names.append(path.parts[-3] if path.name == "merged" else path.name.partition("-")[0])
        limited = '{"max_pixels":1605632}' in flags
        assert limited == path.is_dir()  # the base model and both policies
    assert names == ["base", "Llama", "Qwen3", "base", "grpo", "base", *["sft", "grpo"] * 3]  # stages in their order
    curated = load_rows(line.params.run_dir("curation") / "train" / "dataset")
    assert {"verdict_llama", "verdict_anls"} <= set(curated.column_names)
    assert {"LR", "HR"} == set(curated["label"])
    kept = sorted(path.stem for path in (line.folder / "runs" / "paper" / ".replies").glob("*.jsonl"))
    assert kept == ["awares", "base", "llama", "qwen3_vl", "sft"]


def test_main_table_and_report(line):
    table, outside = line.table("evaluation", "table1_main"), line.table("evaluation", "lmms_eval")
    assert set(table.benchmark) == {*TASKS, AVERAGE} and set(table.system) == set(MAIN_SYSTEMS)
    assert [*zip(outside.system, outside.benchmark, strict=True)] == [*product(("sft", "awares"), TASKS)]
    assert set(outside.metric) == {"score"} and {*outside.value, *outside.rtr} == {0.5} and set(outside.n) == {1}
    file = line.params.report_dir() / "tables" / "table11_hyperparameters.csv"
    knobs = pd.read_csv(file, dtype=str).set_index("parameter")
    assert knobs.loc["gradient_checkpointing"].tolist() == ["True", "True"]  # keys of the profile, too
    assert knobs.loc["crop_token_budget", "grpo"] == "10404" and "launch" not in knobs.index
    assert {file.stem for file in publish.publish(line.params)} >= set(publish.STAGES)


def test_plan_finds_what_is_there_and_what_is_not(line):
    missing = {"base.device": "cuda", "base.launch": "data/launch/8gpu.yaml", "sft.launch": ""}
    missing["evaluation.lmms_eval"] = "nowhere/python"
    cells = nbformat.read(line.run("08_plan", "plan", **missing), as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "\n".join(str(output.get("data", output.get("text", ""))) for output in outputs)
    assert re.search(r"\*\*2 of \d+ missing\*\*", text)
    assert "309 requests to servers" in text  # 40 rows to label: 138; 12 to evaluate: 67; operating curve: 104


def test_no_key_is_left_behind(line):
    """Last: it looks at all that the others wrote."""
    files = [path for part in ("runs", "reports") for path in (line.folder / part).rglob("*") if path.is_file()]
    assert len(files) > 50 and line.printed.stat().st_size > 0
    for key in KEYS.values():
        assert not [path for path in (*files, line.printed) if key.encode() in path.read_bytes()]
