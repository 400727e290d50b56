"""Curation through vLLM servers that it starts itself. Run by `make vllm`."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="lives in a separate environment: make vllm")

import openai
import yaml

from awares.clients import launch, served
from awares.config import load_params
from awares.data.rows import make_split
from awares.engine.jsonl import read_records
from awares.engine.model import load_model, load_processor
from awares.errors import AwaresRequestError
from awares.method import curation
from awares.method.judges import AnnotationOracle
from awares.method.rollout import Engine

ROOT = Path(__file__).parents[2]
FLAGS = {"dtype": "float32", "max-model-len": 4096, "enforce-eager": True, "limit-mm-per-prompt": {"image": 11}}
FLAGS |= {"chat-template": "src/awares/engine/chat_template.jinja", "chat-template-content-format": "openai"}
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.delenv("AWARES_BASE_URL", raising=False)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    for name, value in {**CPU, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)

    def make(runs, engine, **flags):
        declared = yaml.safe_load((ROOT / "data" / "served.yaml").read_text()) | {
            "python": sys.executable,
            "minutes": 8,
        }
        declared["models"]["base"] |= {"model": "data/base", "vllm": {**FLAGS, **flags}, "attempts": 3}
        (tmp_path / "served.yaml").write_text(yaml.safe_dump(declared))
        values = {"engine": engine, "judges": ["semantic"], "lucky_margin": 0.0, "chunk_rows": 50}
        values = {f"curation.{key}": value for key, value in values.items()}
        values |= {"data.train_rows": 40, "threads": 1, "curation.served_file": str(tmp_path / "served.yaml")}
        return load_params("mini", overrides={**values, "paths.runs": str(tmp_path / runs)}, path=ROOT / "params.yaml")

    return make


def curate(params, rows, folder):
    processor = load_processor(ROOT / "data" / "base")
    if params.curation.engine == "local":
        engine = Engine.from_params(load_model(ROOT / "data" / "base"), processor, params, progress=False)
    else:
        engine = served.make_engine("base", processor, params)
    oracle = AnnotationOracle(params.curation.oracle_seed, params.curation.oracle_sigma, params.curation.oracle_margin)
    with launch.managed():
        found = curation.curate({"train": rows}, engine, ["semantic"], oracle, params, folder)["train"]
    return found, read_records(folder / "train" / "answers.jsonl")


def content(records):
    """What a server can tell, by row; a tie of the logits decides nothing."""
    ties = {one["id"] for one in records if min(one[side]["margin"] for side in ("low", "high")) < 1e-3}
    untold = {"margin": 0, "call_gap": 0, "call_logprob": 0}
    return {one["id"]: [{**one[side], **untold} for side in ("low", "high")] for one in records}, ties


def kill_after(file, replies):
    """Ends the server from outside once ``file`` has so many replies."""
    while len(read_records(file)) < replies:
        time.sleep(0.02)
    os.killpg(launch.running.process.pid, signal.SIGKILL)


def test_curation_through_managed_vllm_equals_the_local_one_also_when_vllm_is_killed_halfway(settings, tmp_path):
    local = settings("local", "local")
    rows = make_split(local, "train")
    assert len(rows) == 200
    own, answers = curate(local, rows, tmp_path / "a")
    expected, ties = content(answers)
    params = settings("served", "base")
    replies = tmp_path / "served" / "mini" / ".replies" / "base.jsonl"
    killer = threading.Thread(target=kill_after, args=(replies, 170), daemon=True)
    killer.start()
    with pytest.raises(AwaresRequestError, match="base: its server ended with exit code -9"):
        curate(params, rows, tmp_path / "b")
    kept = [one["reply_key"] for one in read_records(replies)]
    assert 170 <= len(kept) < 400
    found, answers = curate(params, rows, tmp_path / "b")
    all_kept = [one["reply_key"] for one in read_records(replies)]
    assert all_kept[: len(kept)] == kept and len(all_kept) == len(set(all_kept))  # none is requested again
    got, _ = content(answers)
    assert [row_id for row_id in got if got[row_id] != expected[row_id] and row_id not in ties] == []
    columns = ["label", "target_crops", "low_answer", "high_answer"]
    same = [[(row[name] == other[name]) for name in columns] for row, other in zip(found, own, strict=True)]
    assert all(all(one) for one, row in zip(same, own, strict=True) if row["id"] not in ties)
    print(json.dumps({"rows": len(rows), "ties": len(ties), "kept at the kill": len(kept)}))


def test_flags_that_do_not_fit_end_with_the_cause_that_vllm_names(settings, tmp_path):
    params = settings("small", "base", **{"max-model-len": 10**7})
    with pytest.raises(AwaresRequestError, match=r"base: .*data/served.yaml(.|\n)*max_model_len") as told:
        curate(params, make_split(params, "train").select(range(2)), tmp_path / "c")
    print(told.value)
