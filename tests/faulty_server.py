"""A chat server that fails as its requests ask for, and `ServerProcess`, which runs this and the other test servers.

``python faulty_server.py LOG PORT``. The last user text of a request ends in ``|step,step,...``: what to do with its
first, second, ... arrival, the last step from then on; without it, ok. Arrivals are logged as JSON lines (time, text,
body), so that a restarted server continues to count.
"""

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

HERE = Path(__file__).parent


class ServerProcess:
    """The process of the server ``script`` of this folder, and its log of arrivals."""

    def __init__(self, script: str, log: Path, *arguments: str) -> None:
        self.script, self.log, self.arguments, self.port = script, log, arguments, 0
        self.start()

    def start(self) -> None:
        """Start; after `stop`, at the same port again."""
        command = [sys.executable, str(HERE / self.script), str(self.log), str(self.port), *self.arguments]
        path = os.pathsep.join(map(str, (HERE.parent / "src", HERE, HERE / "method")))
        environment = {**os.environ, "PYTHONPATH": path}
        environment.pop("AWARES_API_KEY", None)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def arrivals(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.is_file() else []

    def counts(self, key: str = "text") -> Counter[str]:
        return Counter(arrival[key] for arrival in self.arrivals())


def serve(app: FastAPI) -> None:
    """Run ``app`` at the port of the command line and print the port."""
    listener = socket.create_server(("127.0.0.1", int(sys.argv[2])))
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run([listener])


def last_text(body: dict[str, Any]) -> str:
    content = [message["content"] for message in body["messages"] if message["role"] == "user"][-1]
    return content if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"][-1]


def completion(text: str | None) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def response(step: str, text: str, key: str | None) -> Response:
    name, _, value = step.partition("=")
    whole = json.dumps(completion(f"reply to {text}")).encode()
    if name.isdecimal():
        headers = {"retry-after": value} if value else None
        return JSONResponse({"error": {"message": f"no, and your key was {key}"}}, int(name), headers)
    if name == "torn":  # the connection closes before the promised length
        return Response(whole[:40], headers={"content-length": str(len(whole))}, media_type="application/json")
    bodies = {
        "say": lambda: json.dumps(completion(base64.b64decode(value).decode())),
        "key": lambda: json.dumps(completion(key)),
        "null": lambda: json.dumps(completion(None)),
        "half": lambda: whole[: len(whole) // 2],  # well-formed HTTP around half a document
        "garbage": lambda: "<html>busy</html>",
        "other": lambda: '{"error": {"message": "not today"}}',
    }
    return Response(bodies.get(name, lambda: whole)(), media_type="application/json")


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
        step = steps[min(arrived[text], len(steps)) - 1]
        busy["now"] += 1
        busy["peak"] = max(busy.values())
        try:
            await asyncio.sleep(float(step.removeprefix("slow=")) if step.startswith("slow=") else 0)
        finally:
            busy["now"] -= 1
        return response(step, text, request.headers.get("authorization"))

    @app.get("/peak")
    async def peak() -> int:
        return busy["peak"]

    return app


if __name__ == "__main__":
    serve(make_app(Path(sys.argv[1])))
