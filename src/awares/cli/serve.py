"""``awares serve``: the two-turn interaction, or in mode chat the bare model, behind an OpenAI-compatible API.

The engine is a `rollout.Engine`, which gets one request at a time, or a `RemoteEngine`, whose server (vLLM) does the
batching. A stream gets its answer in one piece: a turn may be a call until it ends. Heads, bodies, the sum of bodies
and large images have limits, so that slow and greedy clients do not affect others.
"""

import asyncio
import copy
import hmac
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import LogitsProcessorList, MaxTimeCriteria, SequenceBiasLogitsProcessor, StoppingCriteriaList

from awares.cli import connections, openai_api
from awares.cli.openai_api import ApiError, PolicyRequest, RawRequest, completion
from awares.cli.options import Limits
from awares.cli.turns import Room, Turns, full
from awares.clients.chat import ChatClient
from awares.engine.decode import Decoder
from awares.engine.images import MIN_SIDE, notes
from awares.errors import AwaresError, AwaresLengthError, AwaresRequestError, AwaresValueError

API_KEY = "AWARES_API_KEY"
PIECE = 2**18  # bytes of a body that must arrive within `Limits.patience`
LARGE = 2**20  # work of a request that waits for other large ones: about a second for the shipped policy on one core
ALL_BODIES = 2**27  # bytes of all bodies that wait


def make_app(engine: Any, model: str, limits: Limits, mode: str = "policy") -> FastAPI:
    """The application, ``model`` to its clients. It limits ``engine``'s prompts. AwaresValueError for an empty key."""
    check_key = _key_check()
    engine.longest_prompt = min(engine.longest_prompt or limits.prompt_tokens, limits.prompt_tokens)
    kind, answer = (RawRequest, answer_chat) if mode == "chat" else (PolicyRequest, answer_policy)
    min_side, max_side = (1, sys.maxsize) if mode == "chat" else (MIN_SIDE, engine.max_side)
    threads = 1 if hasattr(engine, "decoder") else engine.client.server.concurrency
    # Small requests and large ones take turns apart: a large one can take seconds, which no small one should wait
    lanes = [(one, Turns(threads), ThreadPoolExecutor(threads)) for one in (engine, _twin(engine))]
    one_thread = ThreadPoolExecutor(1)  # for large images: malloc keeps the memory of each thread
    room = Room(limits.queue, max(ALL_BODIES, limits.body_bytes))
    handlers: Any = dict.fromkeys((HTTPException, AwaresError, ClientDisconnect, Exception), _refuse)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, exception_handlers=handlers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ready", "model": model, "requests": len(room.clients)}

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await retrieve(model)]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(check_key)])
    async def retrieve(name: str) -> dict[str, Any]:
        openai_api.check_model(name, model)
        return {"id": model, "object": "model", "created": 0, "owned_by": "awares"}

    @app.post("/v1/chat/completions", dependencies=[Depends(check_key)])
    async def complete(request: Request) -> Response:
        deadline = time.time() + limits.timeout
        try:
            async with asyncio.timeout(limits.timeout) as clock:
                wanted = openai_api.read_request(await _body(request, clock, room, limits), kind, model)
                client = request.client.host if request.client else ""
                room.enter(clock, client)
                run = asyncio.get_running_loop().run_in_executor
                files = await run(None, wanted.files, limits)
                work = wanted.work(files)
                thread = one_thread if work > LARGE else None
                free_engine, turns, pool = lanes[work > LARGE]
                async with turns.turn(client, work):
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    room.sizes[clock] = 0  # no other request can end it now
                    images = [await run(thread, openai_api.decode, file, min_side, max_side) for file in files]
                    reply = await run(pool, answer, free_engine, wanted, images, limits, deadline)
        except TimeoutError:
            if clock not in room.sizes:
                raise full() from None
            raise ApiError(504, f"no answer within {limits.timeout:g} s", "timeout") from None
        finally:
            room.leave(clock)
        if not wanted.stream:
            return JSONResponse(reply)
        events = openai_api.as_events(reply, (wanted.stream_options or {}).get("include_usage", False))
        return StreamingResponse(events, media_type="text/event-stream")

    return app


def _key_check() -> Callable[[Request], Awaitable[None]]:
    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise AwaresValueError(f"{API_KEY} is empty: set a key, or unset the variable to serve without one")

    async def check_key(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        token = given.strip().encode() if scheme.lower() == "bearer" else b""
        if key is not None and not hmac.compare_digest(token, key.strip().encode()):
            raise ApiError(401, "wrong or missing API key: send Authorization: Bearer <key>", "invalid_api_key")

    return check_key


async def _body(request: Request, clock: asyncio.Timeout, room: Room, limits: Limits) -> bytearray:
    room.hold(clock, 0)
    body, now = bytearray(), asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(limits.patience) as patience:
            async for piece in request.stream():
                if len(body) // PIECE < (len(body) + len(piece)) // PIECE:
                    patience.reschedule(now() + limits.patience)
                body += piece
                if len(body) > limits.body_bytes:
                    raise ApiError(413, f"the request has more than {limits.body_bytes} bytes", "request_too_large")
                room.hold(clock, len(body))
    except TimeoutError:
        raise ApiError(408, f"{PIECE // 1024} KiB of a body may take {limits.patience} s", "timeout") from None
    return body


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


def answer_policy(
    engine: Any, request: PolicyRequest, images: list[Image.Image], limits: Limits, deadline: float
) -> dict[str, Any]:
    """Runs the interaction. ``max_tokens`` bounds only the answer: a call that is cut short cannot be read."""
    *instructions, user = request.messages
    if {message.role for message in instructions} - {"system"} or user.role != "user" or len(images) != 1:
        raise ApiError(400, "send one user message with one image and a question", param="messages")
    local = hasattr(engine, "decoder")
    longest = (engine.decoder if local else engine).max_new_tokens
    limit = request.limit(longest, min(limits.max_tokens, longest))
    if local:
        engine.decoder.criteria = _until(deadline)
    else:  # with a client for this request's time limit
        left = {"timeout": max(1.0, deadline - time.time()), "attempts": 2}
        engine = copy.copy(engine)
        engine.client = ChatClient(engine.client.server.model_copy(update=left), None)
    done = engine.run(images, ["\n".join(request.texts())], call_bias=request.call_bias or 0.0)[0]
    written = [turn.text_tokens for turn in done.turns if turn.role == "assistant"]
    prompt = sum(turn.visual_tokens + turn.text_tokens for turn in done.turns) - sum(written)
    tokens = engine.codec.tokenize(done.answer)[: written[-1]]
    text = engine.codec.text(tokens[:limit]) if len(tokens) > limit else done.answer
    shown = ("visual_tokens", "full_visual_tokens", "rtr", "crops", "call_status")
    spent = {name: getattr(done, name) for name in shown} | ({"note": note} if (note := notes(images[0])) else {})
    spent["visual_tokens_saved"] = done.full_visual_tokens - done.visual_tokens
    cut = len(tokens) > limit or len(tokens) >= longest
    return completion(request.model, text, cut, prompt, sum(written), awares=spent)


def answer_chat(
    engine: Any, request: RawRequest, images: list[Image.Image], limits: Limits, deadline: float
) -> dict[str, Any]:
    """One greedy completion of the bare model, for any messages with images."""
    processor, biases = engine.processor, request.logit_bias or {}
    if any(token >= len(processor.tokenizer) for token in biases):
        raise ApiError(400, f"logit_bias: the vocabulary has {len(processor.tokenizer)} tokens", param="logit_bias")
    messages = [message.model_dump(include={"role", "content"}) for message in request.messages]
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if rendered.count(processor.image_token) != len(images) or processor.video_token in rendered:
        raise ApiError(400, f"a text holds {processor.image_token}: send the image itself", param="messages")
    model = engine.decoder.model.eval()
    ids = engine.decoder.tokenize(rendered, [image.size for image in images])
    engine.check_length(len(ids), "0")
    left = model.config.get_text_config().max_position_embeddings - len(ids)  # in the context
    decoder = Decoder(model, processor, request.limit(engine.decoder.max_new_tokens, min(limits.max_tokens, left)))
    decoder.criteria = _until(deadline)
    if biases:
        listed: Any = [[[token], bias] for token, bias in biases.items()]
        decoder.processors = LogitsProcessorList([SequenceBiasLogitsProcessor(listed)])
    tokens = decoder.start([ids], [images]).tokens[0]
    ended = tokens[-1] == decoder.end
    text = decoder.text(tokens[:-1] if ended else tokens)
    reply = completion(request.model, text, not ended, len(ids), len(tokens))
    return {**reply, "prompt_token_ids": ids} if request.return_token_ids else reply


def _twin(engine: Any) -> Any:
    """``engine`` with the same weights, to run at the same time: a model holds state of its row."""
    if not hasattr(engine, "decoder"):
        return engine
    model = engine.decoder.model
    return copy.deepcopy(engine, {id(one): one for one in (*model.parameters(), *model.buffers())})


def _until(deadline: float) -> StoppingCriteriaList:
    """Ends a turn at ``deadline`` (seconds since the epoch), when the client has its error 504."""
    return StoppingCriteriaList([MaxTimeCriteria(0.0, initial_timestamp=deadline)])


def run_server(load: Callable[[], Any], host: str, port: int, model: str, limits: Limits, mode: str) -> None:
    """Serves the engine that ``load`` gives until SIGTERM or SIGINT; prints one line with the URL when it is ready.

    ``port`` 0 takes a free one. AwaresValueError if the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # before the model is loaded: a taken port should not cost minutes
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise AwaresValueError(f"cannot listen at {host}:{port} ({error}): choose another host or port") from error
    with listener:
        engine, most = load(), connections.limit(limits.connections)
        app = make_app(engine, model, replace(limits, queue=min(limits.queue, most // 2)), mode)
        if host not in ("127.0.0.1", "::1", "localhost") and API_KEY not in os.environ:
            print(f"warning: {host} is reachable from outside and {API_KEY} is not set", file=sys.stderr)
        for name in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends what is under way and raises the signal again
            signal.signal(name, lambda *_: None)
        shown = f"[{host}]" if ":" in host else host
        print(f"{model} at http://{shown}:{listener.getsockname()[1]}/v1", flush=True)
        connections.serve(app, listener, most, limits)
