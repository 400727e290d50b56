"""The two-turn interaction with the model behind an OpenAI-compatible server such as vLLM (PAPER §1).

In turn 2 the whole conversation is sent again, the low-resolution image byte for byte the same, so the server's prefix
cache holds all of turn 1. The crops are in a user message, because vLLM refuses images in tool messages; it renders to
exactly the text of our tool turn. src/awares/README.md says how to start vLLM.
"""

import base64
import io
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from awares.clients.chat import ChatClient, Reply, Request, RowFailed, Send
from awares.engine.chat_format import END_OF_TURN
from awares.engine.decode import Codec
from awares.engine.model import ImageOnlyProcessor
from awares.errors import AwaresRequestError, AwaresValueError
from awares.method import protocol
from awares.method.protocol import OURS, Protocol, get_protocol
from awares.method.rollout import MAX_NEW_TOKENS, Conversation, Interaction, Trajectory

NEVER = -100.0  # the API's lowest logit_bias: the token is not written
# A tokenizer that marks <tool_call> as special, as ours does, would drop it; the repetition penalty of the
# checkpoint's generation config must not apply.
VLLM_SETTINGS = {"skip_special_tokens": False, "spaces_between_special_tokens": False, "repetition_penalty": 1.0}
FIX = (
    "serve the model with its own chat template and image processor and, on vLLM, with "
    "--chat-template-content-format openai, or give RemoteEngine the processor of the served model"
)


class RemoteEngine(Interaction):
    """Runs rows through the model behind ``client``; same arguments and results as `rollout.Engine`.

    ``processor`` (of the served model) counts the tokens. ``check``: the server's prompt must equal ours. A two-turn
    probe before the first fresh request compares token ids if the server returns them (vLLM does), else their number;
    later prompts are compared by number.

    Differences from the in-process engine: ``call_bias`` must be 0; ``seconds`` is the time of the row's requests, the
    server's queue included; ``margin`` is infinite and ``call_logprob`` None; the server tokenizes the text of turn 1
    again in turn 2; with protocol released, a row that may not call cannot write the call's first word in turn 1.
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
        self.client, self.max_new_tokens, self.unchecked = client, max_new_tokens, check
        self._lock, self._probing = threading.Lock(), threading.Lock()

    def key(self) -> str:
        """Everything known that decides the answers, as the key of stored ones; the weights by the model's name."""
        size = dict(self.processor.image_processor.size)
        return f"remote:{self.client.server.model}:{self.max_new_tokens}:{self.max_side}:{size}:{self.protocol}"

    def _all(self, names: Sequence[str], prepare: Callable[[int], Conversation]) -> list[Trajectory]:
        def talk(index: int, send: Send) -> Trajectory:
            with self._lock:  # images and tokenizers are not safe in several threads
                row = prepare(index)
            if row.bias not in (0.0, float("-inf")):  # logit_bias would apply at every position
                raise AwaresValueError(f"call_bias {row.bias}: use 0 with a server, or the in-process engine")
            urls = self._turn(row, [], send)
            if row.free:
                row.call = self._read_call(row)
            if row.free and row.call.status != "none":
                with self._lock:
                    self._respond(row)
                self._turn(row, urls, send)
            return self._trajectory(row)

        return self.client.converse(names, talk)

    def _turn(self, row: Conversation, urls: list[str], send: Send) -> list[str]:
        """One assistant turn; returns ``urls``, the row's images so far, with the new ones."""
        urls = [*urls, *map(data_url, row.images[len(urls) :])]
        request = self._request(row, urls)
        with self._probing:
            if self.unchecked and request.key(self.client.server.model) not in self.client.replies:
                self._probe(send)
                self.unchecked = False
        reply = send(request)
        row.seconds += reply.seconds
        text = str(reply.text).removesuffix(END_OF_TURN)
        with self._lock:
            self._write(row, self.codec.tokenize(text + END_OF_TURN * (reply.finish == "stop")))
        if reply.completion_tokens is not None:  # the text, tokenized again, may be shorter
            row.turns[-1] = replace(row.turns[-1], text_tokens=reply.completion_tokens)
        return urls

    def _request(self, row: Conversation, urls: Sequence[str]) -> Request:
        barred = [self.processor.image_token_id, self.processor.video_token_id]
        if row.bias < 0 if row.call.status == "none" else self.codec.call_only:
            barred.append(self.codec.call_token)
        settings = {
            "temperature": 0.0,
            "max_tokens": self.max_new_tokens,
            "logit_bias": {str(token): NEVER for token in barred},
            "extra_body": VLLM_SETTINGS,
        }
        expected = len(row.ids)
        return Request(
            row.row_id, as_sent(row.messages, urls), settings, check=lambda reply: self._check(reply, expected)
        )

    def _check(self, reply: Reply, expected: int) -> None:
        """AwaresRequestError if the prompt is not ours, RowFailed if the reply is not a turn of the model."""
        if reply.prompt_tokens not in (None, expected):
            raise AwaresRequestError(f"the server counts {reply.prompt_tokens} prompt tokens, we {expected}: {FIX}")
        if reply.finish not in ("stop", "length"):
            raise RowFailed(f"the reply ended with finish_reason {reply.finish!r}, not stop or length")
        if self.processor.image_token in str(reply.text):
            raise RowFailed("the model wrote an image placeholder: the server ignores logit_bias")

    def _probe(self, send: Send) -> None:
        """AwaresRequestError unless the server renders a two-turn conversation with three images as we do."""
        with self._lock:
            row = self._open(Image.new("RGB", (112, 168)), "probe", "probe", "half", (), self.protocol.system)
            self._force(row, ("top", "left"))
        request = self._request(row, [data_url(image) for image in row.images])
        extra = {"max_tokens": 1, "extra_body": {**VLLM_SETTINGS, "return_token_ids": True}}

        def check(reply: Reply) -> None:
            ids = reply.raw.get("prompt_token_ids")
            if ids is None and reply.prompt_tokens is None:
                raise AwaresRequestError("the server reports no prompt tokens: pass check=False to trust it")
            if ids is not None and ids != row.ids:
                raise AwaresRequestError(f"the server renders another prompt than this model's: {FIX}")
            self._check(reply, len(row.ids))

        try:
            send(replace(request, settings={**request.settings, **extra}, check=check, record=False))
        except RowFailed as error:
            raise AwaresRequestError(f"{self.client.server.url}: the probe before the first row: {error}") from error


def as_sent(messages: Iterable[dict[str, Any]], urls: Sequence[str]) -> list[dict[str, Any]]:
    """Chat messages for the API: ``urls`` replace the image placeholders, tool turns become user turns."""
    pictures = ({"type": "image_url", "image_url": {"url": url}} for url in urls)
    sent = []
    for message in messages:
        content = (protocol.tool_as_user(message) if message["role"] == "tool" else message)["content"]
        if not isinstance(content, str):
            content = [next(pictures) if part["type"] == "image" else part for part in content]
        sent.append({"role": "user" if message["role"] == "tool" else message["role"], "content": content})
    return sent


def data_url(image: Image.Image) -> str:
    """A PNG data URL: lossless, and the same bytes for the same pixels. Fast rather than small."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
