"""A judge and an oracle as a chat server: a process for the tests of `clients.judges`.

``python judging_server.py LOG PORT [rigged | mute]``. It answers the prompts of data/served.yaml about the rows of
`test_curation.make_rows`, whose questions carry a number n, and fails by it: garbage for n % 20 == 3, silence at first
for n % 20 == 7, status 429 at first for n % 5 == 1. Every third reply has words around its JSON. Of two
answers to a ``biased`` question it prefers the first.
``mute``: also, it never answers the judge's requests about n = 10 and the oracle's about n = 9.
``rigged``: it does not fail and judges any rows: of two answers the later one in the alphabet is right.
"""

import asyncio
import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from faulty_server import completion, last_text, serve

SILENCE = 3.0  # seconds: longer than the tests' time-out
BOXES = [[10, 10, 200, 200], [700, 20, 900, 100], [50, 600, 300, 900], [0, 0, 1000, 1000], [400, 400, 600, 600]]
RIGGED, MUTE = (sys.argv[3:] == [mode] for mode in ("rigged", "mute"))
MODELS = ["meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"]


def reply(said: dict[str, str]) -> dict[str, Any]:
    """The reply of a perfect judge or oracle to the lines of the user's text."""
    number = int(re.findall(r"\d+", said["Question"])[0])
    accepted = {answer.lower() for answer in said.get("Accepted answers", "").split(" | ")}
    right = {key: int(value.lower() in accepted) for key, value in said.items()}
    if "First answer" in said:
        first, second = right["First answer"], right["Second answer"]
        if "biased" in said["Question"]:
            return {"first": 1, "second": 1, "better": 1}
        return {"first": first, "second": second, "better": 0 if first == second else 1 if first else 2}
    answer = [300, 50, 400, 100] if number % 2 else [800, 850, 900, 900]
    return {"question_boxes": [[50, 50, 150, 100]], "answer_boxes": [answer]}


def rigged(said: dict[str, str]) -> dict[str, Any]:
    if "First answer" in said or "Second answer" in said:
        first, second = said.get("First answer", ""), said.get("Second answer", "")
        better = 0 if first == second else 1 if first > second else 2
        return {"first": int(first >= second), "second": int(second >= first), "better": better}
    place = BOXES[sum(said.get("Question", "").encode()) % len(BOXES)]
    return {"question_boxes": [place], "answer_boxes": [place]}


def constrained(body: dict[str, Any]) -> bool:
    """Whether a judge's request binds the reply to a verdict of 0, 1 or 2."""
    wanted = body["response_format"]["json_schema"]
    better = wanted["schema"]["properties"]["better"]
    return wanted["strict"] and better["type"] == "integer" and better["enum"] == [0, 1, 2]


def make_app(log: Path) -> FastAPI:
    app = FastAPI()
    arrived: Counter[str] = Counter()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        text, name = last_text(body), hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        arrived[name] += 1
        with log.open("a") as file:
            file.write(json.dumps({"body": name, "row": text.splitlines()[0]}) + "\n")
        number = 0 if RIGGED else int(re.findall(r"\d+", text)[0])
        if number % 20 == 3:
            return JSONResponse({**completion("the second one, I think"), "id": name})
        if "First answer" in text and not constrained(body):
            return JSONResponse({"error": {"message": "a verdict must be constrained to 0, 1 and 2"}}, 400)
        mute = MUTE and number == (10 if "First answer" in text else 9)
        if mute or (arrived[name] == 1 and number % 20 == 7):
            await asyncio.sleep(SILENCE)
        if arrived[name] == 1 and number % 5 == 1:
            return JSONResponse({"error": {"message": "busy"}}, 429, {"retry-after-ms": "20"})
        lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        said = json.dumps(rigged(lines) if RIGGED else reply(lines))
        return JSONResponse({**completion(f"```json\n{said}\n```" if number % 3 == 0 else said), "id": name})

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if request.headers.get("authorization") == "Bearer wrong":
            return JSONResponse({"error": {"message": "no"}}, 401)
        names = [*MODELS, *["deepseek-ai/DeepSeek-V3.2"] * RIGGED]
        cards = [{"id": one, "object": "model", "created": 0, "owned_by": "t"} for one in names]
        return JSONResponse({"object": "list", "data": cards})

    return app


if __name__ == "__main__":
    serve(make_app(Path(sys.argv[1])))
