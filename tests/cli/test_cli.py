"""The command: real processes on a tiny model; output, refusals, and batches that a kill cannot harm."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from conftest import ROOT, save_adapter
from PIL import Image

from awares.cli import batch
from awares.cli import main as cli
from awares.config import load_params
from awares.data.rows import make_split
from awares.engine import chat_format
from awares.engine.jsonl import exclusive_lock, read_records
from awares.engine.model import load_model, load_processor
from awares.errors import AwaresError
from awares.method import evaluation, protocol
from awares.method.rollout import Engine
from awares.policy import AwaRes, Checkpoint, of_run, shipped
from awares.study.tables import TASK_WORDS

SETTINGS = {"policy": "p", "call_bias": 0.0}
PAGE = {"image": "scans/page0.png", "question": "what?"}
BARE = {"image": "scans/page4.png", "id": "g"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def awares(*arguments, **variables):
    """``python -m awares`` in its own process."""
    command = [sys.executable, "-m", "awares", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **variables}, timeout=500)


@pytest.fixture
def scans(tiny, tmp_path):
    """A folder of nine small images and a text file."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(9):
        tiny.noise(84 + 28 * (number % 3), 84, number).save(folder / f"page{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def engine(tiny):
    return Engine(tiny.model, tiny.processor, max_new_tokens=4)


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_help_and_usage_need_no_torch():
    code = "import sys\nfrom awares.cli import main\n"
    code += "codes = [main.main(a.split()) for a in ('--help', '--version', 'ask --help', 'ask', 'nothing', '')]\n"
    code += "assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules) and codes == [0, 0, 0, 2, 2, 2]\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr


REFUSED = [
    (2, "ask page.png", "no question"),
    (2, "ask page.png q --out x.jsonl", "--out"),
    (2, "ask page.png q --model a --run mini", "--run"),
    (2, "ask page.png q --call-bias nan", "--call-bias"),
    (2, "ask page.png q --device gpu", "--device"),
    (2, "ask rows.jsonl", "--out"),
    (2, "eval rows.jsonl --rows 3", "--rows"),
    (2, "push policy me/x", "me/x"),
    (1, "ask page.png q --model nowhere", "nowhere"),
    (1, "ask page.png '' --model {model}", "question"),
    (1, "ask empty q --out x.jsonl --model {model}", "empty"),
    (1, "ask twice.jsonl --out x.jsonl --model {model}", "id a"),
    (1, "ask page.png q --model {model} --show file/seen.png", "file"),
    (1, "ask page.png q --model {model} --server http://127.0.0.1:9/v1", "127.0.0.1:9"),
    (1, "eval twice.jsonl --model {model}", "answers"),
    (1, "serve --model nowhere --port 0", "nowhere"),
    (1, "demo", "make demo"),  # gradio lives in the environment of that target
    (1, "bench --benchmarks vqa --scale 0.01 --out x.jsonl", "vqa"),
    (1, "bench --scale 0.1 --out x.jsonl", "--shape"),
    (1, "bench --shape mini --train --overrides '{{x: 1}}' --out x.jsonl", "key x"),
]


@pytest.mark.parametrize(("code", "line", "reason"), REFUSED)
def test_wrong_usage_is_2_and_wrong_data_is_1_and_one_line(code, line, reason, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (56, 56)).save("page.png")
    Path("empty").mkdir()
    Path("file").write_text("in the way")
    write_lines(Path("twice.jsonl"), 2 * [{"image": "page.png", "question": "q", "id": "a"}])
    Path("params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    assert cli.main(shlex.split(line.format(model=saved))) == code
    captured = capsys.readouterr()
    said = [text for text in captured.err.splitlines() if text.startswith("awares: ")]
    assert len(said) == (code == 1) and reason in (said or [captured.err])[0] and "Traceback" not in captured.err
    assert not captured.out and not Path("x.jsonl").exists()


def test_commands_of_guides_and_help_are_understood():
    commands = typer.main.get_command(cli.app)
    texts, seen = [commands.help], set()
    for guide in (ROOT / "README.md", ROOT / "src" / "awares" / "README.md", ROOT / "data" / "launch" / "README.md"):
        texts += re.findall(r"^```bash\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)
    for row in [row.strip() for text in texts for row in text.replace("\\\n", "").splitlines()]:
        if row.startswith("awares "):
            name, *words = shlex.split(re.split(r"  +#| {3,}", row)[0])[1:]
            seen.add(name)
            assert commands.commands[name].make_context(name, words).params
            assert all((ROOT / word).exists() for word in words if word.startswith("data/"))
    assert seen == {"ask", "bench", "eval", "serve", "plan", "push"}


def test_ask_prints_what_the_library_says(saved, scans, tmp_path, capsys):
    done = awares("ask", scans / "page0.png", "what?", "--model", saved, "--json")
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    expected = AwaRes.from_pretrained(saved).ask(scans / "page0.png", "what?")
    assert (found["answer"], found["rtr"], found["question"]) == (expected.answer, expected.rtr, "what?")
    shown = tmp_path / "pictures" / "seen.png"
    assert cli.main(["ask", str(scans / "page0.png"), "what?", "--model", str(saved), "--show", str(shown)]) == 0
    assert f"{expected.visual_tokens} of {expected.full_visual_tokens} visual tokens" in capsys.readouterr().out
    assert Image.open(shown).size


def test_bias_and_limits_reach_the_engine(saved, scans, capsys):
    for more in ([], ["--call-bias", "99"], ["--call-bias", "-99"], ["--max-new-tokens", "2"]):
        assert cli.main(["ask", str(scans / "page0.png"), "what?", "--model", str(saved), "--json", *more]) == 0
    own, more, less, short = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert more["turns"][1]["text"].startswith(chat_format.TOOL_CALL) and less["call_status"] == "none"
    assert own["call_gap"] == more["call_gap"] == less["call_gap"] and short["turns"][1]["text_tokens"] == 2


def rows_of(out):
    records = read_records(out)
    assert len({record["id"] for record in records}) == len(records), "a row is there twice"
    return {record["id"]: record for record in records}


def test_a_folder(saved, scans, tmp_path, capsys):
    out, policy = tmp_path / "new" / "answers.jsonl", shutil.copytree(saved, tmp_path / "policy")
    line = ["ask", str(scans), "what?", "--out", str(out), "--model", str(policy), "--json", "--max-new-tokens", "4"]
    assert cli.main(line) == 0
    counts = {"out": str(out), "rows": 9, "ran": 9, "done_before": 0, "errors": 0}
    assert json.loads(capsys.readouterr().out) == counts
    assert list(rows_of(out)) == [f"page{number}.png" for number in range(9)]
    own = rows_of(out)["page4.png"]
    assert "answer" in own and (own["question"], own["image"]) == ("what?", "page4.png")
    settings = {"policy": str(policy), "dtype": "float32", "max_side": 2000, "call_bias": 0.0, "max_new_tokens": 4}
    assert settings.items() < own["settings"].items() and {"weights", "prompt"} < set(own["settings"])
    before = out.read_bytes()
    assert cli.main(line) == 0 and json.loads(capsys.readouterr().out)["done_before"] == 9
    config = json.loads((policy / "generation_config.json").read_text())
    (policy / "generation_config.json").write_text(json.dumps({**config, "trained": "anew"}))
    assert cli.main(line) == 1 and "weights" in capsys.readouterr().err  # the same name, other weights
    assert out.read_bytes() == before


def test_bad_rows_are_recorded_and_their_chunks_run_again(saved, scans, tmp_path, capsys, monkeypatch):
    """tests/cases has every fault of a row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "ROWS_PER_WRITE", 2)
    command = ["ask", "rows.jsonl", "--out", "out.jsonl", "--model", str(saved), "--max-new-tokens", "4", "--json"]
    lines = [{**PAGE, "id": "a"}, '{"image": "scans/page2.png", "question": "torn', BARE, {**PAGE, "id": 7}]
    for ran, faulty in ((4, {"rows-2", "g"}), (4, {"rows-2"})):
        write_lines(Path("rows.jsonl"), lines)
        assert cli.main(command) == 1 and json.loads(capsys.readouterr().out)["ran"] == ran
        found = rows_of(Path("out.jsonl"))
        assert {*found} == {"a", "rows-2", "g", "7"} and {name for name in found if "error" in found[name]} == faulty
        lines[2] = {**BARE, "question": "fixed?"}


def test_rows_that_would_be_mixed_up_are_refused(scans, engine, tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", [{**PAGE, "id": "a"}, BARE])
    common = batch.read_batch(rows, "common?")  # for rows without their own
    assert [(row["id"], row["question"]) for row in common] == [("a", "what?"), ("g", "common?")]
    out = tmp_path / "out.jsonl"
    batch.run_batch(scans, "one?", out, engine, SETTINGS)
    before = out.read_bytes()
    with pytest.raises(AwaresError, match="page0.png"):
        batch.run_batch(scans, "another?", out, engine, SETTINGS)
    with pytest.raises(AwaresError, match="call_bias"):
        batch.run_batch(scans, "one?", out, engine, {**SETTINGS, "call_bias": 2.0})
    assert out.read_bytes() == before
    for content in ('{"id": "a"}\n', "a note without a line break", '{"id": "a"}\nnote\n{"i'):
        out.write_text(content)  # a file of something else
        with pytest.raises(AwaresError, match="out.jsonl"):
            batch.run_batch(scans, "q", out, engine, SETTINGS)
        assert out.read_text() == content


def test_after_a_kill_at_any_byte_every_row_is_there_once(scans, engine, tmp_path, monkeypatch):
    """A kill can leave any beginning of the file: take many of them, at line breaks and in the middle of lines."""
    monkeypatch.setattr(batch, "ROWS_PER_WRITE", 2)
    out = tmp_path / "out.jsonl"
    assert batch.run_batch(scans, "what?", out, engine, SETTINGS)["ran"] == 9
    whole, expected = out.read_bytes(), rows_of(out)
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({0, 1, *ends[::2], *(end - 1 for end in ends[::3]), *(end - 40 for end in ends[::4])}):
        out.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        kept = kept if kept == 9 else kept // 2 * 2  # a torn chunk runs again
        counts = batch.run_batch(scans, "what?", out, engine, SETTINGS)
        assert counts == {"rows": 9, "ran": 9 - kept, "done_before": kept, "errors": 0}
        assert out.read_bytes().startswith(whole[: ends[kept - 1] if kept else 0])
        assert all(row["answer"] == expected[key]["answer"] for key, row in rows_of(out).items())


def test_a_second_process_is_refused(scans, engine, tmp_path):
    out = tmp_path / "out.jsonl"
    with exclusive_lock(out), pytest.raises(AwaresError, match="out.jsonl"):
        batch.run_batch(scans, "what?", out, engine, SETTINGS)


def test_eval_gives_the_evaluations_own_numbers(saved, tmp_path, capsys, monkeypatch):
    text = re.sub(r"(?m)^(  bootstrap:) \d+", r"\1 50", (ROOT / "params.yaml").read_text())
    text = re.sub(r"(?m)^(      max_new_tokens:) 32", r"\1 4", text)
    (tmp_path / "prompt.txt").write_text("Answer in one word.")  # the policy gets what params.yaml says
    (tmp_path / "params.yaml").write_text(text.replace('system_file: ""', "system_file: prompt.txt"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "--rows", "2", "--model", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    params = load_params(overrides={"evaluation.rows": 2})
    rows = make_split(params, "evaluation")
    engine = Engine.from_params(load_model(saved), load_processor(saved), params, progress=False)
    done = engine.run(rows["image"], rows["question"], row_ids=rows["id"])
    expected = evaluation.main_table(evaluation.scored(str(saved), rows, done), params.evaluation)
    expected["benchmark"] = expected.benchmark.replace(TASK_WORDS)
    assert found["table"] == expected.drop(columns="system").to_dict("records")


def test_the_shipped_policy_is_base_then_sft_then_grpo(tmp_path, capsys):
    with pytest.raises(AwaresError, match="data/base, data/policy/sft, data/policy/grpo"):
        shipped(tmp_path)
    policy = ROOT / "data" / "policy"
    base = ROOT / "data" / "base"
    assert shipped() == Checkpoint("shipped", base, (policy / "sft", policy / "grpo"), base=base)
    page = ROOT / "data" / "examples" / "page.jpg"
    assert cli.main(["ask", str(page), "look up ben.", "--json"]) == 0
    named = AwaRes.from_pretrained(policy / "grpo").ask(page, "look up ben.")  # an adapter of an adapter of the base
    assert json.loads(capsys.readouterr().out)["call_gap"] == named.call_gap


def test_adapters_of_the_hub_are_found_by_name(saved, scans, tmp_path):
    """In the hub's cache, with the answers of the same adapters in folders; a pickled adapter is not loaded."""
    folders = {}
    for seed, (name, base) in enumerate({"base": "", "sft": "me/base", "grpo": "me/sft", "pickled": "me/base"}.items()):
        cache = tmp_path / "hub" / f"models--me--{name}"
        folders[name] = cache / "snapshots" / ("0" * 40)
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("0" * 40)
        if not base:
            shutil.copytree(saved, folders[name])
            continue
        written = save_adapter(saved, folders[name], seed) / "adapter_config.json"
        written.write_text(json.dumps({**json.loads(written.read_text()), "base_model_name_or_path": base}))
    (folders["pickled"] / "adapter_model.safetensors").unlink()
    torch.save({}, folders["pickled"] / "adapter_model.bin")
    expected = AwaRes.from_pretrained(saved, [folders["sft"], folders["grpo"]]).ask(scans / "page0.png", "q").call_gap
    line = ("ask", scans / "page0.png", "q", "--json", "--model")
    done = awares(*line, "me/grpo", HF_HOME=str(tmp_path))
    assert done.returncode == 0 and json.loads(done.stdout)["call_gap"] == expected, done.stderr
    refused = awares(*line, "me/pickled", HF_HOME=str(tmp_path))
    assert refused.returncode == 1 and "me/pickled" in refused.stderr


def test_a_run_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs" / "mini"
    for name in ("grpo/main-s1", "grpo/ergo-s1", "sft/main-s1", "sft/main-s2"):
        (runs / name / "merged").mkdir(parents=True)
        (runs / name / "merged" / "config.json").write_text("{}")
    merged = runs / "grpo" / "main-s1" / "merged"
    assert of_run("mini") == Checkpoint("run mini/grpo/main-s1", merged, form=protocol.OURS, base="data/base")
    ergo = of_run("mini/grpo/ergo-s1").form
    assert ergo is not None and ergo.offered == ("box",) and ergo.region_budget < 1  # as its variant says
    assert of_run("mini/sft/").path == runs / "sft" / "main-s1" / "merged"
    assert of_run("mini/sft/main-s2").path == runs / "sft" / "main-s2" / "merged"
    for name in ("mini/sft/main-s2/merged", "mini/grpo/main-s9", "mini/data", "mini/evaluation/main-s1"):
        with pytest.raises(AwaresError, match=f"'{name}'"):
            of_run(name)


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"base_model_name_or_path": "."}'])
def test_an_adapter_that_leads_to_no_model_is_named(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(AwaresError, match=f"{tmp_path.name}.*adapter_config.json"):
        AwaRes.from_pretrained(tmp_path)
