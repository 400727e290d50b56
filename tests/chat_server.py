"""OpenAI-compatible servers for tests, each a process: ``python chat_server.py LOG MODE``, started by `ServerProcess`.

``faulty``: the last user text of a request ends in ``|step,step,...``: what to do with its first, second, ... arrival,
the last step from then on; without it, ok.

``judge``: judge and oracle for the prompts of data/served.yaml and the rows of `test_curation.make_rows`, whose
questions carry a number n: garbage for n % 20 == 3, and every third reply has words around its JSON. Of two answers to
a ``biased`` question it prefers the first. ``mute`` never answers the judge's requests about n = 10 and the oracle's
about n = 9.

``rigged``: a judge and an oracle without faults, for any rows: of two answers the later one in the alphabet is right.

``policy``: a model with vLLM's log-probabilities and continued messages, for the processor in the variable PROCESSOR.
A hash of the prompt decides its answers, its calls and the scores of the call.

``engine``: one greedy completion after the other by the model in the folder of the variable MODEL, or without it by the
tiny model, rigged as in test_rollout.

``node``: ``policy`` for a model in a folder, else ``rigged``.

`fake_vllm` makes an interpreter that starts ``python -m vllm...`` as one of these servers.
"""

import asyncio
import base64
import fcntl
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

HERE = Path(__file__).parent
PATH = os.pathsep.join(map(str, (HERE.parent / "src", HERE, HERE / "method")))
SILENCE = 3.0  # seconds: longer than the time-out of the tests
BOXES = [[10, 10, 200, 200], [700, 20, 900, 100], [50, 600, 300, 900], [0, 0, 1000, 1000], [400, 400, 600, 600]]
MODELS = ["meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct-FP8", "Qwen/Qwen2.5-VL-7B-Instruct"]


class ServerProcess:
    """The process of a server, and its log of arrivals: time, text, body, requests under way."""

    def __init__(self, log: Path, mode: str) -> None:
        options: Any = {"stdout": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONPATH": PATH}}
        self.log, self.process = log, subprocess.Popen([sys.executable, __file__, str(log), mode], **options)
        assert self.process.stdout
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def arrivals(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.is_file() else []

    def counts(self) -> Counter[str]:
        return Counter(arrival["text"] for arrival in self.arrivals())


@contextmanager
def serving(folder: Path, *options: Any, name: str = "tiny", **given: Any) -> Iterator[tuple[str, Any]]:
    """URL and process of ``awares serve`` with the model in ``folder``; ``given``: of the process."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = ["serve", "--model", str(folder), "--name", name, "--port", "0", *map(str, options)]
    command = [sys.executable, "-m", "awares", *line]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **given)
    assert process.stdout
    try:
        yield process.stdout.readline().split()[-1], process
    finally:
        process.kill()
        process.communicate()


def fake_vllm(folder: Path, mode: str, log: str = "server.jsonl") -> Path:
    """An "interpreter" with vLLM. Its servers log starts, with flags, and stops; they end at once if another one runs.

    In ``folder``, a file ``dies`` has the number of requests after which a server ends, with an error in its output.
    """
    script = folder / "python"
    run = f"PYTHONPATH={PATH} exec {sys.executable} {__file__} {folder / log} {mode}"
    script.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{run} "$@"\n')
    script.chmod(0o755)
    return script


def completion(text: str | None) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message}}, status, headers)


async def faulty(text: str, body: dict[str, Any], arrival: int, key: str | None) -> Response:
    steps = text.partition("|")[2].split(",")
    name, _, value = steps[min(arrival, len(steps)) - 1].partition("=")
    whole = json.dumps(completion(f"reply to {text}")).encode()
    if name.isdecimal():
        return refusal(int(name), f"no, and your key was {key}", {"retry-after": value} if value else None)
    if name == "torn":  # the connection closes before the promised length
        return Response(whole[:40], headers={"content-length": str(len(whole))}, media_type="application/json")
    if name == "slow":
        await asyncio.sleep(float(value))
    if name in ("say", "key", "null"):
        said = {"say": base64.b64decode(value).decode() if name == "say" else "", "key": key, "null": None}
        return JSONResponse(completion(said[name]))
    half = whole[: len(whole) // 2]  # in whole HTTP
    bodies = {"half": half, "garbage": b"<html>busy</html>", "other": b'{"error": {"message": "not today"}}'}
    return Response(bodies.get(name, whole), media_type="application/json")


async def judge(text: str, body: dict[str, Any], arrival: int, key: str | None) -> Response:
    number, compares = int(re.findall(r"\d+", text)[0]), "First answer" in text
    if number % 20 == 3:
        return JSONResponse(completion("the second one, I think"))
    wanted = body.get("response_format", {}).get("json_schema")  # none: a number alone, curation.judge_order once
    if not (wanted or compares) or (wanted and not wanted["strict"]):
        return refusal(400, "a reply must be constrained")
    if sys.argv[2] == "mute" and number == (10 if compares else 9):
        await asyncio.sleep(SILENCE)
    lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    said: dict[str, Any]
    if compares:
        accepted = lines["Accepted answers"].lower().split(" | ")
        first, second = (int(lines[f"{place} answer"].lower() in accepted) for place in ("First", "Second"))
        said = {"first": first, "second": second, "better": 0 if first == second else 1 if first else 2}
        if "biased" in lines["Question"]:
            said = {"first": 1, "second": 1, "better": 1}
    else:
        answer = [300, 50, 400, 100] if number % 2 else [800, 850, 900, 900]
        said = {"question_boxes": [[50, 50, 150, 100]], "answer_boxes": [answer]}
    shown = json.dumps(said if wanted else said["better"])
    return JSONResponse(completion(f"```json\n{shown}\n```" if number % 3 == 0 else shown))


async def rigged(text: str, body: dict[str, Any], arrival: int, key: str | None) -> Response:
    lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    if "First answer" in lines or "Second answer" in lines:  # an empty answer has no line
        first, second = lines.get("First answer", ""), lines.get("Second answer", "")
        better = 0 if first == second else 1 if first > second else 2
        said: dict[str, Any] = {"first": int(first >= second), "second": int(second >= first), "better": better}
    else:
        place = BOXES[sum(lines.get("Question", "").encode()) % len(BOXES)]
        said = {"question_boxes": [place], "answer_boxes": [place]}
    return JSONResponse(completion(json.dumps(said if "response_format" in body else said["better"])))


async def policy(text: str, body: dict[str, Any], arrival: int, key: str | None) -> Response:
    codec, crops = written_by(os.environ["PROCESSOR"])
    begun, sizes = body.get("continue_final_message", False), [image.size for image in taken_out(body["messages"])]
    shown = codec.processor.apply_chat_template(body["messages"][: -1 if begun else None], add_generation_prompt=True)
    ids = codec.tokenize(shown, sizes) + [codec.call_token] * begun
    draw = int.from_bytes(hashlib.sha256(repr((ids, sizes)).encode()).digest()[:4], "big")
    gap, call, named = draw % 600 / 100 - 3, codec.call_token, "logprob_token_ids" in body
    calls = begun or (body.get("logprobs") and gap > 0)
    said = f'<tool_call>\n{{"name": "crop", "arguments": {{"regions": ["{crops[draw % 10]}"]}}}}\n</tool_call>'
    reply = completion(said.removeprefix("<tool_call>" * begun) if calls else str(draw % 7))
    if body.get("logprobs"):  # a third of the calls is not among the best tokens
        values = {5: -1.0} | ({call: gap - 1.0} if named or gap > -1 else {})
        top = [{"token": f"token_id:{token}", "logprob": value} for token, value in values.items()]
        reply["choices"][0]["logprobs"] = {"content": [{"token": "token_id:5", "logprob": -1.0, "top_logprobs": top}]}
    return JSONResponse(reply | {"prompt_token_ids": ids})


def taken_out(messages: list[dict[str, Any]]) -> list[Image.Image]:
    """The images of a chat, which placeholders replace."""
    found = list[Image.Image]()
    for part in [part for one in messages if isinstance(one["content"], list) for part in one["content"]]:
        if part["type"] == "image_url":
            found.append(Image.open(io.BytesIO(base64.b64decode(part.pop("image_url")["url"].partition(",")[2]))))
            part["type"] = "image"
    return found


@cache
def written_by(folder: str) -> tuple[Any, list[str]]:
    from awares.engine.decode import Codec
    from awares.engine.model import load_processor
    from awares.method.crops import CROPS

    return Codec(load_processor(folder)), list(CROPS)


def make_app(log: Path, mode: str) -> FastAPI:
    app, arrived, under_way, dies = FastAPI(), Counter[str](), set[object](), log.with_name("dies")
    respond = {"faulty": faulty, "rigged": rigged, "policy": policy}.get(mode, judge)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        content = [message["content"] for message in body["messages"] if message["role"] == "user"][-1]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = [part["text"] for part in parts if part["type"] == "text"][-1]
        arrived[text] += 1
        under_way.add(request)
        record = {"time": time.time(), "text": text, "body": body, "under way": len(under_way)}
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if dies.is_file() and sum(arrived.values()) > int(dies.read_text()):
            dies.unlink()
            print("torch.OutOfMemoryError: CUDA out of memory.\nshutting down", flush=True)
            os._exit(9)
        try:
            return await respond(text, body, arrived[text], request.headers.get("authorization"))
        finally:
            under_way.remove(request)

    app.add_api_route("/health", lambda: {})

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if request.headers.get("authorization") == "Bearer wrong":
            return refusal(401, "no")
        names = [*MODELS, *["deepseek-ai/DeepSeek-V3.2"] * (mode == "rigged")]
        cards = [{"id": one, "object": "model", "created": 0, "owned_by": "t"} for one in names]
        return JSONResponse({"object": "list", "data": cards})

    return app


def make_engine_app() -> FastAPI:
    import torch
    from conftest import tiny_model, tiny_tokenizer
    from test_rollout import Rigged
    from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor

    from awares.engine import decode
    from awares.engine.model import load_model, load_processor, make_processor

    torch.set_num_threads(1)
    if folder := os.environ.get("MODEL"):
        model, processor = load_model(folder), load_processor(folder)
    else:
        processor = make_processor(tiny_tokenizer(), max_pixels=2000 * 2000)
        model, Rigged.tokenizer = tiny_model(processor), processor.tokenizer
        decode.FirstToken = Rigged  # type: ignore[misc]
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:  # the next one waits: a model holds state of its row
        body = await request.json()
        images, decoder = taken_out(body["messages"]), decode.Decoder(model, processor, body["max_tokens"])
        rendered = processor.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = decoder.tokenize(rendered, [image.size for image in images])
        if len(ids) + body["max_tokens"] > model.config.get_text_config().max_position_embeddings:
            return refusal(400, "longer than the context")
        barred = [decoder.tokenizer(word, add_special_tokens=False)["input_ids"] for word in body["bad_words"]]
        decoder.processors = LogitsProcessorList([NoBadWordsLogitsProcessor(barred)])
        tokens = decoder.start([ids], [images]).tokens[0]
        ended, usage = tokens[-1] == decoder.end, {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        reply = completion(decoder.text(tokens[:-1] if ended else tokens)) | {"usage": usage, "prompt_token_ids": ids}
        reply["choices"][0]["finish_reason"] = "stop" if ended else "length"
        return reply

    return app


if __name__ == "__main__":
    flags = dict(zip(sys.argv[5::2], sys.argv[6::2], strict=False))  # of vLLM's command line, after -m and its module
    file = Path(sys.argv[1])
    if flags:
        alone = file.with_name("alone").open("w")
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)

        def note(text: str) -> None:
            with file.open("a") as log_file:
                known = {"text": text, "time": time.time(), "flags": sys.argv[5:], "pid": os.getpid()}
                log_file.write(json.dumps(known) + "\n")

        note("started")
        signal.signal(signal.SIGTERM, lambda *_: note("stopped"))  # uvicorn raises it again when it has ended
    mode = sys.argv[2]
    if mode == "node":
        mode = "policy" if Path(sys.argv[sys.argv.index("--model") + 1]).is_dir() else "rigged"
    served = make_engine_app() if mode == "engine" else make_app(file, mode)
    listener = socket.create_server(("127.0.0.1", int(flags.get("--port", 0))))
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(served, log_level="critical")).run([listener])
