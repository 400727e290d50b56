"""One table of inputs, every entry point: each sees the right picture, or refuses that row alone and by name."""

import io
import json
import re
from contextlib import closing, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from chat_server import ServerProcess
from conftest import LONG, tiny_model, tiny_tokenizer
from inputs import BOX_1, CASES, COLOURS, IMAGES, QUESTION, Case
from PIL import Image
from starlette.testclient import TestClient
from test_serve import question

from awares.cli import batch
from awares.cli import main as cli
from awares.cli.options import PolicyOptions
from awares.cli.serve import make_app
from awares.config import load_params
from awares.data import rows as data_rows
from awares.data.sources import fit_image
from awares.engine import images
from awares.engine.jsonl import read_records
from awares.engine.model import make_processor, save_model
from awares.engine.rows import picture, picture_sizes
from awares.errors import AwaresError
from awares.method.protocol import SYSTEM
from awares.method.rollout import Engine
from awares.policy import AwaRes

SERVED = (".png", ".jpg", ".jfif", ".webp")
SHORT = ("--max-new-tokens", "6")


class Seen(NamedTuple):
    """The reply to one row. ``answer``: at a training source the pixels that are trained on."""

    answer: Any
    note: str = ""
    error: str = ""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Model, engine, a folder with rows.jsonl and its images, and the answers to the right pictures.

    The system prompt is one token of this model, so that pictures decide its answers.
    """
    root = tmp_path_factory.mktemp("cases")
    torch.set_num_threads(1)
    processor = make_processor(tiny_tokenizer(long=(*LONG, SYSTEM)))
    model = tiny_model(processor, seed=4)
    save_model(model, processor, root / "tiny")
    engine, folder, right, lines = Engine(model, processor, max_new_tokens=6), root / "hard", {}, list[bytes]()
    folder.mkdir()
    COLOURS.save(folder / "page.png")
    for name, case in CASES.items():
        values: Any = {} if isinstance(case.values, bytes) else case.values
        if case.content:
            (folder / values["image"]).write_bytes(case.content)
        if case.right:
            right[name] = engine.run([case.right], [values.get("question", QUESTION)])[0].answer
        row = {"image": "page.png", "question": QUESTION, "source": name, "question_boxes": BOX_1}
        row |= {"answers": [right.get(name, "a")], **values}
        lines.append(case.values if isinstance(case.values, bytes) else as_line(row))
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert len({*right.values()}) > 11  # answers of 16 pictures, some of which are almost equal
    return SimpleNamespace(folder=folder, model=root / "tiny", engine=engine, right=right)


def as_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode()


def run(*arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, output and messages of the command."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.main([*map(str, arguments)])
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), [line for line in err.getvalue().splitlines() if line.startswith("awares: ")]


def given(world: SimpleNamespace, name: str) -> tuple[Path, str]:
    """Image file and question of a case."""
    values: Any = CASES[name].values
    return world.folder / values.get("image", "page.png"), values.get("question", QUESTION)


def ask_file(world: SimpleNamespace, names: list[str]) -> dict[str, Seen]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyOptions, "load", lambda *_, **__: (AwaRes(world.engine), "tiny"))
        for name in names:
            code, out, messages = run("ask", *given(world, name), "--json")
            reply = json.loads(out) if code == 0 else {}
            assert code == (0 if reply else 1) and len(messages) == int(code or "note" in reply), (name, messages)
            found[name] = Seen(reply.get("answer"), reply.get("note", ""), "".join(messages) if code else "")
    return found


def ask_many(world: SimpleNamespace, names: list[str], *options: object, file: str = "rows.jsonl") -> dict[str, Seen]:
    source = world.folder / file
    out = source.with_name(f"{source.stem}-{len(options)}-out.jsonl")
    code, *_ = run("ask", source, QUESTION, "--out", out, "--model", world.model, *SHORT, *options)
    records = read_records(out)
    assert code == int(any("error" in one for one in records))
    found = [Seen(one.get("answer"), one.get("note", ""), one.get("error", "")) for one in records]
    return dict(zip(names, found, strict=True))


def ask_server(world: SimpleNamespace, names: list[str]) -> dict[str, Seen]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL", str(world.model))
        with closing(ServerProcess(world.folder / "log.jsonl", "engine")) as backend:
            return ask_many(world, names, "--server", backend.url)


def ask_folder(world: SimpleNamespace, names: list[str]) -> dict[str, Seen]:
    files = {given(world, name)[0]: name for name in names}
    (world.folder / "images").mkdir()
    for file in files:
        (world.folder / "images" / file.name).write_bytes(file.read_bytes())
    return ask_many(world, [files[file] for file in sorted(files)], file="images")


def evaluate(world: SimpleNamespace, names: list[str]) -> dict[str, Seen]:
    with pytest.MonkeyPatch.context() as patch:
        few = {"evaluation.bootstrap": 50, "threads": 1}
        patch.setattr("awares.config.load_params", lambda *_, **__: load_params(overrides=few))
        code, out, messages = run("eval", world.folder / "rows.jsonl", "--json", "--model", world.model, *SHORT)
    scores = {row["benchmark"]: row["accuracy"] for row in json.loads(out)["table"]}
    assert code == 1 and len(messages) + len(scores) - 1 == len(names)
    return {name: one_of(number, messages, scores.get(name)) for number, name in enumerate(names, start=1)}


def training(world: SimpleNamespace, names: list[str]) -> dict[str, Seen]:
    faults: list[str] = []
    file = world.folder / "rows.jsonl"
    pixels = {row["source"]: picture(row, 2000).tobytes() for row in data_rows.read_jsonl_rows(file, faults)}
    assert len(faults) + len(pixels) == len(names)
    with pytest.raises(AwaresError, match="rows.jsonl, line 5") as error:
        data_rows.make_split(load_params(overrides={"data.sources": [str(file)]}), "train")
    assert str(error.value).count("rows.jsonl, line") == data_rows.MOST_FAULTS and "more" in str(error.value)
    return {name: one_of(number, faults, pixels.get(name)) for number, name in enumerate(names, start=1)}


def one_of(number: int, faults: list[str], answer: Any) -> Seen:
    own = [fault for fault in faults if re.search(rf"(rows.jsonl, line |row rows-){number}\b", fault)]
    return Seen(answer, error="".join(own))


def server(world: SimpleNamespace, names: list[str]) -> dict[str, Seen]:
    found, http = {}, TestClient(make_app(world.engine, "tiny", cli.Serve()))
    for name in names:
        file, words = given(world, name)
        reply = http.post("/v1/chat/completions", content=as_line(question(file.read_bytes(), words)))
        assert reply.status_code in (200, 400, 413)
        said = reply.json()
        if "error" in said:
            found[name] = Seen(None, error=said["error"]["message"])
        else:
            found[name] = Seen(said["choices"][0]["message"]["content"], said["usage"]["awares"].get("note", ""))
    return found


ENTRIES: dict[str, Any] = {
    one.__name__: one for one in (ask_file, ask_folder, ask_many, ask_server, evaluate, training, server)
}


def applies(entry: str, case: Case) -> bool:
    if not isinstance(case.values, dict):
        return entry not in ("ask_file", "ask_folder", "server")
    image, words = (case.values.get(key, "") for key in ("image", "question"))
    if entry == "ask_folder" or (entry == "server" and case.content):
        return bool(case.content)
    if entry == "server":
        return isinstance(words, str) and "question" in case.values
    changed = {"image", "question"} & case.values.keys() and isinstance(image, str) and isinstance(words, str)
    return entry != "ask_file" or bool(changed and case.values.get("image") not in ("", ".", "rows.jsonl"))


PAIRS = [(entry, name) for entry in ENTRIES for name, case in CASES.items() if applies(entry, case)]


def is_right(entry: str, case: Case) -> bool:
    """Whether the entry point should accept a case."""
    if entry == "server" and case.content:  # Pillow's other readers are not for bytes from strangers
        return bool(case.right) and Path(case.values["image"]).suffix in SERVED  # type: ignore[call-overload]
    if entry == "training":
        return case.trained
    return bool(case.right) and (entry != "evaluate" or case.trained)


@pytest.fixture(scope="module")
def replies(world: SimpleNamespace) -> Any:
    """The replies of an entry point."""
    return cache(lambda entry: ENTRIES[entry](world, [name for one, name in PAIRS if one == entry]))


@pytest.mark.parametrize(("entry", "name"), PAIRS)
def test_every_entry_point_sees_the_right_picture_or_refuses_the_row(
    entry: str, name: str, world: SimpleNamespace, replies: Any
) -> None:
    case, found = CASES[name], replies(entry)[name]
    if is_right(entry, case):
        right = {"evaluate": 100, "training": images.cap(case.right or COLOURS).tobytes()}
        assert (found.answer, found.error) == (right.get(entry, world.right.get(name)), "")
        assert found.note == ("" if entry in right else case.note)
    else:
        assert found.answer is None and 0 < len(found.error) < 600


def test_an_unexpected_error_is_that_rows_error() -> None:
    def run(images: Any, questions: Any, **_: Any) -> list[str]:
        if "bad" in questions:
            raise RuntimeError("a library failed")
        return [f"answer to {question}" for question in questions]

    engine: Any = SimpleNamespace(run=run, max_side=2000)
    found: Any = batch.run_rows(engine, [None] * 3, ["a", "bad", "c"], ["1", "2", "3"], 0.0)
    assert found[0] == "answer to a" and found[2] == "answer to c"
    assert found[1].row_id == "2" and "row 2" in found[1].reason and "a library failed" in found[1].reason


@pytest.mark.parametrize("name", [name for name, case in IMAGES.items() if case.right])
def test_the_right_picture_from_every_kind_of_source(name: str, tmp_path: Path) -> None:
    case: Any = IMAGES[name]
    file = tmp_path / case.values["image"]
    file.write_bytes(case.content)
    with Image.open(file) as opened:
        for source in (file, str(file), case.content, opened):
            found = images.open_image(source)
            assert (found.mode, found.size, found.tobytes()) == ("RGB", case.right.size, case.right.tobytes())
            assert found.info.get(images.NOTE, "") == case.note
    capped = images.cap(found)
    assert images.open_image(capped).info.get(images.NOTE, "") == case.note  # as the engine does
    assert images.upright_size(case.content) == found.size
    stored, (shown,) = fit_image([case.content], 2000)  # a row of the hub, which any reader must show as we do
    assert images.is_plain(stored) and images.open_image(stored).size == shown.size
    assert (shown.mode, shown.tobytes()) == ("RGB", capped.tobytes())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": file.name, "question": "q", "answers": ["a"]}))
    rows = data_rows.read_jsonl_rows(tmp_path / "rows.jsonl")
    assert picture_sizes(rows, 2000) == [capped.size] and picture(rows[0], 2000).tobytes() == capped.tobytes()
    (kept,) = rows.cast_column("image", type(rows.features["image"])(decode=False))
    assert (kept["image"]["bytes"] == case.content) == images.is_plain(case.content)
