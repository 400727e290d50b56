"""The command ``awares``: ask a policy, score it, time it, serve it, plan its pipeline, publish it.

Results go to stdout, the rest to stderr. Torch and transformers are imported inside the commands: help is fast.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from awares import __version__
from awares.cli.options import Bias, Json, PolicyOptions, Profile, refuse_if
from awares.errors import AwaresError, AwaresValueError, Failure

ShapeName = Literal["qwen2.5-vl-7b", "qwen2.5-vl-3b", "qwen2.5-vl-72b", "mini"]


def _run(command: Any, **_: Any) -> None:
    code = command() if callable(command) else command
    sys.stdout.flush()  # here, because typer handles a closed pipe
    raise typer.Exit(code or 0)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, result_callback=_run, rich_markup_mode=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: the process's own); the exit code."""
    try:
        app(arguments, prog_name="awares")
    except SystemExit as end:
        return int(end.code or 0)
    except (AwaresError, OSError) as error:
        _say(" ".join(str(error).split()))
        return 1
    return 0


def _say(text: str) -> None:
    print(f"awares: {text}", file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"awares {__version__}")
        raise typer.Exit


@app.callback()
def awares(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    """AwaRes: a vision-language model that sees an image at half resolution and calls for the crops that it needs.

    \b
    examples:
      awares ask page.png "what is the total?"
      awares ask questions.jsonl --out answers.jsonl
      awares plan --profile paper --check

    Exit codes: 0 done, 1 something in the data or the files is wrong, 2 wrong usage, 130 interrupted.
    """


@app.command("ask")
@dataclass(frozen=True, kw_only=True)
class Ask(PolicyOptions):
    """Ask a policy about an image, or about many.

    In a batch, IMAGE is a folder (every image in it, one question) or a .jsonl file with one row per line: image (a
    path relative to the file), question and optionally id. --out gets one line per row. A row that cannot be run has
    its reason in "error", and the exit code is then 1. The same call again runs the rows without an answer.
    """

    image: Annotated[str, Argument(help="an image file, or - for stdin; for a batch a folder or a .jsonl file")]
    question: Annotated[str | None, Argument(show_default=False, help="in a batch for rows without their own")] = None
    as_json: Json = False
    show: Annotated[Path | None, Option(metavar="FILE.png", help="draw the view and the crops")] = None
    out: Annotated[Path | None, Option(metavar="FILE.jsonl", help="results of a batch")] = None
    call_bias: Bias = None

    def __call__(self) -> int:
        if os.path.isdir(self.image) or self.image.lower().endswith(".jsonl"):
            refuse_if(self.show is not None, "--show draws one image, not a batch")
            refuse_if(self.out is None, "a batch needs --out, the file for its results")
            return self._ask_many(self.out or Path())
        refuse_if(self.out is not None, "--out is for a batch: a folder or a .jsonl file")
        refuse_if(self.show is not None and self.show.suffix.lower() != ".png", "--show: the name must end in .png")
        refuse_if(self.question is None, "no question: write it after the image")
        from awares.engine.images import NOTE, open_image

        image = open_image(sys.stdin.buffer.read() if self.image == "-" else self.image)
        if note := image.info.get(NOTE):
            _say(f"{self.image}: {note}")
        done = self.load()[0].ask(image, self.question or "", call_bias=self.call_bias or 0.0)
        if self.show:
            os.environ.setdefault("MPLBACKEND", "agg")  # opens no window
            from awares.study import figures

            figures.style(110)
            figures.show(figures.gallery([{"image": image, "question": self.question}], [done]), path=self.show)
        if self.as_json:
            about = {"image": self.image, "question": self.question, **done.to_dict(), "rtr": done.rtr}
            print(json.dumps(about | ({"note": note} if note else {}), ensure_ascii=False))
        else:
            malformed = " (malformed call)" if done.call_status == "malformed" else ""
            print(f"{done.answer}\ncrops   {', '.join(done.crops) or 'none'}{malformed}")
            print(f"tokens  {done.visual_tokens} of {done.full_visual_tokens} visual tokens, RTR {done.rtr:.2f}")
            print(f"time    {done.seconds:.2f} s")
        return 0

    def _ask_many(self, out: Path) -> int:
        from awares.cli import batch
        from awares.engine.keys import folder_digest

        rows = batch.read_batch(Path(self.image), self.question)  # before the model is loaded, which takes seconds
        names = {path.name for path in Path(self.image).glob("[!.]*") if path.is_file()}
        if skipped := sorted(names - {row["image"] for row in rows}):
            _say(f"skipped {len(skipped)} files, no images by their names: {', '.join(skipped[:10])}")
        policy, name = self.load(out)
        # what determines the answers: a file of results is never continued with other settings
        engine: Any = policy.engine
        found, tokens = self.checkpoint(), getattr(engine, "decoder", engine).max_new_tokens
        parts = () if self.server else (found.path, *found.adapters)  # a new training has the same names
        settings: dict[str, Any] = {"policy": name, "weights": "-".join(folder_digest(part)[:16] for part in parts)}
        settings |= {"dtype": self.dtype, "prompt": hashlib.sha256(repr(engine.protocol).encode()).hexdigest()[:8]}
        settings |= {"max_side": engine.max_side, "call_bias": self.call_bias or 0.0, "max_new_tokens": tokens}
        counts = batch.run_batch(Path(self.image), self.question, out, policy.engine, settings)
        if self.as_json:
            print(json.dumps({"out": str(out), **counts}))
        _say("{rows} rows, {ran} run now, {done_before} done before, {errors} with an error".format(**counts))
        return 1 if counts["errors"] else 0


@app.command("eval")
@dataclass(frozen=True, kw_only=True)
class Eval(PolicyOptions):
    """Score a policy on the evaluation rows or on your own: Table 1's numbers.

    Accuracy (percent, by each benchmark's own metric, with its interval) and retain token ratio (RTR), per benchmark
    and on average. FILE.jsonl has image, question, answers, and source for the metric. Rows that cannot be read or
    answered are listed and not scored; the exit code is then 1.
    """

    file: Annotated[Path | None, Argument(metavar="FILE.jsonl", help="your own rows (default: the tasks')")] = None
    profile: Profile = ""
    variant: Annotated[str, Option(help="of params.yaml, such as released_eval")] = "main"
    rows: Annotated[int | None, Option(min=1, help="rows of each task (default: evaluation.rows)")] = None
    as_json: Json = False
    call_bias: Bias = None

    def __call__(self) -> int:
        from awares.cli.batch import run_rows
        from awares.config import load_params
        from awares.data.rows import make_split, read_jsonl_rows
        from awares.engine.model import set_threads
        from awares.method import evaluation
        from awares.method.rollout import limits_of
        from awares.study.tables import TASK_WORDS

        given = {"rows": self.rows, "call_bias": self.call_bias}
        overrides = {f"evaluation.{key}": value for key, value in given.items() if value is not None}
        refuse_if(bool(self.file and self.rows), "--rows draws the tasks' rows, not those of a file")
        params = load_params(self.profile, self.variant, overrides)
        faults: list[str] = []
        table = read_jsonl_rows(self.file, faults) if self.file else make_split(params, "evaluation")
        set_threads(params.threads)
        policy, name = self.load(**limits_of(params), pixels=params.crops.pixels)
        policy.engine.progress = sys.stderr.isatty()
        bias = params.evaluation.call_bias
        found = run_rows(policy.engine, table["image"], table["question"], table["id"], bias)
        done = {place: one for place, one in enumerate(found) if not isinstance(one, Failure)}
        faults += [one.reason for one in found if isinstance(one, Failure)]
        for fault in faults:
            _say(fault)
        if not done:
            raise AwaresValueError("no row could be answered")
        scored = evaluation.scored(name, table.select([*done]), [*done.values()])
        scores = evaluation.main_table(scored, params.evaluation).drop(columns="system")
        if not self.file and params.data.origin == "suite":
            scores = scores.replace({"benchmark": TASK_WORDS})
        if self.as_json:
            print(json.dumps({"policy": name, "call_bias": bias, "table": scores.to_dict("records")}))
        else:
            print(scores.to_string(index=False, float_format="{:.2f}".format))
        return 1 if faults else 0


@app.command("serve")
@dataclass(frozen=True, kw_only=True)
class Serve(PolicyOptions):
    """Serve a policy behind an OpenAI-compatible API.

    POST /v1/chat/completions with one image (a data URL) and one question. The model runs here, or behind --server
    (vLLM), which batches. Clients send the key in the environment variable AWARES_API_KEY, if it is set.
    """

    host: Annotated[str, Option(help="address to listen at; the default is this machine only")] = "127.0.0.1"
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one")] = 8000
    name: Annotated[str, Option(help="the model's name for clients (default: that of --model's folder)")] = ""
    image_pixels: Annotated[int, Option(min=1, help="pixels of one image")] = 50_000_000
    body_bytes: Annotated[int, Option(min=1, help="bytes of one request")] = 32 * 2**20
    prompt_tokens: Annotated[int, Option(min=1, help="tokens of one prompt, visual ones included")] = 16384
    max_tokens: Annotated[int, Option(min=1, help="tokens of one answer")] = 1024
    queue: Annotated[int, Option(min=1, help="requests held at a time; more are refused with 429")] = 32
    timeout: Annotated[float, Option(min=0.001, help="seconds from a request's head to its answer")] = 120.0
    connections: Annotated[int, Option(min=16, help="at a time; more are refused with 503")] = 512

    def __call__(self) -> None:
        from awares.cli.serve import run_server

        run_server(self)


@app.command("demo")
@dataclass(frozen=True, kw_only=True)
class Demo(PolicyOptions):
    """Ask a policy on a web page: drop an image, watch both turns. Needs gradio: run `make demo`."""

    host: Annotated[str, Option(help="address to listen at; the default is this machine only")] = "127.0.0.1"
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one")] = 7860

    def __call__(self) -> None:
        if not find_spec("gradio"):
            raise AwaresValueError("gradio is not here: `make demo` installs it and starts the demo")
        from awares.cli import demo
        from awares.policy import AwaRes

        found, options = self.checkpoint(), {"scores": True} if self.server else {}
        policy, name = self.load(None, **options)
        base = AwaRes.from_pretrained(found.base) if found.base and not self.server else None
        demo.run_demo(policy, base, name, found.name == "shipped" or self.run.startswith("mini"), self.host, self.port)


@app.command("bench")
@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time the interaction against full resolution, at the paper's sizes, with random weights (no download).

    Blank rows of each benchmark's image size and response length go through the evaluation's engine, with scripted
    outputs, at batch 1 and at the best token budget, all jobs interleaved, from the PIL image to the text.

    --train adds the second optimiser step of SFT and of GRPO. A random model never ends a turn, so a completion has
    grpo.max_completion_length tokens (32, see --overrides).
    """

    shape: Annotated[ShapeName, Option(help="architecture, random weights")] = "qwen2.5-vl-7b"
    scale: Annotated[float, Option(min=1e-6, max=1, help="fraction of the shape's parameters to keep")] = 1.0
    attention: Annotated[str, Option(help="as base.attn_implementation, such as flash_windows")] = ""
    benchmarks: Annotated[list[str] | None, Option(help="may be repeated (default: all six)")] = None
    rows: Annotated[int, Option(min=0, help="rows of a benchmark; 0: training steps alone")] = 8
    repetitions: Annotated[int, Option(min=1)] = 5
    batch_tokens: Annotated[int, Option(min=2, help="token budget next to batch 1")] = 32768
    train: Annotated[bool, Option("--train", help="also time an SFT and a GRPO step")] = False
    overrides: Annotated[str, Option(help="of params.yaml in the training steps")] = ""
    out: Annotated[Path, Option(help="folder of the CSV tables")] = Path("bench")

    def __call__(self) -> None:
        from awares.bench.bench import measure

        measure(self)


@app.command("plan")
def plan_pipeline(
    profile: Profile = "",
    overrides: Annotated[str, Option(help="of params.yaml, e.g. '{plan.gpus: 2}'")] = "",
    check: Annotated[bool, Option("--check", help="check that this machine has what the profile needs")] = False,
) -> int:
    """Forecast the pipeline's hours (a range), requests, tokens, memory, network and disk, stage by stage.

    --check looks for GPUs, disk, servers, keys, model and datasets, and says how to fix what is missing; the exit code
    is then 1.
    """
    from awares.bench.estimate import forecast
    from awares.bench.plan import preflight
    from awares.config import load_params

    params = load_params(profile, overrides=overrides)
    table, findings = forecast(params), preflight(params) if check else []
    print(table.to_string(index=False, float_format="{:,.1f}".format))
    low, high = table.hours_low.sum(), table.hours_high.sum()
    print(f"\n{low:.0f} to {high:.0f} h in all on {params.plan.gpus} x {params.plan.gpu}, servers included")
    for one in findings:
        print(f"there   {one.what} ({one.found})" if one.there else f"MISSING {one.what} ({one.found}): {one.fix}")
    return 0 if all(one.there for one in findings) else 1


@app.command()
def push(
    repo: Annotated[str, Argument(metavar="OWNER/NAME", help="repository on the hub; a new one is private")],
    profile: Profile = "",
    public: Annotated[bool, Option("--public", help="make a new repository public")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="prepare the folder, list it, upload nothing")] = False,
) -> None:
    """Publish the trained policy (merged model, adapters, a card with Table 1) on a model hub.

    The token comes from the environment variable HF_TOKEN.
    """
    from awares.config import load_params
    from awares.study import publish

    folder = publish.hub_folder(load_params(profile))
    sizes = {file: file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    print(*(f"{size:>14,} {file.relative_to(folder)}" for file, size in sizes.items()), sep="\n")
    print(f"{sum(sizes.values()):>14,} bytes in {folder}")
    if not dry_run:
        print(publish.upload(folder, repo, private=not public))
