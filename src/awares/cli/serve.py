"""An OpenAI-compatible server around the engine: POST /v1/chat/completions, GET /v1/models, GET /health.

``policy`` mode answers one image and one question by the two-turn interaction and counts the visual tokens in
``usage.awares``; ``chat`` mode serves the raw model as any other server would. `batching` holds the queue, `wire` the
format. The key, if there is to be one, comes from the environment variable AWARES_API_KEY.
"""

import asyncio
import hmac
import ipaddress
import math
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from awares.cli.batching import MODES, Batcher, Event, Job
from awares.cli.wire import ApiError, Completion, Reply, ServeSettings, event
from awares.errors import AwaresValueError
from awares.method.rollout import Engine
from awares.policy import Adapters, AwaRes

API_KEY = "AWARES_API_KEY"
PREPARING = 2  # requests whose images are decoded at a time: an image unpacks to many times its bytes


class Service:
    """What the routes share: the queue, the limits, and how many requests are under way."""

    def __init__(self, engine: Engine, settings: ServeSettings, mode: str) -> None:
        if mode not in MODES:
            raise AwaresValueError(f"mode {mode!r}: use one of {', '.join(MODES)}")
        self.settings = settings
        self.mode = MODES[mode](engine, settings)
        self.batcher = Batcher(self.mode, settings)
        self.preparing = asyncio.Semaphore(PREPARING)
        self.key = api_key()
        self.live = 0
        self.listeners: set[Listener] = set()
        self.served = 0
        self.closing = False

    def check_key(self, header: bytes) -> None:
        """ApiError (401) unless ``header`` is ``Bearer <key>``; compared in constant time."""
        if self.key is not None and not hmac.compare_digest(header, b"Bearer " + self.key):
            raise ApiError(401, "wrong or missing API key: send Authorization: Bearer <key>", "invalid_api_key")

    def admit(self) -> None:
        """ApiError when a further request cannot be taken on: 503 at shutdown, 429 when the queue is full."""
        if self.closing:
            raise ApiError(503, "the server is shutting down", "shutting_down")
        if self.live >= self.settings.queue:
            raise ApiError(429, f"{self.live} requests are waiting: try again later", "queue_full")

    def retry_after(self) -> str:
        """Seconds until the queue, at its present pace, is through."""
        return str(min(60, max(1, math.ceil(self.live * self.batcher.seconds_per_job))))

    def give_up(self) -> None:
        """End the requests that a shutdown has no more time for."""
        for listener in self.listeners:
            listener.job.tell(ApiError(503, "the server stopped before the answer was written", "shutting_down"))

    async def job(self, request: Request) -> Job:
        """Read, check and prepare a request; the job is not in the queue yet."""
        body = await read_body(request, self.settings.body_bytes)
        async with self.preparing:
            return Job(**await run_in_threadpool(self.mode.prepare, body))


def api_key() -> bytes | None:
    """The key that clients must show; AwaresValueError when the variable is set to nothing."""
    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise AwaresValueError(f"{API_KEY} is empty: set a key, or unset the variable to serve without one")
    return key.strip().encode() if key is not None else None


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; ApiError (413) as soon as it is known to be longer than ``limit`` bytes."""
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if int(declared) <= limit:  # a header that is no number does not get through the HTTP parser
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                break
        else:
            return bytes(body)
    raise ApiError(413, f"the request has more than {limit} bytes", "request_too_large")


class Gate:
    """Key, shutdown and queue length are checked before a body is read; counts a request until its last byte is sent."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        try:
            self.service.check_key(dict(scope["headers"]).get(b"authorization", b""))
            self.service.admit()
        except ApiError as error:
            return await refuse(error, self.service)(scope, receive, send)
        state = scope.setdefault("state", {})
        self.service.live += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.service.live -= 1
            if "listener" in state:
                state["listener"].close()


def refuse(error: ApiError, service: Service) -> JSONResponse:
    """The error as OpenAI's clients read it."""
    headers = {"Retry-After": service.retry_after()} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


def make_app(policy_or_engine: AwaRes | Engine, settings: ServeSettings | None = None, mode: str = "policy") -> FastAPI:
    """The application: an ASGI app whose lifespan starts and ends the worker that owns the model.

    ``mode``: policy or chat. AwaresValueError for an unknown mode or an empty AWARES_API_KEY.
    """
    engine = policy_or_engine.engine if isinstance(policy_or_engine, AwaRes) else policy_or_engine
    service = Service(engine, settings or ServeSettings(), mode)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await run_in_threadpool(service.batcher.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Gate, service=service)
    add_routes(app, service)
    add_errors(app, service)
    return app


def add_routes(app: FastAPI, service: Service) -> None:
    """Health, models and completions."""

    @app.get("/health")
    async def health() -> JSONResponse:
        batcher = service.batcher
        ready = batcher.thread.is_alive() and not service.closing
        values = {
            "status": "ready" if ready else "closing",
            "model": service.settings.model,
            "requests": service.live,  # admitted and not answered yet: being read, waiting or running
            "waiting": len(batcher.waiting),
            "running": batcher.running,
            "served": service.served,
            "batches": batcher.batches,
        }
        return JSONResponse(values, 200 if ready else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": service.settings.model, "object": "model", "created": 0, "owned_by": "awares"}
        return {"object": "list", "data": [card]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, service)


def add_errors(app: FastAPI, service: Service) -> None:
    """Every failure leaves as OpenAI's error object."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return refuse(error, service)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return refuse(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"), service)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # goes nowhere: the client hung up in the middle of its body

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refuse(ApiError(500, "the server failed on this request", "internal_error"), service)


# One request


async def answer(request: Request, service: Service) -> Response:
    """The completion, or its stream; errors that are known before the first word keep their status code."""
    deadline = asyncio.get_running_loop().time() + service.settings.timeout
    try:
        async with asyncio.timeout_at(deadline):
            job = await service.job(request)
    except TimeoutError:
        raise late(service) from None
    listener = request.state.listener = Listener(job, request, deadline, service)
    service.batcher.put(job)
    first = await listener.next()
    reply = Reply(service.settings.model)
    if isinstance(first, str) or job.stream:  # the former only with the latter
        headers = {"Cache-Control": "no-cache"}
        return StreamingResponse(stream(first, listener, reply, job.include_usage), 200, headers, "text/event-stream")
    return JSONResponse(reply.completion(first))


class Listener:
    """Waits for a job's events, for as long as the client is there and the time is not up."""

    def __init__(self, job: Job, request: Request, deadline: float, service: Service) -> None:
        self.job, self.deadline, self.service = job, deadline, service
        self.hung_up = asyncio.create_task(hang_up(request))
        service.listeners.add(self)

    def close(self) -> None:
        """The job gives up its place in the queue, and its row in a batch."""
        self.service.listeners.discard(self)
        self.job.gone = True
        self.hung_up.cancel()

    async def next(self) -> str | Completion:
        """The next event; ApiError for a failure or when the time is up, ClientDisconnect when nobody is there."""
        coming: asyncio.Task[Event] = asyncio.create_task(self.job.events.get())
        left = self.deadline - asyncio.get_running_loop().time()
        await asyncio.wait({coming, self.hung_up}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            coming.cancel()
            raise ClientDisconnect if self.hung_up.done() else late(self.service)
        found = coming.result()
        if isinstance(found, ApiError):
            raise found
        self.service.served += isinstance(found, Completion)
        return found


async def hang_up(request: Request) -> None:
    """Returns when the client has closed the connection. The body has been read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def late(service: Service) -> ApiError:
    return ApiError(504, f"no answer within {service.settings.timeout:g} s", "timeout")


async def stream(first: str | Completion, listener: Listener, reply: Reply, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: role, pieces of text as they are written, finish reason, usage if asked for, [DONE]."""
    yield reply.chunk({"role": "assistant", "content": ""})
    found, told = first, ""
    try:
        while isinstance(found, str):
            yield reply.chunk({"content": found})
            told += found
            found = await listener.next()
    except ApiError as error:  # the status line has been sent: the error goes the way of the text
        yield event(error.body())
        return
    except ClientDisconnect:
        return
    if len(found.text) > len(told):
        yield reply.chunk({"content": found.text[len(told) :]})
    yield reply.chunk({}, found.finish_reason)
    if include_usage:
        yield reply.usage(found)
    yield "data: [DONE]\n\n"


# The process


class Server(uvicorn.Server):
    """Says when it is ready; at SIGTERM or SIGINT refuses new requests, finishes those under way, then exits."""

    def __init__(self, config: uvicorn.Config, service: Service, url: str) -> None:
        super().__init__(config)
        self.service, self.url = service, url
        self.loop: asyncio.AbstractEventLoop | None = None
        self.draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        print(f"{self.service.settings.model} at {self.url}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one waits for nothing."""
        if self.service.closing or self.loop is None:
            return super().handle_exit(sig, frame)
        self.service.closing = True
        self.loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self.draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self.service.settings.shutdown
        while self.service.live and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self.service.give_up()
        self.should_exit = True


def serve(
    path: str | Path,
    adapter: Adapters | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    mode: str = "policy",
    settings: ServeSettings | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    **options: Any,
) -> None:
    """Load the model of ``path`` and serve it until SIGTERM or SIGINT. Blocks; prints one line with the URL when ready.

    ``path``, ``adapter``, ``dtype``, ``device`` and ``options`` as in `AwaRes.from_pretrained`. ``port`` 0 takes a
    free one. ``settings.model`` is the name that clients give; without ``settings`` it is the folder's.
    AwaresError for a checkpoint that cannot be loaded, an address that cannot be bound, or a limit out of range.
    """
    settings = settings or replace(ServeSettings(), model=Path(path).resolve().name)
    sock = bind(host, port)  # before the model is loaded: a taken port should not cost minutes
    with sock:
        app = make_app(AwaRes.from_pretrained(path, adapter, dtype, device, **options), settings, mode)
        service: Service = app.state.service
        if not is_loopback(host) and service.key is None:
            print(f"warning: {host} is reachable from outside and {API_KEY} is not set", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(
            app, http="h11", ws="none", log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
        Server(config, service, f"http://{shown}:{sock.getsockname()[1]}/v1").run([sock])


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; AwaresValueError when the address is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise AwaresValueError(f"cannot listen at {host}:{port} ({error}): choose another host or port") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
