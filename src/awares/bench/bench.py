"""`awares bench`: speed at the paper's sizes, with random weights (no download).

- *Interactions.* Blank rows of each benchmark's image size and response length go through the evaluation's engine, with
  scripted outputs, at batch 1 and at the best token budget, all jobs interleaved, from the PIL image to the text.
- *Training steps* (``--train``). The second optimiser step of SFT and of GRPO. A random model never ends a turn, so a
  completion has ``grpo.max_completion_length`` tokens (32, see ``--overrides``).
"""

import importlib.metadata
import json
import platform
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import datasets
import pandas as pd
import torch
import typer
from PIL import Image
from transformers import TrainerCallback
from typer import Option

from awares.bench import configs, latency
from awares.config import Params, load_params, parse_overrides
from awares.engine.model import set_attention
from awares.errors import AwaresValueError
from awares.method import grpo, sft

SOURCE_ROWS = ("chartqa", "docvqa", "pope", "realworldqa", "ocrbench")  # image sizes of the training rows, in turn
Tables = Iterator[tuple[str, dict[str, Any], pd.DataFrame]]  # file name, constant columns in front, table
ShapeName = Literal["qwen2.5-vl-7b", "qwen2.5-vl-3b", "qwen2.5-vl-72b", "mini"]


class Settings(NamedTuple):
    """The options of ``awares bench``."""

    shape: Annotated[ShapeName, Option(help="architecture, random weights")] = "qwen2.5-vl-7b"
    scale: Annotated[float, Option(min=1e-6, max=1, help="fraction of the shape's parameters to keep")] = 1.0
    dtype: Annotated[Literal["", "bfloat16", "float32"], Option(help="default: bfloat16 on cuda, else float32")] = ""
    attention: Annotated[str, Option(help="as base.attn_implementation, such as flash_windows")] = ""
    device: Annotated[Literal["cuda", "cpu"], Option()] = "cuda" if torch.cuda.is_available() else "cpu"
    benchmarks: Annotated[list[str], Option(help="may be repeated")] = [*configs.BENCHMARKS]
    rows: Annotated[int, Option(min=1, help="rows of a benchmark")] = 8
    repetitions: Annotated[int, Option(min=1)] = 5
    batch_tokens: Annotated[list[int], Option(min=2, help="token budgets next to batch 1")] = [32768]
    seed: Annotated[int, Option(min=0, help="decides the weights and the order of the jobs")] = 1
    interactions: Annotated[bool, Option(help="time AwaRes and the systems that it replaces")] = True
    train: Annotated[bool, Option("--train", help="also time an SFT and a GRPO step")] = False
    overrides: Annotated[str, Option(help="of params.yaml in the training steps")] = ""
    out: Annotated[Path, Option(help="folder of the CSV tables and machine.json")] = Path("bench")

    def check(self) -> None:
        """AwaresError for a combination that cannot run on this machine."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise AwaresValueError("--device cuda, but torch sees no CUDA GPU: use --device cpu with --shape mini")
        if self.device == "cpu" and self.shape != configs.MINI and self.scale > 0.05:
            raise AwaresValueError(f"--shape {self.shape} needs a CUDA GPU: use --scale 0.001 or --shape mini")
        if unknown := set(self.benchmarks) - set(configs.BENCHMARKS):
            raise AwaresValueError(f"--benchmarks {', '.join(unknown)}: use {', '.join(configs.BENCHMARKS)}")
        if not (self.interactions or self.train):
            raise AwaresValueError("--no-interactions leaves nothing to measure: add --train")
        if self.train:
            self.training_params()

    @property
    def precision(self) -> str:
        return self.dtype or ("bfloat16" if self.device == "cuda" else "float32")

    def build(self) -> tuple[Any, Any]:
        model, processor = configs.build(self.shape, self.scale, self.precision, self.device, self.seed)
        set_attention(model, self.attention)
        return model, processor

    def image_size(self, benchmark: str) -> tuple[int, int]:
        return configs.image_size(benchmark, self.shape, self.scale)

    def training_params(self) -> Params:
        """Profile ``paper`` with two steps of each training, then ``overrides``; AwaresError for a wrong value."""
        fixed = {"base.device": self.device, "base.dtype": self.precision, "sft.epochs": 2, "sft.checkpoints": 1}
        fixed["base.attn_implementation"] = self.attention
        fixed |= {"grpo.max_steps": 2, "grpo.answer_reward": "anls", "grpo.max_completion_length": 32}
        return load_params("paper", overrides={**fixed, **parse_overrides(self.overrides)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the tables as they arrive (a kill loses one benchmark). AwaresError for bad settings."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command(help=__doc__)(Settings)
    settings = app(arguments, prog_name="awares bench", standalone_mode=False)
    if not isinstance(settings, Settings):  # after --help
        return 0
    settings.check()
    named = machine(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "machine.json").write_text(json.dumps(named, indent=2) + "\n")
    print(json.dumps(named, indent=2))
    wanted = {interactions: settings.interactions, training_steps: settings.train}
    done = defaultdict(list)
    for file, place, table in (found for measure, on in wanted.items() if on for found in measure(settings)):
        table = pd.DataFrame(place, index=table.index).join(table)
        done[file].append(table)
        together = pd.concat(done[file], ignore_index=True).round(6).assign(**named)
        together.to_csv(settings.out / file, index=False, lineterminator="\n")
        if file != "times.csv":
            shown = table.loc[:, ~table.columns.str.contains("_low$|_high$|^rows$|^image$|^calls$")]
            print(f"\n{shown.to_string(index=False, float_format='{:.3g}'.format)}", flush=True)
    return 0


def machine(settings: Settings) -> dict[str, str]:
    """Hardware, versions and shape, for the tables."""
    found = {"device": f"{platform.processor() or platform.machine()} CPU", "threads": str(torch.get_num_threads())}
    if settings.device == "cuda":
        found = {"device": torch.cuda.get_device_name()}
    found |= {"shape": settings.shape, "scale": str(settings.scale), "dtype": settings.precision}
    found |= {"attention": settings.attention or "default"}
    versions = {name: importlib.metadata.version(name) for name in ("awares", "torch", "transformers", "trl", "peft")}
    return {**found, "python": platform.python_version(), **versions}


def interactions(settings: Settings) -> Tables:
    """The single times per benchmark, and the table (time, ratios, phases, counts)."""
    model, processor = settings.build()
    budgets = [latency.LOOP, *dict.fromkeys(settings.batch_tokens)]
    for name in settings.benchmarks:
        rows = configs.workload(name, settings.rows, settings.image_size(name))
        jobs = latency.jobs(dict.fromkeys(latency.TIMED_SYSTEMS, model), processor, rows, budgets)
        times, played, _ = latency.time_jobs(jobs, settings.repetitions, settings.seed, settings.device)
        yield "times.csv", {"benchmark": name}, times
        counts = latency.count_table(played, model.config, processor, model.dtype.itemsize)
        place = {"benchmark": name, "image": "{}x{}".format(*rows.images[0].size)}
        yield "latency.csv", place, latency.time_table(times).merge(counts, on="system")


def training_steps(settings: Settings) -> Tables:
    """One SFT and one GRPO step: batch layout, tokens, seconds, tokens/s, peak memory (MB)."""
    yield "training.csv", {}, pd.DataFrame([_time_step(step, settings) for step in ("sft", "grpo")])


def training_rows(count: int, image_size: Callable[[str], tuple[int, int]]) -> datasets.Dataset:
    """Curated rows of the sources' typical sizes; one in five is HR, as with the oracle (Fig. 5: 80.8 % LR)."""
    records = []
    for index in range(count):
        call, fifth = index % 5 == 0, index // 5  # sizes shift with every fifth row, so that calls occur at all sizes
        image = Image.new("RGB", image_size(SOURCE_ROWS[(index + fifth) % len(SOURCE_ROWS)]), "white")
        label, target = ("HR", [configs.CALLS[fifth % len(configs.CALLS)][0]]) if call else ("LR", [])
        record = {"id": str(index), "image": image, "question": configs.QUESTION, "answers": ["forty-two"]}
        records.append({**record, "label": label, "target_crops": target})
    return datasets.Dataset.from_list(records)  # the first row has target_crops, so their type is known


class StepClock(TrainerCallback, latency.Stopwatch):
    """Records the time at the end of every optimiser step."""

    ends: tuple[float, ...] = ()

    def on_step_end(self, *event: Any, **context: Any) -> None:
        self.ends = *self.ends, self.now()


def _time_step(step: str, settings: Settings) -> dict[str, Any]:
    """Train two steps; layout, tokens and seconds of the second one."""
    params, (model, processor) = settings.training_params(), settings.build()
    section: Any = getattr(params, step)
    size = section.batch_size
    trainer: Any
    with tempfile.TemporaryDirectory() as folder:
        if step == "sft":
            rows = training_rows(size, settings.image_size)
            samples = sft.plan_samples(rows, processor, params)
            trainer = sft.build_sft_trainer(params, rows, samples, model, processor, Path(folder))
        else:
            rows = training_rows(2 * size // section.generations, settings.image_size)
            trainer = grpo.build_grpo_trainer(params, rows, model, processor, Path(folder))
        clock = StepClock(settings.device)
        trainer.add_callback(clock)
        trainer.args.save_strategy = "no"
        trainer.train()
    if len(clock.ends) != 2:
        raise AwaresValueError(f"training ran {len(clock.ends)} steps instead of 2: check --overrides")
    if step == "sft":
        layout, tokens = f"{size} samples", sum(sample.length for sample in samples[size:])
    else:
        seen = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
        layout, tokens = f"{size} completions, G {section.generations}", seen[1] - seen[0]
    seconds, layout = clock.ends[1] - clock.ends[0], f"{layout}, {section.per_device_batch_size} at a time"
    record = {"step": step, "layout": layout, "tokens": tokens, "seconds": seconds}
    return {**record, "tokens_per_second": tokens / seconds, "peak_memory_mb": clock.peak_memory() / 1e6}
