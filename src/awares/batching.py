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
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from awares import protocol
from awares.config import AwaresError
from awares.crops import cap, low_resolution
from awares.decode import Decoder
from awares.rollout import Engine, Trajectory
from awares.wire import ApiError, ChatRequest, Completion, ServeSettings, read_image

log = logging.getLogger(__name__)
Event = (
    str | Completion | ApiError
)  # a piece of the answer's text; the whole answer, which is the last event; a failure


@dataclass(eq=False)
class Job:
    """One request under way. The event loop makes it, reads ``events`` and sets ``gone``; the worker does the rest."""

    ids: list[int]  # the prompt
    images: list[Image]  # of the prompt; in policy mode the full image
    size: int  # tokens of the prompt and room for the answer
    max_tokens: int
    question: str = ""
    call_bias: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit at every position
    show_ids: bool = False  # tell the prompt's ids with the answer
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    sent: str = ""  # what the client has been told of the answer
    done: bool = False
    gone: bool = False  # nobody waits for the answer any more

    def tell(self, event: Event) -> None:
        """Hand the client an event, from the worker's thread; the loop may have gone with a server that was killed."""
        self.done = self.done or not isinstance(event, str)
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def write(self, text: str) -> None:
        """Tell what is new in ``text``, the answer so far. A trailing U+FFFD may be half a character: it is held."""
        if len(text) > len(self.sent) and not text.endswith("\ufffd"):
            self.tell(text[len(self.sent) :])
            self.sent = text


class Mode(Protocol):
    """What a request means, and what a batch does."""

    engine: Engine

    def prepare(self, request: ChatRequest) -> dict[str, Any]:
        """The fields of a `Job`, in any thread; ApiError for a request that cannot be served."""

    def run(self, jobs: Sequence[Job]) -> None:
        """Answer all ``jobs`` as one batch, in the worker's thread."""


class Chat:
    """The raw model, as any other server would show it: the messages through the chat template, then greedy text."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.engine = engine
        self.settings = settings

    def prepare(self, request: ChatRequest) -> dict[str, Any]:
        if request.call_bias:
            raise ApiError(
                400, "call_bias belongs to the policy mode; this server runs in chat mode", None, "call_bias"
            )
        limit = request.limit(self.engine.decoder.max_new_tokens, self.settings.max_tokens)
        urls = [url for message in request.messages for url in message.urls()]
        check_count(urls, self.settings)
        images = [read_image(url, self.settings, min_side=1) for url in urls]
        ids = self.engine.decoder.tokenize(self._render(request), [image.size for image in images])
        size = check_size(len(ids) + limit, self.engine, self.settings)
        beyond = [token for token in request.logit_bias if token >= len(self.engine.processor.tokenizer)]
        if beyond:
            raise ApiError(400, f"logit_bias: no token {beyond[0]}", None, "logit_bias")
        asked = {"logit_bias": request.logit_bias, "show_ids": request.return_token_ids}
        return {"ids": ids, "images": images, "size": size, "max_tokens": limit, **asked}

    def _render(self, request: ChatRequest) -> str:
        conversation: list[dict[str, Any]] = []
        for message in request.messages:
            for token in ("<|image_pad|>", "<|video_pad|>"):
                if token in message.text():
                    raise ApiError(400, f"a message's text holds {token}: send the image itself", None, "messages")
            parts = [
                {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"}
                for part in message.content
            ]
            conversation.append({"role": message.role, "content": parts})
        rendered = self.engine.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return str(rendered)

    def run(self, jobs: Sequence[Job]) -> None:
        model = self.engine.decoder.model.eval()
        decoder = Decoder(model, self.engine.processor, max(job.max_tokens for job in jobs))
        decoder.criteria = StoppingCriteriaList([Rows(jobs, decoder)])
        decoder.processors = LogitsProcessorList([Biases(jobs)])
        decoder.start([job.ids for job in jobs], [job.images for job in jobs])


class Biases(LogitsProcessor):
    """Adds each row's ``logit_bias``."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        pairs = [(row, *pair) for row, job in enumerate(jobs) for pair in job.logit_bias.items()]
        self.rows, self.tokens = [row for row, _, _ in pairs], [token for _, token, _ in pairs]
        self.values = torch.tensor([value for _, _, value in pairs])

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``scores`` (B, vocabulary) -> the same, biased."""
        if not self.rows:
            return scores
        biased = scores.clone()
        biased[self.rows, self.tokens] += self.values.to(scores)
        return biased


class Rows(StoppingCriteria):
    """Passes each row's text on as it is written, and ends a row at its own limit or when its client has gone."""

    def __init__(self, jobs: Sequence[Job], decoder: Decoder) -> None:
        self.jobs = jobs
        self.decoder = decoder
        self.tokens: list[list[int]] = [[] for _ in jobs]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """``input_ids`` (B, T) with the newest tokens last -> (B,), True where the row has ended."""
        newest: Tensor = input_ids[:, -1]
        for job, tokens, token in zip(self.jobs, self.tokens, newest.tolist(), strict=True):
            if not job.done and not job.gone:
                tokens.append(token)
                self._report(job, tokens)
        return torch.tensor([job.done or job.gone for job in self.jobs], device=input_ids.device)

    def _report(self, job: Job, tokens: list[int]) -> None:
        ended = tokens[-1] == self.decoder.end
        text = self.decoder.text(tokens[:-1] if ended else tokens)
        if ended or len(tokens) >= job.max_tokens:
            reason = "stop" if ended else "length"
            job.tell(Completion(text, reason, len(job.ids), len(tokens), prompt_ids=job.ids if job.show_ids else None))
        else:
            job.write(text)


class Policy:
    """The two-turn interaction: low resolution, the crops that the policy asks for, the answer."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.engine = engine
        self.settings = settings

    def prepare(self, request: ChatRequest) -> dict[str, Any]:
        urls = [url for message in request.messages for url in message.urls()]
        if len(request.messages) != 1 or request.messages[0].role != "user" or len(urls) != 1:
            raise ApiError(400, "send one user message with one image and a question", None, "messages")
        for name in ("logit_bias", "return_token_ids"):
            if getattr(request, name):
                raise ApiError(400, f"{name} belongs to the chat mode; this server runs in policy mode", None, name)
        most = min(self.settings.max_tokens, self.engine.decoder.max_new_tokens)
        limit = request.limit(most, most)
        question = request.messages[0].text()
        try:
            protocol.check_question(question)
        except AwaresError as error:
            raise ApiError(400, str(error), None, "messages") from error
        image = cap(read_image(urls[0], self.settings), self.engine.max_side)
        ids = self._prompt(question, image)
        size = check_size(len(ids) + self.engine.decoder.max_new_tokens, self.engine, self.settings)
        fields = {"max_tokens": limit, "question": question, "call_bias": request.call_bias}
        return {"ids": ids, "images": [image], "size": size, **fields}

    def _prompt(self, question: str, image: Image) -> list[int]:
        """What turn 1 will see: it decides with whom the row shares a batch."""
        conversation = protocol.user_messages(question, [None], protocol.SYSTEM)
        text = self.engine.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return self.engine.decoder.tokenize(text, [low_resolution(image).size])

    def run(self, jobs: Sequence[Job]) -> None:
        images, questions = [job.images[0] for job in jobs], [job.question for job in jobs]
        trajectories = self.engine.run(images, questions, call_bias=[job.call_bias for job in jobs])
        for job, trajectory in zip(jobs, trajectories, strict=True):
            job.tell(self._completion(job, trajectory))

    def _completion(self, job: Job, trajectory: Trajectory) -> Completion:
        """``max_tokens`` bounds the answer alone: a call cut short would be no call."""
        text, written = trajectory.answer, [turn.text_tokens for turn in trajectory.turns if turn.role == "assistant"]
        cut = written[-1] >= self.engine.decoder.max_new_tokens
        if written[-1] > job.max_tokens and len(tokens := self.engine.decoder.tokenize(text)) > job.max_tokens:
            text, cut = self.engine.decoder.text(tokens[: job.max_tokens]), True
        prompt = sum(turn.visual_tokens + turn.text_tokens for turn in trajectory.turns if turn.role != "assistant")
        return Completion(text, "length" if cut else "stop", prompt, sum(written), spent(trajectory))


MODES: dict[str, type[Policy] | type[Chat]] = {"policy": Policy, "chat": Chat}


def spent(trajectory: Trajectory) -> dict[str, Any]:
    """What ``usage.awares`` says of an interaction; ``visual_tokens_saved`` is negative if it took more than the full image."""
    return {
        "visual_tokens": trajectory.visual_tokens,
        "full_visual_tokens": trajectory.full_visual_tokens,
        "visual_tokens_saved": trajectory.full_visual_tokens - trajectory.visual_tokens,
        "rtr": trajectory.rtr,
        "crops": list(trajectory.crops),
        "call_status": trajectory.call_status,
    }


def check_count(urls: Sequence[str], settings: ServeSettings) -> None:
    """ApiError (400) when a request has more images than ``settings.images``."""
    if len(urls) > settings.images:
        raise ApiError(400, f"{len(urls)} images, but a request may have {settings.images}", None, "messages")


def check_size(tokens: int, engine: Engine, settings: ServeSettings) -> int:
    """``tokens``, of prompt and answer together; ApiError (400) when the server or the model cannot hold them."""
    limit = min(settings.prompt_tokens, engine.decoder.model.config.get_text_config().max_position_embeddings)
    if tokens > limit:
        message = f"prompt and answer take {tokens} tokens, visual ones included, but this server holds {limit}"
        raise ApiError(400, message, "context_length_exceeded", "messages")
    return tokens


class Batcher:
    """The queue and its worker. ``put`` and the counts belong to the event loop's thread."""

    def __init__(self, mode: Mode, settings: ServeSettings) -> None:
        self.mode = mode
        self.settings = settings
        self.waiting: deque[Job] = deque()
        self.arrived = threading.Condition()
        self.stopping = False
        self.running = 0
        self.served = 0
        self.seconds_per_job = 0.0
        self.thread = threading.Thread(target=self._work, name="awares-model", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the worker when it has answered what waits."""
        with self.arrived:
            self.stopping = True
            self.arrived.notify()
        self.thread.join()

    def put(self, job: Job) -> None:
        with self.arrived:
            self.waiting.append(job)
            self.arrived.notify()

    def _work(self) -> None:
        while batch := self._gather():
            begun = time.monotonic()
            self.running = len(batch)
            self._answer(batch)
            self.seconds_per_job = (time.monotonic() - begun) / len(batch)
            self.served += sum(job.done and not job.gone for job in batch)
            self.running = 0

    def _gather(self) -> list[Job]:
        """The next batch: waits for a first job, then up to ``window`` s for its neighbours; [] at the end of work."""
        with self.arrived:
            while not (batch := self._fitting()):
                if self.stopping:
                    return []
                self.arrived.wait()
            deadline = time.monotonic() + self.settings.window
            while len(batch) == len(self.waiting) and not self.stopping and (left := deadline - time.monotonic()) > 0:
                self.arrived.wait(left)
                batch = self._fitting()
            for job in batch:
                self.waiting.remove(job)
            return batch

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
        except Exception as error:  # a server outlives whatever one batch may raise
            log.exception("a batch of %d failed", len(batch))
            left = [job for job in batch if not job.done and not job.gone]
            if len(batch) == 1 and left:
                left[0].tell(ApiError(500, f"the model failed on this request ({type(error).__name__})", "model_error"))
            elif len(batch) > 1:
                for job in left:
                    self._answer([job])
