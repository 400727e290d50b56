"""Evaluation on servers, killed at random moments: the same tables at the end, and no stored reply requested again."""

import multiprocessing
import random
import time

import pandas as pd
import pytest
import yaml
from chat_server import ServerProcess
from conftest import ROOT, curated_rows

from awares.clients.served import KeptEngine
from awares.config import load_params
from awares.engine.jsonl import read_records
from awares.engine.model import save_model
from awares.method import evaluation
from awares.study import diagnostics

KILLS, CONCURRENCY, SYSTEMS = 10, 3, ("base", "sft", "awares")


@pytest.fixture
def server(tiny, tmp_path, monkeypatch):
    save_model(tiny.model, tiny.processor, tmp_path / "base")
    for name in SYSTEMS[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    monkeypatch.setenv("PROCESSOR", str(tmp_path / "base"))
    running = ServerProcess(tmp_path / "log.jsonl", "policy")
    for name in SYSTEMS:
        monkeypatch.setenv(f"AWARES_{name.upper()}_URL", running.url)
    yield running
    running.close()


@pytest.fixture
def rows():
    rows = curated_rows([(112, 112), (168, 112)], [()] * 24, ["3"]).remove_columns(["source", "label", "target_crops"])
    return rows.add_column("source", ["chartqa", "pope"] * 12)


def settings(folder, runs):
    declared = yaml.safe_load((ROOT / "data" / "served.yaml").read_text())
    declared["models"]["base"] |= {"model": str(folder / "base"), "concurrency": CONCURRENCY}
    (folder / "served.yaml").write_text(yaml.safe_dump(declared))
    values = {"curation.served_file": str(folder / "served.yaml"), "base.model": str(folder / "base")}
    values |= {"evaluation.engine": "vllm", "evaluation.chunk_rows": 5, "evaluation.bootstrap": 50}
    return load_params(overrides={**values, "paths.runs": str(folder / runs)})


def evaluate(folder, runs, rows):
    """The requests of 05_evaluation and 05_operating_curve; their numbers in ``tables.csv``."""
    params, ids = settings(folder, runs), rows["id"]
    out, done, tables = params.run_dir("evaluation"), {}, []
    engine = KeptEngine(params, rows, out)
    done = {view: engine.answer(view=view, row_ids=ids) for view in ("full", "half", "none")}
    for system in SYSTEMS[1:]:
        engine = KeptEngine(params, rows, out, system, folder / system)
        done[system] = engine.run(call_bias=0.0, row_ids=ids)
        swept = evaluation.sweep_call_bias(engine, rows, done[system], 0.0, [-9.0, -1.5, 0.0, 1.5, 9.0])
        tables.append(evaluation.operating_curve(system, rows, swept, params.evaluation))
        best = diagnostics.run_frontier(system, engine, rows.select(range(4)))
        tables.append(pd.DataFrame({"rtr": best.rtr_curve, "accuracy": best.accuracy_curve}))
    scores = pd.concat([evaluation.scored(system, rows, found) for system, found in done.items()])
    tables += [evaluation.main_table(scores, params.evaluation), scores]
    out.mkdir(parents=True, exist_ok=True)
    pd.concat(tables).to_csv(out / "tables.csv")
    return out / "tables.csv"


def stored(folder, runs):
    return sum(len(read_records(file)) for file in (folder / runs).glob("mini/.replies/*.jsonl"))


def test_ten_kills_change_no_table_and_no_stored_reply_is_requested_again(server, rows, tmp_path, monkeypatch):
    whole = evaluate(tmp_path, "whole", rows)
    found = pd.read_csv(whole)
    rates = found[found.call_bias.notna()].groupby("system").call_rate.agg(["min", "max"]).to_numpy()
    assert (rates == [[0, 100]] * 2).all()  # all decisions, by bias
    needed = len(server.arrivals())
    assert needed == stored(tmp_path, "whole") > 300, (needed, stored(tmp_path, "whole"))
    draw, lost = random.Random(0), 0
    for moment in sorted(draw.sample(range(1, needed), KILLS)):
        process = multiprocessing.get_context("fork").Process(target=evaluate, args=(tmp_path, "killed", rows))
        process.start()
        while len(server.arrivals()) - needed - lost < moment and process.is_alive():
            time.sleep(0.01)
        process.kill()
        process.join()
        time.sleep(0.2)  # the server answers what it has read
        lost = len(server.arrivals()) - needed - stored(tmp_path, "killed")
        for file in (tmp_path / "killed").glob("mini/.replies/*.jsonl"):  # as a kill within a write leaves it
            file.write_bytes(file.read_bytes() + file.read_bytes()[:99])
    assert 0 < lost <= KILLS * CONCURRENCY
    again = evaluate(tmp_path, "killed", rows)
    assert again.read_bytes() == whole.read_bytes()
    assert stored(tmp_path, "killed") == needed == len(server.arrivals()) - needed - lost
    monkeypatch.setenv("AWARES_BASE_URL", "http://127.0.0.1:9/v1")
    again.unlink()
    assert evaluate(tmp_path, "killed", rows).read_bytes() == whole.read_bytes()  # stored trajectories need no server
