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

from awares.cli.options import Limits
from awares.engine.images import open_image, upright_size
from awares.engine.jsonl import read_records
from awares.errors import AwaresError, AwaresRequestError, AwaresValueError, faults_of
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
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from other hosts
    built = build_page(policy, base, name, generated).queue(max_size=WAITING, default_concurrency_limit=1)
    limits = {"max_file_size": Limits().image_bytes, "footer_links": []}
    built.launch(server_name=host, server_port=port or None, theme=theme, show_error=True, **limits)


def build_page(policy: AwaRes, base: AwaRes | None, name: str, generated: bool) -> gr.Blocks:
    """The page of one policy."""
    world = " It reads generated pictures like the examples, not photographs." if generated else ""
    with gr.Blocks(title="AwaRes", analytics_enabled=False) as built:
        gr.Markdown(f"# AwaRes\nPolicy: {name}.{world} It sees the image at half resolution and may request regions.")
        with gr.Row():
            with gr.Column():
                image = SentImage(label="Image", type="filepath", sources=["upload", "clipboard"], elem_id="image")
                question = gr.Textbox(label="Question", elem_id="question")
                about = "Call bias (logits): above 0 it requests regions more often"
                bias = gr.Slider(-10, 10, 0, step=0.5, label=about)
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                if (EXAMPLES / "questions.jsonl").is_file():
                    rows = read_records(EXAMPLES / "questions.jsonl")
                    shown = [[str(EXAMPLES / row["image"]), row["question"]] for row in rows]
                    gr.Examples(shown, [image, question], cache_examples=False, label="Examples that it can read")
            with gr.Column(scale=2):
                look = {"show_label": False, "interactive": False, "buttons": ["fullscreen"]}
                outputs = [gr.HTML(elem_id="said"), gr.Image(elem_id="turns", **look), gr.HTML(elem_id="systems")]

        def ask(source: str | None, text: str, call_bias: float) -> tuple[str, Image.Image | None, str]:
            try:
                return reply(policy, base, generated, source, text, call_bias)
            except AwaresError as error:
                return f"<p role='alert'><b>{html.escape(str(error))}</b></p>", None, ""

        for event in (button.click, question.submit):
            event(ask, [image, question, bias], outputs)
    return built


def reply(
    policy: AwaRes, base: AwaRes | None, generated: bool, source: str | None, question: str, call_bias: float
) -> tuple[str, Image.Image, str]:
    """What the page shows for one question: text about both turns, their picture, and the systems in a table.

    AwaresError for a missing or broken image, one above the pixels of `Limits`, or an empty question.
    """
    if not source:
        raise AwaresValueError("no image: drop one, or choose an example")
    image = read(Path(source))
    try:
        done = policy.ask(image, question, call_bias=call_bias)
    except AwaresRequestError:
        if call_bias or not getattr(policy.engine, "scores", False):
            raise
        served: Any = policy.engine
        served.scores = False  # the server has no log-probabilities: no probability is shown
        done = policy.ask(image, question)
    drawn = figures.show(figures.interaction_figure({"image": image, "question": question}, done))
    runs = {"AwaRes": done}
    for view in ("full", "half"):
        which = f"{'base model' if base else 'the policy itself'}, {view} resolution"
        runs[which] = (base or policy).engine.answer([image], [question], view=view)[0]
    lines = [(which, one.answer, one.visual_tokens, one.rtr) for which, one in runs.items()]
    table = show_table(pd.DataFrame(lines, columns=["system", "answer", "visual tokens", "rtr"])).data
    found = doubts(policy, generated, image, question, done)
    notes = "".join(f"<p role='alert'>⚠ {html.escape(note)}</p>" for note in found)
    return notes + told(done, call_bias), Image.open(io.BytesIO(drawn.data)), table


def read(path: Path) -> Image.Image:
    """The image; AwaresError for a broken one, and, before it is decoded, for one with too many pixels."""
    content, most = path.read_bytes(), Limits().image_pixels
    with faults_of("image: corrupt or not an image, convert it to PNG or JPEG"):
        width, height = upright_size(content)
    if width * height > most:
        raise AwaresValueError(f"image: {width} x {height} px, but the demo accepts {most:,} px: shrink it")
    return open_image(content)


def told(done: Trajectory, call_bias: float) -> str:
    """Both turns in words. The bias adds to the log-odds of a call."""
    chance = ""
    if done.call_logprob is not None:
        odds = done.call_logprob - math.log(-math.expm1(min(done.call_logprob, -1e-9))) + call_bias
        chance = f"Probability of a call: {1 / (1 + math.exp(-odds)):.3f}. "
    choice = f"It requests {', '.join(done.crops)}." if done.crops else "It answers without a crop."
    saved = f"{done.full_visual_tokens - done.visual_tokens} of {done.full_visual_tokens} visual tokens saved"
    turns = "".join(f"<dt>{turn.role}</dt><dd>{html.escape(turn.text)}</dd>" for turn in done.turns)
    more = f"<details><summary>Text of the turns</summary><dl>{turns}</dl></details>"
    return f"<p>{chance}{choice} Answer: <b>{html.escape(done.answer)}</b> ({saved})</p>{more}"


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
