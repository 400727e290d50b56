"""``awares serve``: the two-turn interaction, or in mode chat the bare model, behind an OpenAI-compatible API.

POST /v1/chat/completions, GET /v1/models, GET /health. The engine is a `rollout.Engine`, which gets one request at a
time, or a `RemoteEngine`, whose server (vLLM) does the batching. A stream gets its answer in one piece: a turn may be
a call until it ends. Clients send the key in the environment variable AWARES_API_KEY, if it is set.
"""

import asyncio
import copy
import hmac
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import LogitsProcessorList, MaxTimeCriteria, SequenceBiasLogitsProcessor, StoppingCriteriaList

from awares.cli import openai_api
from awares.cli.openai_api import ApiError, PolicyRequest, RawRequest, completion
from awares.cli.options import Limits
from awares.clients.chat import ChatClient
from awares.engine.decode import Decoder
from awares.engine.images import cap
from awares.errors import AwaresError, AwaresRequestError, AwaresValueError

API_KEY = "AWARES_API_KEY"


def make_app(engine: Any, model: str, limits: Limits, mode: str = "policy") -> FastAPI:
    """The application; ``model`` is the name that clients give. AwaresValueError for an empty AWARES_API_KEY."""
    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise AwaresValueError(f"{API_KEY} is empty: set a key, or unset the variable to serve without one")
    kind, answer = (RawRequest, answer_chat) if mode == "chat" else (PolicyRequest, answer_policy)
    threads = 1 if hasattr(engine, "decoder") else engine.client.server.concurrency
    pool, free = ThreadPoolExecutor(threads), asyncio.Semaphore(threads)
    count = {"requests": 0}
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if key is not None and not hmac.compare_digest(given, b"Bearer " + key.strip().encode()):
            raise ApiError(401, "wrong or missing API key: send Authorization: Bearer <key>", "invalid_api_key")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ready", "model": model, **count}

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "awares"}]}

    @app.post("/v1/chat/completions", dependencies=[Depends(check_key)])
    async def complete(request: Request) -> Response:
        if count["requests"] >= limits.queue:
            raise ApiError(429, f"{count['requests']} requests are waiting: try again later", "queue_full")
        count["requests"] += 1
        deadline = time.time() + limits.timeout
        try:
            async with asyncio.timeout(limits.timeout):
                wanted = openai_api.read_request(await _body(request, limits.body_bytes), kind, model)
                async with free:
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    run = asyncio.get_running_loop().run_in_executor
                    reply = await run(pool, answer, engine, wanted, limits, deadline)
        except TimeoutError:
            raise ApiError(504, f"no answer within {limits.timeout:g} s", "timeout") from None
        finally:
            count["requests"] -= 1
        if not wanted.stream:
            return JSONResponse(reply)
        events = openai_api.as_events(reply, (wanted.stream_options or {}).get("include_usage", False))
        return StreamingResponse(events, media_type="text/event-stream")

    for kind_of_error in (HTTPException, AwaresError, ClientDisconnect, Exception):
        app.add_exception_handler(kind_of_error, _refuse)
    return app


async def _body(request: Request, most: int) -> bytearray:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise ApiError(413, f"the request has more than {most} bytes", "request_too_large")
    return body


async def _refuse(request: Request, error: Any) -> Response:
    """Every error as OpenAI's error object."""
    if isinstance(error, AwaresRequestError):
        error = ApiError(502, str(error), "upstream_error")
    elif isinstance(error, AwaresError):
        error = ApiError(400, str(error).removeprefix("row 0: "), param="messages")
    elif not isinstance(error, ApiError):
        error = ApiError(getattr(error, "status_code", 500), getattr(error, "detail", "the server failed"))
    return JSONResponse(error.body, error.status_code, error.headers)


def answer_policy(engine: Any, request: PolicyRequest, limits: Limits, deadline: float) -> dict[str, Any]:
    """Runs the interaction. ``max_tokens`` bounds the answer alone: a call that is cut short would be no call."""
    message, images = request.messages[0], request.images(limits)
    if len(request.messages) != 1 or message.role != "user" or len(images) != 1:
        raise ApiError(400, "send one user message with one image and a question", param="messages")
    local, image = hasattr(engine, "decoder"), cap(images[0], engine.max_side)
    longest = engine.decoder.max_new_tokens if local else engine.max_new_tokens
    limit = request.limit(longest, min(limits.max_tokens, longest))
    question = "\n".join(part["text"] for part in message.content if part["type"] == "text")
    _check_length(engine, engine.prompt_length(image, question), longest, limits)
    if local:
        engine.decoder.criteria = _until(deadline)
    else:  # with a client for this request's time limit
        left = {"timeout": max(1.0, deadline - time.time()), "attempts": 2}
        server, engine = engine.client.server.model_copy(update=left), copy.copy(engine)
        engine.client = ChatClient(server, None)
    done = engine.run([image], [question], call_bias=request.call_bias or 0.0)[0]
    written = [turn.text_tokens for turn in done.turns if turn.role == "assistant"]
    tokens = engine.codec.tokenize(done.answer)[: written[-1]]
    text = engine.codec.text(tokens[:limit]) if len(tokens) > limit else done.answer
    prompt = sum(turn.visual_tokens + turn.text_tokens for turn in done.turns if turn.role != "assistant")
    spent: dict[str, Any] = {"visual_tokens": done.visual_tokens, "full_visual_tokens": done.full_visual_tokens}
    spent |= {"visual_tokens_saved": done.full_visual_tokens - done.visual_tokens, "rtr": done.rtr}
    spent |= {"crops": list(done.crops), "call_status": done.call_status}
    cut = len(tokens) > limit or len(tokens) >= longest
    return completion(request.model, text, cut, prompt, sum(written), awares=spent)


def answer_chat(engine: Any, request: RawRequest, limits: Limits, deadline: float) -> dict[str, Any]:
    """One greedy completion of the bare model, for any messages with images."""
    images, processor, biases = request.images(limits, min_side=1), engine.processor, request.logit_bias or {}
    if any(token >= len(processor.tokenizer) for token in biases):
        raise ApiError(400, f"logit_bias: there are {len(processor.tokenizer)} tokens", param="logit_bias")
    messages = [message.model_dump() for message in request.messages]
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if rendered.count(processor.image_token) != len(images) or processor.video_token in rendered:
        raise ApiError(400, f"a text holds {processor.image_token}: send the image itself", param="messages")
    limit = request.limit(engine.decoder.max_new_tokens, limits.max_tokens)
    decoder = Decoder(engine.decoder.model.eval(), processor, limit)
    ids = decoder.tokenize(rendered, [image.size for image in images])
    _check_length(engine, len(ids), limit, limits)
    decoder.criteria = _until(deadline)
    if biases:
        listed: Any = [[[token], bias] for token, bias in biases.items()]
        decoder.processors = LogitsProcessorList([SequenceBiasLogitsProcessor(listed)])
    tokens = decoder.start([ids], [images]).tokens[0]
    ended = tokens[-1] == decoder.end
    text = decoder.text(tokens[:-1] if ended else tokens)
    reply = completion(request.model, text, not ended, len(ids), len(tokens))
    return {**reply, "prompt_token_ids": ids} if request.return_token_ids else reply


def _check_length(engine: Any, prompt: int, room: int, limits: Limits) -> None:
    """ApiError for a prompt above the server's limit or, with ``room`` for its answer, above the model's context."""
    most = limits.prompt_tokens
    if hasattr(engine, "decoder"):
        most = min(most, engine.decoder.model.config.get_text_config().max_position_embeddings - room)
    if prompt > most:
        message = f"the prompt has {prompt} tokens, visual ones included; here it may have {most}"
        raise ApiError(400, message, "context_length_exceeded", "messages")


def _until(deadline: float) -> StoppingCriteriaList:
    """Ends the turn at ``deadline``, in seconds since the epoch: the client then has its error 504."""
    return StoppingCriteriaList([MaxTimeCriteria(0.0, initial_timestamp=deadline)])


def run_server(load: Callable[[], Any], host: str, port: int, model: str, limits: Limits, mode: str) -> None:
    """Serves the engine that ``load`` gives until SIGTERM or SIGINT; prints one line with the URL when it is ready.

    ``port`` 0 takes a free one. AwaresValueError when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # before the model is loaded: a taken port should not cost minutes
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise AwaresValueError(f"cannot listen at {host}:{port} ({error}): choose another host or port") from error
    with listener:
        app = make_app(load(), model, limits, mode)
        if host not in ("127.0.0.1", "::1", "localhost") and API_KEY not in os.environ:
            print(f"warning: {host} is reachable from outside and {API_KEY} is not set", file=sys.stderr)
        for name in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends what is under way and raises the signal again
            signal.signal(name, lambda *_: None)
        shown = f"[{host}]" if ":" in host else host
        print(f"{model} at http://{shown}:{listener.getsockname()[1]}/v1", flush=True)
        config = uvicorn.Config(app, http="h11", ws="none", log_level="warning", access_log=False)
        config.timeout_graceful_shutdown = int(limits.shutdown)
        uvicorn.Server(config).run([listener])
