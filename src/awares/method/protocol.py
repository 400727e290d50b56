"""The conversation of PAPER §1 and §2.3: system prompt, tool schema, messages, and the text form of a call.

A conversation is ``[system, user(I_low, q), assistant(a)]`` or ``[system, user(I_low, q), assistant(call C),
tool(crops), assistant(a)]``, in Qwen2.5-VL's chat format with its ``<tool_call>`` JSON. The system prompt has the tool
schema, because TRL's vision collator does not pass ``tools=`` to the template. The released checkpoint (PAPER §7)
writes ``GET_CROPS: ['0', '5']`` instead and gets the crops in a user turn. A `Protocol` is one of these two forms.
Calls are rendered in one form; the parser reads both. No other module renders or parses a call.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from awares.engine.chat_format import END_OF_TURN, SPECIAL_TOKENS, TOOL_CALL, TOOL_TOKENS, answer_text
from awares.errors import AwaresFileError, AwaresValueError
from awares.method.crops import CROPS, allowed, cut, is_free, low_resolution
from awares.settings import FREE_BOX, Params

TOOL_NAME = "crop"
PLAIN_SYSTEM = "You are a helpful assistant."
FREE_FORM = "left,top,right,bottom"  # a free box in the prompt, in 1/1000 of the image sides


def system_prompt(offered: Sequence[str]) -> str:
    """Our system prompt with the tool and its ``offered`` regions."""
    offered = [FREE_FORM if name == FREE_BOX else name for name in offered]
    return (
        "You are a helpful assistant. The image is shown at half resolution. Answer the question. "
        "Where something is too small to read, call the tool to see regions of the image at full resolution.\n"
        '<tools>\n{"name": "crop", "arguments": {"regions": ' + json.dumps(offered) + "}}\n</tools>"
    )


SYSTEM = system_prompt(tuple(CROPS))
TOOL_ERROR = "error: no such region"
RELEASED_CALL = "GET_CROPS"
_IDS = {str(number): name for number, name in enumerate(CROPS) if name != "all"}  # the released policy's '0' .. '8'
RELEASED_SYSTEM = (
    "You answer questions about an image, which is shown at low resolution. If it is too coarse to answer from, write "
    "GET_CROPS: and a list of region ids, for example GET_CROPS: ['3'] or GET_CROPS: ['0', '5'], to see those regions "
    f"at high resolution; the ids are {_IDS}, and 'all' is the whole image. Otherwise write the answer."
)


@dataclass(frozen=True)
class Call:
    """The request of an assistant turn.

    ``status``: none (an answer), valid, recovered (readable, but not the exact format), malformed (no readable region).
    """

    crops: tuple[str, ...]
    status: str
    text: str


@dataclass(frozen=True)
class Protocol:
    """The text form of an interaction.

    ``system``: the prompt; ``opening``: the text that every call begins with; ``offered``: the regions of the tool;
    ``region_budget``: a region that covers a larger fraction of the image is shown at lower density; ``margin``: px by
    which a region is widened (`crops.cut`); ``geometry``: the way of halving and cropping, ours or released.
    """

    name: str
    system: str
    opening: str
    offered: tuple[str, ...] = tuple(CROPS)
    region_budget: float = 1.0
    margin: int = 0
    geometry: str = "ours"

    def low(self, image: Image) -> Image:
        """I_low, the view of turn 1."""
        return low_resolution(image, self.geometry)

    def cut(self, image: Image, name: str) -> Image:
        """The picture that the tool returns for region ``name``."""
        return cut(image, name, self.region_budget, self.margin, self.geometry)

    def call_message(self, crops: Iterable[str]) -> dict[str, Any]:
        """The assistant message that requests ``crops``; AwaresValueError for an unknown, repeated or missing name."""
        if self.name != "ours":
            return {"role": "assistant", "content": [_text(self.render_call(crops))]}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _function(crops)}]}

    def render_call(self, crops: Iterable[str]) -> str:
        """The text of that message, without the end-of-turn token."""
        function = _function(crops)
        if self.name == "ours":
            return f"<tool_call>\n{json.dumps(function)}\n</tool_call>"
        ids = {name: number for number, name in _IDS.items()}
        return f"{RELEASED_CALL}: {[ids.get(name, name) for name in function['arguments']['regions']]}"

    def reply(self, images: Sequence[Image | None], error: str | None = None) -> dict[str, Any]:
        """The message that opens turn 2: the requested crops in order (None: a placeholder), or an error as text."""
        content = [_text(error)] if error else [_image(image) for image in images]
        sender = {"role": "tool", "name": TOOL_NAME} if self.name == "ours" else {"role": "user"}
        return {**sender, "content": content}


OURS = Protocol("ours", SYSTEM, TOOL_CALL)
RELEASED = Protocol("released", RELEASED_SYSTEM, RELEASED_CALL)


def get_protocol(name: str, system: str | None = None, **fields: Any) -> Protocol:
    """The protocol ours or released, with ``system`` as its prompt if given, and ``fields`` of `Protocol`.

    AwaresValueError for another name.

    The released checkpoint was trained with the prompt on its model card: give that one to reproduce its numbers.
    """
    known = {protocol.name: protocol for protocol in (OURS, RELEASED)}
    if name not in known:
        raise AwaresValueError(f"protocol.name: unknown {name!r}, choose from {', '.join(known)}")
    return replace(known[name], **fields, system=system or known[name].system)


def from_params(params: Params) -> Protocol:
    """The protocol ``protocol.name`` for ``crops.offered``, with the prompt of ``protocol.system_file`` if set."""
    offered, system = params.crops.offered, None
    if params.protocol.system_file:
        system = read_system(params.path(params.protocol.system_file))
    elif offered != tuple(CROPS):
        system = system_prompt(offered)
    section = params.crops
    shown = {"region_budget": section.region_budget, "margin": section.margin, "geometry": section.geometry}
    return get_protocol(params.protocol.name, system, offered=offered, **shown)


def read_system(file: Path) -> str:
    """The system prompt in a text file; AwaresFileError without one."""
    if not (text := file.read_text(encoding="utf-8").strip() if file.is_file() else ""):
        raise AwaresFileError(f"{file}: no system prompt there; protocol.system_file or system= names it")
    return text


# Rendering


def tool_as_user(message: dict[str, Any]) -> dict[str, Any]:
    """The tool's message as a user message with the same text, for servers that refuse images in tool turns."""
    content = [_text("<tool_response>\n"), *message["content"], _text("\n</tool_response>")]
    return {"role": "user", "content": content}


def user_messages(question: str, images: Sequence[Image | None], system: str = PLAIN_SYSTEM) -> list[dict[str, Any]]:
    """System and user turn: images first, then the question. ``None`` is an image placeholder."""
    check_question(question)
    user = {"role": "user", "content": [*(_image(image) for image in images), _text(question)]}
    return [{"role": "system", "content": [_text(system)]}, user]


def messages(
    question: str,
    low_image: Image | None,
    crops: Sequence[str] | None = None,
    crop_images: Sequence[Image | None] | None = None,
    answer: str | None = None,
    protocol: Protocol = OURS,
) -> list[dict[str, Any]]:
    """A two-turn conversation of the policy (PAPER §2.3) in the form of ``protocol``.

    ``crops``: the call, none for a direct answer; ``crop_images``: their images in this order (default: placeholders).
    Without ``answer`` the conversation ends where the model continues.
    """
    conversation = user_messages(question, [low_image], protocol.system)
    if crops:
        pictures = [None] * len(crops) if crop_images is None else list(crop_images)
        if len(pictures) != len(crops):
            raise AwaresValueError(f"{len(crops)} crops requested but {len(pictures)} crop images given")
        conversation += [protocol.call_message(crops), protocol.reply(pictures)]
    if answer is not None:
        conversation.append({"role": "assistant", "content": [_text(answer)]})
    return conversation


def tool_suffix(tokenizer: Any, message: dict[str, Any]) -> str:
    """The text between the end-of-turn token of the assistant's call and the next assistant turn."""
    dummy = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    before = tokenizer.apply_chat_template(dummy, tokenize=False)
    after = tokenizer.apply_chat_template([*dummy, message], tokenize=False, add_generation_prompt=True)
    return after[before.rindex(END_OF_TURN) + len(END_OF_TURN) :]


def check_question(question: str) -> None:
    """AwaresValueError if a question is empty or contains a control token of the chat format."""
    if not question or not question.strip():
        raise AwaresValueError("question is empty: write one")
    if any("\ud800" <= letter <= "\udfff" for letter in question):
        raise AwaresValueError("question has half of a surrogate pair, which is no text: write it in UTF-8")
    held = [token for token in (*SPECIAL_TOKENS, *TOOL_TOKENS) if token in question]
    if held:
        raise AwaresValueError(f"question {question[:60]!r} contains the control token {held[0]}: remove it")


def _function(crops: Iterable[str]) -> dict[str, Any]:
    regions = list(crops)
    unknown = [name for name in regions if name not in CROPS and not is_free(name)]
    if unknown or not regions or len(set(regions)) < len(regions):
        raise AwaresValueError(f"crops {regions}: name one or more of {', '.join(CROPS)}, each once")
    return {"name": TOOL_NAME, "arguments": {"regions": regions}}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(image: Image | None) -> dict[str, Any]:
    return {"type": "image"} if image is None else {"type": "image", "image": image}


# Parsing

_WORDS = {"upper": "top", "lower": "bottom", "centre": "center", "middle": "center"}
_WORDS |= {"full": "all", "whole": "all", "entire": "all"}
_NOISE = {"half", "quadrant", "corner", "image", "region", "side", "the", "part"}
_STRICT = re.compile(r"\s*<tool_call>\s*(\{.*\})\s*</tool_call>\s*", re.DOTALL)
_CALL_LIKE = re.compile(
    r"</?tool_call>|(?i:GET_CROPS)|[\"']arguments[\"']\s*:|\bregions[\"']?\s*[:=]\s*\[|\{\s*[\"']name[\"']\s*:"
)
# The released code's prompt and parser also accept GET_CROPS without the colon.
_KEY = re.compile(r"(?:(?:regions?|crops?)[\"']?\s*[:=]|GET_CROPS[\"']?\s*[:=]?)\s*(.*)", re.DOTALL | re.IGNORECASE)
_OBJECT = re.compile(r"(?=\{\s*[\"'](?:name|arguments)[\"']\s*:)")  # where one of several calls in a tag begins
_NUMBER = re.compile(r"-?(?:\d{1,6}(?:\.\d*)?|\.\d+)")
# Signs that Unicode's compatibility forms leave as they are
_SIGNS = str.maketrans("“”„«»「」‘’‚‹›−–‑、【】", '"' * 7 + "'" * 5 + "---" + ",[]")
_TAGS = (  # an XML call, and the JSON for it
    (re.compile(r"<(?:function|invoke)(?:=| name=)[\"']?(\w+)[\"']?>"), r'{"name": "\1", '),
    (re.compile(r"<parameter(?:=| name=)[\"']?(\w+)[\"']?>"), r'"\1": '),
)
_NAME = re.compile(r"[\"']name[\"']\s*:\s*[\"']([^\"']*)[\"']")


def parse_call(text: str, protocol: Protocol = OURS) -> Call:
    """Read an assistant turn: strictly first, then with tolerance (PAPER §5, formatting; §7, the released format).

    Calls of both protocols are read, but only the exact format of ``protocol`` is valid. A region that the tool does
    not offer counts as unknown.
    """
    text = answer_text(text)
    plain = _plain(text)
    if not _CALL_LIKE.search(plain):
        return Call((), "none", text)
    strict = _parse_strict(text) if protocol.name == "ours" else ()
    if strict and all(allowed(name, protocol.offered) for name in strict):
        return Call(strict, "valid", text)
    found: list[str] = []
    tags = plain.split(TOOL_CALL)[1:] or [plain]
    for block in (block for tag in tags for block in _OBJECT.split(tag)[1:] or [tag]):
        tool = _NAME.search(block)
        if tool and tool.group(1).strip().lower().removeprefix("functions.") != TOOL_NAME:
            continue
        names = _free_boxes(block) if FREE_BOX in protocol.offered else _crop_names(block)
        found += [name for name in names if name not in found and allowed(name, protocol.offered)]
    if protocol.name != "ours" and found and protocol.render_call(found) == text:
        return Call(tuple(found), "valid", text)
    return Call(tuple(found), "recovered" if found else "malformed", text)


def _plain(text: str) -> str:
    """``text`` in ASCII punctuation, with the quotes of nested JSON unescaped and XML calls as JSON."""
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS))
    text = re.sub(r"\\+[nt]", " ", text).replace("\\", "")
    for tag, as_json in _TAGS:
        text = tag.sub(as_json, text)
    return text


def _parse_strict(text: str) -> tuple[str, ...]:
    """The regions of exactly one JSON call with the right keys and no region twice; () for anything else."""
    found = _STRICT.fullmatch(text)
    try:
        call = json.loads(found.group(1)) if found else None
    except (ValueError, RecursionError):
        return ()
    match call:
        case {"name": name, "arguments": {"regions": [*regions], **more}, **others}:
            if name == TOOL_NAME and not more and not others and all(isinstance(one, str) for one in regions):
                return tuple(regions) if len(set(regions)) == len(regions) else ()
    return ()


def _crop_names(block: str) -> tuple[str, ...]:
    """Crop names from one call-like piece of text; () if none is readable."""
    key = _KEY.search(block)
    tail = (key.group(1) if key else block.split("</tool_call>")[0]).strip()
    if tail.startswith("["):
        tail = tail[1:].split("]", 1)[0]
        numbers = re.findall(r"\d+", tail)
        if "[" in tail or re.search(r"\d\.\d", tail) or (len(numbers) > 3 and max(map(len, numbers)) > 1):
            return ()  # [[0, 0, 500, 500]] and ["0,0,500,500"] are boxes: their numbers are not crop ids
    elif key:
        tail = re.split(r"[}<\n]", tail, maxsplit=1)[0]
    names = map(_canonical, re.split(r"[,;]| and ", tail))
    return tuple(dict.fromkeys(name for name in names if name))


def _free_boxes(block: str) -> tuple[str, ...]:
    """Free boxes from one call-like piece of text: four numbers alone between brackets or quotes, rounded.

    Five numbers, one below 0, or fractions of a side form no box: a guess would show another place.
    """
    boxes = []
    for part in re.split(r"[\[\](){}<>\"'`:=]", block)[:-1]:  # the last part has no end: its number may be cut off
        items = re.split(r"\s*[,;]\s*|\s+", re.sub(r"^(?:\s*[a-z]+\s)+", "", part, flags=re.IGNORECASE).strip())
        if len(items) == 4 and all(map(_NUMBER.fullmatch, items)):
            edges = [float(item) for item in items]
            if max(edges) > 1:
                boxes.append(",".join(str(round(edge)) for edge in edges))
    return tuple(dict.fromkeys(box for box in boxes if is_free(box)))


def _canonical(item: str) -> str | None:
    """`Upper left corner` -> top-left, `'5'` -> top, `all` -> all; None for anything else."""
    item = item.strip(" \t\n\"'`.[](){}").lower()
    if item in _IDS:
        return _IDS[item]
    words = [_WORDS.get(word, word) for word in re.split(r"[-_ ]+", item) if word not in _NOISE]
    name = "-".join(words)
    squeezed = {crop.replace("-", ""): crop for crop in CROPS}
    return squeezed.get(name.replace("-", ""))
