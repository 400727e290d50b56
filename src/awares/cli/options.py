"""The command line of ``awares``: commands, options, help. Nothing heavy is imported to show it."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from awares import __version__

DTYPES = ("float32", "bfloat16", "float16")

ABOUT = "AwaRes: a vision-language model that sees an image at half resolution and asks for the crops that it needs."
EXAMPLES = """\
examples:
  awares ask page.png "what is the total?"
  awares ask page.png "what is the total?" --show seen.png --json
  awares ask scans/ "what is the total?" --out answers.jsonl
  awares ask questions.jsonl --out answers.jsonl        again after a kill: it goes on
  awares eval --rows 20
  awares serve --port 8000
  awares plan --profile paper --check
  awares COMMAND --help                                 the options of a command

exit codes: 0 done, 1 something in the data or the files is wrong, 2 wrong usage, 130 interrupted
"""
ASK_EXAMPLES = """\
A policy is a folder (--model), a base model with adapters (--model and --adapter), or what a run of the pipeline left
(--run mini); without any of them it is the one that ships with the repository.

In a batch, IMAGE is a folder (every image in it, one question) or a .jsonl file with a row a line: image (a path beside
the file), question and, if you like, id; rows of the training data's schema will do. Results go to --out, a line a row.
Rows that are in there are not asked again, whatever ended the last run; a row that cannot be asked stands there with the
reason in "error", and the exit code is then 1.

examples:
  awares ask page.png "what is the total?" --call-bias 2        look closer more readily
  awares ask scans/ "is it signed?" --out answers.jsonl
  awares ask questions.jsonl --out answers.jsonl --run mini/sft
  awares ask page.png "what is the total?" --server http://127.0.0.1:8000/v1 --model policy/
"""
EVAL_EXAMPLES = """\
Accuracy (percent, by each benchmark's own metric, with its interval) and retain token ratio (RTR), per benchmark and
averaged over them: Table 1's numbers for one policy.

examples:
  awares eval --rows 20                     20 rows of each task
  awares eval --seed 2024                   rows that no stage has seen
  awares eval mine.jsonl --run mini         rows of your own: image, question, answers, and source for the metric
"""
SERVE_EXAMPLES = """\
POST /v1/chat/completions as OpenAI's clients write it: one image (a data URL) and one question. The key that clients must
show, if any, comes from the environment variable AWARES_API_KEY. It ends at SIGTERM, after what is under way.

example:
  awares serve --port 8000 --image-bytes 5000000 --timeout 30
"""

PLAN_EXAMPLES = """\
Requests, tokens, GPU hours, memory and disk of every stage, counted from params.yaml (section `plan`) and data/served.yaml. With --check it looks for
GPUs, disk, servers, keys, model and datasets, says how to mend what is missing, and the exit code is then 1.

examples:
  awares plan --profile paper
  awares plan --profile paper --check
"""

PUSH_EXAMPLES = """\
The merged policy with its adapters and a model card whose numbers are this run's Table 1, or the curated rows with a
dataset card. The token comes from the environment variable HF_TOKEN. Images are left out unless --images says otherwise.

examples:
  awares push policy me/awares-mini --dry-run
  awares push dataset me/awares-curated --profile paper
"""


def parser(given: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser; options are filled in for the command that ``given`` names, since some are read from its module."""
    top = argparse.ArgumentParser(
        "awares", description=ABOUT, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"awares {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (summary, epilog, fill) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=name, parser=sub)
        if name in given[:1]:
            fill(sub)
    return top


def _ask_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("image", type=Path, metavar="IMAGE", help="an image; for a batch a folder or a .jsonl file")
    sub.add_argument("question", nargs="?", metavar="QUESTION", help="what to ask")
    sub.add_argument(
        "--question", dest="common", metavar="TEXT", help="the same; in a batch, for rows without their own"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object, every turn in it")
    sub.add_argument(
        "--show", type=_png, metavar="FILE.png", help="draw the half-resolution view with the crops asked for"
    )
    batch = sub.add_argument_group("batch")
    batch.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="where the results go; the same call goes on with it"
    )
    batch.add_argument("--retry-errors", action="store_true", help="ask the rows again that ended in an error")
    batch.add_argument("--chunk", type=count, metavar="ROWS", help="write results every so many rows (default 64)")
    group = _policy_options(sub)
    _server_options(group)
    _bias_option(group)


def _eval_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("rows_file", nargs="?", type=Path, metavar="FILE.jsonl", help="your own rows; default: the tasks'")
    sub.add_argument("--profile", default="", help="whose tasks and settings (default: that of params.yaml)")
    sub.add_argument("--rows", type=count, metavar="N", help="rows of each task (default: evaluation.rows)")
    sub.add_argument("--seed", type=int, metavar="N", help="draws the rows (default: evaluation.seed)")
    sub.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="keep the trajectories; the same call goes on with it"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    group = _policy_options(sub)
    _server_options(group)
    _bias_option(group)


def _serve_options(sub: argparse.ArgumentParser) -> None:
    from dataclasses import fields

    from awares.cli.wire import ServeSettings

    sub.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine only)"
    )
    sub.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default %(default)s)")
    sub.add_argument("--mode", choices=("policy", "chat"), default="policy", help="chat serves the raw model")
    limits = sub.add_argument_group("limits")
    for one in fields(ServeSettings):
        kind: Callable[[str], Any] = one.type if isinstance(one.type, type) else str
        flag, note = f"--{one.name.replace('_', '-')}", LIMITS[one.name]
        if one.name == "model":
            sub.add_argument("--name", dest="model_name", metavar="NAME", help=note)
        else:
            limits.add_argument(flag, type=kind, default=one.default, metavar="N", help=f"{note} (default %(default)s)")
    _policy_options(sub)


LIMITS = {
    "model": "the model's name for clients (default: that of --model's folder, else awares)",
    "image_bytes": "bytes of one image",
    "image_pixels": "pixels of all images of one request",
    "images": "images of one request",
    "body_bytes": "bytes of one request",
    "prompt_tokens": "tokens of one prompt, visual ones included",
    "max_tokens": "tokens of one answer",
    "queue": "requests held at a time; more are refused with 429",
    "timeout": "seconds for one request",
    "window": "seconds that an idle server waits for a first request's neighbours",
    "shutdown": "seconds for what is under way at SIGTERM",
}


def _policy_options(sub: argparse.ArgumentParser) -> Any:
    group = sub.add_argument_group("policy")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--model", metavar="PATH", help="a model, or an adapter that names its base: a folder or a hub name"
    )
    which.add_argument("--run", metavar="NAME", help="what a run left: mini, mini/sft, mini/grpo/main-s2")
    group.add_argument(
        "--adapter", type=Path, action="append", metavar="PATH", help="merged into --model; may be repeated"
    )
    group.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1 (default %(default)s)")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default %(default)s)")
    group.add_argument(
        "--max-new-tokens", type=count, metavar="N", help="of one turn (default 64; eval: params.yaml's)"
    )
    group.add_argument("--token-budget", type=count, metavar="N", help="tokens of a padded batch: bounds the memory")
    return group


def _server_options(group: Any) -> None:
    group.add_argument(
        "--server",
        metavar="URL",
        help="ask the model behind an OpenAI-compatible server, ending in /v1; its tokenizer is --model's",
    )
    group.add_argument("--server-model", metavar="NAME", help="its name there (default: the folder's)")


def _bias_option(group: Any) -> None:
    group.add_argument(
        "--call-bias",
        type=finite,
        metavar="X",
        help="> 0 asks for crops more readily, < 0 less (default 0, as trained)",
    )


def count(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a port from 0 to 65535")
    return int(text)


def finite(text: str) -> float:
    """An argument that is a number, and neither infinite nor nan."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number")
    return float(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give cpu, cuda or cuda:N")
    return text


def _png(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r}: the picture is a PNG, name it so")
    return Path(text)


def _plan_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--profile", default="", help="whose stages (default: that of params.yaml)")
    sub.add_argument("--overrides", default="", help="of params.yaml, e.g. '{plan.gpus: 2}'")
    sub.add_argument("--check", action="store_true", help="look whether this machine has what the profile needs")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _push_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("what", choices=("policy", "dataset"))
    sub.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub; it is made if need be, private")
    sub.add_argument("--profile", default="", help="whose run (default: that of params.yaml)")
    sub.add_argument("--images", action="store_true", help="upload the images of a dataset too")
    sub.add_argument("--public", action="store_true", help="make a new repository public")
    sub.add_argument("--dry-run", action="store_true", help="lay everything out, say what would be uploaded, stop")


# command -> summary, what its help says below the options, what fills in its options
COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "ask": ("ask a policy about an image, or about many", ASK_EXAMPLES, _ask_options),
    "eval": ("score a policy on the evaluation rows or on your own", EVAL_EXAMPLES, _eval_options),
    "bench": ("time the interaction against full resolution", "", lambda sub: None),  # awares.bench has its own options
    "plan": ("tell what the pipeline will ask for, and whether it is there", PLAN_EXAMPLES, _plan_options),
    "push": ("publish a trained policy or curated rows on a model hub", PUSH_EXAMPLES, _push_options),
    "serve": ("serve a policy behind an OpenAI-compatible API", SERVE_EXAMPLES, _serve_options),
}
