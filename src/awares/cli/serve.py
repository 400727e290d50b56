"""``awares serve``: the two-turn interaction behind OpenAI's chat completions.

A `rollout.Engine` gets one request at a time; behind a `RemoteEngine` the server (vLLM) does the batching. A stream
gets its answer in one piece: a turn may be a call until it ends. For strangers, put a reverse proxy before it.
"""

import asyncio
import base64
import copy
import hmac
import io
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from openai.types.chat import ChatCompletionContentPartImageParam as ImagePart
from openai.types.chat import ChatCompletionContentPartTextParam as TextPart
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import MaxTimeCriteria, StoppingCriteriaList

from awares.cli.main import Serve
from awares.clients.chat import ChatClient
from awares.engine.images import NOTE, SHOWN, cap, open_image
from awares.errors import AwaresError, AwaresLengthError, AwaresRequestError, AwaresValueError, faults_of

API_KEY = "AWARES_API_KEY"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow's other readers are not for bytes from strangers
# Fields of a request, accepted with any value, and those accepted with the values that change nothing
IGNORED = {"metadata", "name", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
           "safety_identifier", "seed", "top_k", "top_p", "user"}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("temperature", "frequency_penalty", "presence_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("tool_choice", "function_call", "reasoning_effort"), ("none", "auto")),
    **dict.fromkeys(("logprobs", "store"), (False,)),
    **dict.fromkeys(("stop", "tools", "functions"), ([],)),
    **{"n": (1,), "repetition_penalty": (1,), "logit_bias": ({},), "modalities": (["text"],)},
    **{"response_format": ({"type": "text"},), "service_tier": ("auto", "default"), "verbosity": ("medium",)},
}


class ApiError(HTTPException):
    """A refusal; the client gets it as OpenAI's error object."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message, {"Retry-After": "1"} if status == 429 else None)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Strict(BaseModel, extra="forbid", strict=True):
    """An unknown field is refused, not ignored; null means the default."""

    @model_validator(mode="before")
    @classmethod
    def _without_effect(cls, fields: Any) -> Any:
        if type(fields) is not dict:
            return fields
        kept = {key: value for key, value in fields.items() if key not in IGNORED}
        return {key: value for key, value in kept.items() if value not in (None, *NEUTRAL.get(key, ()))}


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
_as_parts = BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given)


class Message(Strict):
    role: Literal["system", "developer", "user"]
    content: Annotated[list[ContentPart], _as_parts]


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions; src/awares/README.md lists what is ignored, bounded or refused."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] = {}
    call_bias: float = Field(0.0, allow_inf_nan=False)


def make_app(engine: Any, model: str, limits: Serve) -> FastAPI:
    """The application, ``model`` to its clients. It limits ``engine``'s prompts. AwaresValueError for an empty key."""
    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise AwaresValueError(f"{API_KEY} is empty: set a key, or unset the variable to serve without one")
    engine.longest_prompt = min(engine.longest_prompt or limits.prompt_tokens, limits.prompt_tokens)
    threads = 1 if hasattr(engine, "decoder") else engine.client.server.concurrency
    pool, held = ThreadPoolExecutor(threads), set[Request]()

    async def check_key(request: Request, sent: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> None:
        free = request.url.path == "/health" or not key
        if not free and not (sent and hmac.compare_digest(sent.credentials.encode(), str(key).strip().encode())):
            raise ApiError(401, "wrong or missing API key: send Authorization: Bearer <key>", "invalid_api_key")

    handlers: Any = dict.fromkeys((HTTPException, AwaresError, ClientDisconnect, Exception), _refuse)
    options: Any = {"docs_url": None, "redoc_url": None, "openapi_url": None, "dependencies": [Depends(check_key)]}
    app = FastAPI(**options, exception_handlers=handlers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ready", "model": model, "requests": len(held)}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await retrieve(model)]}

    @app.get("/v1/models/{name:path}")
    async def retrieve(name: str) -> dict[str, Any]:
        if name != model:
            raise ApiError(404, f"no model {name[:SHOWN]!r}: this is {model!r}", "model_not_found", "model")
        return {"id": model, "object": "model", "created": 0, "owned_by": "awares"}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        deadline = time.time() + limits.timeout
        if len(held) >= limits.queue:
            raise ApiError(429, f"the server holds {limits.queue} requests: try again later", "queue_full")
        held.add(request)
        try:
            async with asyncio.timeout(limits.timeout):
                wanted = await _read(request, limits.body_bytes)
                await retrieve(wanted.model)
                reply = await asyncio.wrap_future(pool.submit(_answer, engine, wanted, limits, deadline))
        except TimeoutError:
            raise ApiError(504, f"no answer within {limits.timeout:g} s", "timeout") from None
        finally:
            held.remove(request)
        if not wanted.stream:
            return JSONResponse(reply)
        return StreamingResponse(_as_events(reply, wanted), media_type="text/event-stream")

    return app


async def _refuse(request: Request, error: Any) -> Response:
    """Every error as OpenAI's error object."""
    if isinstance(error, AwaresRequestError):
        error = ApiError(502, str(error), "upstream_error")
    elif isinstance(error, AwaresError):
        code = "context_length_exceeded" if isinstance(error, AwaresLengthError) else None
        error = ApiError(400, str(error).removeprefix("row 0: "), code, "messages")
    elif not isinstance(error, ApiError):
        error = ApiError(getattr(error, "status_code", 500), getattr(error, "detail", "the server failed"))
    return JSONResponse(error.body, error.status_code, error.headers)


async def _read(request: Request, most: int) -> ChatRequest:
    """The request; ApiError for more than ``most`` bytes, or for the first wrong field."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            raise ApiError(413, f"the request has more than {most} bytes", "request_too_large")
    try:
        return ChatRequest.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        key, message = ".".join(map(str, fault["loc"]))[:SHOWN], fault["msg"]
        if key in NEUTRAL:
            message = f"only {' or '.join(map(repr, NEUTRAL[key]))} is accepted here"
        raise ApiError(400, f"{key or 'body'}: {message}", param=key or None) from error


def _answer(engine: Any, request: ChatRequest, limits: Serve, deadline: float) -> dict[str, Any]:
    """Runs the interaction until ``deadline`` (seconds since the epoch) at most; a ``chat.completion``.

    ``max_tokens`` bounds only the answer: a call that is cut short cannot be read.
    """
    parts: list[Any] = [part for message in request.messages for part in message.content]
    texts, urls = ([part[kind] for part in parts if part["type"] == kind] for kind in ("text", "image_url"))
    *instructions, user = [message.role for message in request.messages]
    if {*instructions} - {"system", "developer"} or user != "user" or len(urls) != 1:
        raise ApiError(400, "send one user message with one image and a question", param="messages")
    with faults_of(f"image_url: not a readable {', '.join(FORMATS)} image in a base64 data URL"):
        sent = Image.open(io.BytesIO(base64.b64decode(urls[0]["url"].split(";base64,")[1])), formats=FORMATS)
    if sent.width * sent.height > limits.image_pixels:
        raise ApiError(413, f"image: at most {limits.image_pixels} px", param="messages")
    image = cap(open_image(sent, "image_url"), engine.max_side)
    longest = getattr(engine, "decoder", engine).max_new_tokens
    if hasattr(engine, "decoder"):
        engine.decoder.criteria = StoppingCriteriaList([MaxTimeCriteria(0.0, initial_timestamp=deadline)])
    else:  # with a client for this request's time limit
        left = {"timeout": max(1.0, deadline - time.time()), "attempts": 2}
        engine = copy.copy(engine)
        engine.client = ChatClient(engine.client.server.model_copy(update=left), None)
    done = engine.run([image], ["\n".join(texts)], call_bias=request.call_bias)[0]
    written = [turn.text_tokens for turn in done.turns if turn.role == "assistant"]
    prompt = sum(turn.visual_tokens + turn.text_tokens for turn in done.turns) - sum(written)
    tokens = engine.codec.tokenize(done.answer)[: written[-1]]
    limit = min(request.max_completion_tokens or request.max_tokens or longest, limits.max_tokens, longest)
    text = engine.codec.text(tokens[:limit]) if len(tokens) > limit else done.answer
    shown = ("visual_tokens", "full_visual_tokens", "rtr", "crops", "call_status")
    spent = {name: getattr(done, name) for name in shown} | ({"note": note} if (note := image.info.get(NOTE)) else {})
    spent["visual_tokens_saved"] = done.full_visual_tokens - done.visual_tokens
    usage = {"prompt_tokens": prompt, "completion_tokens": sum(written), "total_tokens": prompt + sum(written)}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}
    choice["finish_reason"] = "length" if len(tokens) > limit or len(tokens) >= longest else "stop"
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
    return {**head, "model": request.model, "choices": [choice], "usage": usage | {"awares": spent}}


def _as_events(reply: dict[str, Any], request: ChatRequest) -> Iterator[str]:
    """The completion as a stream: the answer, its finish reason, usage if requested, [DONE]."""
    [choice], usage = reply["choices"], reply.pop("usage")
    whole = {"index": 0, "delta": choice["message"], "finish_reason": None, "logprobs": None}
    last = {**whole, "delta": {}, "finish_reason": choice["finish_reason"]}
    chunks: list[Any] = [{"choices": [whole]}, {"choices": [last]}, {"choices": [], "usage": usage}]
    for chunk in chunks[: 3 if request.stream_options.get("include_usage") else 2]:
        yield f"data: {json.dumps({**reply, 'object': 'chat.completion.chunk', **chunk})}\n\n"
    yield "data: [DONE]\n\n"


def run_server(settings: Serve) -> None:
    """Serves the policy until SIGTERM or SIGINT; prints the URL. AwaresValueError for a bad address."""
    host, port = settings.host, settings.port
    family, shown = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
    name = settings.name or (Path(settings.model).resolve().name if settings.model else "awares")
    try:  # before the model is loaded: a taken port should not cost minutes
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise AwaresValueError(f"cannot listen at {host}:{port} ({error}): choose another host or port") from error
    with listener:
        app = make_app(settings.load()[0].engine, name, settings)
        if host not in ("127.0.0.1", "::1", "localhost") and API_KEY not in os.environ:
            print(f"warning: {host} is reachable from outside and {API_KEY} is not set", file=sys.stderr)
        for one in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends what is under way and raises the signal again
            signal.signal(one, lambda *_: None)
        print(f"{name} at http://{shown}:{listener.getsockname()[1]}/v1", flush=True)
        config = uvicorn.Config(app, log_level="error", access_log=False, limit_concurrency=settings.connections)
        uvicorn.Server(config).run([listener])
