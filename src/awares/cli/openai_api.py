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

from PIL import Image, ImageOps
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException

from awares.cli.options import Limits
from awares.engine.images import MIN_SIDE, check_image
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


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "high"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | str = Field(
        union_mode="left_to_right"
    )

    def parts(self) -> list[TextPart | ImagePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions. Decoding is greedy: ``top_p``, ``seed`` and ``user`` have no effect."""

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
        parts = [part for message in self.messages for part in message.parts() if isinstance(part, ImagePart)]
        if len(parts) > limits.images:
            raise ApiError(400, f"{len(parts)} images: a request may have {limits.images}", param="messages")
        images: list[Image.Image] = []
        for part in parts:
            left = limits.image_pixels - sum(image.width * image.height for image in images)
            images.append(read_image(part.image_url.url, limits.image_bytes, left, min_side))
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
        reason = "not supported by this server" if fault["type"] == "extra_forbidden" else fault["msg"]
        param = ".".join(str(key) for key in fault["loc"] if not str(key).startswith("list[")) or None
        raise ApiError(400, f"{param or 'body'}: {reason}", param=param) from error
    if request.model != model:
        raise ApiError(404, f"no model {request.model!r}: this is {model!r}", "model_not_found", "model")
    return request


def read_image(url: str, most_bytes: int, most_pixels: int, min_side: int) -> Image.Image:
    """The image of a base64 data URL; ApiError 400 for an unreadable one, 413 for too many bytes or pixels."""
    header, _, data = url.partition(";base64,")
    if not header.startswith("data:image/"):
        message = f"image_url {url[:40]!r}: give a data URL, data:image/png;base64,...; nothing else is fetched"
        raise ApiError(400, message, "invalid_image", "messages")
    try:
        raw = base64.b64decode(data, validate=True)
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:  # reads the header, unpacks nothing
            if len(raw) <= most_bytes and image.width * image.height <= most_pixels:
                return check_image(ImageOps.exif_transpose(image), "image", min_side)
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
    """The completion as a stream: role, answer, finish reason, usage if requested, [DONE]."""
    choice, usage = reply["choices"][0], reply.pop("usage")
    steps: list[Any] = [({"role": "assistant", "content": ""}, None), ({"content": choice["message"]["content"]}, None)]
    for delta, finish in [*steps, ({}, choice["finish_reason"])]:
        chunk = {**reply, "object": "chat.completion.chunk"}
        chunk["choices"] = [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
        yield f"data: {json.dumps(chunk)}\n\n"
    if include_usage:
        yield f"data: {json.dumps({**chunk, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"
