"""The two-turn interaction with the model behind an OpenAI-compatible server such as vLLM (PAPER §1).

`RemoteEngine` takes the place of `rollout.Engine` wherever one is wanted. In turn 2 the whole conversation is sent
again, the low-resolution image byte for byte the same, so that the server's prefix cache holds all of turn 1; the crops
go in a user message, because vLLM refuses images in tool messages. It renders to the very text of our tool turn, which
is checked once against the server. What vLLM must be started with stands in README.md beside this file.
"""

import asyncio
import base64
import io
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from awares.clients.chat import ChatClient, Send
from awares.clients.replies import Lost, Reply, Request
from awares.config import Params
from awares.engine.chat_format import END_OF_TURN
from awares.engine.decode import Codec
from awares.engine.model import ImageOnlyProcessor
from awares.errors import AwaresRequestError, AwaresValueError
from awares.method import protocol
from awares.method.protocol import OURS, Protocol, get_protocol
from awares.method.rollout import MAX_NEW_TOKENS, Conversation, ImageSource, Interaction, Trajectory

NEVER = -100.0  # the API's lowest logit_bias: the token is not written
MEND = (
    "serve the model with its own chat template and image processor and, on vLLM, with "
    "--chat-template-content-format openai, or give RemoteEngine the processor of the model that is served"
)


class RemoteEngine(Interaction):
    """Runs rows through the model behind ``client``; same arguments and results as `rollout.Engine`.

    ``processor`` (tokenizer and image processor of the served model) counts the tokens. ``check``: before the first
    fresh request a probe of two turns is sent, and the server's prompt must be ours, token for token where the server
    tells its ids (vLLM does), else by their number. Every later prompt is compared by number.

    Where the results differ from the in-process engine's: ``seconds`` is the time that the row's own requests took, in
    the server's queue too; ``margin`` is infinite and ``call_logprob`` None, since the server tells no logits; in
    turn 2 the server tokenizes the text of turn 1 anew, so a call that the model spelt with other tokens than its tokenizer
    would is read back with the tokenizer's; a call that begins with a word (protocol released) is barred from the whole
    first turn of a row that may not call, not from its first position only, and in turn 2 from no position.
    """

    def __init__(
        self,
        client: ChatClient,
        processor: ImageOnlyProcessor,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_side: int = 2000,
        check: bool = True,
        protocol: str | Protocol = OURS,
    ) -> None:
        chosen = get_protocol(protocol) if isinstance(protocol, str) else protocol
        super().__init__(Codec(processor, chosen.opening), max_side, chosen)
        self.client = client
        self.max_new_tokens = max_new_tokens
        self.unchecked = check
        self._opening = threading.Lock()

    @classmethod
    def from_params(
        cls, client: ChatClient, processor: ImageOnlyProcessor, params: Params, **options: Any
    ) -> "RemoteEngine":
        """An engine with the limits of params.yaml; ``options`` override them."""
        limits: dict[str, Any] = dict(
            max_new_tokens=params.protocol.max_new_tokens,
            max_side=params.crops.max_side,
            protocol=protocol.from_params(params),
        )
        return cls(client, processor, **{**limits, **options})

    def key(self) -> str:
        """What decides the answers, for keying stored ones; the weights are known by the model's name only."""
        size = dict(self.processor.image_processor.size)
        return f"remote:{self.client.server.model}:{self.max_new_tokens}:{self.max_side}:{size}:{self.protocol}"

    def run(
        self,
        images: Sequence[ImageSource],
        questions: Sequence[str],
        forced: Sequence[tuple[str, ...] | None] | None = None,
        call_bias: float | Sequence[float] = 0.0,
        row_ids: Sequence[str] | None = None,
    ) -> list[Trajectory]:
        """As `rollout.Engine.run`. AwaresRequestError lists rows without a reply; the same call again goes on.

        A ``call_bias`` other than 0 is an AwaresError: logit_bias holds at every position and would change the answers.
        """
        if any([call_bias] if isinstance(call_bias, float | int) else call_bias):
            raise AwaresValueError(
                f"call_bias {call_bias!r}: a server biases a token at every position, not at the first one only: "
                "use 0, or the in-process engine"
            )
        return super().run(images, questions, forced, row_ids=row_ids)

    # Rows

    def _all(self, names: Sequence[str], prepare: Callable[[int], Conversation]) -> list[Trajectory]:
        gate = asyncio.Lock()

        def opened(index: int) -> Conversation:
            with self._opening:  # two rows may share one image that is not loaded yet
                return prepare(index)

        async def talk(index: int, send: Send) -> Trajectory:
            row = await asyncio.to_thread(opened, index)
            await self._play(row, send, gate)
            return self._trajectory(row)

        return self.client.converse(names, talk)

    async def _play(self, row: Conversation, send: Send, gate: asyncio.Lock) -> None:
        urls: list[str] = []
        await self._turn(row, urls, send, gate)
        if row.free:
            row.call = self._read_call(row)
        if row.free and row.call.status != "none":
            await asyncio.to_thread(self._respond, row)
            await self._turn(row, urls, send, gate)

    async def _turn(self, row: Conversation, urls: list[str], send: Send, gate: asyncio.Lock) -> None:
        """One assistant turn; ``urls``: of the row's images, each encoded once."""
        urls += await asyncio.to_thread(lambda: [data_url(image) for image in row.images[len(urls) :]])
        request = self._request(row, urls)
        async with gate:
            if self.unchecked and not self.client.holds(request):
                await self._probe(send)
                self.unchecked = False
        reply = await send(request)
        row.seconds += reply.seconds
        self._write(row, self._tokens(reply))
        if reply.completion_tokens is not None:  # else counted by tokenizing the text anew, which may come out shorter
            row.turns[-1] = replace(row.turns[-1], text_tokens=reply.completion_tokens)

    def _request(self, row: Conversation, urls: Sequence[str]) -> Request:
        barred = [self.processor.image_token_id, self.processor.video_token_id]
        may_not_call = row.bias < 0 if row.call.status == "none" else self.codec.call_only
        barred += [self.codec.call_token] if may_not_call else []
        settings = {
            "temperature": 0.0,
            "max_tokens": self.max_new_tokens,
            "logit_bias": {str(token): NEVER for token in barred},
            # Control tokens as they are: <tool_call> would be dropped by a tokenizer that marks it special, as ours does
            # (Qwen's does not). The checkpoint's own repetition penalty must not leak in.
            "extra_body": {
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "repetition_penalty": 1.0,
            },
        }
        expected = len(row.ids)
        return Request(
            row.row_id, as_sent(row.messages, urls), settings, check=lambda reply: self._check(reply, expected)
        )

    def _tokens(self, reply: Reply) -> list[int]:
        text = reply.text.removesuffix(END_OF_TURN)
        return self.codec.tokenize(text + END_OF_TURN * (reply.finish == "stop"))

    def _check(self, reply: Reply, expected: int) -> None:
        """Before a reply is recorded: AwaresRequestError for another prompt than ours, Lost for no turn of the model."""
        if reply.prompt_tokens is not None and reply.prompt_tokens != expected:
            raise AwaresRequestError(
                f"the server counts {reply.prompt_tokens} prompt tokens where we count {expected}: {MEND}"
            )
        if reply.finish not in ("stop", "length"):
            raise Lost(f"the reply ended with finish_reason {reply.finish!r}, not stop or length")
        if self.processor.image_token in reply.text:
            raise Lost("the model wrote an image placeholder: the server ignores logit_bias")

    async def _probe(self, send: Send) -> None:
        """AwaresRequestError unless the server renders a two-turn conversation with three images as we do."""
        row = self._open(Image.new("RGB", (112, 168)), "probe", "probe", "half", (), self.protocol.system)
        self._force(row, ("top", "left"))
        request = self._request(row, [data_url(image) for image in row.images])
        extra = {**request.settings["extra_body"], "return_token_ids": True}
        settings = {**request.settings, "max_tokens": 1, "extra_body": extra}

        def check(reply: Reply) -> None:
            ids = reply.raw.get("prompt_token_ids")
            if ids is None and reply.prompt_tokens is None:
                raise AwaresRequestError("the server tells no prompt tokens to check: pass check=False to trust it")
            if ids is not None and ids != row.ids:
                raise AwaresRequestError(f"the server renders another prompt than this model's: {MEND}")
            self._check(reply, len(row.ids))

        try:
            await send(Request("probe", request.messages, settings, check=check, record=False))
        except Lost as error:
            raise AwaresRequestError(
                f"{self.client.server.url}: the probe before the first row failed: {error}"
            ) from error


def as_sent(messages: Iterable[dict[str, Any]], urls: Sequence[str]) -> list[dict[str, Any]]:
    """Chat messages as the API wants them: ``urls`` in place of the image placeholders, tool turns as user turns."""
    pictures = iter(urls)

    def part(content: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": next(pictures)}} if content["type"] == "image" else content

    sent = []
    for message in messages:
        if message["role"] == "tool":
            message = protocol.tool_as_user(message)
        content = message["content"]
        sent.append(
            {"role": message["role"], "content": content if isinstance(content, str) else [*map(part, content)]}
        )
    return sent


def data_url(image: Image.Image) -> str:
    """A PNG data URL: lossless, and the same bytes for the same pixels. Fast rather than small."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
