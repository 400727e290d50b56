"""The requests and replies of OpenAI's chat completions that ``awares serve`` supports; it fetches no URL."""

import base64
import binascii
import io
import json
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from openai.types.chat import ChatCompletionContentPartImageParam as ImagePart
from openai.types.chat import ChatCompletionContentPartTextParam as TextPart
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException

from awares.cli.options import Limits
from awares.engine.images import SHOWN, cap, open_image
from awares.errors import AwaresError

Completion = dict[str, Any]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow's other readers are not for bytes from strangers


class ApiError(HTTPException):
    """A refusal; the client gets it as OpenAI's error object."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message, {408: {"Connection": "close"}, 429: {"Retry-After": "1"}}.get(status))
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# Fields of a request, accepted with any value, and those accepted with the values that change nothing
IGNORED = {"metadata", "name", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
           "safety_identifier", "seed", "top_k", "top_p", "user"}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("temperature", "frequency_penalty", "presence_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("logprobs", "store", "skip_special_tokens", "spaces_between_special_tokens"), (False,)),
    **dict.fromkeys(("tool_choice", "function_call", "reasoning_effort"), ("none", "auto")),
    **dict.fromkeys(("stop", "tools", "functions", "annotations"), ([],)),
    **{"n": (1,), "repetition_penalty": (1,), "logit_bias": ({},), "modalities": (["text"],)},
    **{"response_format": ({"type": "text"},), "service_tier": ("auto", "default"), "verbosity": ("medium",)},
}


class Strict(BaseModel, extra="forbid", strict=True):
    """An unknown field is refused, not ignored; null means the default."""

    @model_validator(mode="before")
    @classmethod
    def _without_effect(cls, fields: Any) -> Any:
        if type(fields) is not dict:
            return fields
        kept = {key: value for key, value in fields.items() if value is not None and key not in IGNORED}
        return {key: value for key, value in kept.items() if value not in NEUTRAL.get(key, ())}


Role = Literal["system", "user", "assistant"]
ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
_as_parts = BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given)


class Message(Strict):
    role: Annotated[Role, BeforeValidator(lambda name: "system" if name == "developer" else name)]  # its newer name
    content: Annotated[list[ContentPart], _as_parts]


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions; src/awares/README.md lists what is ignored, bounded or refused."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None

    def limit(self, default: int, most: int) -> int:
        """Tokens that the answer may have, at most ``most``."""
        return min(self.max_completion_tokens or self.max_tokens or default, most)

    def parts(self, kind: str) -> list[Any]:
        """The contents of all parts of type text or image_url, in the order of the messages."""
        found: list[Any] = [part for message in self.messages for part in message.content]
        return [part[kind] for part in found if part["type"] == kind]

    def work(self, pixels: int) -> int:
        """The work of a request with so many pixels, in pixels; a character of text counts as 200."""
        return pixels + 200 * sum(map(len, self.parts("text")))

    def files(self, limits: Limits) -> tuple[list[bytes], int]:
        """The image files in the order of the messages, and their pixels; ApiError for bad ones or too many."""
        parts, files, pixels = self.parts("image_url"), list[bytes](), 0
        if len(parts) > limits.images:
            raise ApiError(400, f"{len(parts)} images: a request may have {limits.images}", param="messages")
        try:
            for part in parts:
                files.append(data_of(part["url"]))
                with _opened(files[-1]) as image:
                    pixels += image.width * image.height
        except Exception as error:  # Pillow raises a dozen types on hostile bytes
            reason = error if isinstance(error, AwaresError) else type(error).__name__
            message = f"image_url: not a readable {', '.join(FORMATS)} image in a data URL ({reason})"
            raise ApiError(400, message, "invalid_image", "messages") from error
        if pixels > limits.image_pixels or max(map(len, files), default=0) > limits.image_bytes:
            message = f"images: at most {limits.image_bytes} bytes each and {limits.image_pixels} px together"
            raise ApiError(413, message, "image_too_large", "messages")
        return files, pixels


class PolicyRequest(ChatRequest):
    call_bias: float | None = Field(None, allow_inf_nan=False)


class RawRequest(ChatRequest):  # with the fields that `RemoteEngine` sends to vLLM
    logit_bias: dict[Annotated[int, Field(ge=0, strict=False)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    return_token_ids: bool | None = None

    def work(self, pixels: int) -> int:
        """As in mode policy; a token of the answer counts as 20,000."""
        return super().work(pixels) + 20_000 * self.limit(0, 1024)


def read_request(body: bytearray, kind: type[ChatRequest], model: str) -> Any:
    """The request in ``body``; ApiError 400 names the first wrong field, 404 another model."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        key, message = ".".join(map(str, fault["loc"]))[:SHOWN], fault["msg"]
        if key in NEUTRAL:
            message = f"only {' or '.join(map(repr, NEUTRAL[key]))} is accepted here"
        raise ApiError(400, f"{key or 'body'}: {message}", param=key or None) from error
    check_model(request.model, model)
    return request


def check_model(name: str, model: str) -> None:
    """ApiError 404 if ``name`` is not that of our ``model``."""
    if name != model:
        raise ApiError(404, f"no model {name[:SHOWN]!r}: this is {model!r}", "model_not_found", "model")


def _opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file), formats=FORMATS)


def decode(file: bytes, min_side: int, max_side: int) -> Image.Image:
    """The image upright, in RGB, shrunk to ``max_side`` px; AwaresError for an unreadable one."""
    with _opened(file) as image:
        return cap(open_image(image, "image_url", min_side), max_side)


def data_of(url: str) -> bytes:
    """The content of a data URL (RFC 2397) in any legal spelling; AwaresError for another URL or media type."""
    header, comma, data = url.partition(",")
    scheme, _, media = header.strip().lower().partition(":")
    kind, *parameters = (part.strip() for part in media.split(";"))
    if scheme != "data" or not comma or not (kind.startswith("image/") or kind in ("", "application/octet-stream")):
        raise AwaresError(f"{url[:40]!r} is not a data URL (data:image/png;base64,...); others are not fetched")
    raw = data.partition("#")[0].encode("ascii")
    if b"%" in raw:  # decoded as quoted-printable, in C: urllib makes an object of every escape
        raw = binascii.a2b_qp(raw.replace(b"=", b"=3D").replace(b"%", b"="))
    if parameters[-1:] != ["base64"]:
        return raw
    raw = raw.translate(None, b" \t\n\f\r")
    return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)


def completion(model: str, text: str, cut: bool, prompt: int, written: int, **more: Any) -> Completion:
    """A ``chat.completion`` of ``written`` tokens after a prompt of ``prompt``; ``more`` is added to its usage."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop", "logprobs": None}
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written, **more}
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
    return {**head, "model": model, "choices": [choice], "usage": usage}


def as_events(reply: Completion, include_usage: bool) -> Iterator[str]:
    """The completion as a stream: the answer, its finish reason, usage if requested, [DONE]."""
    [choice], usage = reply["choices"], reply.pop("usage")
    whole = {"index": 0, "delta": choice["message"], "finish_reason": None, "logprobs": None}
    last = {**whole, "delta": {}, "finish_reason": choice["finish_reason"]}
    chunks: list[Completion] = [{"choices": [whole]}, {"choices": [last]}, {"choices": [], "usage": usage}]
    for chunk in chunks[: 3 if include_usage else 2]:
        yield f"data: {json.dumps({**reply, 'object': 'chat.completion.chunk', **chunk})}\n\n"
    yield "data: [DONE]\n\n"
