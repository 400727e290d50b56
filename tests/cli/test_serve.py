"""The server, spoken to by the stock openai client: in this process, or as real processes for time and sockets."""

import base64
import copy
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from chat_server import ServerProcess, serving
from PIL import Image
from starlette.testclient import TestClient

from awares.cli import main as cli
from awares.cli.serve import make_app
from awares.engine.images import as_png
from awares.engine.model import save_model
from awares.errors import AwaresError
from awares.method.rollout import Engine

KEY = "sesame-5c1f"
END, CALL = "<|im_end|>", "<tool_call>"
LIMITS = cli.Serve(image_pixels=300_000, body_bytes=300_000, prompt_tokens=4000)


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(tiny.model, tiny.processor, max_new_tokens=12)


@pytest.fixture(scope="module")
def policy(engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWARES_API_KEY", KEY)
        return make_app(engine, "tiny", LIMITS)


def client(target, key=KEY):
    """The stock client for an application in this process, or for the address of a server."""
    http = None if isinstance(target, str) else TestClient(target, raise_server_exceptions=False)
    url = target if isinstance(target, str) else "http://testserver/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=300, http_client=http)


def picture(data):
    raw = as_png(data) if isinstance(data, Image.Image) else data
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


def test_a_bad_image_is_refused(tiny, policy):
    for image, status in (
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", 400),  # Pillow would run a program for it
        ("data:image/png;base64,@@@@", 400),
        ("file:///etc/hostname", 400),
        ("data:text/html;base64,PGI+", 400),
        ("data:image/png;base64", 400),
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


def test_parameters_without_effect_are_accepted_and_instructions_are_read_before_the_question(tiny, policy):
    request, create = question(tiny.noise(56, 56, 0)), client(policy).chat.completions.create
    plain = create(**request).choices
    assert all(create(**{**request, **change}).choices == plain for change in WITHOUT_EFFECT)
    roles = [{"role": role, "content": "be brief"} for role in ("system", "developer")]
    found = [create(**{**request, "messages": [first, *request["messages"]]}).choices for first in roles]
    assert found == 2 * [create(**question(tiny.noise(56, 56, 0), "be brief\nwhat?")).choices]


def test_a_request_that_cannot_be_heeded_is_refused_with_the_fields_name(tiny, policy):
    seen, good = picture(tiny.noise(56, 56, 0)), question(tiny.noise(56, 56, 0))
    user = good["messages"][0]

    def content(*parts):
        return {"messages": [{"role": "user", "content": list(parts)}]}

    cases = [
        ({"messages": []}, "messages"),
        ({"messages": [user, user]}, "messages"),
        ({"messages": [user, {"role": "assistant", "content": "a"}, user]}, "messages.1.role"),
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
    for change, param in cases:
        error = refused(policy, **{**good, **change})
        assert (error.status_code, error.param) == (400, param), (change, error.message)
        assert (error.code == "context_length_exceeded") == ("q" * 9000 in str(change))
    assert refused(policy, **{**good, "model": "gpt-4"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
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


def health(url):
    return httpx.get(url.removesuffix("v1") + "health").json()


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


def test_many_clients_of_a_front_get_what_they_get_alone(tiny, saved, engine, tmp_path, monkeypatch):
    """`awares serve` in front of a server that has the place of vLLM."""
    monkeypatch.delenv("AWARES_API_KEY", raising=False)
    monkeypatch.setenv("MODEL", str(saved))
    backend = ServerProcess(tmp_path / "log.jsonl", "engine")
    images = [tiny.noise(56 + 14 * seed, 84, seed) for seed in range(10)]
    with serving(saved, "--max-new-tokens", 12, "--server", backend.url) as (url, _):
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
        backend.close()
        assert refused(url, **question(images[0], "new?")).status_code == 502


def test_a_request_that_takes_too_long_gets_504_and_a_full_server_429(tiny, endless):
    options = ("--timeout", 3, "--queue", 2, "--max-new-tokens", 10**6, "--max-tokens", 10**6)
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
    with serving(endless, "--max-new-tokens", 600) as (url, process), ThreadPoolExecutor(1) as pool:
        create, request = client(url).chat.completions.create, question(tiny.noise(56, 56, 0))
        under_way = pool.submit(create, **request)
        wait_for(url, 1)
        process.send_signal(signal.SIGTERM)
        usage = under_way.result().usage
        assert usage is not None and usage.completion_tokens >= 600
        assert process.wait(timeout=300) == 0
        with pytest.raises(openai.APIConnectionError):
            create(**request)


def test_a_taken_port_is_named(engine, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--port", port]) == 1 and port in capsys.readouterr().err
