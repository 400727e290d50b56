"""The chat format of Qwen2.5-VL and Qwen3-VL: special tokens, chat template, and how an assistant turn is read back."""

from pathlib import Path
from typing import Any

TOOL_CALL = "<tool_call>"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, *_VISION)
TOOL_TOKENS = (TOOL_CALL, "</tool_call>")  # one token each; <tool_response> is one only from Qwen3 on

# Qwen2.5-VL's template, plus tool calls, tool turns and the generation marks that give the assistant mask. A turn
# renders the same whatever follows it (prefix-preserving), and the end-of-turn token belongs to the assistant's turn.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")

# transformers' `parse_response` (which TRL's GRPOTrainer calls) reads an assistant turn back into a message with this.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {"open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json"}
        | {"transform": {"type": "function", "function": "{content}"}},
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def install(tokenizer: Any) -> None:
    """Set chat template, response template and left padding on a tokenizer, in place; they are saved with it."""
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    tokenizer.padding_side = "left"


def answer_text(text: str) -> str:
    """An assistant turn without end-of-turn tokens and outer white space."""
    return text.split(END_OF_TURN, 1)[0].split(END_OF_TEXT, 1)[0].strip()
