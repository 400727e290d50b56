"""The command: real processes on a tiny model; what is printed, what is refused, and batches that a kill cannot harm."""

import functools
import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from awares import __version__
from awares.cli import batch, options
from awares.cli import main as cli
from awares.cli.wire import ServeSettings
from awares.config import load_params
from awares.data import rows as data
from awares.engine import chat_format, decode
from awares.engine.jsonl import read_records
from awares.engine.model import DTYPES, load_model, load_processor, save_model
from awares.errors import AwaresError
from awares.method import evaluation, protocol
from awares.method.rollout import Engine, Trajectory
from awares.policy import AwaRes, Checkpoint, of_run, shipped
from awares.study import publish

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"policy": "p", "call_bias": 0.0}


def awares(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``python -m awares`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "awares", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    save_model(tiny.model, tiny.processor, folder)
    return folder


@pytest.fixture
def scans(tiny: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder of nine small images and a file that is none."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(9):
        tiny.noise(84 + 28 * (number % 3), 84, number).save(folder / f"page{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def engine(tiny: SimpleNamespace) -> Engine:
    return Engine(tiny.model, tiny.processor, max_new_tokens=4)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def one_line(process: subprocess.CompletedProcess[str]) -> str:
    """stderr, which must be a single line and no traceback."""
    lines = process.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("awares: "), process.stderr
    return lines[0]


# Help, usage, version


def test_help_version_and_usage_need_no_torch() -> None:
    code = (
        "import sys\nfrom awares.cli import main\n"
        "for line in (['--help'], ['--version'], ['ask', '--help'], ['ask'], ['nothing'], []):\n"
        "    try:\n        main(line)\n    except SystemExit as end:\n        print('exit', end.code)\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^exit (\d)$", done.stdout, re.MULTILINE) == ["0", "0", "0", "2", "2", "2"]
    assert f"awares {__version__}" in done.stdout and "examples:" in done.stdout and "exit codes:" in done.stdout
    assert all(f"    {command} " in done.stdout for command in ("ask", "eval", "bench", "serve"))


def test_the_installed_command_and_the_module_are_the_same() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("awares", scripts["awares"], "console_scripts").load() is cli.main
    done = awares("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"awares {__version__}\n", "")


@pytest.mark.parametrize(
    "line, reason",
    [
        ("ask page.png", "no question"),
        ("ask page.png q --question q", "the question stands twice"),
        ("ask page.png q --out x.jsonl", "belong to a batch"),
        ("ask page.png q --show seen.jpg", "name it so"),
        ("ask page.png q --adapter a", "--adapter needs --model"),
        ("ask page.png q --model a --run mini", "not allowed with"),
        ("ask page.png q --call-bias much", "give a number"),
        ("ask page.png q --call-bias nan", "give a number"),
        ("ask page.png q --dtype int8", "invalid choice"),
        ("ask page.png q --device gpu", "give cpu, cuda or cuda:N"),
        ("ask page.png q --max-new-tokens 0", "whole number above 0"),
        ("ask rows.jsonl", "a batch needs --out"),
        ("ask . q --out x.jsonl --show seen.png", "--show draws one image"),
        ("eval rows.jsonl --rows 3", "draw the tasks' rows"),
    ],
)
def test_wrong_usage_is_2(line: str, reason: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (56, 56)).save("page.png")
    with pytest.raises(SystemExit) as end:
        cli.main(shlex.split(line))
    captured = capsys.readouterr()
    assert end.value.code == 2 and reason in captured.err and not captured.out
    assert not Path("x.jsonl").exists()


def test_dtypes_are_those_that_load() -> None:
    assert set(options.DTYPES) == set(DTYPES)


# One question


class Calling(decode.FirstToken):
    """The model writes the call for ``center`` in its first turn."""

    tokenizer: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.logits is None:
            self.known = input_ids.shape[1]
        scores = super().__call__(input_ids, scores)
        if "<tool_response>" not in self.tokenizer.decode(input_ids[0]):
            wanted = self.tokenizer(protocol.OURS.render_call(["center"]) + "<|im_end|>")["input_ids"]
            scores[:] = float("-inf")
            scores[:, wanted[min(input_ids.shape[1] - self.known, len(wanted) - 1)]] = 0.0
        return scores


@pytest.fixture
def calling(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calling, "tokenizer", tiny.processor.tokenizer)
    monkeypatch.setattr(decode, "FirstToken", Calling)


def test_ask_in_a_process_prints_what_the_library_says(model: Path, scans: Path) -> None:
    done = awares("ask", scans / "page0.png", "what?", "--model", model, "--json")
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    policy = AwaRes.from_pretrained(model)
    expected = policy.ask(scans / "page0.png", "what?")
    assert (found["answer"], found["rtr"], found["question"]) == (expected.answer, expected.rtr, "what?")
    told = Trajectory.from_dict({key: found[key] for key in expected.to_dict()})
    assert told.turns == expected.turns and told.visual_tokens == expected.visual_tokens


def test_ask_prints_answer_crops_tokens_time_and_draws(
    model: Path, scans: Path, calling: None, tmp_path: Path, capsys: Any
) -> None:
    shown = tmp_path / "pictures" / "seen.png"
    line = ["ask", str(scans / "page2.png"), "what?", "--model", str(model), "--show", str(shown)]
    assert cli.main(line) == 0
    answer, crops, tokens, seconds = capsys.readouterr().out.split("\n")[-5:-1]
    expected = AwaRes.from_pretrained(model).ask(scans / "page2.png", "what?")
    assert expected.crops == ("center",) and answer == expected.answer.split("\n")[-1]
    assert crops.split() == ["crops", "center"]
    numbers = f"{expected.visual_tokens} of {expected.full_visual_tokens} visual tokens, RTR {expected.rtr:.2f}"
    assert numbers in tokens and re.fullmatch(r"time +\d+\.\d\d s", seconds)
    assert Image.open(shown).size[0] > 1.5 * Image.open(shown).size[1]  # the view, and the crop beside it


def test_the_bias_reaches_the_policy(model: Path, scans: Path, capsys: Any) -> None:
    base = ["ask", str(scans / "page0.png"), "what?", "--model", str(model), "--json"]
    assert cli.main(base) == cli.main([*base, "--call-bias", "99"]) == cli.main([*base, "--call-bias", "-99"]) == 0
    own, more, less = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert more["turns"][1]["text"].startswith(chat_format.TOOL_CALL) and less["call_status"] == "none"
    assert own["call_gap"] == more["call_gap"] == less["call_gap"]


def test_limits_reach_the_engine(model: Path, scans: Path, capsys: Any) -> None:
    assert (
        cli.main(["ask", str(scans / "page0.png"), "q", "--model", str(model), "--max-new-tokens", "2", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["turns"][1]["text_tokens"] == 2


@pytest.mark.parametrize(
    "line, reason",
    [
        ("ask none.png q", "no image file none.png"),
        ("ask torn.png q", "not a readable image"),
        ("ask page.png q --model nowhere", "nowhere: no such model folder"),
        ("ask page.png q --model . ", "cannot read tokenizer"),
        ("ask page.png '' --model {model}", "question is empty"),
        ("ask page.png q --run nothing", "unknown profile 'nothing'"),
        ("ask page.png q --run mini/base_model", "no policy of run 'mini/base_model'"),
        ("ask rows.jsonl --out out.jsonl --model {model}", "rows.jsonl: no such file"),
        ("ask empty q --out out.jsonl --model {model}", "empty: no image in it"),
        ("ask page.png q --model {model} --show file/seen.png", "file"),
    ],
)
def test_what_is_wrong_with_the_data_is_1_and_one_line(
    line: str, reason: str, model: Path, tiny: SimpleNamespace, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.noise(56, 56, 0).save("page.png")
    Path("torn.png").write_bytes(Path("page.png").read_bytes()[:60])
    Path("empty").mkdir()
    Path("file").write_text("in the way")
    Path("params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    assert cli.main(shlex.split(line.format(model=model))) == 1
    captured = capsys.readouterr()
    said = [text for text in captured.err.splitlines() if text.startswith("awares: ")]
    assert len(said) == 1 and reason in said[0] and "Traceback" not in captured.err


def test_an_error_in_a_process_is_one_line_and_1(scans: Path, tmp_path: Path) -> None:
    done = awares("ask", scans / "page0.png", "q", "--model", tmp_path / "absent", "--json")
    assert done.returncode == 1 and done.stdout == "" and "no such model folder" in one_line(done)


# Many questions


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    records = read_records(out)
    assert len({record["row_id"] for record in records}) == len(records), "a row stands twice"
    return {record["row_id"]: record for record in records}


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def test_a_folder_in_a_process(model: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "answers.jsonl"
    line = ("ask", scans, "what?", "--out", out, "--model", model, "--json", "--max-new-tokens", 4)
    done = awares(*line)
    assert done.returncode == 0 and "9 rows, 9 asked now, 0 done before" in one_line(done)
    assert json.loads(done.stdout) == {"out": str(out), "rows": 9, "ran": 9, "done_before": 0, "errors": 0}
    found = rows_of(out)
    assert list(found) == [f"page{number}.png" for number in range(9)]
    expected = AwaRes.from_pretrained(model, max_new_tokens=4).ask(scans / "page4.png", "what?")
    own = found["page4.png"]
    assert (own["answer"], own["question"], own["image"]) == (expected.answer, "what?", "page4.png")
    settings = dict(own["settings"])
    assert re.fullmatch("[0-9a-f]{16}", settings.pop("weights")) and re.fullmatch("[0-9a-f]{8}", settings.pop("prompt"))
    assert settings == {
        "policy": str(model),
        "dtype": "float32",
        "max_side": 2000,
        "call_bias": 0.0,
        "max_new_tokens": 4,
    }
    (told,) = batch.trajectories(out, ["page4.png"])
    assert told.turns == expected.turns
    before = out.read_bytes()
    assert "0 asked now, 9 done before" in one_line(awares(*line)) and out.read_bytes() == before


ROWS: list[Any] = [
    {"image": "scans/page0.png", "question": "first?", "id": "a"},
    {"image": "scans/page1.png", "question": "schema?", "answers": ["1"], "source": "chartqa", "question_boxes": []},
    '{"image": "scans/page2.png", "question": "torn',
    {"image": "scans/none.png", "question": "no image?", "id": "b"},
    {"image": "scans/notes.txt", "question": "no picture?", "id": "c"},
    {"image": "scans/page3.png", "question": " ", "id": "d"},
    {"image": "scans/page3.png", "question": "<|im_end|>?", "id": "e"},
    {"question": "of what?", "id": "f"},
    ["a", "list"],
    {"image": "scans/page4.png", "id": "g"},
    {"image": "scans/page5.png", "question": "last?", "id": 7},
    {"image": "scans/page5.png", "question": "last?", "id": "h"},
]
REASONS = {
    "rows-3": "rows.jsonl, line 3: not JSON",
    "b": "no image file",
    "c": "not a readable image",
    "d": "question is ' ', not text",
    "e": "holds the control token <|im_end|>",
    "f": "line 8: image is None, not text",
    "rows-9": "not an object but list",
    "g": "question is None, not text",
    "7": "id is 7, not text",
}


def test_bad_rows_are_recorded_and_the_rest_goes_on(
    model: Path, scans: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("rows.jsonl"), ROWS)
    line = ["ask", "rows.jsonl", "--out", "out.jsonl", "--model", str(model), "--chunk", "4", "--max-new-tokens", "4"]
    assert cli.main(line) == 1
    assert "12 rows, 12 asked now, 0 done before, 9 with an error" in capsys.readouterr().err
    found = rows_of(Path("out.jsonl"))
    assert set(found) == {*REASONS, "a", "rows-2", "h"}
    for row_id, reason in REASONS.items():
        assert reason in found[row_id]["error"] and "answer" not in found[row_id]
    assert all("answer" in found[row_id] for row_id in ("a", "rows-2", "h"))

    assert cli.main(line) == 1  # errors stand until they are asked for again, or the row has changed
    assert "0 asked now" in capsys.readouterr().err
    Image.open("scans/page0.png").save("scans/none.png")
    rows = [row if row != ROWS[5] else {**ROWS[5], "question": "mended?"} for row in ROWS]
    write_lines(Path("rows.jsonl"), rows)
    assert cli.main([*line, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ran"] == 1  # the mended question
    assert cli.main([*line, "--json", "--retry-errors"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "out": "out.jsonl", "rows": 12, "ran": 8, "done_before": 4, "errors": 7
    }  # fmt: skip
    again = rows_of(Path("out.jsonl"))
    assert "answer" in again["b"] and "answer" in again["d"] and again["a"] == found["a"]


def test_a_question_for_all_rows_without_their_own(scans: Path, engine: Engine, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [ROWS[0], ROWS[9]])
    items = batch.read_items(rows, "common?")
    assert [(item.row_id, item.question, item.error) for item in items] == [
        ("a", "first?", None),
        ("g", "common?", None),
    ]
    batch.run(items, tmp_path / "out.jsonl", engine, SETTINGS)
    assert {row["question"] for row in rows_of(tmp_path / "out.jsonl").values()} == {"first?", "common?"}


def test_rows_that_would_be_mixed_up_are_refused(scans: Path, engine: Engine, tmp_path: Path) -> None:
    twice = write_lines(tmp_path / "twice.jsonl", [ROWS[0], ROWS[0]])
    with pytest.raises(AwaresError, match="id a stands twice"):
        batch.read_items(twice)
    with pytest.raises(AwaresError, match="needs a question"):
        batch.read_items(scans)
    out = tmp_path / "out.jsonl"
    batch.run(batch.read_items(scans, "one?")[:2], out, engine, SETTINGS)
    before = out.read_bytes()
    with pytest.raises(AwaresError, match="row page0.png with another image or question"):
        batch.run(batch.read_items(scans, "another?"), out, engine, SETTINGS)
    with pytest.raises(AwaresError, match=r"other settings \(call_bias 0.0\)"):
        batch.run(batch.read_items(scans, "one?"), out, engine, {**SETTINGS, "call_bias": 2.0})
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", ['{"id": "a"}\n', "a note without a line break", '{"row_id": "a"}\nnote\n{"ro'])
def test_a_file_of_something_else_is_never_touched(content: str, scans: Path, engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    out.write_text(content)
    with pytest.raises(AwaresError, match="contains something other than results"):
        batch.run(batch.read_items(scans, "q"), out, engine, SETTINGS)
    assert out.read_text() == content


# Kills


def test_after_a_kill_at_any_byte_every_row_is_there_once(scans: Path, engine: Engine, tmp_path: Path) -> None:
    """What a kill can leave is a beginning of the file: take many of them, at line breaks and in the middle of lines."""
    out = tmp_path / "out.jsonl"
    items = batch.read_items(scans, "what?")
    assert batch.run(items, out, engine, SETTINGS, size=3).ran == 9
    whole, expected = out.read_bytes(), rows_of(out)
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0, 1, 5, *ends, *(end - 1 for end in ends), *(end - 40 for end in ends), *(end + 7 for end in ends[:-1])}
    for cut in sorted(cuts):
        out.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        summary = batch.run(items, out, engine, SETTINGS, size=3)
        assert (summary.done_before, summary.ran, summary.errors) == (kept, 9 - kept, 0)
        assert out.read_bytes()[: ends[kept - 1] if kept else 0] == whole[: ends[kept - 1] if kept else 0]
        found = rows_of(out)
        assert list(found) == list(expected)
        assert [without_time(row)["answer"] for row in found.values()] == [row["answer"] for row in expected.values()]


def waiting(process: subprocess.Popen[str], out: Path, lines: int) -> Iterator[int]:
    """The number of whole lines in ``out``, until there are ``lines``; an error if the process ends before."""
    while True:
        count = out.read_bytes().count(b"\n") if out.is_file() else 0
        yield count
        if count >= lines:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def started(scans: Path, out: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = ["ask", str(scans), "what?", "--out", str(out), "--model", str(model), "--chunk", "1", *more]
    command = [sys.executable, "-m", "awares", *line]
    # under nohup, and in a shell's background, ctrl-c is ignored and its children inherit that
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, preexec_fn=listening, **pipes)


@pytest.mark.parametrize("where", ["in this process", "over HTTP"])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_a_killed_batch_goes_on(
    kill: signal.Signals,
    where: str,
    tiny: SimpleNamespace,
    model: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    more = ["--server", request.getfixturevalue("served")] if where == "over HTTP" else []
    scans, out, count = tmp_path / "many", tmp_path / "out.jsonl", 120 if more else 300
    scans.mkdir()
    for number in range(count):
        tiny.noise(56, 56, number).save(scans / f"page{number:03}.png")
    process = started(scans, out, model, *more)
    for _ in waiting(process, out, 3):
        pass
    process.send_signal(signal.SIGSTOP)  # it must not finish while this one looks
    with pytest.raises(AwaresError, match="another process is writing it"):
        batch.run(batch.read_items(scans, "what?"), out, None, {})
    process.send_signal(kill)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=300)
    left = out.read_bytes()
    done = left.count(b"\n")
    assert 3 <= done < count, "it must be hit in the middle"
    if kill == signal.SIGINT:
        assert process.returncode == 130 and stderr.splitlines()[-1] == "awares: interrupted"
        assert "Traceback" not in stderr
    else:
        assert process.returncode == -signal.SIGKILL
    with out.open("ab") as file:  # and in the middle of a line, the worst moment
        file.write(b'{"row_id": "page299.png", "image": "page5')
    again = started(scans, out, model, *more)
    _, stderr = again.communicate(timeout=500)
    assert (
        again.returncode == 0
        and f"{count} rows, {count - done} asked now, {done} done before, 0 with an error" in stderr
    )
    assert out.read_bytes().startswith(left[: left.rindex(b"\n") + 1])
    assert sorted(rows_of(out)) == [f"page{number:03}.png" for number in range(count)]


# eval


def small_params(folder: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    text = re.sub(r"(?m)^(  bootstrap:) \d+", r"\1 50", text)
    (folder / "params.yaml").write_text(re.sub(r"(?m)^(      max_new_tokens:) 32", r"\1 4", text))


def test_eval_gives_the_evaluations_own_numbers(model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    small_params(tmp_path)
    (tmp_path / "prompt.txt").write_text("Answer in one word.")  # the policy is told what params.yaml says
    params_file = tmp_path / "params.yaml"
    params_file.write_text(params_file.read_text().replace('system_file: ""', "system_file: prompt.txt"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "--rows", "2", "--seed", "7", "--model", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    params = load_params(overrides={"evaluation.rows": 2, "evaluation.seed": 7})
    rows = data.make_split(params, "evaluation")
    engine = Engine.from_params(load_model(model), load_processor(model), params, progress=False)
    done = engine.run(rows["image"], rows["question"], row_ids=rows["id"])
    expected = evaluation.main_table(evaluation.scored(str(model), rows, done), params.evaluation)
    assert found["table"] == expected.drop(columns="system").to_dict("records")
    assert [row["benchmark"] for row in found["table"]] == [*params.data.tasks, "average"]


def test_eval_of_rows_of_your_own_is_kept_and_goes_on(
    model: Path, scans: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    small_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    policy = AwaRes.from_pretrained(model, max_new_tokens=4)
    answer = policy.ask(scans / "page0.png", "q").answer
    write_lines(
        Path("mine.jsonl"),
        [
            {"image": "scans/page0.png", "question": "q", "answers": [answer], "source": "ocrbench"},
            {"image": "scans/page1.png", "question": "q", "answers": ["something else"], "source": "ocrbench"},
        ],
    )
    line = ["eval", "mine.jsonl", "--model", str(model), "--out", "kept.jsonl"]
    assert cli.main(line) == 0
    table = capsys.readouterr().out
    assert re.search(r"^ *average +50\.00 ", table, re.MULTILINE), table
    before = Path("kept.jsonl").read_bytes()
    assert cli.main(line) == 0 and capsys.readouterr().out == table and Path("kept.jsonl").read_bytes() == before
    trained = shutil.copytree(model, tmp_path / "again")
    shutil.move(model, tmp_path / "aside")
    try:  # the same name, other weights
        settings = json.loads((trained / "generation_config.json").read_text())
        (trained / "generation_config.json").write_text(json.dumps({**settings, "trained": "anew"}))
        trained.rename(model)
        assert (
            cli.main(line) == 1 and "kept.jsonl: holds results of other settings (weights '" in capsys.readouterr().err
        )
    finally:
        shutil.rmtree(model)
        shutil.move(tmp_path / "aside", model)
    assert cli.main(line) == 0 and "2 rows, 0 asked now, 2 done before" in capsys.readouterr().err
    write_lines(Path("mine.jsonl"), [{"image": "scans/page0.png", "question": "q"}])
    assert cli.main(line) == 1 and "answers missing" in capsys.readouterr().err


# Which policy


def test_the_shipped_policy_is_base_then_sft_then_grpo(tmp_path: Path) -> None:
    with pytest.raises(AwaresError, match=r"data/base, data/policy/sft, data/policy/grpo missing.*--model.*make repro"):
        shipped(tmp_path)
    for name, file in {"base": "config", "policy/sft": "adapter_config", "policy/grpo": "adapter_config"}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / f"{file}.json").write_text("{}")
    policy = tmp_path / "data" / "policy"
    assert shipped(tmp_path) == Checkpoint("shipped", tmp_path / "data" / "base", (policy / "sft", policy / "grpo"))


def test_published_adapters_name_what_they_were_made_for(model: Path, scans: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    params = load_params("mini", overrides={"paths.runs": str(tmp_path / "runs")}, path=ROOT / "params.yaml")
    params = replace(params, root=tmp_path)
    shutil.copytree(model, tmp_path / "data" / "base")
    for seed, stage in enumerate(("sft", "grpo")):
        folder = params.run_dir(stage) / "adapter"
        with pytest.raises(AwaresError, match=f"run `dvc repro {stage}`"):
            publish.publish_policy(params)
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(load_model(model), lora).save_pretrained(str(folder))
    publish.publish_policy(params)
    policy = tmp_path / "data" / "policy"
    both = AwaRes.from_pretrained(model, [policy / "sft", policy / "grpo"]).ask(scans / "page0.png", "q")
    chained = AwaRes.from_pretrained(policy / "grpo").ask(scans / "page0.png", "q")
    assert chained.call_gap == both.call_gap
    first = AwaRes.from_pretrained(policy / "sft").ask(scans / "page0.png", "q")
    assert first.call_gap != both.call_gap
    assert shipped(tmp_path).adapters == (policy / "sft", policy / "grpo")


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub whose repositories are the folders OWNER/NAME of ``root``, all of one commit; ``asked``: for which files."""

    root: Path
    asked: list[str]

    def do_GET(self) -> None:
        found = re.match(r"/(?:api/models/)?(\w+/\w+)", self.path)
        repository = self.root / (found[1] if found else "")
        file = repository / self.path.partition("/resolve/")[2].partition("/")[2]
        self.asked.append(file.name)
        body = file.read_bytes() if file.is_file() else b""
        self.send_response(200 if file.is_file() else 404)
        if not file.is_file():
            self.send_header("X-Error-Code", "EntryNotFound" if repository.is_dir() else "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *values: Any) -> None:
        pass


def test_adapters_of_the_hub_are_fetched_without_pickles(model: Path, scans: Path, tmp_path: Path) -> None:
    """Over HTTP once, then from the cache, and with the answers of the same adapters in folders."""
    import torch
    from peft import LoraConfig, get_peft_model

    root = tmp_path / "hub"
    shutil.copytree(model, root / "me" / "base")
    for seed, (name, base) in enumerate({"sft": "me/base", "grpo": "me/sft"}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(load_model(model), config).save_pretrained(str(root / "me" / name))
        written = root / "me" / name / "adapter_config.json"
        written.write_text(json.dumps({**json.loads(written.read_text()), "base_model_name_or_path": base}))
    (root / "me" / "pickled").mkdir()
    shutil.copy(root / "me" / "sft" / "adapter_config.json", root / "me" / "pickled")
    for name in ("sft", "pickled"):
        torch.save({}, root / "me" / name / "adapter_model.bin")
    handler: Any = type("Here", (Hub,), {"root": root, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    places = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT / "src"), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def ask(*policy: str, **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "awares", "ask", str(scans / "page0.png"), "q", "--json", *policy]
        return subprocess.run(line, env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True)

    try:
        online = ask("--model", "me/grpo")
        asked = set(handler.asked)
        given = ask("--model", str(model), "--adapter", "me/sft", "--adapter", "me/grpo")
        pickled, absent = ask("--model", "me/pickled"), ask("--model", str(model), "--adapter", "me/none")
    finally:
        server.shutdown()
    offline = ask("--model", "me/grpo", HF_HUB_OFFLINE="1")
    folders = [root / "me" / name for name in ("sft", "grpo")]
    expected = AwaRes.from_pretrained(model, folders).ask(scans / "page0.png", "q").call_gap
    assert expected != AwaRes.from_pretrained(model, folders[:1]).ask(scans / "page0.png", "q").call_gap
    for done in (online, given, offline):
        assert done.returncode == 0 and json.loads(done.stdout)["call_gap"] == expected, done.stderr
    assert {"adapter_config.json", "adapter_model.safetensors"} < asked
    assert not [name for name in handler.asked if name.endswith((".bin", ".pt", ".pth"))]
    assert pickled.returncode == 1 and "me/pickled: no adapter_model.safetensors there" in pickled.stderr
    assert absent.returncode == 1 and "me/none: no such model folder, nor to be had from the hub" in absent.stderr
    mistyped = ask("--model", str(model), "--adapter", str(tmp_path / "polcy"))
    assert mistyped.returncode == 1 and "polcy: no adapter_config.json there: give the folder" in mistyped.stderr


def test_without_a_name_the_shipped_policy_is_asked(capsys: Any) -> None:
    line = ["ask", str(ROOT / "data" / "examples" / "page.jpg"), "look up ben.", "--json"]
    try:
        shipped()
    except AwaresError as error:
        assert cli.main(line) == 1 and str(error) in capsys.readouterr().err
    else:
        assert cli.main(line) == 0 and json.loads(capsys.readouterr().out)["answer"]


def test_a_run_is_found_by_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    for stage, name in (("grpo", "main-s1"), ("sft", "main-s1"), ("sft", "main-s2")):
        folder = tmp_path / "runs" / "mini" / stage / name / "merged"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    runs = tmp_path / "runs" / "mini"
    merged = runs / "grpo" / "main-s1" / "merged"
    assert of_run("mini") == Checkpoint("run mini/grpo/main-s1", merged, form=protocol.OURS)
    shutil.copytree(merged.parent, runs / "grpo" / "ergo-s1")
    ergo = of_run("mini/grpo/ergo-s1").form
    assert ergo is not None and ergo.offered == ("box",) and ergo.region_budget < 1  # as its variant says
    assert of_run("mini/sft").path == runs / "sft" / "main-s1" / "merged"
    assert of_run("mini/sft/main-s2").path == of_run("mini/sft/main-s2/").path == runs / "sft" / "main-s2" / "merged"
    with pytest.raises(AwaresError, match="no run 'mini/sft/main-s2/merged': give profile, profile/stage or"):
        of_run("mini/sft/main-s2/merged")
    for name in ("mini/grpo/main-s9", "mini/data", "mini/evaluation/main-s1"):
        with pytest.raises(AwaresError, match=f"no policy of run '{name}'"):
            of_run(name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "adapter_config.json is torn or none"),
        ("[]", "adapter_config.json is torn or none"),
        ("{}", "names no base model"),
        ('{"base_model_name_or_path": "."}', "names an adapter that was made for this one"),
    ],
)
def test_an_adapter_that_leads_to_no_model_is_named(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(AwaresError, match=f"{tmp_path.name}.*{said}"):
        AwaRes.from_pretrained(tmp_path)


def test_help_tells_the_engines_own_limit(capsys: Any) -> None:
    from awares.method.rollout import MAX_NEW_TOKENS

    with pytest.raises(SystemExit, match="0"):
        cli.main(["ask", "--help"])
    assert f"of one turn (default {MAX_NEW_TOKENS};" in " ".join(capsys.readouterr().out.split())


def test_adapters_are_merged_in_the_order_given(model: Path, scans: Path, tmp_path: Path, capsys: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    line = ["ask", str(scans / "page0.png"), "q", "--model", str(model), "--json"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(load_model(model), config).save_pretrained(str(tmp_path / f"adapter{seed}"))
        line += ["--adapter", str(tmp_path / f"adapter{seed}")]
    assert cli.main(line) == 0
    adapters = [tmp_path / "adapter1", tmp_path / "adapter2"]
    expected = AwaRes.from_pretrained(model, adapters).ask(scans / "page0.png", "q")
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == expected.answer and found["call_gap"] == expected.call_gap
    assert expected.call_gap != AwaRes.from_pretrained(model, adapters[:1]).ask(scans / "page0.png", "q").call_gap


# behind a server


@pytest.fixture(scope="module")
def served(model: Path) -> Any:
    """Address of `awares serve --mode chat` around the very model of the fixture ``model``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("AWARES_API_KEY", None)
    command = [sys.executable, "-m", "awares", "serve", "--mode", "chat", "--model", str(model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    yield process.stdout.readline().split()[-1]
    process.terminate()
    process.wait()


def test_what_is_asked_over_http_is_answered_as_in_the_process(
    model: Path, served: str, scans: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("AWARES_API_KEY", raising=False)
    ask = ["ask", str(scans / "page0.png"), "what is it?", "--model", str(model), "--json"]
    answers = []
    for more in ([], ["--server", served]):
        assert cli.main([*ask, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [one["answer"] for one in answers][0] == answers[1]["answer"] and answers[0]["rtr"] == answers[1]["rtr"]
    out = tmp_path / "out.jsonl"
    line = ["ask", str(scans), "what is it?", "--model", str(model), "--out", str(out), "--server", served]
    assert cli.main(line) == 0 and len(out.read_text().splitlines()) == 9
    assert (tmp_path / "out.jsonl.replies").is_file()
    assert cli.main([*ask, "--server", served, "--call-bias", "2"]) == 1
    assert "a server biases a token at every position" in capsys.readouterr().err
    assert cli.main([*ask, "--server", "http://127.0.0.1:9/v2x"]) == 1


# serve, bench, and what the README promises


def test_every_limit_of_the_server_is_an_option() -> None:
    line = ["serve", "--queue", "3", "--timeout", "2.5", "--image-bytes", "99"]
    parsed = options.parser(line).parse_args(line)
    limits = {one.name: getattr(parsed, one.name) for one in fields(ServeSettings) if one.name != "model"}
    assert ServeSettings(**limits) == ServeSettings(queue=3, timeout=2.5, image_bytes=99)
    assert set(options.LIMITS) == {one.name for one in fields(ServeSettings)}


def test_serve_is_up_with_the_limits_given_and_ends_at_sigterm(model: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = ["serve", "--model", str(model), "--port", "0", "--name", "tiny", "--body-bytes", "100"]
    command = [sys.executable, "-m", "awares", *line]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{url}/models", timeout=60) as answer:
            assert json.loads(answer.read())["data"][0]["id"] == "tiny"
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(f"{url}/chat/completions", data=b"{" + b" " * 200, timeout=60)
    finally:
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in stderr


def test_a_limit_out_of_range_is_wrong_usage(model: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "--model", str(model), "--queue", "0"])
    assert capsys.readouterr().err.endswith("error: queue is 0: give a number above 0\n")


def readme_lines(command: str) -> list[str]:
    guides = (ROOT / "README.md", ROOT / "src" / "awares" / "README.md", ROOT / "data" / "launch" / "README.md")
    text = "\n".join(guide.read_text() for guide in guides)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(command)]


def shown_lines() -> list[str]:
    """Command lines of the README and of every help, without their comments; bench has options of its own."""
    texts = [
        options.EXAMPLES,
        options.ASK_EXAMPLES,
        options.EVAL_EXAMPLES,
        options.SERVE_EXAMPLES,
        options.PLAN_EXAMPLES,
    ]
    texts.append(options.PUSH_EXAMPLES)
    rows = [row.strip() for text in texts for row in text.splitlines()] + readme_lines("awares ")
    lines = [re.split(r"  +#| {3,}", row)[0] for row in rows if re.match(r"awares (?!COMMAND|bench)", row)]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("line", shown_lines())
def test_commands_of_readme_and_help_are_understood(line: str) -> None:
    words = shlex.split(line)
    parsed = options.parser(words[1:]).parse_args(words[1:])
    assert parsed.command == words[1] and parsed.command in cli.COMMANDS
    for word in words:
        assert not word.startswith("data/") or (ROOT / word).exists()


def test_readme_shows_the_shell() -> None:
    assert len(readme_lines("awares ask")) >= 3 and readme_lines("awares eval") and readme_lines("awares serve")


def test_examples_are_rows_of_the_schema() -> None:
    rows = data.from_jsonl(ROOT / "data" / "examples" / "questions.jsonl")
    assert len(rows) == 4 and set(rows["source"]) <= set(load_params(path=ROOT / "params.yaml").data.tasks)
    assert len(batch.read_items(ROOT / "data" / "examples", "what stands here?")) == 4
