"""A chat server that fails as its requests ask for: run as a process by the tests of the client.

``python faulty_server.py LOG PORT``. The last user text of a request ends in ``|step,step,...``: what to do with its
first, second, ... arrival, the last step from then on; without it, ok. Arrivals are logged as JSON lines (time, text,
body), so that a restarted server goes on counting.
"""

import asyncio
import base64
import json
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response


def last_text(body: dict[str, Any]) -> str:
    content = [message["content"] for message in body["messages"] if message["role"] == "user"][-1]
    return content if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"][-1]


def completion(text: str | None) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


async def play(step: str, text: str, request: Request) -> Response:
    name, _, value = step.partition("=")
    whole = json.dumps(completion(f"reply to {text}")).encode()
    if name == "slow":
        await asyncio.sleep(float(value))
    if name == "say":
        return JSONResponse(completion(base64.b64decode(value).decode()))
    if name == "key":
        return JSONResponse(completion(request.headers.get("authorization")))
    if name == "null":
        return JSONResponse(completion(None))
    if name == "half":  # well-formed HTTP around half a document
        return Response(whole[: len(whole) // 2], media_type="application/json")
    if name == "torn":  # the connection closes before the promised length
        return Response(whole[:40], headers={"content-length": str(len(whole))}, media_type="application/json")
    if name == "garbage":
        return Response("<html>busy</html>", media_type="text/html")
    if name == "other":
        return JSONResponse({"error": {"message": "not today"}})
    if name.isdecimal():
        headers = {"retry-after": value} if value else None
        said = f"no, and your key was {request.headers.get('authorization')}"
        return JSONResponse({"error": {"message": said}}, int(name), headers)
    return Response(whole, media_type="application/json")


def make_app(log: Path) -> FastAPI:
    app = FastAPI()
    arrived = Counter(json.loads(line)["text"] for line in log.read_text().splitlines()) if log.is_file() else Counter()
    busy = {"now": 0, "peak": 0}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        text = last_text(body)
        arrived[text] += 1
        with log.open("a") as file:
            file.write(json.dumps({"time": time.time(), "text": text, "body": body}) + "\n")
        steps = text.partition("|")[2].split(",")
        busy["now"] += 1
        busy["peak"] = max(busy.values())
        try:
            return await play(steps[min(arrived[text], len(steps)) - 1], text, request)
        finally:
            busy["now"] -= 1

    @app.get("/peak")
    async def peak() -> int:
        return busy["peak"]

    return app


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", int(sys.argv[2])))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(make_app(Path(sys.argv[1])), log_level="critical")
    uvicorn.Server(config).run([listener])
