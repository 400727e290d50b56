"""Requests batched as they arrive: a queue, and the one thread that owns the model.

A job is prepared (its images decoded, its tokens counted) before it enters the queue, so that whatever is wrong with a
request is found before it shares a batch. `Batcher` takes what waits, in order of arrival, as far as the engine's token
budget reaches; what arrives during a batch waits for the next. What a batch does is the mode's: `Policy` runs the
two-turn interaction, `Chat` the raw model.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL.Image import Image
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from awares.cli.wire import (
    ApiError,
    ChatRequest,
    Completion,
    Message,
    PolicyRequest,
    RawRequest,
    ServeSettings,
    parse_request,
    read_images,
)
from awares.engine.decode import Decoder
from awares.engine.images import cap
from awares.errors import AwaresError, AwaresValueError
from awares.method.rollout import Engine, Trajectory

log = logging.getLogger(__name__)
# A piece of the answer's text; the whole answer; a failure. After one of the latter two nothing comes.
Event = str | Completion | ApiError


@dataclass(eq=False)
class Job:
    """One request under way. The event loop makes it, reads ``events`` and sets ``gone``; the worker does the rest."""

    images: list[Image]
    size: int  # tokens of the prompt and room for the answer
    max_tokens: int
    ids: list[int] = field(default_factory=list)  # the prompt (chat mode)
    question: str = ""  # (policy mode)
    call_bias: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit at every position
    show_ids: bool = False  # tell the prompt's ids with the answer
    stream: bool = False
    include_usage: bool = False  # in a stream
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    sent: str = ""  # what the client has been told of the answer
    done: bool = False
    gone: bool = False  # nobody waits for the answer any more

    @property
    def over(self) -> bool:
        """Whether there is nothing more to do for it."""
        return self.done or self.gone

    def tell(self, event: Event) -> None:
        """Hand the client an event, from the worker's thread; the loop may have gone with a server that was stopped."""
        self.done = self.done or not isinstance(event, str)
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def write(self, text: str) -> None:
        """Tell what is new in ``text``, the answer so far. A trailing U+FFFD may be half a character: it is held."""
        if self.stream and len(text) > len(self.sent) and not text.endswith("\ufffd"):
            self.tell(text[len(self.sent) :])
            self.sent = text


class Mode(Protocol):
    """What a request means, and what a batch does."""

    engine: Engine
    settings: ServeSettings

    def prepare(self, body: bytes) -> dict[str, Any]:
        """The fields of a `Job`, in any thread; ApiError for a request that cannot be served."""

    def run(self, jobs: Sequence[Job]) -> None:
        """Answer all ``jobs`` as one batch, in the worker's thread."""


class Chat:
    """The raw model, as any other server would show it: the messages through the chat template, then greedy text."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.engine = engine
        self.settings = settings

    def prepare(self, body: bytes) -> dict[str, Any]:
        request = parse_request(body, RawRequest, self.settings.model)
        if unknown := [token for token in request.logit_bias if token >= len(self.engine.processor.tokenizer)]:
            raise ApiError(400, f"logit_bias: there is no token {unknown[0]}", None, "logit_bias")
        limit = request.limit(self.engine.decoder.max_new_tokens, self.settings.max_tokens)
        images = read_images([url for message in request.messages for url in message.urls()], self.settings, min_side=1)
        conversation: Any = [{"role": turn.role, "content": _template_parts(turn)} for turn in request.messages]
        text = self.engine.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids = self.engine.decoder.tokenize(text, [image.size for image in images])
        size = check_size(len(ids), limit, self.engine, self.settings)
        how = {"logit_bias": request.logit_bias, "show_ids": request.return_token_ids, **answer_form(request)}
        return {"ids": ids, "images": images, "size": size, "max_tokens": limit, **how}

    def run(self, jobs: Sequence[Job]) -> None:
        model = self.engine.decoder.model.eval()
        decoder = Decoder(model, self.engine.processor, max(job.max_tokens for job in jobs))
        decoder.criteria = StoppingCriteriaList([Writer(jobs, decoder)])
        decoder.processors = LogitsProcessorList([LogitBias([job.logit_bias for job in jobs])])
        decoder.start([job.ids for job in jobs], [job.images for job in jobs])


def _template_parts(message: Message) -> list[dict[str, Any]]:
    """The parts in their order, images as placeholders; a placeholder in the text would be taken for an image."""
    text = "".join(part.text for part in message.content if part.type == "text")
    for token in ("<|image_pad|>", "<|video_pad|>"):
        if token in text:
            raise ApiError(400, f"a message's text holds {token}: send the image itself", None, "messages")
    return [part.model_dump() if part.type == "text" else {"type": "image"} for part in message.content]


class LogitBias(LogitsProcessor):
    """Adds each row's biases (token id -> value)."""

    def __init__(self, biases: Sequence[dict[int, float]]) -> None:
        places = [(row, token, value) for row, bias in enumerate(biases) for token, value in bias.items()]
        self.rows, self.tokens = [row for row, _, _ in places], [token for _, token, _ in places]
        self.values = torch.tensor([value for _, _, value in places])

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``scores`` (B, vocabulary) -> the same, biased."""
        if not self.rows:
            return scores
        biased = scores.clone()
        biased[self.rows, self.tokens] += self.values.to(scores)
        return biased


class Writer(StoppingCriteria):
    """Passes each row's text on as it is written, and ends a row at its own limit or when its client has gone."""

    def __init__(self, jobs: Sequence[Job], decoder: Decoder) -> None:
        self.jobs = jobs
        self.decoder = decoder
        self.tokens: list[list[int]] = [[] for _ in jobs]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """``input_ids`` (B, T) with the newest tokens last -> (B,), True where the row has ended."""
        for job, tokens, token in zip(self.jobs, self.tokens, input_ids[:, -1].tolist(), strict=True):
            if not job.over:
                tokens.append(token)
                self._report(job, tokens)
        return torch.tensor([job.over for job in self.jobs], device=input_ids.device)

    def _report(self, job: Job, tokens: list[int]) -> None:
        ended = tokens[-1] == self.decoder.end
        if ended or len(tokens) >= job.max_tokens:
            text = self.decoder.text(tokens[:-1] if ended else tokens)
            ids = job.ids if job.show_ids else None
            job.tell(Completion(text, "stop" if ended else "length", len(job.ids), len(tokens), prompt_ids=ids))
        elif job.stream:
            job.write(self.decoder.text(tokens))


class Policy:
    """The two-turn interaction: low resolution, the crops that the policy asks for, the answer.

    An answer comes in one piece, streamed or not: until a turn has ended it may still turn out to be a call.
    """

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.engine = engine
        self.settings = settings

    def prepare(self, body: bytes) -> dict[str, Any]:
        request = parse_request(body, PolicyRequest, self.settings.model)
        message = request.messages[0]
        if len(request.messages) != 1 or message.role != "user" or len(message.urls()) != 1:
            raise ApiError(400, "send one user message with one image and a question", None, "messages")
        longest = self.engine.decoder.max_new_tokens
        limit = request.limit(longest, min(self.settings.max_tokens, longest))
        image = cap(read_images(message.urls(), self.settings)[0], self.engine.max_side)
        try:
            prompt = self.engine.prompt_length(image, message.text())
        except AwaresValueError as error:
            raise ApiError(400, str(error).removeprefix("row 0: "), None, "messages") from error
        size = check_size(prompt, longest, self.engine, self.settings)
        how = {"question": message.text(), "call_bias": request.call_bias, **answer_form(request)}
        return {"images": [image], "size": size, "max_tokens": limit, **how}

    def run(self, jobs: Sequence[Job]) -> None:
        images, questions = [job.images[0] for job in jobs], [job.question for job in jobs]
        self.engine.decoder.criteria.append(deserted := Deserted(jobs))
        try:
            trajectories = self.engine.run(images, questions, call_bias=[job.call_bias for job in jobs])
        finally:
            self.engine.decoder.criteria.remove(deserted)
        for job, trajectory in zip(jobs, trajectories, strict=True):
            job.tell(self._completion(job, trajectory))

    def _completion(self, job: Job, trajectory: Trajectory) -> Completion:
        """``max_tokens`` bounds the answer alone: a call cut short would be no call."""
        text, written = trajectory.answer, [turn.text_tokens for turn in trajectory.turns if turn.role == "assistant"]
        limit = self.engine.decoder.max_new_tokens
        cut = (
            written[-1] >= limit and len(self.engine.decoder.tokenize(text)) >= limit
        )  # else the last token ended the turn
        if written[-1] > job.max_tokens and len(tokens := self.engine.decoder.tokenize(text)) > job.max_tokens:
            text, cut = self.engine.decoder.text(tokens[: job.max_tokens]), True
        prompt = sum(turn.visual_tokens + turn.text_tokens for turn in trajectory.turns if turn.role != "assistant")
        return Completion(text, "length" if cut else "stop", prompt, sum(written), spent(trajectory))


class Deserted(StoppingCriteria):
    """Ends a batch that nobody waits for any more."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), all(job.gone for job in self.jobs), device=input_ids.device)


MODES: dict[str, type[Policy] | type[Chat]] = {"policy": Policy, "chat": Chat}


def answer_form(request: ChatRequest) -> dict[str, bool]:
    """Whether the answer is streamed, and with its usage."""
    return {"stream": request.stream, "include_usage": request.stream_options.include_usage}


def spent(trajectory: Trajectory) -> dict[str, Any]:
    """``usage.awares`` of an interaction; ``visual_tokens_saved`` is negative where it took more than the full image."""
    return {
        "visual_tokens": trajectory.visual_tokens,
        "full_visual_tokens": trajectory.full_visual_tokens,
        "visual_tokens_saved": trajectory.full_visual_tokens - trajectory.visual_tokens,
        "rtr": trajectory.rtr,
        "crops": list(trajectory.crops),
        "call_status": trajectory.call_status,
    }


def check_size(prompt: int, room: int, engine: Engine, settings: ServeSettings) -> int:
    """Tokens of a prompt and its answer together; ApiError (400) when the server or the model cannot hold them."""
    longest = engine.decoder.model.config.get_text_config().max_position_embeddings
    if prompt > settings.prompt_tokens or prompt + room > longest:
        limit = min(settings.prompt_tokens, longest - room)
        message = f"the prompt has {prompt} tokens, visual ones included, but here it may have {limit}"
        raise ApiError(400, message, "context_length_exceeded", "messages")
    return prompt + room


class Batcher:
    """The queue and its worker."""

    def __init__(self, mode: Mode, settings: ServeSettings) -> None:
        self.mode = mode
        self.settings = settings
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()  # guards ``waiting`` and ``stopping``
        self.stopping = False
        self.running = 0
        self.batches = 0
        self.seconds_per_job = 0.0
        self.thread = threading.Thread(target=self._work, name="awares-model", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the worker when it has answered what waits."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    def put(self, job: Job) -> None:
        with self.changed:
            self.waiting.append(job)
            self.changed.notify()

    def _work(self) -> None:
        while (batch := self._gather()) or not self.stopping:
            if batch:  # not if all who waited have gone
                begun = time.monotonic()
                self.running = len(batch)
                self._answer(batch)
                self.running = 0
                self.batches += 1
                self.seconds_per_job = (time.monotonic() - begun) / len(batch)

    def _gather(self) -> list[Job]:
        """The next batch: waits for a first job, then up to ``window`` s for its neighbours."""
        with self.changed:
            while not (self._fitting() or self.stopping):
                self.changed.wait()
            self.changed.wait_for(lambda: self.stopping or self._full(), self.settings.window)
            batch = self._fitting()
            for job in batch:
                self.waiting.remove(job)
            return batch

    def _full(self) -> bool:
        """Whether more is waiting than fits one batch."""
        return len(self._fitting()) < len(self.waiting)

    def _fitting(self) -> list[Job]:
        """The first jobs in the queue whose padded size stays within the token budget; a longer job runs alone."""
        for job in [job for job in self.waiting if job.gone]:
            self.waiting.remove(job)
        batch: list[Job] = []
        longest = 0
        for job in self.waiting:
            longest = max(longest, job.size)
            if batch and longest * (len(batch) + 1) > self.mode.engine.token_budget:
                break
            batch.append(job)
        return batch

    def _answer(self, batch: Sequence[Job]) -> None:
        """Run ``batch``; should it fail, each job alone, so that one job's failure is not its neighbours'."""
        try:
            self.mode.run(batch)
        except Exception as error:  # a server outlives whatever a batch may raise
            log.exception("a batch of %d failed", len(batch))
            left = [job for job in batch if not job.over]
            if len(batch) > 1:
                for job in left:
                    self._answer([job])
            elif left:
                left[0].tell(_failure(error))


def _failure(error: Exception) -> ApiError:
    if isinstance(error, AwaresError):
        return ApiError(400, str(error))
    return ApiError(500, f"the model failed on this request ({type(error).__name__})", "model_error")
