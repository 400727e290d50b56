"""The requests and replies of OpenAI's chat completions, as far as ``awares serve`` supports them.

Images are base64 data URLs: the server fetches no URL and opens no file.
"""

import base64
import io
import json
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from openai.types.chat import ChatCompletionContentPartImageParam as ImagePart
from openai.types.chat import ChatCompletionContentPartTextParam as TextPart
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.exceptions import HTTPException

from awares.cli.options import Limits
from awares.engine.images import MIN_SIDE, open_image
from awares.errors import AwaresError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow's other readers are not for bytes from strangers


class ApiError(HTTPException):
    """A refusal; the client gets it as OpenAI's error object."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message, {"Retry-After": "1"} if status == 429 else None)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Strict(BaseModel, extra="forbid", strict=True):
    """An unknown field is refused, not ignored; null stands for the default."""


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[ContentPart], BeforeValidator(_as_parts)]


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions. Without effect: top_p, seed, user, detail."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: dict[Literal["include_usage"], bool] | None = None
    temperature: float | None = Field(None, ge=0, le=0)
    n: Literal[1] | None = None
    top_p: float | None = None
    seed: int | None = None
    user: str | None = None

    def limit(self, default: int, most: int) -> int:
        """Tokens that the answer may have, at most ``most``."""
        return min(self.max_completion_tokens or self.max_tokens or default, most)

    def images(self, limits: Limits, min_side: int = MIN_SIDE) -> list[Image.Image]:
        """Upright RGB images in the order of the messages; ApiError for bad ones or too many."""
        parts = [part for message in self.messages for part in message.content]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        if len(urls) > limits.images:
            raise ApiError(400, f"{len(urls)} images: a request may have {limits.images}", param="messages")
        images, left = list[Image.Image](), limits.image_pixels
        for url in urls:
            images.append(read_image(url, limits.image_bytes, left, min_side))
            left -= images[-1].width * images[-1].height
        return images


class PolicyRequest(ChatRequest):
    call_bias: float | None = Field(None, allow_inf_nan=False)


class RawRequest(ChatRequest):  # with the fields that `RemoteEngine` sends to vLLM
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: Literal[False] | None = None
    spaces_between_special_tokens: Literal[False] | None = None
    repetition_penalty: float | None = Field(None, ge=1, le=1)


def read_request(body: bytearray, kind: type[ChatRequest], model: str) -> Any:
    """The request in ``body``; ApiError 400 names the first wrong field, 404 another model."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, fault["loc"])) or None
        raise ApiError(400, f"{param or 'body'}: {fault['msg']}", param=param) from error
    if request.model != model:
        raise ApiError(404, f"no model {request.model!r}: this is {model!r}", "model_not_found", "model")
    return request


def read_image(url: str, most_bytes: int, most_pixels: int, min_side: int) -> Image.Image:
    """The image of a base64 data URL; ApiError 400 for an unreadable one, 413 for too many bytes or pixels."""
    header, _, data = url.partition(";base64,")
    try:
        if not header.startswith("data:image/"):
            raise AwaresError(f"{url[:40]!r} is no data URL, data:image/png;base64,...; nothing else is fetched")
        raw = base64.b64decode(data, validate=True)
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:  # reads the header, unpacks nothing
            if len(raw) <= most_bytes and image.width * image.height <= most_pixels:
                return open_image(image, "image", min_side)
            size = f"{len(raw)} bytes, {image.width}x{image.height} px"
    except Exception as error:  # Pillow's decoders raise a dozen types on hostile bytes
        reason = error if isinstance(error, AwaresError) else type(error).__name__
        message = f"image_url: not a readable {', '.join(FORMATS)} image in base64 ({reason})"
        raise ApiError(400, message, "invalid_image", "messages") from error
    message = f"an image of {size}: at most {most_bytes} bytes and, of this request, {most_pixels} px are left"
    raise ApiError(413, message, "image_too_large", "messages")


def completion(model: str, text: str, cut: bool, prompt: int, written: int, **more: Any) -> dict[str, Any]:
    """A ``chat.completion`` of ``written`` tokens after a prompt of ``prompt``; ``more`` is added to its usage."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop", "logprobs": None}
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written, **more}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}


def as_events(reply: dict[str, Any], include_usage: bool) -> Iterator[str]:
    """The completion as a stream: the answer, its finish reason, usage if requested, [DONE]."""
    [choice], usage = reply["choices"], reply.pop("usage")
    whole = {"index": 0, "delta": choice["message"], "finish_reason": None, "logprobs": None}
    last = {**whole, "delta": {}, "finish_reason": choice["finish_reason"]}
    chunks: list[dict[str, Any]] = [{"choices": [whole]}, {"choices": [last]}]
    if include_usage:
        chunks.append({"choices": [], "usage": usage})
    for chunk in chunks:
        yield f"data: {json.dumps({**reply, 'object': 'chat.completion.chunk', **chunk})}\n\n"
    yield "data: [DONE]\n\n"
