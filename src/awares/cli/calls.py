"""What `protocol.parse_call` accepts and rejects, as a table: the tests hold the parser to it and README.md shows it.

``valid`` is a call in the very format of the protocol in use, ``recovered`` one that can be read all the same, ``malformed`` a
call for nothing (the policy gets an error in words and answers from what it has), ``none`` an answer.
"""

from dataclasses import dataclass

from awares.method.protocol import OURS


@dataclass(frozen=True)
class Example:
    """A turn, what it is to our protocol and to the released one, and the crops that it asks for."""

    text: str
    ours: str
    released: str
    crops: tuple[str, ...]
    note: str


def _tool(arguments: str) -> str:
    return OURS.render_call(["top"]).replace('["top"]', arguments)


EXAMPLES: tuple[Example, ...] = (
    # In the format of one protocol
    Example(OURS.render_call(["top"]), "valid", "recovered", ("top",), "our format"),
    Example(_tool('["bottom", "center"]'), "valid", "recovered", ("bottom", "center"), "several, in the order asked"),
    Example(_tool('["all"]'), "valid", "recovered", ("all",), "the whole image"),
    Example("GET_CROPS: ['3']", "recovered", "valid", ("bottom-right",), "the paper's format"),
    Example("GET_CROPS: ['0', '5']", "recovered", "valid", ("top-left", "top"), "several ids"),
    Example("GET_CROPS: ['all']", "recovered", "valid", ("all",), "the whole image"),
    # Variants of the paper's format
    Example("GET_CROPS: ['0','5']", "recovered", "recovered", ("top-left", "top"), "no space"),
    Example("GET_CROPS:['0', '5']", "recovered", "recovered", ("top-left", "top"), "no space after the colon"),
    Example(
        "GET_CROPS ['3']", "recovered", "recovered", ("bottom-right",), "no colon, as the released evaluation asks"
    ),
    Example('GET_CROPS: ["0", "5"]', "recovered", "recovered", ("top-left", "top"), "double quotes"),
    Example("GET_CROPS: [0, 5]", "recovered", "recovered", ("top-left", "top"), "numbers"),
    Example("GET_CROPS: [0,5,6,7]", "recovered", "recovered", ("top-left", "top", "bottom", "left"), "four numbers"),
    Example("GET_CROPS: 5", "recovered", "recovered", ("top",), "no list"),
    Example("GET_CROPS: ['top-left']", "recovered", "recovered", ("top-left",), "a name for an id"),
    Example("GET_CROPS: ['5', '5']", "recovered", "recovered", ("top",), "one twice"),
    Example("GET_CROPS: ['5', '9']", "recovered", "recovered", ("top",), "an unknown id beside a known one"),
    Example("GET_CROPS: ['0', '5'", "recovered", "recovered", ("top-left", "top"), "cut off"),
    Example("get_crops: ['8']", "recovered", "recovered", ("right",), "small letters"),
    Example("It is too small. GET_CROPS: ['4']", "recovered", "recovered", ("center",), "words before"),
    # Variants of ours
    Example(_tool('"top"'), "recovered", "recovered", ("top",), "no list"),
    Example(_tool('["Upper left", "centre"]'), "recovered", "recovered", ("top-left", "center"), "other words"),
    Example(_tool('["top", "top"]'), "recovered", "recovered", ("top",), "one twice"),
    Example(_tool('["left", "nowhere"]'), "recovered", "recovered", ("left",), "an unknown name beside a known one"),
    Example(_tool("['right']").replace('"', "'"), "recovered", "recovered", ("right",), "single quotes"),
    Example("<tool_call>top-left and right</tool_call>", "recovered", "recovered", ("top-left", "right"), "no JSON"),
    # Calls for nothing
    Example("GET_CROPS: []", "malformed", "malformed", (), "no region"),
    Example("GET_CROPS: ['9']", "malformed", "malformed", (), "an unknown id"),
    Example("GET_CROPS", "malformed", "malformed", (), "cut off too early"),
    Example(_tool("[]"), "malformed", "malformed", (), "no region"),
    Example(_tool('["nowhere"]'), "malformed", "malformed", (), "an unknown name"),
    Example(_tool("[[0, 0, 500, 500]]"), "malformed", "malformed", (), "a box is no region"),
    Example(_tool('["0,0,500,500"]'), "malformed", "malformed", (), "nor is its text"),
    Example(_tool('["top"]').replace("crop", "zoom"), "malformed", "malformed", (), "another tool"),
    # Answers
    Example("top left", "none", "none", (), "a place as an answer"),
    Example("['0', '5']", "none", "none", (), "a list as an answer"),
    Example("all", "none", "none", (), "a word of the protocol as an answer"),
    Example("crop: wheat", "none", "none", (), "a word that looks like a key"),
)


def markdown() -> str:
    """The table for a page: turn, status under either protocol, crops, note."""
    lines = ["| the policy writes | ours | released | crops | |", "|---|---|---|---|---|"]
    for one in EXAMPLES:
        text = " ".join(one.text.split()).replace("|", "\\|")
        lines.append(f"| `{text}` | {one.ours} | {one.released} | {', '.join(one.crops)} | {one.note} |")
    return "\n".join(lines)
