"""One table of inputs, every entry point: each sees the right picture, or refuses that row alone and by name."""

import base64
import io
import json
import re
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.error import HTTPError

import pytest
import torch
from chat_server import ServerProcess, serving
from conftest import LONG, tiny_model, tiny_tokenizer
from inputs import BOX_1, CASES, COLOURS, IMAGES, QUESTION, Case
from PIL import Image

from awares.cli import batch
from awares.cli import main as cli
from awares.cli.options import PolicyOptions
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
ANSWERED = {name: case for name, case in CASES.items() if case.right}


class Seen(NamedTuple):
    """The reply to one row. ``answer``: at a training source the pixels that are trained on."""

    answer: Any
    note: str = ""
    error: str = ""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Model, engine, and two folders with rows.jsonl: the hard inputs, and plain PNG files of their right pictures.

    The system prompt is one token of this model, so that pictures decide its answers.
    """
    root = tmp_path_factory.mktemp("cases")
    torch.set_num_threads(1)
    processor = make_processor(tiny_tokenizer(long=(*LONG, SYSTEM)))
    model = tiny_model(processor, seed=4)
    save_model(model, processor, root / "tiny")
    engine = Engine(model, processor, max_new_tokens=6)
    for kind, cases in (("hard", CASES), ("plain", ANSWERED)):
        (root / kind).mkdir()
        COLOURS.save(root / kind / "page.png")
        lines = list[bytes]()
        for name, case in cases.items():
            values = dict(case.values) if isinstance(case.values, dict) else {}
            if kind == "hard" and case.content:
                (root / kind / values["image"]).write_bytes(case.content)
            elif kind == "plain" and case.right:
                values = {"image": f"{len(lines)}.png", "question": values.get("question", QUESTION)}
                case.right.save(root / kind / values["image"])
            row = {"image": "page.png", "question": QUESTION, "source": name, "answers": ["a"], "question_boxes": BOX_1}
            if case.right:
                asked = values.get("question", QUESTION)
                row["answers"] = [engine.run([case.right], [asked])[0].answer]
            lines.append(case.values if isinstance(case.values, bytes) and kind == "hard" else as_line(row | values))
        (root / kind / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return SimpleNamespace(root=root, model=root / "tiny", engine=engine)


def as_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode()


def run(*arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, output and messages of the command."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.main([*map(str, arguments)])
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), [line for line in err.getvalue().splitlines() if line.startswith("awares: ")]


def given(folder: Path, name: str) -> tuple[Path, str]:
    """Image file and question of a case."""
    values: Any = CASES[name].values
    if folder.name == "hard":
        return folder / values.get("image", "page.png"), values.get("question", QUESTION)
    return folder / f"{[*ANSWERED].index(name)}.png", values.get("question", QUESTION)


# Entry points: the replies to the cases in a folder


def ask_file(world: SimpleNamespace, folder: Path) -> dict[str, Seen]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyOptions, "load", lambda *_, **__: (AwaRes(world.engine), "tiny"))
        for name in cases_of("ask_file", folder):
            code, out, messages = run("ask", *given(folder, name), "--json")
            reply = json.loads(out) if code == 0 else {}
            assert code == (0 if reply else 1) and len(messages) == int(code or "note" in reply), (name, messages)
            found[name] = Seen(reply.get("answer"), reply.get("note", ""), "".join(messages) if code else "")
    return found


def ask_many(world: SimpleNamespace, source: Path, names: list[str], *options: object) -> dict[str, Seen]:
    out = source.with_name(f"{source.stem}-{len(options)}-out.jsonl")
    code, *_ = run("ask", source, QUESTION, "--out", out, "--model", world.model, *SHORT, *options)
    records = read_records(out)
    assert code == int(any("error" in one for one in records))
    found = [Seen(one.get("answer"), one.get("note", ""), one.get("error", "")) for one in records]
    return dict(zip(names, found, strict=True))


def ask_jsonl(world: SimpleNamespace, folder: Path) -> dict[str, Seen]:
    return ask_many(world, folder / "rows.jsonl", cases_of("ask_jsonl", folder))


def ask_server(world: SimpleNamespace, folder: Path) -> dict[str, Seen]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL", str(world.model))
        backend = ServerProcess(folder / "log.jsonl", "engine")
    try:
        return ask_many(world, folder / "rows.jsonl", cases_of("ask_jsonl", folder), "--server", backend.url)
    finally:
        backend.stop()


def ask_folder(world: SimpleNamespace, folder: Path) -> dict[str, Seen]:
    images = {given(folder, name)[0]: name for name in cases_of("ask_folder", folder)}
    (folder / "images").mkdir()
    for file in images:
        (folder / "images" / file.name).write_bytes(file.read_bytes())
    return ask_many(world, folder / "images", [images[file] for file in sorted(images)])


def evaluate(world: SimpleNamespace, folder: Path) -> dict[str, Seen]:
    with pytest.MonkeyPatch.context() as patch:
        few = {"evaluation.bootstrap": 50, "threads": 1}
        patch.setattr("awares.config.load_params", lambda *_, **__: load_params(overrides=few))
        code, out, messages = run("eval", folder / "rows.jsonl", "--json", "--model", world.model, *SHORT)
    table = {row["benchmark"]: row for row in json.loads(out)["table"]}
    names = cases_of("ask_jsonl", folder)
    scores = {name: row["accuracy"] for name, row in table.items()}
    assert code == int(bool(messages)) and len(messages) + len(scores) - 1 == len(names)
    return {name: one_of(number, messages, scores.get(name)) for number, name in enumerate(names, start=1)}


def training(world: SimpleNamespace, folder: Path) -> dict[str, Seen]:
    faults: list[str] = []
    rows = data_rows.read_jsonl_rows(folder / "rows.jsonl", faults)
    pixels = {row["source"]: picture(row, 2000).tobytes() for row in rows}
    names = cases_of("ask_jsonl", folder)
    assert len(faults) + len(rows) == len(names)
    if faults:
        with pytest.raises(AwaresError, match="rows.jsonl, line 5") as error:
            data_rows.make_split(load_params(overrides={"data.sources": [str(folder / "rows.jsonl")]}), "train")
        assert str(error.value).count("rows.jsonl, line") == data_rows.MOST_FAULTS and "more" in str(error.value)
    return {name: one_of(number, faults, pixels.get(name)) for number, name in enumerate(names, start=1)}


def one_of(number: int, faults: list[str], answer: Any) -> Seen:
    own = [fault for fault in faults if re.search(rf"(rows.jsonl, line |row rows-){number}\b", fault)]
    return Seen(answer, error="".join(own))


def server(world: SimpleNamespace, folder: Path) -> dict[str, Seen]:
    found = {}
    with serving(world.model, *SHORT) as (url, _):
        for name in cases_of("server", folder):
            file, question = given(folder, name)
            data = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
            parts = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": question}]
            body = as_line({"model": "tiny", "messages": [{"role": "user", "content": parts}]})
            head = {"Content-Type": "application/json"}
            try:
                with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body, head)) as reply:
                    content = json.load(reply)
                note = content["usage"]["awares"].get("note", "")
                found[name] = Seen(content["choices"][0]["message"]["content"], note)
            except HTTPError as error:
                assert error.code in (400, 413)
                found[name] = Seen(None, error=json.load(error)["error"]["message"])
    return found


ENTRIES: dict[str, Callable[[SimpleNamespace, Path], dict[str, Seen]]] = {
    one.__name__: one for one in (ask_file, ask_folder, ask_jsonl, ask_server, evaluate, training, server)
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


def cases_of(entry: str, folder: Path) -> list[str]:
    cases = CASES if folder.name == "hard" else ANSWERED
    return [name for name, case in cases.items() if applies(entry, case)]


def is_right(entry: str, case: Case) -> bool:
    """Whether the entry point should accept a case."""
    if entry == "server" and case.content:  # Pillow's other readers are not for bytes from strangers
        return bool(case.right) and Path(case.values["image"]).suffix in SERVED  # type: ignore[call-overload]
    if entry == "training":
        return case.trained
    return bool(case.right) and (entry != "evaluate" or case.trained)


@pytest.fixture(scope="module")
def replies(world: SimpleNamespace) -> Callable[[str], tuple[dict[str, Seen], dict[str, Seen]]]:
    """The replies of an entry point to the hard inputs, and to plain files of their right pictures."""

    def ask(entry: str) -> tuple[dict[str, Seen], dict[str, Seen]]:
        return ENTRIES[entry](world, world.root / "hard"), ENTRIES[entry](world, world.root / "plain")

    return cache(ask)


@pytest.mark.parametrize(
    ("entry", "name"), [(entry, name) for entry in ENTRIES for name, case in CASES.items() if applies(entry, case)]
)
def test_every_entry_point_sees_the_right_picture_or_refuses_the_row(entry: str, name: str, replies: Any) -> None:
    case, (hard, plain) = CASES[name], replies(entry)
    found = hard[name]
    if is_right(entry, case):
        right = plain[name].answer if case.right else COLOURS.tobytes()
        assert right is not None and (found.answer, found.error) == (right, "")
        assert found.note == ("" if entry in ("evaluate", "training") else case.note)
    else:
        assert found.answer is None and 0 < len(found.error) < 600


def test_the_answers_tell_the_pictures_apart(replies: Any) -> None:
    for entry in ("ask_file", "ask_folder", "ask_jsonl", "ask_server", "server"):
        plain = replies(entry)[1]
        assert len({one.answer for one in plain.values()}) > 11  # of 16 pictures, some of which are almost equal
    assert {one.answer for one in replies("evaluate")[1].values()} == {100.0}


class Fragile:
    """An engine that fails on one row, with an exception that is no AwaresError."""

    max_side = 2000

    def run(self, images: Any, questions: Any, call_bias: float = 0.0, row_ids: Any = None) -> list[str]:
        if "bad" in questions:
            raise RuntimeError("a library failed")
        return [f"answer to {question}" for question in questions]


def test_an_unexpected_error_is_that_rows_error() -> None:
    found: Any = batch.run_rows(Fragile(), [None] * 3, ["a", "bad", "c"], ["1", "2", "3"], 0.0)
    assert found[0] == "answer to a" and found[2] == "answer to c"
    assert found[1].row_id == "2" and "row 2" in found[1].reason and "a library failed" in found[1].reason


@pytest.mark.parametrize("name", [name for name, case in IMAGES.items() if case.right])
def test_the_right_picture_from_every_kind_of_source(name: str, tmp_path: Path) -> None:
    case, file = IMAGES[name], tmp_path / f"{name}{IMAGES[name].suffix}"
    file.write_bytes(case.content)
    assert case.right
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
