"""`awares bench`: speed at the paper's sizes, with random weights (no download).

- *Interactions.* Blank rows of each benchmark's image size and response length go through the evaluation's engine, with
  scripted outputs, at batch 1 and at the best token budget, all jobs interleaved, from the PIL image to the text.
- *Pruners* (``--pruners``). The training-free pruners at 100 %, 70 % and 50 % of the visual tokens against the plain
  full image. At 100 % the first token's logits must equal the plain model's (in float32; bfloat16 rounds).
- *Training steps* (``--train``). The second optimiser step of our SFT trainer and of our GRPO trainer. A random model
  never ends a turn, so a GRPO completion has ``grpo.max_completion_length`` tokens (32, see ``--overrides``).
"""

import importlib.metadata
import json
import platform
import re
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

from awares.bench import configs, costs, latency
from awares.bench.latency import LOOP
from awares.config import Params, load_params, parse_overrides
from awares.errors import AwaresValueError
from awares.method import grpo, sft
from awares.method.rollout import Trajectory

PRUNERS, PERCENTS = ("visionzip", "holov", "sparsevlm", "fastv", "random_token"), (100, 70, 50)
SOURCE_ROWS = ("chartqa", "docvqa", "pope", "realworldqa", "ocrbench")  # image sizes of the training rows, in turn
ShapeName = Literal["qwen2.5-vl-7b", "qwen2.5-vl-3b", "qwen2.5-vl-72b", "mini"]
Tables = dict[str, pd.DataFrame]  # by file name


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch("([0-9]+)x([0-9]+)", text)
    if not sides or min(int(sides[1]), int(sides[2])) < configs.SMALLEST_SIDE:
        raise typer.BadParameter(f"{text!r}: give WIDTHxHEIGHT in px, each {configs.SMALLEST_SIDE} or more")
    return int(sides[1]), int(sides[2])


class Settings(NamedTuple):
    """The options of ``awares bench``."""

    shape: Annotated[ShapeName, Option(help="architecture, random weights")] = "qwen2.5-vl-7b"
    scale: Annotated[float, Option(min=1e-6, max=1, help="fraction of the shape's parameters that is left")] = 1.0
    dtype: Annotated[Literal["", "bfloat16", "float32"], Option(help="default: bfloat16 on cuda, else float32")] = ""
    device: Annotated[Literal["cuda", "cpu"], Option()] = "cuda" if torch.cuda.is_available() else "cpu"
    benchmarks: Annotated[list[str], Option(help="may be repeated")] = [*configs.BENCHMARKS]
    image: Annotated[Any, Option(parser=_size, metavar="WxH", help="size of every image in px")] = None
    rows: Annotated[int, Option(min=1, help="rows of a benchmark")] = 8
    repetitions: Annotated[int, Option(min=1)] = 5
    batch_tokens: Annotated[list[int], Option(min=2, help="token budgets next to batch 1")] = [32768]
    seed: Annotated[int, Option(min=0, help="of the weights and the order of the jobs")] = 1
    gpu: Annotated[Literal["", "a100", "h100", "h200"], Option(help="of the roofline; default: by name")] = ""
    interactions: Annotated[bool, Option(help="time AwaRes and the systems that it replaces")] = True
    train: Annotated[bool, Option("--train", help="also time an SFT and a GRPO step")] = False
    pruners: Annotated[bool, Option("--pruners", help="also time the pruners of visual tokens")] = False
    overrides: Annotated[str, Option(help="of params.yaml in the training steps")] = ""
    out: Annotated[Path, Option(help="folder of the CSV tables and machine.json")] = Path("bench")

    def check(self) -> None:
        """AwaresError for a combination that cannot run on this machine."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise AwaresValueError("--device cuda, but torch sees no CUDA GPU: use --device cpu with --shape mini")
        if self.device == "cpu" and self.shape != configs.MINI and self.scale > 0.05:
            large = f"--shape {self.shape} --scale {self.scale}"
            raise AwaresValueError(f"{large} needs a CUDA GPU: use --scale 0.001 or --shape mini")
        if unknown := set(self.benchmarks) - set(configs.BENCHMARKS):
            raise AwaresValueError(f"--benchmarks {', '.join(unknown)}: use {', '.join(configs.BENCHMARKS)}")
        if not (self.interactions or self.pruners or self.train):
            raise AwaresValueError("--no-interactions leaves nothing to measure: add --pruners or --train")
        if self.train:
            self.training_params()

    @property
    def precision(self) -> str:
        """``dtype``, or the device's default."""
        return self.dtype or ("bfloat16" if self.device == "cuda" else "float32")

    def build(self) -> tuple[Any, Any]:
        """Model and processor."""
        return configs.build(self.shape, self.scale, self.precision, self.device, self.seed)

    def image_size(self, benchmark: str) -> tuple[int, int]:
        """(width, height) px: ``image``, else the typical size of ``benchmark`` at this shape and scale."""
        return self.image or configs.image_size(benchmark, self.shape, self.scale)

    def training_params(self) -> Params:
        """Profile ``paper`` with two steps of each training, then ``overrides``; AwaresError for a wrong value."""
        fixed = {"base.device": self.device, "base.dtype": self.precision, "sft.epochs": 2, "sft.checkpoints": 1}
        fixed |= {"grpo.max_steps": 2, "grpo.answer_reward": "anls", "grpo.max_completion_length": 32}
        return load_params("paper", overrides={**fixed, **parse_overrides(self.overrides)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``awares bench`` with ``arguments``; the exit code. AwaresError for settings that cannot run."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command(help=__doc__)(Settings)
    settings = app(arguments, prog_name="awares bench", standalone_mode=False)
    if isinstance(settings, Settings):
        run_bench(settings)
    return 0


def run_bench(settings: Settings) -> None:
    """Measure, print the tables and write them to ``settings.out`` as they arrive: a kill loses one benchmark."""
    settings.check()
    named = machine(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "machine.json").write_text(json.dumps(named, indent=2) + "\n")
    print(json.dumps(named, indent=2))
    wanted = {interactions: settings.interactions, pruners: settings.pruners, training_steps: settings.train}
    done = defaultdict(list)
    for tables in (tables for measure, on in wanted.items() if on for tables in measure(settings)):
        for file, table in tables.items():
            done[file].append(table)
            together = pd.concat(done[file], ignore_index=True).round(6).assign(**named)
            together.to_csv(settings.out / file, index=False, lineterminator="\n")
        first = next(iter(tables.values()))
        shown = first.loc[:, ~first.columns.str.contains("_low$|_high$|^rows$|^image$|^calls$")]
        print(f"\n{shown.to_string(index=False, float_format='{:.3g}'.format)}", flush=True)


def machine(settings: Settings) -> dict[str, str]:
    """Hardware, versions and shape, for the tables."""
    gpu = settings.device == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} CPU"
    threads = {} if gpu else {"threads": str(torch.get_num_threads())}
    packages = ("awares", "torch", "transformers", "trl", "peft")
    versions = {name: importlib.metadata.version(name) for name in packages}
    shape = {"shape": settings.shape, "scale": str(settings.scale), "dtype": settings.precision}
    return {"device": device, **threads, **shape, "python": platform.python_version(), **versions}


# Interactions


def interactions(settings: Settings) -> Iterator[Tables]:
    """Per benchmark the table (time, ratios, phases, counts, roofline), and the single times."""
    model, processor = settings.build()
    work = {name: configs.workload(name, settings.rows, settings.image_size(name)) for name in settings.benchmarks}
    longest, gpu = configs.longest_turn(list(work.values()), processor), find_gpu(settings)
    budgets, size = [LOOP, *dict.fromkeys(settings.batch_tokens)], model.dtype.itemsize
    for name, rows in work.items():
        models = dict.fromkeys(latency.TIMED_SYSTEMS, model)
        jobs = latency.jobs(models, processor, rows, budgets, max_new_tokens=longest)
        times, done, _ = latency.time_jobs(jobs, settings.repetitions, settings.seed, settings.device)
        table = latency.time_table(times).merge(latency.count_table(done, model.config, processor, size), on="system")
        table["roofline_ms"] = [
            _roofline(done[str(line.system)], line, model, processor, gpu) if gpu else float("nan")
            for line in table.itertuples()
        ]
        table.insert(0, "benchmark", name)
        table.insert(1, "image", "{}x{}".format(*rows.images[0].size))
        yield {"latency.csv": table, "times.csv": times.assign(benchmark=name)}


def _roofline(done: Sequence[Trajectory], line: Any, model: Any, processor: Any, gpu: costs.Gpu) -> float:
    """Least ms per row at this line's batch: rows alone, or all rows at once."""
    groups, reuse = [[one] for one in done] if line.batch == "1" else [done], line.system != "awares_naive"
    config, size = model.config, model.dtype.itemsize
    parts = [costs.roofline_seconds(group, config, processor, gpu, reuse, size) for group in groups]
    return 1000 * sum(sum(part.values()) for part in parts) / len(done)


def find_gpu(settings: Settings) -> costs.Gpu | None:
    """``settings.gpu``, else the known GPU in the device's name; None for other GPUs and on a CPU."""
    name = settings.gpu or (torch.cuda.get_device_name().lower() if settings.device == "cuda" else "")
    known = [key for key in costs.GPUS if re.search(rf"\b{key}\b", name) and "pcie" not in name]  # data of SXM modules
    return costs.GPUS[known[0]] if known else None


# Pruners


def pruners(settings: Settings) -> Iterator[Tables]:
    """Per benchmark and budget: ms per row of every pruner, ratio to ``full`` within a repetition, peak memory.

    Further columns, equal for all rows: RTR as the mean over layers, counted FLOPs, and the largest difference of a
    first logit from ``full``'s.
    """
    model, processor = settings.build()
    names = ["full", *(f"{name}_{percent}" for name in PRUNERS for percent in PERCENTS)]
    models = dict.fromkeys(names, model)
    for name in settings.benchmarks:
        one, work = (
            configs.workload(name, count, settings.image_size(name))._replace(scripts={})
            for count in (1, settings.rows)
        )
        limits = {"max_new_tokens": configs.answer_tokens(configs.BENCHMARKS[name].awares)}
        single = latency.jobs(models, processor, one, [LOOP], **limits)
        counted = latency.flops_table(single)
        first = {job.system: _first_logits(job, model) for job in single}
        counted["logits_gap"] = [float((first[system] - first["full"]).abs().max()) for system in names]
        for budget in (LOOP, settings.batch_tokens[0]):
            jobs = latency.jobs(models, processor, work, [budget], **limits)
            times, done, _ = latency.time_jobs(jobs, settings.repetitions, settings.seed, settings.device)
            table = latency.ratio_table(times, names)
            kept = {system: sum(one.layer_rtr for one in some) / len(some) for system, some in done.items()}
            table.insert(1, "layer_rtr", table.system.map(kept))
            table["peak_memory_mb"] = table.system.map(times.groupby("system").peak_memory.first() / 1e6)
            table.insert(0, "token_budget", budget)
            table.insert(0, "image", "{}x{}".format(*work.images[0].size))
            table.insert(0, "benchmark", name)
            yield {"pruners.csv": table.merge(counted, on="system")}


def _first_logits(job: latency.TimedJob, model: Any) -> torch.Tensor:
    """Logits (rows, vocabulary) of the first token that ``job`` writes, before any processor."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, output: seen.append(output[:, -1].float()))
    job.work(None)
    hook.remove()
    return seen[0]


# Training steps


def training_steps(settings: Settings) -> Iterator[Tables]:
    """One SFT and one GRPO step: batch layout, tokens, seconds, tokens/s, peak memory (MB)."""
    table = pd.DataFrame([_time_sft(settings), _time_grpo(settings)])
    table.insert(4, "tokens_per_second", table.tokens / table.seconds)
    yield {"training.csv": table}


def training_rows(count: int, image_size: Callable[[str], tuple[int, int]]) -> datasets.Dataset:
    """Curated rows of the sources' typical sizes; one in five is HR, as with the oracle (Fig. 5: 80.8 % LR)."""
    records = []
    for index in range(count):
        call, fifth = index % 5 == 0, index // 5  # sizes shift with every fifth row, so that calls meet all of them
        image = Image.new("RGB", image_size(SOURCE_ROWS[(index + fifth) % len(SOURCE_ROWS)]), "white")
        record = {"id": str(index), "image": image, "question": configs.QUESTION, "answers": ["forty-two"]}
        target = [configs.CALLS[fifth % len(configs.CALLS)][0]] if call else []
        records.append({**record, "label": "HR" if call else "LR", "target_crops": target})
    return datasets.Dataset.from_list(records)  # the first row has target_crops, so their type is known


def _time_sft(settings: Settings) -> dict[str, Any]:
    params, (model, processor) = settings.training_params(), settings.build()
    size = params.sft.batch_size
    rows = training_rows(size, settings.image_size)
    samples = sft.plan_samples(rows, processor, params)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft.build_sft_trainer(params, rows, samples, model, processor, Path(folder))
        measured = _second_step(trainer, settings.device)
    layout = f"{size} samples, {params.sft.per_device_batch_size} at a time"
    return {"step": "sft", "layout": layout, "tokens": sum(sample.length for sample in samples[size:]), **measured}


def _time_grpo(settings: Settings) -> dict[str, Any]:
    params, (model, processor) = settings.training_params(), settings.build()
    section = params.grpo
    rows = training_rows(2 * section.batch_size // section.generations, settings.image_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo.build_grpo_trainer(params, rows, model, processor, Path(folder))
        measured = _second_step(trainer, settings.device)
    seen = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    layout = f"{section.batch_size} completions, G {section.generations}, {section.per_device_batch_size} at a time"
    return {"step": "grpo", "layout": layout, "tokens": seen[1] - seen[0], **measured}


class StepClock(TrainerCallback, latency.Stopwatch):
    """Records the time at the end of every optimiser step."""

    ends: tuple[float, ...] = ()

    def on_step_end(self, *event: Any, **context: Any) -> None:
        """Called by the trainer."""
        self.ends = *self.ends, self.now()


def _second_step(trainer: Any, device: str) -> dict[str, float]:
    """Train two steps; seconds of the second one and peak memory (MB)."""
    clock, memory = StepClock(device), latency.PeakMemory(device)
    trainer.add_callback(clock)
    trainer.args.save_strategy = "no"
    trainer.train()
    if len(clock.ends) != 2:
        raise AwaresValueError(f"training ran {len(clock.ends)} steps instead of 2: check --overrides")
    return {"seconds": clock.ends[1] - clock.ends[0], "peak_memory_mb": memory.read() / 1e6}
