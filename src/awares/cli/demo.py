"""The page of ``awares demo``: drop an image, ask a question, watch both turns. Needs gradio (`make demo`)."""

import html
import io
import math
import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("MPLBACKEND", "agg")  # opens no window

import gradio as gr
import pandas as pd
from PIL import Image

from awares.cli.main import Serve
from awares.engine.images import open_image, upright_size
from awares.engine.jsonl import read_records
from awares.errors import AwaresError, AwaresValueError, faults_of
from awares.method.rollout import Trajectory
from awares.mini.drawing import Style
from awares.policy import AwaRes
from awares.study import figures
from awares.study.tables import show_table

EXAMPLES = Path(__file__).resolve().parents[3] / "data/examples"
UNSURE = 0.5  # logits between the two best tokens: below it, answers to evaluation rows are wrong five times as often
WAITING = 20  # clicks; more are refused


class SentImage(gr.Image):
    """An image as the path of the file that was sent: gradio's own would decode it first, whatever it is."""

    is_template = True  # of gr.Image: drawn as one

    def preprocess(self, payload: Any) -> str | None:  # noqa: D102
        return payload and payload.path


def run_demo(policy: AwaRes, base: AwaRes | None, name: str, generated: bool, host: str, port: int) -> None:
    """Serve the page until SIGINT. ``base`` answers from the full and the half view; ``generated``: as in `doubts`."""
    figures.style(110)
    world = " It reads generated pictures like the examples, not photographs." if generated else ""

    def ask(source: str | None, text: str, call_bias: float) -> tuple[str, Image.Image | None, str]:
        try:
            return reply(policy, base, generated, source, text, call_bias)
        except AwaresError as error:
            return f"<p role='alert'><b>{html.escape(str(error))}</b></p>", None, ""

    image = SentImage(label="Image", type="filepath", sources=["upload", "clipboard"], elem_id="image")
    question = gr.Textbox(label="Question", elem_id="question")
    bias = gr.Slider(-10, 10, 0, step=0.5, label="Call bias (logits): above 0 it requests regions more often")
    picture = gr.Image(elem_id="turns", show_label=False, interactive=False, buttons=["fullscreen"])
    rows = read_records(EXAMPLES / "questions.jsonl")
    page = gr.Interface(
        ask,
        [image, question, bias],
        [gr.HTML(elem_id="said"), picture, gr.HTML(elem_id="systems")],
        title="AwaRes",
        description=f"Policy: {name}.{world} It sees the image at half resolution and may request regions.",
        examples=[[str(EXAMPLES / row["image"]), row["question"], 0] for row in rows] or None,
        cache_examples=False,
        submit_btn=gr.Button("Ask", variant="primary", elem_id="ask"),
        flagging_mode="never",
        analytics_enabled=False,
    )
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from other hosts
    limits = {"max_file_size": Serve.body_bytes, "footer_links": []}
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    page.launch(server_name=host, server_port=port or None, theme=theme, show_error=True, **limits)


def reply(
    policy: AwaRes, base: AwaRes | None, generated: bool, source: str | None, question: str, call_bias: float
) -> tuple[str, Image.Image, str]:
    """What the page shows for one question: text about both turns, their picture, and the systems in a table.

    AwaresError for a missing or broken image, one above the pixels of `Serve`, or an empty question.
    """
    if not source:
        raise AwaresValueError("no image: drop one, or choose an example")
    content, most = Path(source).read_bytes(), Serve.image_pixels
    with faults_of("image: corrupt or not an image, convert it to PNG or JPEG"):
        width, height = upright_size(content)
    if width * height > most:  # before it is decoded
        raise AwaresValueError(f"image: {width} x {height} px, but the demo accepts {most:,} px: shrink it")
    image = open_image(content)
    done = policy.ask(image, question, call_bias=call_bias)
    drawn = figures.show(figures.interaction_figure({"image": image, "question": question}, done))
    runs = {"AwaRes": done}
    for view in ("full", "half"):
        which = f"{'base model' if base else 'the policy itself'}, {view} resolution"
        runs[which] = (base or policy).engine.answer([image], [question], view=view)[0]
    lines = [(which, one.answer, one.visual_tokens, one.rtr) for which, one in runs.items()]
    table = show_table(pd.DataFrame(lines, columns=["system", "answer", "visual tokens", "rtr"])).data
    said = "".join(
        f"<p role='alert'>⚠ {html.escape(one)}</p>" for one in doubts(policy, generated, image, question, done)
    )
    if done.call_logprob is not None:  # the bias adds to the log-odds of a call
        odds = done.call_logprob - math.log(-math.expm1(min(done.call_logprob, -1e-9))) + call_bias
        said += f"<p>Probability of a call: {1 / (1 + math.exp(-odds)):.3f}.</p>"
    choice = f"It requests {', '.join(done.crops)}." if done.crops else "It answers without a crop."
    saved = f"{done.full_visual_tokens - done.visual_tokens} of {done.full_visual_tokens} visual tokens saved"
    turns = "".join(f"<dt>{turn.role}</dt><dd>{html.escape(turn.text)}</dd>" for turn in done.turns)
    said += f"<p>{choice} Answer: <b>{html.escape(done.answer)}</b> ({saved})</p>"
    said += f"<details><summary>Text of the turns</summary><dl>{turns}</dl></details>"
    return said, Image.open(io.BytesIO(drawn.data)), table


def doubts(policy: AwaRes, generated: bool, image: Image.Image, question: str, done: Trajectory) -> list[str]:
    """Why the answer may be a guess: sizes and words that training did not have, or a close decision between tokens.

    ``generated``: the policy was trained on the pictures of `mini.drawing`. A word is unknown to the tokenizer if it
    breaks into more than half as many tokens as letters.
    """
    sides = [side for size in Style().sizes for side in size]
    low, high, found = min(sides), max(sides), []
    if generated and not (low <= min(image.size) and max(image.size) <= high):
        size = f"The image has {image.width} x {image.height} px"
        found.append(f"{size}; the policy was trained on generated pictures with sides of {low} to {high} px.")
    tokenizer = policy.engine.processor.tokenizer
    words = re.findall(r"[^\W\d_]{4,}", question)
    if strange := [word for word in words if len(tokenizer.tokenize(f" {word}")) > len(word) / 2]:
        found.append(f"Words that the policy has not learned: {', '.join(strange)}.")
    if done.margin < UNSURE:
        found.append(f"The policy is unsure: its two best tokens were {done.margin:.2f} logits apart at one place.")
    return found
