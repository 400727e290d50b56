"""The server: real processes on loopback, spoken to by the stock openai client and, where it must hurt, by raw sockets."""

import asyncio
import base64
import copy
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import awares
from awares.cli.batching import Batcher, Chat, Job
from awares.cli.serve import make_app, serve
from awares.cli.wire import ApiError, Completion, ServeSettings, read_images
from awares.engine import chat_format
from awares.engine.decode import Decoder
from awares.engine.model import save_model
from awares.errors import AwaresError
from awares.method import protocol
from awares.method.rollout import Engine

KEY = "sesame-5c1f"
FOR_EVER = 10**6  # tokens: an answer that nobody ends takes an hour
TIE = 1e-4  # where the two best logits are nearer than this, rounding may choose
START = """
import json, sys, torch
from awares.cli.serve import ServeSettings, serve
torch.set_num_threads(1)
path, settings, options = json.loads(sys.argv[1])
serve(path, port=0, settings=ServeSettings(**settings), **options)
"""


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].split("/")[0])

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=300)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=60) as reply:
            return json.load(reply)

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Waits for a state of /health; fails when it does not come."""
        end = time.monotonic() + 300
        while not holds(state := self.health()):
            assert time.monotonic() < end, state
            time.sleep(0.05)

    def send(self, head: str, body: bytes = b"") -> socket.socket:
        """A request over a raw socket."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=300)
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
        return connection


@contextmanager
def server(
    folder: Path, key: str | None = None, settings: dict[str, Any] | None = None, **options: Any
) -> Iterator[Running]:
    environment = {**os.environ, "PYTHONPATH": str(Path(awares.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    environment |= {"AWARES_API_KEY": key} if key else {}
    arguments = json.dumps([str(folder), {"model": "tiny", **(settings or {})}, options])
    log = folder.parent / f"{time.monotonic_ns()}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", START, arguments], env=environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("tiny at http://127.0.0.1:"), log.read_text()
        yield Running(process, line.split()[-1], log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def save(tiny: SimpleNamespace, path: Path, endless: bool) -> Path:
    """The tiny model with room for long answers; ``endless`` never ends a turn, for what must not be over by itself."""
    model = copy.deepcopy(tiny.model)
    model.config.text_config.max_position_embeddings = 2 * FOR_EVER
    if endless:
        model.lm_head.weight.data[tiny.processor.tokenizer.convert_tokens_to_ids(chat_format.END_OF_TURN)] = 0
    save_model(model, tiny.processor, path)
    return path


@pytest.fixture(scope="module")
def folder(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny, tmp_path_factory.mktemp("models") / "tiny", endless=False)


@pytest.fixture(scope="module")
def endless(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny, tmp_path_factory.mktemp("models") / "endless", endless=True)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Iterator[Running]:
    """Small limits and a key."""
    limits = {
        "image_bytes": 150_000,
        "image_pixels": 300_000,
        "body_bytes": 300_000,
        "prompt_tokens": 4000,
        "window": 0.05,
    }
    with server(folder, KEY, limits, max_new_tokens=12) as running:
        yield running


@pytest.fixture(scope="module")
def chat(folder: Path) -> Iterator[Running]:
    limits = {"max_tokens": FOR_EVER, "images": 4, "timeout": 1200}
    with server(folder, None, limits, mode="chat", max_new_tokens=12) as running:
        yield running


@pytest.fixture(scope="module")
def slow(endless: Path) -> Iterator[Running]:
    """No answer comes in time, and two requests fill the server."""
    limits = {"timeout": 4, "queue": 2, "max_tokens": FOR_EVER}
    with server(endless, None, limits, max_new_tokens=FOR_EVER) as running:
        yield running


@pytest.fixture(scope="module")
def engine(tiny: SimpleNamespace) -> Engine:
    return Engine(tiny.model, tiny.processor, max_new_tokens=12)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def url(data: bytes | Image.Image) -> str:
    raw = encode(data) if isinstance(data, Image.Image) else data
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def picture(data: bytes | Image.Image | str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else url(data)}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def question(image: Any, words: str = "what?") -> dict[str, Any]:
    """The body of a policy request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": [picture(image), text(words)]}], "temperature": 0}


def refused(running: Running, key: str = KEY, **request: Any) -> openai.APIStatusError:
    """The error that the openai client raises; its body must be OpenAI's."""
    with pytest.raises(openai.APIStatusError) as caught:
        running.client(key).chat.completions.create(**request)
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    return caught.value


def read_reply(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of what comes back on a raw socket."""
    with connection, connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = dict(line.decode().lower().strip().split(": ", 1) for line in iter(file.readline, b"\r\n"))
        return status, json.loads(file.read(int(headers["content-length"])))


# The policy


def test_the_answer_and_its_usage_are_the_engines(tiny: SimpleNamespace, policy: Running, engine: Engine) -> None:
    image = tiny.noise(230, 150, 1)
    for bias in (0.0, 99.0):
        reply = policy.client(KEY).chat.completions.create(**question(image), extra_body={"call_bias": bias})
        own = engine.run([image], ["what?"], call_bias=bias)[0]
        assert reply.choices[0].message.content == own.answer or own.margin < TIE
        assert (reply.object, reply.model, reply.choices[0].message.role) == ("chat.completion", "tiny", "assistant")
        usage: Any = reply.usage
        written = sum(turn.text_tokens for turn in own.turns if turn.role == "assistant")
        read = sum(turn.text_tokens + turn.visual_tokens for turn in own.turns if turn.role != "assistant")
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (read, written, read + written)
        assert usage.awares == {
            "visual_tokens": own.visual_tokens,
            "full_visual_tokens": own.full_visual_tokens,
            "visual_tokens_saved": own.full_visual_tokens - own.visual_tokens,
            "rtr": pytest.approx(own.rtr),
            "crops": list(own.crops),
            "call_status": own.call_status,
        }
        assert (own.call_status == "none") == (bias == 0)  # the dial was turned, so both interactions were seen


def test_a_policy_that_calls_reports_its_crops(tiny: SimpleNamespace, engine: Engine) -> None:
    """The random policy writes no valid call: its trajectory is forced here, and only the report of it is looked at."""
    from awares.cli.batching import spent

    trajectory = engine.run([tiny.noise(224, 224, 0)], ["q"], forced=[("all", "top")])[0]
    said = spent(trajectory)
    assert said["crops"] == ["all", "top"] and said["visual_tokens"] == 16 + 64 + 32
    assert said["visual_tokens_saved"] == 64 - 112 and said["rtr"] == pytest.approx(112 / 64)


def test_a_stream_says_the_same_and_ends_with_its_usage(tiny: SimpleNamespace, policy: Running) -> None:
    client, request = policy.client(KEY), question(tiny.noise(112, 140, 2))
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    words = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(words) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    bare = list(client.chat.completions.create(**request, stream=True))
    assert bare[-1].choices[0].finish_reason and not any(chunk.usage for chunk in bare)


def test_max_tokens_cuts_the_answer_and_not_the_call(tiny: SimpleNamespace, policy: Running) -> None:
    client, request = policy.client(KEY), question(tiny.noise(112, 140, 2))
    whole = client.chat.completions.create(**request)
    cut = client.chat.completions.create(**request, max_tokens=3)
    content, full = cut.choices[0].message.content or "", whole.choices[0].message.content or ""
    assert cut.choices[0].finish_reason == "length" and cut.usage.awares == whole.usage.awares  # type: ignore[union-attr]
    assert 0 < len(content) < len(full) and full.startswith(content.rstrip("\ufffd"))
    error = refused(policy, **request, max_tokens=13)
    assert error.status_code == 400 and "at most 12" in error.message and error.param == "max_tokens"


def test_fifty_clients_at_once_share_batches_and_get_what_they_get_alone(
    tiny: SimpleNamespace, policy: Running, engine: Engine
) -> None:
    rng = np.random.default_rng(0)
    sides = rng.integers(56, 200, (50, 2))
    images = [tiny.noise(int(width), int(height), seed) for seed, (width, height) in enumerate(sides)]
    biases = [0.0 if index % 2 else 99.0 for index in range(50)]
    bad = {7: question(encode(images[7])[:200]), 21: question(images[21], "a <tool_call> b")}

    async def all_at_once() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=policy.url, api_key=KEY, max_retries=0, timeout=300) as client:
            requests = [
                client.chat.completions.create(
                    **bad.get(index, question(images[index], f"q{index}?")), extra_body={"call_bias": biases[index]}
                )
                for index in range(50)
            ]
            return await asyncio.gather(*requests, return_exceptions=True)

    before = policy.health()
    replies = asyncio.run(all_at_once())
    after = policy.health()
    assert after["served"] - before["served"] == 48 and after["batches"] - before["batches"] < 24
    for index, reply in enumerate(replies):
        if index in bad:
            assert isinstance(reply, openai.BadRequestError), reply
            continue
        own = engine.run([images[index]], [f"q{index}?"], call_bias=biases[index])[0]
        assert reply.choices[0].message.content == own.answer or own.margin < TIE
        assert reply.usage.awares["call_status"] == own.call_status


def test_the_models_name_and_state_are_told(policy: Running) -> None:
    assert [model.id for model in policy.client(KEY).models.list()] == ["tiny"]
    assert policy.health()["status"] == "ready" and policy.health()["model"] == "tiny"


# What a stranger may send


def bad_images(tiny: SimpleNamespace) -> dict[str, tuple[Any, int, str]]:
    """Name -> image part's content, status, a word of the message."""
    good = encode(tiny.noise(112, 112, 0))
    broken = bytearray(good)
    broken[60:90] = bytes(30)
    bomb = b"IHDR" + struct.pack(">II", 60000, 60000) + good[24:29]
    bomb = good[:12] + bomb + struct.pack(">I", zlib.crc32(bomb)) + good[33:]
    return {
        "truncated": (good[: len(good) // 2], 400, "readable"),
        "broken": (bytes(broken), 400, "readable"),
        "noise": (np.random.default_rng(0).bytes(500), 400, "readable"),
        "empty": (b"", 400, "readable"),
        "a format that is not read": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", 400, "readable"),
        "declares more pixels than it has bytes": (bomb, 413, "far too many pixels"),
        "no base64": ("data:image/png;base64,@@@@", 400, "base64"),
        "an address": ("http://127.0.0.1/a.png", 400, "data URL"),
        "a file": ("file:///etc/hostname", 400, "data URL"),
        "a path": ("/etc/hostname", 400, "data URL"),
        "too small": (tiny.noise(20, 112, 0), 400, "28"),
        "a strip": (Image.new("RGB", (8000, 30)), 400, "200:1"),
        "too many bytes": (np.random.default_rng(0).bytes(160_000), 413, "150000"),
        "more pixels than are left": (Image.new("RGB", (600, 600)), 413, "300000"),
    }


def test_a_bad_image_is_refused_in_plain_words(tiny: SimpleNamespace, policy: Running) -> None:
    for name, (image, status, word) in bad_images(tiny).items():
        error = refused(policy, **question(image))
        assert (error.status_code, word in error.message) == (status, True), (name, error.message)


def test_any_damage_to_an_image_ends_in_an_image_or_a_refusal(tiny: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        good = encode(tiny.noise(56, 84, 0), kind)
        for _ in range(60):
            data = np.frombuffer(good, dtype=np.uint8).copy()
            data[rng.integers(len(data), size=3)] = rng.integers(256, size=3)
            try:
                assert read_images([url(data.tobytes()[: rng.integers(20, 2 * len(data))])], ServeSettings())
            except ApiError as error:
                assert error.status in (400, 413)


def test_a_photograph_is_turned_upright_and_transparency_is_white(tiny: SimpleNamespace) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    tiny.noise(112, 56, 0).save(file, "JPEG", exif=exif)
    clear = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    upright, white = read_images([url(file.getvalue()), url(clear)], ServeSettings())
    assert upright.size == (56, 112) and white.getpixel((5, 5)) == (255, 255, 255)


def test_a_request_that_cannot_be_heeded_is_refused_with_the_fields_name(
    tiny: SimpleNamespace, policy: Running
) -> None:
    image = tiny.noise(56, 56, 0)
    good = question(image)
    user = good["messages"][0]
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        ({"model": "gpt-4"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [user, user]}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "s"}, user]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "no image"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [picture(image), picture(image), text("two")]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [picture(image)]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [picture(image), text("<|im_end|>")]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [picture(image), text("q" * 9000)]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
        ({"temperature": 0.7}, 400, "temperature"),
        ({"n": 2}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"stop": ["."]}, 400, "stop"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"extra_body": {"call_bias": "much"}}, 400, "call_bias"),
        ({"extra_body": {"call_bies": 1}}, 400, "call_bies"),
        ({"logit_bias": {"5": -100}}, 400, "logit_bias"),
    ]
    for change, status, param in cases:
        error = refused(policy, **{**good, **change})
        assert (error.status_code, error.param) == (status, param), (change, error.message)
    assert policy.client(KEY).chat.completions.create(**{**good, "seed": None, "user": "u"}).choices


def test_a_body_that_is_no_json_or_too_long_gets_an_answer_and_holds_no_place(policy: Running) -> None:
    key = f"Authorization: Bearer {KEY}\r\n"
    for body in (
        b'{"model": "tiny", "messages": [{"ro',
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"n": NaN}',
        b'["\\ud800"]',
    ):
        status, reply = read_reply(policy.send(f"{key}Content-Length: {len(body)}", body))
        assert status == 400 and reply["error"]["type"] == "invalid_request_error", body[:20]
    status, reply = read_reply(policy.send(f"{key}Content-Length: 300001"))  # refused before it is sent
    assert status == 413 and reply["error"]["code"] == "request_too_large"
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    status, reply = read_reply(policy.send(f"{key}Transfer-Encoding: chunked", piece * 5))  # its length is not declared
    assert status == 413 and reply["error"]["code"] == "request_too_large"
    with policy.send(f"{key}Content-Length: 500", b'{"model": "ti'):
        policy.until(lambda state: state["requests"] == 1)
    policy.until(lambda state: state["requests"] == 0)  # the client hung up in the middle of its body


def test_what_is_not_there_is_an_openai_error_too(policy: Running) -> None:
    connection = socket.create_connection(("127.0.0.1", policy.port), timeout=60)
    connection.sendall(f"GET /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
    status, reply = read_reply(connection)
    assert status == 404 and set(reply["error"]) == {"message", "type", "param", "code"}


def test_without_the_key_nothing_but_health_is_told(tiny: SimpleNamespace, policy: Running) -> None:
    for key in ("wrong", KEY + "x", KEY[:-1], "schlüssel".encode().decode("latin-1")):
        error = refused(policy, key, **question(tiny.noise(56, 56, 0))) if key.isascii() else None
        assert error is None or (error.status_code, error.code) == (401, "invalid_api_key")
        status, _ = read_reply(policy.send(f"Authorization: Bearer {key}\r\nContent-Length: 0"))
        assert status == 401
    with pytest.raises(openai.AuthenticationError):
        policy.client("wrong").models.list()
    assert policy.health()["status"] == "ready" and KEY not in policy.log.read_text()


# The raw model


def raw(tiny: SimpleNamespace, messages: list[dict[str, Any]], limit: int) -> tuple[str, list[int], list[int], float]:
    """What the in-process decoder writes after the same messages: text, its ids, the prompt's ids, the margin."""
    images, conversation = [], []
    for message in messages:
        parts: Any = []
        for part in [text(message["content"])] if isinstance(message["content"], str) else message["content"]:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].split(",")[1])
                images.append(Image.open(io.BytesIO(data)).convert("RGB"))
            parts.append({"type": "image"} if part["type"] == "image_url" else part)
        conversation.append({"role": message["role"], "content": parts})
    decoder = Decoder(tiny.model, tiny.processor, limit)
    rendered = tiny.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids = decoder.tokenize(rendered, [image.size for image in images])
    output = decoder.start([ids], [images])
    return (
        decoder.text(output.tokens[0]).removesuffix(chat_format.END_OF_TURN),
        output.tokens[0],
        ids,
        output.margins[0],
    )


def unending(tiny: SimpleNamespace) -> dict[str, int]:
    """The bias that keeps a turn from ending before its limit."""
    return {str(tiny.processor.tokenizer.convert_tokens_to_ids(chat_format.END_OF_TURN)): -100}


def conversations(tiny: SimpleNamespace) -> list[list[dict[str, Any]]]:
    first = {"role": "user", "content": [picture(tiny.noise(84, 56, 0)), text("what?")]}
    crops = [text("<tool_response>\n"), picture(tiny.noise(14, 30, 1)), picture(tiny.noise(56, 112, 2)), text("\n!")]
    return [
        [{"role": "user", "content": "no image"}],
        [{"role": "system", "content": "be brief"}, first],
        [
            first,
            {"role": "assistant", "content": protocol.OURS.render_call(["top", "left"])},
            {"role": "user", "content": crops},
        ],
        [
            {
                "role": "user",
                "content": [text("a"), picture(tiny.noise(56, 56, 3)), text("b"), picture(tiny.noise(84, 84, 4))],
            }
        ],
    ]


def test_chat_writes_what_the_decoder_writes_alone_and_side_by_side(tiny: SimpleNamespace, chat: Running) -> None:
    client = chat.client()

    def ask(task: tuple[list[dict[str, Any]], int]) -> Any:
        extra = {"return_token_ids": True, "skip_special_tokens": False, "repetition_penalty": 1.0}
        messages: Any = task[0]
        return client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=task[1], temperature=0, extra_body=extra
        )

    tasks = [(messages, limit) for messages in conversations(tiny) for limit in (1, 7, 20)]
    alone = [ask(task) for task in tasks[:3]]
    with ThreadPoolExecutor(len(tasks)) as pool:
        together = list(pool.map(ask, tasks))
    for (messages, limit), reply in zip(tasks[:3] + tasks, alone + together, strict=True):
        content, tokens, ids, margin = raw(tiny, messages, limit)
        assert reply.prompt_token_ids == ids and reply.usage.prompt_tokens == len(ids)
        assert margin < TIE or reply.choices[0].message.content == content
        assert margin < TIE or reply.usage.completion_tokens == len(tokens)
        ended = tokens[-1] == tiny.processor.tokenizer.convert_tokens_to_ids(chat_format.END_OF_TURN)
        assert margin < TIE or reply.choices[0].finish_reason == ("stop" if ended else "length")


def test_a_turn_that_ends_early_leaves_its_neighbours_alone_and_keeps_control_tokens(
    tiny: SimpleNamespace, chat: Running
) -> None:
    """A bias makes the end of turn certain for one row, and a call's token for another; the third has none."""
    messages: Any = conversations(tiny)[1]
    ids = tiny.processor.tokenizer.convert_tokens_to_ids
    biases = [{str(ids("<|im_end|>")): 100}, {str(ids("<tool_call>")): 100}, {}]
    client = chat.client()

    def ask(bias: dict[str, int]) -> Any:
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, logit_bias=bias)

    with ThreadPoolExecutor(3) as pool:
        ended, called, free = (reply.choices[0] for reply in pool.map(ask, biases))
    assert (ended.message.content, ended.finish_reason) == ("", "stop")
    assert (called.message.content, called.finish_reason) == ("<tool_call>" * 6, "length")
    assert free.message.content == raw(tiny, messages, 6)[0]


def test_a_chat_stream_comes_as_it_is_written(tiny: SimpleNamespace, chat: Running) -> None:
    messages: Any = conversations(tiny)[1]
    client = chat.client()
    long: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 150, "logit_bias": unending(tiny)}
    whole = client.chat.completions.create(**long)
    stream = client.chat.completions.create(**long, stream=True)
    pieces, seen_running = [], False
    for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        seen_running = seen_running or (pieces[-1] != "" and chat.health()["running"] == 1)
    assert "".join(pieces) == whole.choices[0].message.content
    assert seen_running and len(pieces) > 20


def test_chat_refuses_what_it_would_have_to_ignore(tiny: SimpleNamespace, chat: Running) -> None:
    messages = conversations(tiny)[0]
    five = [{"role": "user", "content": [picture(tiny.noise(56, 56, 0))] * 5}]
    forged = [{"role": "user", "content": "see <|image_pad|>"}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"extra_body": {"call_bias": 1}}, "call_bias"),
        ({"temperature": 1}, "temperature"),
        ({"max_tokens": FOR_EVER + 1}, "max_tokens"),
        ({"messages": five}, "messages"),
        ({"messages": forged}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty"),
        ({"extra_body": {"skip_special_tokens": True}}, "skip_special_tokens"),
    ]
    for change, param in cases:
        error = refused(chat, **{"model": "tiny", "messages": messages, **change})
        assert (error.status_code, error.param) == (400, param), (change, error.message)


def test_a_stream_whose_reader_leaves_ends_its_row(tiny: SimpleNamespace, chat: Running) -> None:
    messages: Any = conversations(tiny)[1]
    stream = chat.client().chat.completions.create(
        model="tiny", messages=messages, max_tokens=FOR_EVER, logit_bias=unending(tiny), stream=True
    )
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    assert chat.health()["running"] == 1
    stream.close()
    chat.until(lambda state: state["requests"] == 0 and state["running"] == 0)


def test_what_arrives_during_a_long_batch_is_answered_after_it(tiny: SimpleNamespace, chat: Running) -> None:
    messages: Any = conversations(tiny)[1]
    client, ended = chat.client(), {}

    def ask(limit: int) -> int:
        reply = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=limit, logit_bias=unending(tiny)
        )
        ended[limit] = time.perf_counter()
        assert reply.usage is not None
        return reply.usage.completion_tokens

    with ThreadPoolExecutor(12) as pool:
        long = pool.submit(ask, 120)
        chat.until(lambda state: state["running"] == 1)
        short = list(pool.map(ask, range(1, 11)))
        assert long.result() == 120 and short == list(range(1, 11))
    assert max(ended.values()) > ended[120]  # not all of them went before it
    assert (
        min(moment for limit, moment in ended.items() if limit != 120) > ended[120] - 0.5
    )  # answered with it, or after


def test_a_job_that_fails_in_its_batch_fails_alone(engine: Engine) -> None:
    """Nothing that can be sent gets this far; a job is made by hand whose prompt has no place for its image."""
    good = engine.decoder.tokenize("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")

    async def run() -> list[Any]:
        jobs = [Job(images, len(good) + 4, 4, ids=good) for images in ([], [Image.new("RGB", (56, 56))], [])]
        batcher = Batcher(Chat(engine, ServeSettings()), ServeSettings(window=0.2))
        for job in jobs:
            batcher.put(job)
        batcher.start()
        events = [await asyncio.wait_for(job.events.get(), 60) for job in jobs]
        await asyncio.to_thread(batcher.stop)
        assert batcher.batches == 1
        return events

    first, failed, last = asyncio.run(run())
    assert isinstance(first, Completion) and first == last
    assert isinstance(failed, ApiError) and failed.status == 500 and failed.code == "model_error"


# Time, load and the end


def test_what_takes_too_long_gets_504_and_gives_its_place_back(tiny: SimpleNamespace, slow: Running) -> None:
    begun = time.monotonic()
    error = refused(slow, **question(tiny.noise(56, 56, 0)))
    assert (error.status_code, error.code) == (504, "timeout") and time.monotonic() - begun >= 4
    slow.until(lambda state: state["requests"] == 0 and state["running"] == 0)
    status, reply = read_reply(slow.send("Content-Length: 500", b'{"model": "ti'))  # nor may a body take its time
    assert status == 504 and reply["error"]["code"] == "timeout"


def test_a_full_server_says_when_to_come_back(tiny: SimpleNamespace, slow: Running) -> None:
    slow.until(lambda state: state["requests"] == 0)
    held = [slow.send("Content-Length: 500", b"{") for _ in range(2)]
    slow.until(lambda state: state["requests"] == 2)
    error = refused(slow, **question(tiny.noise(56, 56, 0)))
    assert (error.status_code, error.code) == (429, "queue_full") and int(error.response.headers["retry-after"]) >= 1
    for connection in held:
        connection.close()
    slow.until(lambda state: state["requests"] == 0)


def test_a_client_that_hangs_up_frees_the_model(tiny: SimpleNamespace, endless: Path) -> None:
    limits = {"timeout": 1200, "shutdown": 0.5, "max_tokens": FOR_EVER}
    with server(endless, None, limits, max_new_tokens=FOR_EVER) as running:
        body = json.dumps(question(tiny.noise(56, 56, 0))).encode()
        with running.send(f"Content-Length: {len(body)}", body):
            running.until(lambda state: state["running"] == 1)
        running.until(lambda state: state["requests"] == 0 and state["running"] == 0)
        assert running.health()["served"] == 0
        with running.send(f"Content-Length: {len(body)}", body) as connection:  # longer than a shutdown may take
            running.until(lambda state: state["running"] == 1)
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(timeout=300) == 0
            status, reply = read_reply(connection)
            assert status == 503 and reply["error"]["code"] == "shutting_down"


def test_sigterm_finishes_what_is_under_way_and_refuses_the_rest(tiny: SimpleNamespace, folder: Path) -> None:
    with (
        server(folder, None, {"timeout": 1200, "shutdown": 600}, mode="chat") as running,
        ThreadPoolExecutor(1) as pool,
    ):
        messages: Any = conversations(tiny)[1]
        ask = running.client().chat.completions.create
        under_way = pool.submit(ask, model="tiny", messages=messages, max_tokens=600, logit_bias=unending(tiny))
        running.until(lambda state: state["running"] == 1)
        running.process.send_signal(signal.SIGTERM)
        error = refused(running, model="tiny", messages=messages)
        assert (error.status_code, error.code) == (503, "shutting_down") and error.response.headers["retry-after"]
        reply = under_way.result()
        assert reply.usage is not None and reply.usage.completion_tokens == 600
        assert running.process.wait(timeout=300) == 0
        assert "Traceback" not in running.log.read_text()
        with pytest.raises(openai.APIConnectionError):
            ask(model="tiny", messages=messages)


# Before it starts


def test_what_cannot_be_served_is_said_at_once(
    tiny: SimpleNamespace, engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AwaresError, match="mode 'chats': use one of policy, chat"):
        make_app(engine, mode="chats")
    with pytest.raises(AwaresError, match="queue is 0"):
        ServeSettings(queue=0)
    with pytest.raises(AwaresError, match="timeout is nan"):
        ServeSettings(timeout=float("nan"))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(AwaresError, match="choose another host or port"),
    ):
        serve(folder, port=taken.getsockname()[1])
    with pytest.raises(AwaresError, match="no such model folder"):
        serve(folder / "none", port=0)
    monkeypatch.setenv("AWARES_API_KEY", " ")
    with pytest.raises(AwaresError, match="AWARES_API_KEY is empty"):
        make_app(engine)


def test_the_engine_takes_a_bias_for_each_row(tiny: SimpleNamespace, engine: Engine) -> None:
    images, biases = [tiny.noise(84, 84, seed) for seed in range(3)], [99.0, 0.0, -99.0]
    together = engine.run(images, ["q"] * 3, call_bias=biases)
    alone = [engine.run([image], ["q"], call_bias=bias)[0] for image, bias in zip(images, biases, strict=True)]
    assert [row.answer for row in together] == [row.answer for row in alone]
    assert [row.turns[1].text.startswith("<tool_call>") for row in together] == [True, False, False]
    assert engine.prompt_length(images[0], "q") == together[0].turns[0].text_tokens + together[0].turns[0].visual_tokens
    with pytest.raises(AwaresError, match="3 questions but 2 call_bias"):
        engine.run(images, ["q"] * 3, call_bias=biases[:2])
