"""`awares bench --shape qwen2.5-vl-7b`: the systems' speed at the paper's size, with random weights (no download).

What is timed:

- *Interactions.* For each benchmark, rows of its typical image size and of the paper's response lengths go through the
  engine that evaluation uses, outputs ordered token by token, at batch 1 and at the best of the given token budgets, all
  jobs interleaved. Time runs from the PIL image to the text: resizing, cutting and patching, vision tower, prefill, decoding.
- *Pruners* (``--pruners``). The training-free pruners of visual tokens at all, 70 % and 50 % of them, each against the plain full image,
  at batch 1 and at the first token budget, answers as long as AwaRes's. At 100 % choosing is all that there is to see, and
  the first token's logits must be the plain model's (in float32; bfloat16 rounds).
- *SFT step.* The second of two optimiser steps of our SFT trainer at ``sft.batch_size``, from the end of the first to its
  own: data preparation, forward and backward passes of all micro-batches, update. No checkpoint is written.
- *GRPO step.* The same of our GRPO trainer at ``grpo.batch_size`` completions: rollouts, reference and policy passes,
  update. A random model never calls and never ends a turn, so each completion is ``--completion-tokens`` long; the
  reward is ANLS, so that no second model runs beside.
"""

import argparse
import gc
import importlib.metadata
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from PIL import Image
from transformers import TrainerCallback

from awares import __version__
from awares.bench import configs as shapes
from awares.bench import costs, latency
from awares.bench.latency import LOOP, Stopwatch
from awares.config import Params, load_params, parse_overrides
from awares.errors import AwaresError, AwaresValueError
from awares.method import grpo, sft
from awares.method.rollout import Trajectory

PACKAGES = ("torch", "transformers", "trl", "peft")
PRUNERS, PERCENTS = ("visionzip", "holov", "sparsevlm", "fastv", "random_token"), (100, 70, 50)
SOURCE_ROWS = ("chartqa", "docvqa", "pope", "realworldqa", "ocrbench")  # whose sizes the training rows have, in turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``awares bench``."""
    add = parser.add_argument
    add("--shape", default="qwen2.5-vl-7b", choices=[*shapes.SHAPES, shapes.MINI], help="architecture, random weights")
    add("--scale", type=_scale, default=1.0, help="shrink the shape to about this share of its parameters")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on cuda, float32 on cpu")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--benchmarks", nargs="+", default=list(shapes.BENCHMARKS), choices=list(shapes.BENCHMARKS), metavar="NAME")
    add("--image", type=_size, metavar="WxH", help="size of every image in px, whatever --benchmarks and --scale say")
    add("--rows", type=count, default=8, help="rows of a benchmark")
    add("--repetitions", type=count, default=5)
    add("--batch-tokens", nargs="+", type=_budget, default=[32768], help="token budgets to try, beside batch 1")
    add("--seed", type=_seed, default=1, help="of the weights and of the order of the jobs")
    add("--gpu", choices=list(costs.GPUS), help="whose roofline to compare with (default: told from the device's name)")
    add("--interactions", action=argparse.BooleanOptionalAction, default=True, help="time AwaRes and what it replaces")
    add("--train", action="store_true", help="time an SFT and a GRPO step, too")
    add("--pruners", action="store_true", help="time the pruners of visual tokens, too")
    add("--completion-tokens", type=count, default=32, help="of a turn in the GRPO step")
    add("--overrides", default="", help="of params.yaml in the training steps, e.g. '{sft.batch_size: 16}'")
    add(
        "--out",
        type=Path,
        default=Path("bench"),
        help="folder for latency.csv, times.csv, pruners.csv, training.csv, machine.json",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m awares.bench``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="awares bench", description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except AwaresError as error:
        print(f"awares bench: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Measure, write ``options.out``, print the tables. AwaresError for what cannot run."""
    check(options)
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    named = machine(options, dtype)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "machine.json").write_text(json.dumps(named, indent=2) + "\n")
    print(json.dumps(named, indent=2))
    if options.interactions:
        _write_each(interactions(options, dtype), ("latency.csv", "times.csv"), options, named)
    if options.pruners:
        _write_each(((table,) for table in pruners(options, dtype)), ("pruners.csv",), options, named)
    if options.train:
        steps = training_steps(options, dtype)
        _write(steps, options.out / "training.csv", named)
        print(f"\n{_shown(steps)}")


def check(options: argparse.Namespace) -> None:
    """AwaresError naming the mend for what this machine cannot run."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise AwaresValueError(
            "--device cuda, but torch sees no CUDA GPU: use --device cpu with --scale or --shape mini"
        )
    if options.device == "cpu" and options.shape != shapes.MINI and options.scale > 0.05:
        raise AwaresValueError(
            f"--shape {options.shape} at --scale {options.scale} needs a CUDA GPU, and torch sees none to use: "
            "shrink it (--scale 0.001), or take --shape mini"
        )
    if len(set(options.batch_tokens)) < len(options.batch_tokens):
        raise AwaresValueError(f"--batch-tokens {options.batch_tokens}: one stands twice")
    if options.train:
        training_params(options, "float32")
    if not (options.interactions or options.pruners or options.train):
        raise AwaresValueError("--no-interactions leaves nothing to measure: add --pruners or --train")


def count(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


def finite(text: str) -> float:
    """An argument that is a number, and neither infinite nor nan."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number")
    return float(text)


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 up")
    return int(text)


def _budget(text: str) -> int:
    if count(text) == LOOP:
        raise argparse.ArgumentTypeError("give a number above 1: batch 1 is always measured")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch("([0-9]+)x([0-9]+)", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"{text!r}: give width x height in px, such as 896x896")
    size = int(sides[1]), int(sides[2])
    if min(size) < shapes.SMALLEST_SIDE:
        raise argparse.ArgumentTypeError(f"{text!r}: no side may be below {shapes.SMALLEST_SIDE} px")
    return size


def _scale(text: str) -> float:
    if not 0 < finite(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0 and not above 1")
    return float(text)


def machine(options: argparse.Namespace, dtype: str) -> dict[str, str]:
    """Hardware, versions and shape, for the tables."""
    gpu = options.device == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} CPU"
    threads = {} if gpu else {"threads": str(torch.get_num_threads())}
    versions = {"awares": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
    shape = {"shape": options.shape, "scale": str(options.scale), "dtype": dtype}
    return {"device": device, **threads, **shape, "python": platform.python_version(), **versions}


def image_size(benchmark: str, options: argparse.Namespace) -> tuple[int, int]:
    """(width, height) px: ``--image``, else what stands for ``benchmark`` at this shape and scale."""
    return options.image or shapes.image_size(benchmark, options.shape, options.scale)


# Interactions


def interactions(options: argparse.Namespace, dtype: str) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Of each benchmark the table (time, ratios, phases, counts, roofline), and the single times."""
    model, processor = shapes.build(options.shape, options.scale, dtype, options.device, options.seed)
    work = {name: shapes.workload(name, options.rows, image_size(name, options)) for name in options.benchmarks}
    limits = {"max_new_tokens": shapes.longest_turn(list(work.values()), processor)}
    for name, rows in work.items():
        models, budgets = dict.fromkeys(latency.SYSTEMS, model), [LOOP, *options.batch_tokens]
        jobs = latency.jobs(models, processor, rows, budgets, **limits)
        times, done, _ = latency.measure(jobs, options.repetitions, options.seed, options.device)
        counts = latency.count_table(done, model.config, processor, model.dtype.itemsize)
        table = latency.time_table(times).merge(counts, on="system")
        table["roofline_ms"] = [
            _roofline(done[row.system], row.batch, row.system, model, processor, options) for row in table.itertuples()
        ]
        table.insert(0, "benchmark", name)
        table.insert(1, "image", "{}x{}".format(*rows.images[0].size))
        yield table, times.assign(benchmark=name)


def pruners(options: argparse.Namespace, dtype: str) -> Iterator[pd.DataFrame]:
    """Of each benchmark and batch, every pruner at every share: ms a row, ratio to ``full`` within a repetition, peak memory; and of a
    row, which are all alike: RTR of the layers' mean, counted FLOPs, the largest difference of a first logit from ``full``'s.
    """
    model, processor = shapes.build(options.shape, options.scale, dtype, options.device, options.seed)
    names = ["full", *(f"{name}_{percent}" for name in PRUNERS for percent in PERCENTS)]
    for name in options.benchmarks:
        size = image_size(name, options)
        work, length = shapes.workload(name, options.rows, size), shapes.answer_tokens(shapes.BENCHMARKS[name].awares)
        rows = {"id": work.row_ids, "image": work.images, "question": work.questions}
        alike = {key: values[:1] for key, values in rows.items()}
        single = latency.system_jobs(names, model, processor, alike, LOOP, max_new_tokens=length)
        counted = latency.flops_table(single)
        first = {job.system: _first_logits(job, model) for job in single}
        counted["logits_gap"] = [float((first[system] - first["full"]).abs().max()) for system in names]
        for budget in (LOOP, options.batch_tokens[0]):
            jobs = latency.system_jobs(names, model, processor, rows, budget, max_new_tokens=length)
            times, done, _ = latency.measure(jobs, options.repetitions, options.seed, options.device)
            table = latency.ratio_table(times).set_index("system").loc[names].reset_index()
            kept = {system: sum(one.layer_rtr for one in some) / len(some) for system, some in done.items()}
            table.insert(1, "layer_rtr", table.system.map(kept))
            table["peak_memory_mb"] = table.system.map(times.groupby("system").peak_memory.first() / 1e6)
            table.insert(0, "token_budget", budget)
            table.insert(0, "image", "{}x{}".format(*size))
            table.insert(0, "benchmark", name)
            yield table.merge(counted, on="system")


def _first_logits(job: latency.Job, model: Any) -> torch.Tensor:
    """Logits of the first token that ``job`` writes, (rows, vocabulary), before anything is barred."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, output: seen.append(output[:, -1].float()))
    try:
        job.work(None)
    finally:
        hook.remove()
    return seen[0]


def _roofline(
    done: Sequence[Trajectory], batch: Any, system: Any, model: Any, processor: Any, options: argparse.Namespace
) -> float:
    """Least ms a row at this batch (rows alone, or all of them at once); nan without a GPU to count for."""
    gpu = gpu_of(options)
    if gpu is None:
        return float("nan")
    groups = [[one] for one in done] if batch == "1" else [list(done)]
    reuse, size = system != "awares_naive", model.dtype.itemsize
    parts = [costs.roofline_seconds(group, model.config, processor, gpu, reuse, size) for group in groups]
    return 1000 * sum(sum(part.values()) for part in parts) / len(done)


def gpu_of(options: argparse.Namespace) -> costs.Gpu | None:
    """``--gpu``, else the known GPU that the device's name holds; None for others and on a CPU."""
    if options.gpu:
        return costs.GPUS[options.gpu]
    name = torch.cuda.get_device_name().lower() if options.device == "cuda" else ""
    known = [
        key for key in costs.GPUS if re.search(rf"\b{key}\b", name) and "pcie" not in name
    ]  # the SXM modules' data
    return costs.GPUS[known[0]] if known else None


# Training steps


class Clock(TrainerCallback):
    """The time at the end of every optimiser step, and the peak of memory."""

    def __init__(self, device: str) -> None:
        self.watch, self.memory = Stopwatch(device), latency.PeakMemory(device)
        self.ends: list[float] = []  # seconds, of a clock that starts anywhere

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.ends.append(self.watch.now())


def training_steps(options: argparse.Namespace, dtype: str) -> pd.DataFrame:
    """One SFT and one GRPO step: batch layout, tokens, seconds, tokens/s, peak memory (MB)."""
    params = training_params(options, dtype)
    return pd.DataFrame([_sft_step(options, params, dtype), _grpo_step(options, params, dtype)])


def training_params(options: argparse.Namespace, dtype: str) -> Params:
    """Profile ``paper`` with two steps of each training, and ``--overrides`` last; AwaresError for what they name wrongly."""
    overrides = (
        f"{{base.device: {options.device}, base.dtype: {dtype}, sft.epochs: 2, sft.checkpoints: 1, grpo.max_steps: 2, "
    )
    overrides += f"grpo.max_completion_length: {options.completion_tokens}, grpo.answer_reward: anls}}"
    values = {**parse_overrides(overrides), **parse_overrides(options.overrides)}
    return load_params("paper", overrides=values)


def training_rows(count: int, options: argparse.Namespace) -> datasets.Dataset:
    """Curated rows of typical sizes, or of ``--image``; the share that is HR is the oracle's (Fig. 5: 80.8 % LR)."""
    records = []
    for index in range(count):
        call, fifth = index % 5 == 0, index // 5  # the sizes shift with every five, so that calls meet all of them
        size = image_size(SOURCE_ROWS[(index + fifth) % len(SOURCE_ROWS)], options)
        record: dict[str, Any] = {
            "id": str(index),
            "image": Image.new("RGB", size, "white"),
            "question": shapes.QUESTION,
        }
        record |= {"answers": ["forty-two"], "label": "HR" if call else "LR"}
        records.append({**record, "target_crops": [shapes.CALLS[fifth % len(shapes.CALLS)][0]] if call else []})
    features = {"id": datasets.Value("string"), "image": datasets.Image(), "question": datasets.Value("string")}
    texts = datasets.List(datasets.Value("string"))
    features |= {"answers": texts, "label": datasets.Value("string"), "target_crops": texts}
    return datasets.Dataset.from_list(records, features=datasets.Features(features))


def _sft_step(options: argparse.Namespace, params: Params, dtype: str) -> dict[str, Any]:
    model, processor = shapes.build(options.shape, options.scale, dtype, options.device, options.seed)
    rows = training_rows(params.sft.batch_size, options)
    samples = sft.plan(rows, processor, params)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft.build_trainer(params, rows, samples, model, processor, Path(folder))
        seconds, memory = _second_step(trainer, options.device)
    tokens = sum(sample.length for sample in samples[params.sft.batch_size :])
    layout = f"{params.sft.batch_size} samples, {params.sft.per_device_batch_size} at a time"
    return _step("sft", layout, tokens, seconds, memory)


def _grpo_step(options: argparse.Namespace, params: Params, dtype: str) -> dict[str, Any]:
    model, processor = shapes.build(options.shape, options.scale, dtype, options.device, options.seed)
    section = params.grpo
    rows = training_rows(2 * section.batch_size // section.generations, options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo.build_trainer(params, rows, model, processor, Path(folder))
        seconds, memory = _second_step(trainer, options.device)
    seen = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    layout = f"{section.batch_size} completions, G {section.generations}, {section.per_device_batch_size} at a time"
    return _step("grpo", layout, seen[1] - seen[0], seconds, memory)


def _second_step(trainer: Any, device: str) -> tuple[float, float]:
    """Train two steps; (seconds of the second one, peak memory in bytes)."""
    gc.collect()
    clock = Clock(device)
    trainer.add_callback(clock)
    trainer.args.save_strategy = "no"
    trainer.train()
    if len(clock.ends) != 2:
        raise AwaresValueError(f"training: {len(clock.ends)} steps where 2 were laid out: check --overrides")
    return clock.ends[1] - clock.ends[0], clock.memory.read()


def _step(name: str, layout: str, tokens: float, seconds: float, memory: float) -> dict[str, Any]:
    rate = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    return {"step": name, "layout": layout, **rate, "peak_memory_mb": memory / 1e6}


# Output


def _write_each(
    measured: Iterable[tuple[pd.DataFrame, ...]],
    files: Sequence[str],
    options: argparse.Namespace,
    named: dict[str, str],
) -> None:
    """Add tables to ``files`` as they come, so that a kill costs one benchmark; prints the first of each."""
    done = []
    for tables in measured:
        done.append(tables)
        for file, parts in zip(files, zip(*done, strict=True), strict=True):
            _write(pd.concat(parts, ignore_index=True), options.out / file, named)
        print(f"\n{_shown(tables[0])}", flush=True)


def _write(table: pd.DataFrame, path: Path, named: dict[str, str]) -> None:
    table.round(6).assign(**named).to_csv(path, index=False, lineterminator="\n")


def _shown(table: pd.DataFrame) -> str:
    columns = [
        name for name in table if not str(name).endswith(("_low", "_high")) and name not in ("rows", "image", "calls")
    ]
    return table[columns].to_string(index=False, float_format=lambda value: f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(main())
