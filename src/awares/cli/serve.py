"""``awares serve``: the two-turn interaction, or in mode chat the bare model, behind an OpenAI-compatible API.

A `rollout.Engine` gets one request of each size at a time; behind a `RemoteEngine` the server (vLLM) does the batching.
A stream gets its answer in one piece: a turn may be a call until it ends.
"""

import asyncio
import copy
import hmac
import os
import signal
import socket
import sys
import time
from bisect import bisect
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import LogitsProcessorList, MaxTimeCriteria, SequenceBiasLogitsProcessor, StoppingCriteriaList

from awares.cli import connections, openai_api
from awares.cli.openai_api import ApiError, Completion, PolicyRequest, RawRequest, completion
from awares.cli.options import Limits
from awares.clients.chat import ChatClient
from awares.engine.decode import Decoder
from awares.engine.images import MIN_SIDE, NOTE
from awares.errors import AwaresError, AwaresLengthError, AwaresRequestError, AwaresValueError

API_KEY = "AWARES_API_KEY"
Images = list[Image.Image]
LANES = (2**18, 2**21)  # work of the largest small and medium requests: 0.3 and 2 s of one core with the shipped policy


def make_app(engine: Any, model: str, limits: Limits, mode: str = "policy") -> FastAPI:
    """The application, ``model`` to its clients. It limits ``engine``'s prompts. AwaresValueError for an empty key."""
    check_key = _key_check()
    engine.longest_prompt = min(engine.longest_prompt or limits.prompt_tokens, limits.prompt_tokens)
    kind, answer = (RawRequest, answer_chat) if mode == "chat" else (PolicyRequest, answer_policy)
    min_side, max_side = (1, sys.maxsize) if mode == "chat" else (MIN_SIDE, engine.max_side)
    limits = limits if mode == "chat" else replace(limits, images=1)
    threads = 1 if hasattr(engine, "decoder") else engine.client.server.concurrency
    lanes = [_lane(engine, threads, 5 * size) for size in range(len(LANES) + 1)]  # no small one waits for a large one
    turns = WeakValueDictionary[tuple[int, str], asyncio.Semaphore]()  # of each client, so that clients alternate
    opening, one_thread = ThreadPoolExecutor(2), _lane(None, 1, 10)[1]  # few: malloc keeps the memory of each thread
    held, waiting = dict[asyncio.Timeout, int](), dict[asyncio.Timeout, str]()  # bytes of bodies; clients' addresses
    handlers: Any = dict.fromkeys((HTTPException, AwaresError, ClientDisconnect, Exception), _refuse)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, exception_handlers=handlers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ready", "model": model, "requests": len(waiting)}

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
                wanted = openai_api.read_request(await connections.body(request, clock, held, limits), kind, model)
                client = waiting[clock] = request.client.host if request.client else ""
                connections.make_room(waiting, held, clock, limits.queue)
                run = asyncio.get_running_loop().run_in_executor
                files, pixels = await run(opening, wanted.files, limits)
                size = bisect(LANES, wanted.work(pixels))
                (own, pool, free), thread = lanes[size], one_thread if size == len(LANES) else None
                async with turns.setdefault((size, client), asyncio.Semaphore(threads)), free:
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    held[clock] = 0  # no other request can end it now
                    images = [await run(thread, openai_api.decode, file, min_side, max_side) for file in files]
                    reply = await run(pool, answer, own, wanted, images, limits, deadline)
        except TimeoutError:
            if clock not in held:
                raise ApiError(*connections.FULL) from None
            raise ApiError(504, f"no answer within {limits.timeout:g} s", "timeout") from None
        finally:
            held.pop(clock, None)
            waiting.pop(clock, None)
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
        right = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), (key or "").strip().encode())
        if key is not None and not right:
            raise ApiError(401, "wrong or missing API key: send Authorization: Bearer <key>", "invalid_api_key")

    return check_key


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


def answer_policy(engine: Any, request: PolicyRequest, images: Images, limits: Limits, deadline: float) -> Completion:
    """Runs the interaction. ``max_tokens`` bounds only the answer: a call that is cut short cannot be read."""
    *instructions, user = request.messages
    if {message.role for message in instructions} - {"system"} or user.role != "user" or len(images) != 1:
        raise ApiError(400, "send one user message with one image and a question", param="messages")
    longest = getattr(engine, "decoder", engine).max_new_tokens
    limit = request.limit(longest, min(limits.max_tokens, longest))
    if hasattr(engine, "decoder"):
        engine.decoder.criteria = _until(deadline)
    else:  # with a client for this request's time limit
        left = {"timeout": max(1.0, deadline - time.time()), "attempts": 2}
        engine = copy.copy(engine)
        engine.client = ChatClient(engine.client.server.model_copy(update=left), None)
    done = engine.run(images, ["\n".join(request.parts("text"))], call_bias=request.call_bias or 0.0)[0]
    written = [turn.text_tokens for turn in done.turns if turn.role == "assistant"]
    prompt = sum(turn.visual_tokens + turn.text_tokens for turn in done.turns) - sum(written)
    tokens = engine.codec.tokenize(done.answer)[: written[-1]]
    text = engine.codec.text(tokens[:limit]) if len(tokens) > limit else done.answer
    shown = ("visual_tokens", "full_visual_tokens", "rtr", "crops", "call_status")
    note = images[0].info.get(NOTE)
    spent = {name: getattr(done, name) for name in shown} | ({"note": note} if note else {})
    spent["visual_tokens_saved"] = done.full_visual_tokens - done.visual_tokens
    cut = len(tokens) > limit or len(tokens) >= longest
    return completion(request.model, text, cut, prompt, sum(written), awares=spent)


def answer_chat(engine: Any, request: RawRequest, images: Images, limits: Limits, deadline: float) -> Completion:
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


def _lane(engine: Any, threads: int, nice: int) -> tuple[Any, ThreadPoolExecutor, asyncio.Semaphore]:
    """An engine with the same weights that can run at the same time (a model holds state of its row), and its turns."""
    if hasattr(engine, "decoder"):
        shared = *engine.decoder.model.parameters(), *engine.decoder.model.buffers()
        engine = copy.deepcopy(engine, {id(one): one for one in shared})
    lower: Any = os.nice if sys.platform == "linux" else str  # on Linux a thread has its own priority
    return engine, ThreadPoolExecutor(threads, initializer=lower, initargs=(nice,)), asyncio.Semaphore(threads)


def _until(deadline: float) -> StoppingCriteriaList:
    """Ends a turn at ``deadline`` (seconds since the epoch), when the client has its error 504."""
    return StoppingCriteriaList([MaxTimeCriteria(0.0, initial_timestamp=deadline)])


def run_server(load: Callable[[], Any], host: str, port: int, model: str, limits: Limits, mode: str) -> None:
    """Serves the engine of ``load`` until SIGTERM or SIGINT; prints the URL. AwaresValueError for a bad address."""
    family, shown = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
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
        print(f"{model} at http://{shown}:{listener.getsockname()[1]}/v1", flush=True)
        connections.serve(app, listener, most, limits)
