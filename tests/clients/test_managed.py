"""Servers that a step starts for itself: one at a time, stopped whatever happens, and what is said when they fail."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from chat_server import MODELS, fake_vllm
from test_curation import FakeEngine, content
from test_served import ROOT, curate, settings

from awares.clients import launch
from awares.engine.jsonl import read_records
from awares.errors import AwaresError, AwaresRequestError

FLAGS = {"max-model-len": 8192, "enforce-eager": True, "limit-mm-per-prompt": {"image": 1}}


@pytest.fixture
def params(tmp_path, monkeypatch):
    """A judge and an oracle without addresses."""
    for name in ("LLAMA", "QWEN3_VL"):
        monkeypatch.delenv(f"AWARES_{name}_URL", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not for loopback
    monkeypatch.delenv("NO_PROXY")

    def managed(raw):
        raw.update(python=str(fake_vllm(tmp_path, "rigged")), minutes=1)
        raw["models"]["llama"].update(vllm=FLAGS, timeout=20.0)

    return settings(tmp_path, managed)


class Base(FakeEngine):
    wrong = "0"  # the rigged judge prefers what comes later in the alphabet


def log(folder):
    return read_records(folder / "server.jsonl")


def running(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    return False


def test_each_step_starts_its_own_server_and_a_kill_halfway_changes_nothing(params, tmp_path):
    whole, broken = tmp_path / "whole" / "out", tmp_path / "broken" / "out"
    with launch.managed():
        rows = curate(params, whole, rows=24, engine=Base())
    assert set(rows["label"]) == {"LR", "HR"}
    starts = [one for one in log(tmp_path) if one["text"] == "started"]
    assert [one["flags"][one["flags"].index("--model") + 1] for one in starts] == MODELS[:2]
    given = '--enforce-eager --limit-mm-per-prompt {"image":1} --max-model-len 8192'
    assert " ".join(starts[0]["flags"]).endswith(given)
    assert not any(running(one["pid"]) for one in starts)
    asked = sorted(json.dumps(one["body"], sort_keys=True) for one in log(tmp_path) if "body" in one)
    (tmp_path / "server.jsonl").unlink()
    with launch.managed():
        curate(params, whole, rows=24, engine=Base(dies_at=0))
    assert not log(tmp_path)  # all is kept: no server is needed
    (tmp_path / "runs" / "mini" / ".replies").rename(tmp_path / "first")
    (tmp_path / "dies").write_text("5")
    died = "(?s)llama: its server ended with exit code 9; .*data/served.yaml.*CUDA out of memory"
    with pytest.raises(AwaresRequestError, match=died), launch.managed():
        curate(params, broken, rows=24, engine=Base())
    (tmp_path / "dies").write_text("8")  # the judge once more
    with pytest.raises(AwaresRequestError, match="CUDA out of memory"), launch.managed():
        curate(params, broken, rows=24, engine=Base(dies_at=0))
    with launch.managed():
        curate(params, broken, rows=24, engine=Base(dies_at=0))
    assert content(broken) == content(whole) and not (tmp_path / "dies").exists()
    again = [json.dumps(one["body"], sort_keys=True) for one in log(tmp_path) if "body" in one]
    assert sorted(set(again)) == asked and len(again) - len(asked) <= 3 * 8  # only those that were under way


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_with_the_process_that_started_it(params, tmp_path, how):
    code = f"""
import sys, time
from awares.clients import launch, served
from awares.config import load_params
overrides = {{"curation.served_file": {params.curation.served_file!r}, "paths.runs": {str(tmp_path / "runs")!r}}}
params = load_params(overrides=overrides, path={str(ROOT / "params.yaml")!r})
with launch.managed(), served.get_model("llama", params).connect() as api:
    print(api.models.list().data[0].id, flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert "Llama" in process.stdout.readline()
    (started,) = log(tmp_path)
    assert running(started["pid"])
    process.send_signal(how)
    process.wait()
    until = time.monotonic() + 20
    while running(started["pid"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(started["pid"])


def test_a_missing_environment_and_a_server_that_does_not_start_are_named_with_the_fix(params, tmp_path):
    engine = FakeEngine(dies_at=0)
    nowhere = settings(tmp_path, lambda raw: raw.update(python="nowhere/python"), judges=["llama"])
    fault = "(?s)llama: vLLM for .*no vLLM in .*nowhere/python; make vllm.*AWARES_LLAMA_URL"
    with pytest.raises(AwaresError, match=fault):
        curate(nowhere, tmp_path / "out", engine=engine)  # before the base model answers
    fails = tmp_path / "fails"
    said = "echo loading\necho 'INFO no error: yet'\necho 'ValueError: no KV cache'\necho bye"
    fails.write_text(f"#!/bin/sh\n[ $1 = -c ] && exit 0\n{said}\nexit 1\n")
    fails.chmod(0o755)
    params = settings(tmp_path, lambda raw: raw.update(python=str(fails)), judges=["llama"])
    died = r"exit code 1; .*served\.yaml.*\nValueError: no KV cache$"
    with pytest.raises(AwaresRequestError, match=died), launch.managed():
        curate(params, tmp_path / "out", rows=4)
    with pytest.raises(AwaresRequestError, match="AWARES_LLAMA_URL, or .*managed"):
        curate(params, tmp_path / "out", rows=4)
