"""OpenAI's chat-completions format: request bodies in; completions, chunks and errors out.

Nothing here knows of models, queues or sockets. Images come as base64 data URLs only: the server fetches no URL and
opens no file, so a request can reach nothing but the model.
"""

import base64
import binascii
import io
import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from awares.engine.images import MIN_SIDE, check_image
from awares.errors import AwaresError, AwaresValueError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # OpenAI's; Pillow's other readers are not for bytes from strangers


@dataclass(frozen=True)
class ServeSettings:
    """Limits of the server; AwaresValueError naming the one that is out of range.

    ``model``: the name that clients give. Per request: ``image_bytes`` of one image, ``image_pixels`` (width times
    height) of all together, number of ``images``, ``body_bytes``, ``prompt_tokens`` (visual ones included; in policy
    mode of the first turn), ``max_tokens`` of the answer, ``timeout`` in seconds from its head to its answer.
    ``queue``: requests held at a time, waiting or running. ``window``: seconds that a batch which is not full waits for
    more. ``shutdown``: seconds for what is under way at SIGTERM.
    """

    model: str = "awares"
    image_bytes: int = 20 * 2**20
    image_pixels: int = 50_000_000
    images: int = 16
    body_bytes: int = 32 * 2**20
    prompt_tokens: int = 16384
    max_tokens: int = 1024
    queue: int = 128
    timeout: float = 120.0
    window: float = 0.01
    shutdown: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "model" and not (math.isfinite(value) and (value > 0 or name == "window" and value == 0)):
                raise AwaresValueError(f"{name} is {value!r}: give a number above 0")


class ApiError(AwaresError):
    """A refusal that the client sees: HTTP ``status`` and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# Requests


class _Strict(BaseModel):
    """A field that the server would not heed is refused, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "high"] = "auto"  # the policy chooses its own detail, and the raw model sees all there is


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn; a string as content is one text part."""

    role: Literal["system", "user", "assistant"]
    content: list[Part]

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    def text(self) -> str:
        """The text parts, a line each."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    def urls(self) -> list[str]:
        """The image parts' URLs, in order."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


Asked = TypeVar("Asked", bound="ChatRequest")


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions, as far as both modes heed it. Decoding is greedy, or the request refused."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = 0.0
    n: Literal[1] = 1
    top_p: float = 1.0  # of no effect on greedy decoding, and so are the two below
    seed: int | None = None
    user: str | None = None

    @field_validator("temperature")
    @classmethod
    def _greedy(cls, value: float) -> float:
        if value != 0:
            raise ValueError("this server decodes greedily: use temperature 0")
        return value

    def limit(self, default: int, most: int) -> int:
        """Tokens that the answer may have; ApiError when more are asked for than ``most``."""
        asked = self.max_completion_tokens or self.max_tokens or min(default, most)
        if asked > most:
            raise ApiError(400, f"max_tokens is {asked}, but this server writes at most {most}", param="max_tokens")
        return asked


class PolicyRequest(ChatRequest):
    """``call_bias``: the dial; added to the logit of the call token at the first position."""

    call_bias: float = Field(0.0, allow_inf_nan=False)


class RawRequest(ChatRequest):
    """OpenAI's ``logit_bias``, and of vLLM's own fields those that say what this server does anyway."""

    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    return_token_ids: bool = False  # the prompt's ids come with the answer
    skip_special_tokens: Literal[False] = False
    spaces_between_special_tokens: Literal[False] = False
    repetition_penalty: float = Field(1.0, ge=1, le=1)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not all(key.isdecimal() for key in value):
            raise ValueError("map token ids to numbers from -100 to 100")
        return {int(key): bias for key, bias in value.items()}  # JSON has no keys but strings


def parse_request(body: bytes, kind: type[Asked], model: str) -> Asked:
    """The request in ``body``; ApiError 400 names the first field that is wrong, 404 is for another model's name.

    A field that is null counts as absent.
    """
    try:
        values = _cleaned(json.loads(body, parse_constant=_no_constant))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no valid JSON: {error}", "invalid_json") from error
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _param(first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = "this server does not support this field"
        raise ApiError(400, f"{param or 'body'}: {reason}", param=param) from error
    if request.model != model:
        raise ApiError(404, f"no model {request.model!r}: this is {model!r}", "model_not_found", "model")
    return request


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


def _cleaned(value: Any) -> Any:
    """``value`` without nulls; ValueError for half a surrogate pair, which JSON can hold and a tokenizer cannot."""
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items() if item is not None}
    if isinstance(value, str):
        value.encode()
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


def _param(place: tuple[int | str, ...]) -> str | None:
    """``messages[0].content[1].image_url.url``; pydantic names the kind of a part once more before its fields."""
    text = ""
    for before, item in zip((None, *place), place, strict=False):
        if item != before:
            text += f"[{item}]" if isinstance(item, int) else f".{item}"
    return text.removeprefix(".") or None


def read_images(urls: Sequence[str], settings: ServeSettings, min_side: int = MIN_SIDE) -> list[Image.Image]:
    """Upright RGB images from base64 data URLs; ApiError 400 when one cannot be read, 413 when they are too large."""
    if len(urls) > settings.images:
        raise ApiError(400, f"{len(urls)} images, but a request may have {settings.images}", None, "messages")
    images: list[Image.Image] = []
    for url in urls:
        pixels = settings.image_pixels - sum(image.width * image.height for image in images)
        images.append(_read_image(url, settings.image_bytes, pixels, min_side))
    return images


def _read_image(url: str, most_bytes: int, most_pixels: int, min_side: int) -> Image.Image:
    header, comma, data = url.partition(",")
    if not header.startswith("data:image/") or not header.endswith(";base64") or not comma:
        message = f"image_url {url[:40]!r}: give a data URL, data:image/png;base64,...; nothing else is fetched"
        raise ApiError(400, message, "invalid_image", "messages")
    if len(data) * 3 // 4 - 2 > most_bytes:
        raise ApiError(413, f"an image has more than {most_bytes} bytes", "image_too_large", "messages")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"image_url: not base64 ({error})", "invalid_image", "messages") from error
    return _decode(raw, most_pixels, min_side)


def _decode(raw: bytes, most_pixels: int, min_side: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if image.width * image.height > most_pixels:  # known from the header, before anything is unpacked
                size = f"{image.width}x{image.height} px where {most_pixels} px are left"
                raise ApiError(413, f"images too large: one has {size}", "image_too_large", "messages")
            return check_image(ImageOps.exif_transpose(image), "image", min_side)
    except ApiError:
        raise
    except AwaresError as error:
        raise ApiError(400, str(error), "invalid_image", "messages") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, whatever ours is
        raise ApiError(413, "images too large: one has far too many pixels", "image_too_large", "messages") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on hostile bytes, struct.error among them
        reason = f"not a readable {', '.join(FORMATS)} image ({type(error).__name__})"
        raise ApiError(400, f"image_url: {reason}", "invalid_image", "messages") from error


# Answers


@dataclass(frozen=True)
class Completion:
    """An answer. ``finish_reason``: stop or length; ``extra``: what ``usage.awares`` says beyond OpenAI's fields."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    extra: dict[str, Any] | None = None
    prompt_ids: list[int] | None = None  # where the request wants them

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage``, with the visual tokens in an object of its own."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        total = {"total_tokens": self.prompt_tokens + self.completion_tokens}
        return {**counts, **total, **({"awares": self.extra} if self.extra is not None else {})}


class Reply:
    """Builds the objects of one answer: they share id, time and model name."""

    def __init__(self, model: str) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def completion(self, done: Completion) -> dict[str, Any]:
        """A ``chat.completion``."""
        message = {"role": "assistant", "content": done.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": done.finish_reason, "logprobs": None}
        ids = {} if done.prompt_ids is None else {"prompt_token_ids": done.prompt_ids}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": done.usage(), **ids}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        """A ``chat.completion.chunk`` with one choice, as a server-sent event."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return event({**self.head, "object": "chat.completion.chunk", "choices": [choice]})

    def usage(self, done: Completion) -> str:
        """The chunk that closes a stream with ``include_usage``: no choice, all counts."""
        return event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": done.usage()})


def event(values: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(values)}\n\n"
