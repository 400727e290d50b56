"""Mutated images, calls, rows and requests, with fixed seeds: users see answers and AwaresErrors, nothing else."""

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_server import serving
from inputs import CASES, COLOURS, IMAGES, QUESTION, encoded
from test_entry_points import as_line, run
from test_protocol import BOXES, CALLS, FREE, NO_BOXES
from test_serve import health, question

from awares.cli.options import PolicyOptions
from awares.data.rows import read_jsonl_rows
from awares.engine import images
from awares.engine.jsonl import read_records
from awares.errors import AwaresError
from awares.method.crops import CROPS, allowed
from awares.method.protocol import OURS, RELEASED, parse_call
from awares.method.rollout import Engine
from awares.policy import AwaRes

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
ODD: list[Any] = [None, True, -1, 0, 1.5, 10**40, 1e308, float("nan"), "", " ", "\0", "\ud800", "x" * 300, "~", "٣"]
ODD += [[], {}, [[]], [[0, 0, 1, 1]], {"a": {"b": []}}, [None], "/dev/zero", "../page.png", "page.png", "data:,"]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """``data`` with a few bytes changed, cut or repeated."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(found) + 1)
        more = rng.choice((b"", bytes([rng.randrange(256)]), b'"', b"{[", b"\r\n"))
        found[place : place + rng.choice((0, 0, 1, 1, 9))] = more
    return bytes(found[: rng.randrange(len(found) + 1)] if rng.random() < 0.1 else found)


def with_odd_values(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which one part is another value, is missing, or is there twice."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]
    chosen, kind = rng.choice(keys), rng.random()
    if isinstance(value, list):
        more = [value[chosen]] if kind < 0.1 else [] if kind < 0.2 else [with_odd_values(rng, value[chosen])]
        return value[:chosen] + more + value[chosen + (kind >= 0.1) :]
    if kind < 0.1:
        return {key: one for key, one in value.items() if key != chosen}
    return value | {rng.choice(("extra", "name", "n")) if kind < 0.2 else chosen: with_odd_values(rng, value[chosen])}


def test_mutated_files_raise_nothing_but_awares_errors() -> None:
    rng = np.random.default_rng(31)
    sources = [case.content for case in IMAGES.values() if 100 < len(case.content) < 30_000]
    for _ in range(1500):
        data = bytearray(sources[rng.integers(len(sources))])
        for place in rng.integers(0, min(len(data), int(rng.choice([60, 400, 30_000]))), size=rng.integers(1, 8)):
            data[place] = rng.integers(256)
        try:
            found = images.open_image(bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.2 else data))
        except AwaresError:
            continue
        assert found.mode == "RGB" and min(found.size) >= images.MIN_SIDE
    assert images.open_image(COLOURS).tobytes() == COLOURS.tobytes()


def test_mutated_calls_raise_nothing_and_ask_only_for_what_is_offered() -> None:
    rng = random.Random(31)
    seeds = [form % call for call in CALLS for form in ("%s", "<tool_call>\n%s\n</tool_call>")]
    seeds += [f'<tool_call>{{"regions": ["{box}"]}}' for box in (BOXES + NO_BOXES).split("|")]
    seeds += ["GET_CROPS: ['0', '5']", "[" * 3000, '<tool_call>{"a": ' + "[" * 3000 + "}</tool_call>"]
    signs = "\"'[]{}<>:=,.-\\ \n0159“：］\ud83d\0" + "atpcr"
    for _ in range(5000):
        text = list(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            text[rng.randrange(len(text))] = rng.choice(signs) * rng.choice((0, 1, 1, 2))
        for form in (OURS, RELEASED, FREE):
            found = parse_call("".join(text), form)
            assert all(allowed(name, form.offered) for name in found.crops)
            assert bool(found.crops) == (found.status in ("valid", "recovered"))
    assert parse_call(OURS.render_call(CROPS)).status == "valid"


def test_mutated_rows_are_answered_or_refused_one_by_one(tiny: SimpleNamespace, tmp_path: Path) -> None:
    rng, engine = random.Random(31), Engine(tiny.model, tiny.processor, max_new_tokens=1)
    COLOURS.save(tmp_path / "page.png")
    good = {"id": "a", "image": "page.png", "question": QUESTION, "answers": ["a"], "question_boxes": [[0, 0, 9, 9]]}
    raw = [as_line(good), *(case.values for case in CASES.values() if isinstance(case.values, bytes))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyOptions, "load", lambda *_, **__: (AwaRes(engine), "tiny"))
        for number in range(40):
            lines = [as_line(with_odd_values(rng, {**good, "id": f"r{place}"})) for place in range(12)]
            lines += [mutated(rng, rng.choice(raw)[:2000]).replace(b"\n", b"") for _ in range(6)]
            file, out = tmp_path / f"{number}.jsonl", tmp_path / f"{number}.out"
            file.write_bytes(b"\n".join(lines))
            code, _, messages = run("ask", file, "--out", out)
            if records := read_records(out):
                assert len(records) == sum(bool(line.strip()) for line in lines)
                assert code == int(any("error" in one for one in records))
            else:
                assert code == 1 and len(messages) == 1 and "every row needs its own" in messages[0]
            try:
                read_jsonl_rows(file, [])
            except AwaresError as error:
                assert "hold" in str(error) or "line" in str(error) or "own" in str(error)


def exchange(url: str, data: bytes) -> bytes:
    """What the server sends back to ``data`` until it closes the connection, or for five seconds."""
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), timeout=60) as connection:
        connection.settimeout(5)
        try:
            connection.sendall(data)
            return connection.makefile("rb").read()
        except OSError:
            return b""


def test_mutated_requests_get_an_answer_or_a_refusal(saved: Path, tmp_path: Path) -> None:
    rng, sent = random.Random(31), list[bytes]()
    small = [case.content for case in IMAGES.values() if 100 < len(case.content) < 9_000]
    for _ in range(250):
        image = mutated(rng, rng.choice(small)) if rng.random() < 0.3 else encoded(COLOURS, "PNG")
        request = question(image) | {"stop": [], "user": "u", "n": 1, "stream": False, "max_tokens": 3}
        body = as_line(request if rng.random() < 0.2 else with_odd_values(rng, request))
        sent.append((HEAD % len(body)).encode() + body)
        body = mutated(rng, body)
        sent += [(HEAD % len(body)).encode() + body] + [mutated(rng, sent[-1])] * (rng.random() < 0.3)
    with open(tmp_path / "log", "wb") as log:
        with serving(saved, "--max-new-tokens", 2, stderr=log) as (url, _):
            with ThreadPoolExecutor(16) as pool:
                replies = [*pool.map(lambda data: exchange(url, data), sent)]
            assert health(url)["status"] == "ready"
    found = {int(reply.split()[1]) for reply in replies if reply}
    assert 200 in found and all(status == 200 or 400 <= status < 500 for status in found), found
    for reply in replies:
        head, _, body = reply.partition(b"\r\n\r\n")
        if b"application/json" in head:
            assert "error" in json.loads(body) or "choices" in json.loads(body)
        else:  # a stream, or bytes that are no HTTP
            assert not body or b"data: [DONE]" in body or body == b"Invalid HTTP request received."
    assert (tmp_path / "log").read_text() == ""
