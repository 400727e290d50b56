"""The two-turn interaction with the model behind an OpenAI-compatible server such as vLLM (PAPER §1).

Turn 2 sends turn 1 again byte for byte, for the server's prefix cache. The crops are in a user message, as vLLM refuses
images in tool messages; it renders to exactly the text of our tool turn.
"""

import base64
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from awares.clients.chat import ChatClient, Reply, Request, RowFailed, Send
from awares.engine.chat_format import END_OF_TURN
from awares.engine.decode import Codec
from awares.engine.images import as_png
from awares.engine.jsonl import Record
from awares.engine.model import ImageOnlyProcessor
from awares.errors import AwaresRequestError, AwaresValueError
from awares.method import protocol
from awares.method.protocol import OURS, Protocol
from awares.method.rollout import MAX_NEW_TOKENS, Conversation, Interaction, Trajectory

# Special tokens stay, such as our <tool_call>; no repetition penalty of the checkpoint; the ids are compared with ours
VLLM_SETTINGS: dict[str, Any] = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
VLLM_SETTINGS |= {"repetition_penalty": 1.0, "return_token_ids": True}
TOP = 20  # log-probabilities of the first token in a reply, the most that the API allows


class RemoteEngine(Interaction):
    """Runs rows through the model behind ``client``; same arguments and results as `rollout.Engine`.

    The server's prompt must equal that of ``processor``: token by token if the server returns the ids (vLLM does), else
    in number; ``check=False`` accepts neither. ``scores``: `call_gap` and `call_logprob` from the log-probabilities of
    the first token (vLLM has them); without them ``call_bias`` must be 0. Where a bias changes that token, the row is
    requested again: the server continues it, or may not write it. Other differences from the in-process engine:
    ``seconds`` includes the queue; ``margin`` is infinite; turn 2 tokenizes the text of turn 1 again; a bias that
    forbids the call bars its first token in the whole of turn 1, which with protocol released is a word.
    """

    def __init__(
        self,
        client: ChatClient,
        processor: ImageOnlyProcessor,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_side: int = 2000,
        check: bool = True,
        scores: bool = False,
        protocol: Protocol = OURS,
    ) -> None:
        super().__init__(Codec(processor, protocol.opening), max_side, protocol)
        self.client, self.max_new_tokens, self.check, self.scores = client, max_new_tokens, check, scores
        self._never = [processor.image_token_id, processor.video_token_id]  # tokens that no turn may have
        self._words = {token: self.codec.text([token]) for token in (*self._never, self.codec.call_token)}
        self._lock = threading.Lock()  # images and tokenizers are not safe in several threads

    def key(self, crops: bool = True) -> str:
        """As in `rollout.Interaction`; the weights by the model's name."""
        size, seen = dict(self.processor.image_processor.size), self.protocol if crops else self.protocol.geometry
        return f"remote:{self.client.server.model}:{self.max_new_tokens}:{self.max_side}:{size}:{seen}"

    def _all(self, names: Sequence[str], prepare: Callable[[int], Conversation]) -> list[Trajectory]:
        def talk(index: int, send: Send) -> Trajectory:
            with self._lock:
                row = prepare(index)
            if not self.scores and row.bias not in (0.0, float("-inf")):
                raise AwaresValueError(f"call_bias {row.bias}: use 0 with a server, or the in-process engine")
            self._turn(row, send)
            if row.free:
                row.call = self._read_call(row)
                if row.call.status != "none":
                    with self._lock:
                        self._respond(row)
                    self._turn(row, send)
            return self._trajectory(row)

        return self.client.converse(names, talk)

    def _turn(self, row: Conversation, send: Send) -> None:
        """One turn of the model. In a free first turn with ``scores``, the bias decides whether it is a call."""
        scored, begun = self.scores and row.free and len(row.turns) == 1, ""
        barred = row.bias == float("-inf") if len(row.turns) == 1 else self.codec.call_only
        reply = send(self._request(row, barred, scored=scored))
        seconds = reply.seconds
        if scored:
            row.call_logprob, row.call_gap = self._scores(row, reply, send)
            wanted = row.call_gap + row.bias > 0
            if wanted != (row.call_gap > 0):
                begun = self.codec.text([self.codec.call_token]) if wanted else ""
                reply = send(self._request(row, not wanted, begun))
                seconds += reply.seconds
        row.seconds += seconds
        text = begun + str(reply.text).removesuffix(END_OF_TURN)
        with self._lock:
            self._write(row, self.codec.tokenize(text + END_OF_TURN * (reply.finish == "stop")))
        if reply.completion_tokens is not None:  # tokenizing the text again may give fewer tokens
            row.turns[-1] = replace(row.turns[-1], text_tokens=reply.completion_tokens + bool(begun))

    def _request(self, row: Conversation, barred: bool, begun: str = "", scored: bool = False) -> Request:
        """For the next turn of ``row``. ``barred``: no call token in it; ``begun``: the call's first token."""
        never = [*self._never, *([self.codec.call_token] if barred else [])]
        # Not logit_bias, which vLLM refuses where it drafts tokens
        extra = VLLM_SETTINGS | {"bad_words": [self._words[token] for token in never]}
        settings: Record = {"temperature": 0.0, "max_tokens": self.max_new_tokens, "extra_body": extra}
        messages, ids = as_sent(row.messages, row.images), list(row.ids)
        if begun:
            messages.append({"role": "assistant", "content": begun})
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
            settings["max_tokens"] -= 1
            ids.append(self.codec.call_token)
        if scored:
            settings |= {"logprobs": True, "top_logprobs": TOP}
            extra |= {"return_tokens_as_token_ids": True}
        limits = str(dict(self.processor.image_processor.size))  # of the server, too; the request does not carry them
        return Request(row.row_id, messages, settings, partial(self._accept, ids), limits)

    def _scores(self, row: Conversation, reply: Reply, send: Send) -> tuple[float, float]:
        """As `decode.call_scores`, from the first token's log-probabilities before any bias."""
        call, found = self.codec.call_token, _first_logprobs(reply)
        if call not in found:  # below the first TOP tokens: a second request names it
            request = self._request(row, False, scored=True)
            extra = request.settings["extra_body"] | {"logprob_token_ids": [call]}
            settings = {**request.settings, "top_logprobs": 0, "max_tokens": 1, "extra_body": extra}
            found = _first_logprobs(send(replace(request, settings=settings)))
        others = [value for token, value in found.items() if token not in (call, *self._never)]
        if call not in found or not others:
            raise RowFailed("no log-probability of the call: the server must be vLLM 0.30 or newer")
        return found[call], found[call] - max(others)

    def _accept(self, prompt: list[int], reply: Reply) -> None:
        """AwaresRequestError if the prompt is not ours, RowFailed if the reply is not a turn of the model."""
        ids, count = reply.raw.pop("prompt_token_ids", None), reply.prompt_tokens
        if self.check and ids is None and count is None:
            raise AwaresRequestError("the server reports no prompt tokens: pass check=False to trust it")
        if ids not in (None, prompt) or count not in (None, len(prompt)):
            fix = "pass its processor; vLLM needs --chat-template-content-format openai and --mm-processor-kwargs"
            raise AwaresRequestError(f"the server's prompt ({count} tokens) is not ours ({len(prompt)}): {fix}")
        if scores := reply.raw["choices"][0].get("logprobs"):
            scores["content"] = scores["content"][:1]  # of the first token: all that is kept
        if reply.finish not in ("stop", "length"):
            raise RowFailed(f"the reply ended with finish_reason {reply.finish!r}, not stop or length")
        if self.processor.image_token in str(reply.text):
            raise RowFailed("the model wrote an image placeholder: the server ignores bad_words")


def _first_logprobs(reply: Reply) -> dict[int, float]:
    """Log-probabilities by token id at the first generated position; {} if the server returns none."""
    content = (reply.raw["choices"][0].get("logprobs") or {}).get("content") or [{"top_logprobs": []}]
    return {int(one["token"].removeprefix("token_id:")): one["logprob"] for one in content[0]["top_logprobs"]}


def as_sent(messages: Iterable[dict[str, Any]], images: Iterable[Image.Image]) -> list[dict[str, Any]]:
    """Chat messages for the API: ``images`` replace the placeholders, tool turns become user turns."""
    pictures, sent = map(image_part, images), []
    for message in messages:
        shown = protocol.tool_as_user(message) if message["role"] == "tool" else message
        content = shown["content"]
        if not isinstance(content, str):
            content = [next(pictures) if part["type"] == "image" else part for part in content]
        sent.append({"role": shown["role"], "content": content})
    return sent


def image_part(image: Image.Image) -> dict[str, Any]:
    """The image for the API, as PNG: lossless, and the same bytes for the same pixels. Fast rather than small."""
    url = "data:image/png;base64," + base64.b64encode(as_png(image, compress_level=1)).decode()
    return {"type": "image_url", "image_url": {"url": url}}
