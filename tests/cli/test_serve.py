"""The server, spoken to by the stock openai client: in this process, or as real processes for time and sockets.

At the end a polite client next to slow, silent and greedy ones, of the embedded model with few descriptors.
"""

import base64
import copy
import io
import json
import re
import resource
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from urllib.parse import quote

import numpy as np
import openai
import pytest
from chat_server import serving
from PIL import Image
from starlette.testclient import TestClient

from awares.cli import main as cli
from awares.cli.openai_api import ChatRequest, decode
from awares.cli.options import Limits
from awares.cli.serve import make_app
from awares.engine.model import save_model
from awares.errors import AwaresError
from awares.method.rollout import Engine

KEY = "sesame-5c1f"
END, CALL = "<|im_end|>", "<tool_call>"
LIMITS = Limits(image_bytes=150_000, image_pixels=300_000, body_bytes=300_000, prompt_tokens=4000)


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(tiny.model, tiny.processor, max_new_tokens=12)


@pytest.fixture(scope="module")
def policy(engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWARES_API_KEY", KEY)
        return make_app(engine, "tiny", LIMITS)


@pytest.fixture(scope="module")
def chat(engine):
    return make_app(engine, "tiny", Limits(images=4), mode="chat")


def client(target, key=KEY):
    """The stock client for an application in this process, or for the address of a server."""
    http = None if isinstance(target, str) else TestClient(target, raise_server_exceptions=False)
    url = target if isinstance(target, str) else "http://testserver/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=300, http_client=http)


def encode(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def picture(data):
    raw = encode(data) if isinstance(data, Image.Image) else data
    url = raw if isinstance(raw, str) else "data:image/png;base64," + base64.b64encode(raw).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text(words):
    return {"type": "text", "text": words}


def question(image, words="what?"):
    """The body of a policy request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": [picture(image), text(words)]}], "temperature": 0}


def refused(target, key=KEY, **request):
    """The error that the openai client raises; its body must be OpenAI's."""
    with pytest.raises(openai.APIStatusError) as caught:
        client(target, key).chat.completions.create(**request)
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    return caught.value


# The policy


def test_the_answer_and_its_usage_are_the_engines(tiny, policy, engine):
    image = tiny.noise(230, 150, 1)
    for bias in (0.0, 99.0):
        reply = client(policy).chat.completions.create(**question(image), extra_body={"call_bias": bias})
        own = engine.run([image], ["what?"], call_bias=bias)[0]
        assert reply.choices[0].message.content == own.answer and (own.call_status == "none") == (bias == 0)
        assert (reply.object, reply.model, reply.choices[0].message.role) == ("chat.completion", "tiny", "assistant")
        usage = reply.usage
        written = sum(turn.text_tokens for turn in own.turns if turn.role == "assistant")
        read = sum(turn.text_tokens + turn.visual_tokens for turn in own.turns if turn.role != "assistant")
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (read, written, read + written)
        assert usage.awares["visual_tokens"] == own.visual_tokens and usage.awares["rtr"] == pytest.approx(own.rtr)
        saved = own.full_visual_tokens - own.visual_tokens
        assert (usage.awares["crops"], usage.awares["visual_tokens_saved"]) == ([*own.crops], saved)


def test_a_stream_has_the_same_answer_and_max_tokens_cuts_the_answer_alone(tiny, policy):
    request = question(tiny.noise(112, 140, 2))
    create = client(policy).chat.completions.create
    whole = create(**request)
    chunks = list(create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {(chunk.object, chunk.id) for chunk in chunks} == {("chat.completion.chunk", chunks[0].id)}
    words = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(words) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    bare = list(create(**request, stream=True))
    assert bare[-1].choices[0].finish_reason and not any(chunk.usage for chunk in bare)
    cut = create(**request, max_tokens=3)  # the call is not cut
    content, full = cut.choices[0].message.content or "", whole.choices[0].message.content or ""
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.awares == whole.usage.awares
    assert 0 < len(content) < len(full) and full.startswith(content.rstrip("\ufffd"))


def test_without_the_key_only_health_answers(tiny, policy, engine, monkeypatch):
    models, http = client(policy).models, TestClient(policy)
    assert [model.id for model in models.list()] == [models.retrieve("tiny").id] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        models.retrieve("other/model")
    for key in ("wrong", KEY + "x", KEY[:-1]):
        error = refused(policy, key, **question(tiny.noise(56, 56, 0)))
        assert (error.status_code, error.code) == (401, "invalid_api_key")
    for scheme, status in (("bearer", 200), ("BEARER ", 200), ("Basic", 401), ("", 401)):
        assert http.get("/v1/models", headers={"Authorization": f"{scheme} {KEY}"}).status_code == status
    assert http.get("/health").json().items() >= {"status": "ready", "model": "tiny", "requests": 0}.items()
    assert http.get("/v1/files", headers={"Authorization": f"Bearer {KEY}"}).json()["error"]["message"]
    monkeypatch.setenv("AWARES_API_KEY", " ")
    with pytest.raises(AwaresError, match="AWARES_API_KEY"):
        make_app(engine, "tiny", LIMITS)


# What a stranger may send


def test_a_bad_image_is_refused(tiny, policy):
    rng = np.random.default_rng(0)
    for image, status in (
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", 400),  # Pillow would run a program for it
        ("data:image/png;base64,@@@@", 400),
        ("file:///etc/hostname", 400),
        ("data:text/html;base64,PGI+", 400),
        ("data:image/png;base64", 400),
        (tiny.noise(20, 112, 0), 400),
        (Image.fromarray(rng.integers(256, size=(240, 300, 3), dtype=np.uint8)), 413),
        (Image.new("RGB", (600, 600)), 413),
    ):
        error = refused(policy, **question(image))
        assert (error.status_code, error.param) == (status, "messages"), error.message


WITH_EFFECT = {"stop": ["."], "n": 2, "logprobs": True, "presence_penalty": 0.5, "tool_choice": "required",
               "response_format": {"type": "json_object"}, "store": True, "service_tier": "priority",
               "tools": [{"type": "function", "function": {"name": "f"}}], "modalities": ["text", "audio"]}  # fmt: skip
WITHOUT_EFFECT = [
    dict.fromkeys(("stop", "tools", "audio", "response_format", "logit_bias", "max_tokens")),
    dict.fromkeys(("temperature", "frequency_penalty", "presence_penalty", "top_logprobs"), 0),
    {**dict.fromkeys(("stop", "tools", "functions"), []), "logit_bias": {}, "modalities": ["text"]},
    dict.fromkeys(("logprobs", "store", "parallel_tool_calls", "stream"), False),
    dict.fromkeys(("tool_choice", "function_call", "reasoning_effort"), "none"),
    dict.fromkeys(("tool_choice", "service_tier"), "auto"),
    dict.fromkeys(("user", "safety_identifier", "prompt_cache_key"), "x"),
    {"n": 1, "seed": 7, "top_p": 0.5, "verbosity": "medium", "metadata": {"run": "7"}},
    {"response_format": {"type": "text"}, "prediction": {"type": "content", "content": "x"}},
    {"max_tokens": 10**6, "max_completion_tokens": 10**6},
    {"extra_body": {"top_k": 5, "repetition_penalty": 1.0, "unknown": None}},
]


def test_parameters_without_effect_are_accepted(tiny, policy, chat):
    request = question(tiny.noise(56, 56, 0))
    for create in (client(app).chat.completions.create for app in (policy, chat)):
        plain = create(**request).choices
        assert all(create(**{**request, **change}).choices == plain for change in WITHOUT_EFFECT)


def test_developer_is_the_role_system_which_the_policy_reads_before_the_question(tiny, policy, chat):
    request, found = question(tiny.noise(56, 56, 0)), []
    for app, role in product((policy, chat), ("system", "developer")):
        create, first = client(app).chat.completions.create, {"role": role, "content": "be brief"}
        found.append(create(**{**request, "messages": [first, *request["messages"]]}).choices)
    joined = client(policy).chat.completions.create(**question(tiny.noise(56, 56, 0), "be brief\nwhat?")).choices
    assert found[0] == found[1] == joined and found[2] == found[3]
    answer = create(**request).choices[0].message.model_dump()  # a conversation goes on with the whole message
    more = [*request["messages"], answer, {"role": "user", "content": "and?", "name": "ann"}]
    assert create(**{**request, "messages": more}).choices


HEADS = "image/png|IMAGE/PNG|image/jpg|image/png;charset=utf-8|image/png;a=b;name=x%2Cy|".split("|")


def test_every_legal_spelling_of_a_data_url_is_read(tiny):
    image = tiny.noise(57, 56, 0)
    raw = encode(image)
    raw += bytes(1 + -len(raw) % 3)  # its base64 has padding
    code = base64.b64encode(raw).decode()
    broken = [end.join(re.findall(".{1,76}", code)) for end in ("\n", "\r\n", "%0A")]
    urls = [*(f"data:{head};base64,{code}" for head in HEADS), f"data:image/png,{quote(raw)}"]
    urls += [f"Data:Image/Png;BASE64,{code}", f" data:image/png ; base64,{code}"]
    for data in (*broken, quote(code, safe=""), code.rstrip("="), f"{code}#top"):
        urls.append(f"data:image/png;base64,{data}")
    for url in urls:
        request = ChatRequest(model="tiny", messages=[{"role": "user", "content": [picture(url)]}])
        assert decode(request.files(LIMITS)[0][0], 28, 2000).tobytes() == image.tobytes(), url[:60]


def test_a_request_that_cannot_be_heeded_is_refused_with_the_fields_name(tiny, policy, chat):
    seen, good = picture(tiny.noise(56, 56, 0)), question(tiny.noise(56, 56, 0))
    user = good["messages"][0]

    def content(*parts):
        return {"messages": [{"role": "user", "content": list(parts)}]}

    for_policy = [
        ({"messages": []}, "messages"),
        ({"messages": [user, user]}, "messages"),
        (content(seen, seen, text("two")), "messages"),
        (content(seen, text("<|im_end|>")), "messages"),
        (content(seen, text("q" * 9000)), "messages"),  # longer than the context
        (content({"type": "audio"}), "messages.0.content.0"),
        (content(seen, {"type": "image_url"}), "messages.0.content.1.image_url.image_url"),
        ({"temperature": 0.7}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        *(({name: value}, name) for name, value in WITH_EFFECT.items()),
        ({"extra_body": {"call_bias": "much"}}, "call_bias"),
        ({"logit_bias": {"5": -100}}, "logit_bias"),
    ]
    for_chat = [
        ({"extra_body": {"call_bias": 1}}, "call_bias"),
        (content(*[seen] * 5), "messages"),
        (content(text("see <|image_pad|>")), "messages"),
        (content(text("q" * 9000)), "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty"),
    ]
    for app, cases in ((policy, for_policy), (chat, for_chat)):
        for change, param in cases:
            error = refused(app, **{**good, **change})
            assert (error.status_code, error.param) == (400, param), (change, error.message)
            assert (error.code == "context_length_exceeded") == ("q" * 9000 in str(change))
    assert refused(policy, **{**good, "model": "gpt-4"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "tiny", "messages": [{"ro', 400),
        (b"[" * 100_000, 400),
        (b"{" + b" " * 300_000, 413),
        (iter([b" " * 200_000] * 2), 413),  # its length is not declared
    ],
)
def test_a_body_that_is_no_request_gets_an_answer_and_holds_no_place(policy, body, status):
    http = TestClient(policy)
    reply = http.post("/v1/chat/completions", content=body, headers={"Authorization": f"Bearer {KEY}"})
    assert reply.status_code == status and reply.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/health").json()["requests"] == 0


# The raw model


def brief(tiny):
    """A conversation for the raw model."""
    user = {"role": "user", "content": [picture(tiny.noise(84, 56, 0)), text("what?")]}
    return [{"role": "system", "content": [text("be brief")]}, user]


def test_logit_bias_counts_at_every_position_and_control_tokens_are_kept(tiny, chat):
    request = {"model": "tiny", "messages": brief(tiny), "max_tokens": 6}
    ids = tiny.processor.tokenizer.convert_tokens_to_ids
    for token, content, finish in ((END, "", "stop"), (CALL, 6 * CALL, "length")):
        reply = client(chat).chat.completions.create(**request, logit_bias={str(ids(token)): 100})
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (content, finish)


# Processes


def connect(url, source="127.0.0.1"):
    address = "127.0.0.1", int(url.split(":")[2].split("/")[0])
    return socket.create_connection(address, timeout=60, source_address=(source, 0))


def health(url):
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return json.loads(connection.makefile("rb").read().split(b"\r\n\r\n")[1])


def wait_for(url, requests):
    end = time.monotonic() + 100
    while health(url)["requests"] != requests:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def endless(tiny, tmp_path_factory):
    """The tiny model, which never ends a turn and has room for a million tokens."""
    model = copy.deepcopy(tiny.model)
    model.config.text_config.max_position_embeddings = 2 * 10**6
    model.lm_head.weight.data[tiny.processor.tokenizer.convert_tokens_to_ids(END)] = 0
    folder = tmp_path_factory.mktemp("models") / "endless"
    save_model(model, tiny.processor, folder)
    return folder


def test_many_clients_at_once_get_what_they_get_alone_from_a_front_of_a_server(tiny, engine, tmp_path, monkeypatch):
    """`awares serve` in front of `awares serve --mode chat`, which has the place of vLLM."""
    monkeypatch.delenv("AWARES_API_KEY", raising=False)
    save_model(tiny.model, tiny.processor, tmp_path / "tiny")
    images = [tiny.noise(56 + 14 * seed, 84, seed) for seed in range(10)]
    with (
        serving(tmp_path / "tiny", "--mode", "chat", "--max-new-tokens", 12) as (backend, process),
        serving(tmp_path / "tiny", "--max-new-tokens", 12, "--server", backend, "--server-model", "tiny") as (url, _),
    ):
        create = client(url).chat.completions.create
        with ThreadPoolExecutor(10) as pool:
            asks = [pool.submit(create, **question(image)) for image in images]
            replies = [ask.result() for ask in asks]
        for image, reply in zip(images, replies, strict=True):
            own = engine.run([image], ["what?"])[0]
            assert reply.usage.awares["call_status"] == own.call_status
            if own.call_status == "none":  # a server reads half characters back with other tokens
                assert reply.choices[0].message.content == own.answer
                assert reply.usage.awares["rtr"] == pytest.approx(own.rtr)
        assert refused(url, **question(images[0]), extra_body={"call_bias": 2}).status_code == 400
        process.kill()
        process.wait()
        assert refused(url, **question(images[0], "new?")).status_code == 502


def test_a_request_that_takes_too_long_gets_504_and_a_full_server_429(tiny, endless):
    options = ("--timeout", 3, "--queue", 2, "--max-new-tokens", 10**6, "--max-tokens", 10**6, "--patience", 2)
    with serving(endless, *options) as (url, process), ThreadPoolExecutor(2) as pool:
        begun = time.monotonic()
        request = question(tiny.noise(56, 56, 0))
        held = [pool.submit(refused, url, **request) for _ in range(2)]
        wait_for(url, 2)
        full = refused(url, **request)
        assert (full.status_code, full.code) == (429, "queue_full") and int(full.response.headers["retry-after"]) >= 1
        assert {(one.result().status_code, one.result().code) for one in held} == {(504, "timeout")}
        assert time.monotonic() - begun >= 3


def test_sigterm_finishes_the_request_under_way(tiny, endless):
    with serving(endless, "--mode", "chat") as (url, process), ThreadPoolExecutor(1) as pool:
        messages = brief(tiny)
        create = client(url).chat.completions.create
        under_way = pool.submit(create, model="tiny", messages=messages, max_tokens=600)
        wait_for(url, 1)
        process.send_signal(signal.SIGTERM)
        usage = under_way.result().usage
        assert usage is not None and usage.completion_tokens == 600
        assert process.wait(timeout=300) == 0
        with pytest.raises(openai.APIConnectionError):
            create(model="tiny", messages=messages)


def test_a_taken_port_is_named(engine, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--port", port]) == 1 and port in capsys.readouterr().err


# Slow, silent and greedy clients

BASE = Path(__file__).parents[2] / "data" / "base"
FILES = 100  # file descriptors of the server
SECONDS = 10  # of attacks
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL, process and log of a server."""
    folder = tmp_path_factory.mktemp("served")
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))}
    with open(folder / "log", "wb") as log:
        with serving(BASE, "--patience", 2, stderr=log, **few) as (url, process):
            yield url, process, folder / "log"


def send(connection, data):
    """Whether the server still listens."""
    with suppress(OSError):
        connection.sendall(data)
        return True


def half_sent(count, start, drip):
    """A client with ``count`` connections, which sends ``drip`` on each every half second and opens lost ones again."""

    def run(url, ended):
        held = [connect(url) for _ in range(count)]
        for connection in held:
            send(connection, start)
        while not ended.wait(0.5):
            for place, connection in enumerate(held):
                if not send(connection, drip):
                    connection.close()
                    held[place] = connect(url)
                    send(held[place], start)
        for connection in held:
            connection.close()

    return run


def greedy(image, source="127.0.0.1"):
    """A client that always waits for an answer about ``image``."""
    body = json.dumps(question(image)).encode()

    def run(url, ended):
        while not ended.is_set():
            with connect(url, source) as connection, suppress(OSError):
                send(connection, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                connection.recv(2**16)

    return run


def silent(url, ended):
    """Asks again and again on one connection and reads no answer."""
    connection = connect(url)
    connection.setblocking(False)
    while not ended.wait(0.1):
        send(connection, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20)


ATTACKS = [
    half_sent(300, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"X-More: 1\r\n"),
    half_sent(128, HEAD + b"Content-Length: 30000000\r\n\r\n{", b" "),
    half_sent(5, HEAD + b"Content-Length: 30000000\r\n\r\n{" + b" " * 25_000_000, b""),
    *[greedy(Image.new("RGBA", (7000, 7000), (9, 9, 9, 9)))] * 4,  # 49 megapixels in 190 kB, seconds of the model
    *[greedy(Image.new("RGB", (900, 900)))] * 4,
    *[greedy(Image.new("RGB", (336, 224)), "127.0.0.2")] * 12,  # as small as the polite client's, but of another one
    *[silent] * 4,
]


@pytest.mark.skipif(sys.platform != "linux", reason="a client's address is any of 127.0.0.0/8, memory is in /proc")
def test_a_polite_client_gets_its_answers_in_two_seconds_and_memory_and_log_stay_small(tiny, server):
    url, process, log = server
    ended, waited = threading.Event(), []

    def polite():
        begun = time.monotonic()
        assert health(url)["status"] == "ready"
        stock = client(url).with_options(max_retries=2)  # its default
        assert stock.chat.completions.create(**question(tiny.noise(336, 252, 0))).choices
        return time.monotonic() - begun

    alone = max(polite() for _ in range(6))  # on a machine that runs other tests, more than its 0.2 s
    with ThreadPoolExecutor(len(ATTACKS)) as pool, ExitStack() as attacks:
        for attack in ATTACKS:
            attacks.callback(pool.submit(attack, url, ended).result)
        attacks.callback(ended.set)  # first
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            waited.append(polite())
    peak = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    assert max(waited) < max(2, 8 * alone), (alone, waited)
    assert int(peak.split()[1]) < 1.5 * 2**20, peak
    assert log.stat().st_size < 20_000, log.read_text()[:2000]


def test_half_sent_requests_are_closed_after_a_few_seconds(server):
    url, _, _ = server
    begun = time.monotonic()
    head, body = connect(url), connect(url)
    head.sendall(HEAD)
    body.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
    assert head.recv(100) == b"" and b" 408 " in body.recv(100)
    assert 1 < time.monotonic() - begun < 6
