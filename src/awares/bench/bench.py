"""`awares bench`: speed at the paper's sizes, with random weights (no download).

- *Interactions.* Blank rows of each benchmark's image size and response length go through the evaluation's engine, with
  scripted outputs, at batch 1 and at the best token budget, all jobs interleaved, from the PIL image to the text.
- *Pruners* (``--pruners``). The training-free pruners at 100 %, 70 % and 50 % of the visual tokens against the plain
  full image. At 100 % the first token's logits must equal the plain model's (in float32; bfloat16 rounds).
- *Training steps* (``--train``). The second optimiser step of our SFT trainer and of our GRPO trainer. A random model
  never ends a turn, so a GRPO completion has ``--completion-tokens`` tokens; ANLS as reward needs no second model.
"""

import gc
import importlib.metadata
import inspect
import json
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import pandas as pd
import torch
import typer
from PIL import Image
from transformers import TrainerCallback
from typer import Option

from awares import __version__
from awares.bench import configs, costs, latency
from awares.bench.latency import LOOP, Stopwatch
from awares.config import Params, load_params, parse_overrides
from awares.errors import AwaresValueError
from awares.method import grpo, sft
from awares.method.rollout import Trajectory

PACKAGES = ("torch", "transformers", "trl", "peft")
PRUNERS, PERCENTS = ("visionzip", "holov", "sparsevlm", "fastv", "random_token"), (100, 70, 50)
SOURCE_ROWS = ("chartqa", "docvqa", "pope", "realworldqa", "ocrbench")  # image sizes of the training rows, in turn
Shape = Literal["qwen2.5-vl-7b", "qwen2.5-vl-3b", "qwen2.5-vl-72b", "mini"]
Precision = Literal["", "bfloat16", "float32"]
Roofline = Literal["", "a100", "h100", "h200"]
BENCHMARKS: Any = tuple(configs.BENCHMARKS)
BUDGETS: Any = (32768,)


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch("([0-9]+)x([0-9]+)", text)
    if not sides or min(int(sides[1]), int(sides[2])) < configs.SMALLEST_SIDE:
        raise typer.BadParameter(
            f"{text!r}: give width x height in px, such as 896x896, each {configs.SMALLEST_SIDE} or more"
        )
    return int(sides[1]), int(sides[2])


@dataclass(frozen=True)
class Settings:
    """The options of ``awares bench``; AwaresError for a combination that cannot run on this machine."""

    shape: Annotated[Shape, Option(help="architecture, random weights")] = "qwen2.5-vl-7b"
    scale: Annotated[float, Option(min=1e-6, max=1, help="fraction of the shape's parameters that is left")] = 1.0
    dtype: Annotated[Precision, Option(help="default: bfloat16 on cuda, float32 on cpu", show_default=False)] = ""
    device: Annotated[Literal["cuda", "cpu"], Option()] = "cuda" if torch.cuda.is_available() else "cpu"
    benchmarks: Annotated[list[str], Option(help="may be repeated")] = BENCHMARKS
    image: Annotated[Any, Option(parser=_size, metavar="WxH", help="size of every image in px")] = None
    rows: Annotated[int, Option(min=1, help="rows of a benchmark")] = 8
    repetitions: Annotated[int, Option(min=1)] = 5
    batch_tokens: Annotated[list[int], Option(min=2, help="token budgets next to batch 1; may be repeated")] = BUDGETS
    seed: Annotated[int, Option(min=0, help="of the weights and the order of the jobs")] = 1
    gpu: Annotated[Roofline, Option(help="roofline to compare with (default: by the device's name)")] = ""
    interactions: Annotated[bool, Option(help="time AwaRes and the systems that it replaces")] = True
    train: Annotated[bool, Option("--train", help="also time an SFT and a GRPO step")] = False
    pruners: Annotated[bool, Option("--pruners", help="also time the pruners of visual tokens")] = False
    completion_tokens: Annotated[int, Option(min=1, help="of a turn in the GRPO step")] = 32
    overrides: Annotated[str, Option(help="of params.yaml in the training steps")] = ""
    out: Annotated[Path, Option(help="folder of the CSV tables and machine.json")] = Path("bench")

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise AwaresValueError(
                "--device cuda, but torch sees no CUDA GPU: use --device cpu with --scale or --shape mini"
            )
        if self.device == "cpu" and self.shape != configs.MINI and self.scale > 0.05:
            raise AwaresValueError(
                f"--shape {self.shape} --scale {self.scale} needs a CUDA GPU: use --scale 0.001 or --shape mini"
            )
        if unknown := set(self.benchmarks) - set(BENCHMARKS):
            raise AwaresValueError(f"--benchmarks {', '.join(unknown)}: use {', '.join(BENCHMARKS)}")
        if len(set(self.batch_tokens)) < len(self.batch_tokens):
            raise AwaresValueError(f"--batch-tokens {list(self.batch_tokens)}: a budget is repeated")
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
        fixed |= {
            "grpo.max_steps": 2,
            "grpo.max_completion_length": self.completion_tokens,
            "grpo.answer_reward": "anls",
        }
        return load_params("paper", overrides={**fixed, **parse_overrides(self.overrides)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``awares bench`` with ``arguments``; the exit code. AwaresError for settings that cannot run."""

    def command(**options: Any) -> None:
        run(Settings(**options))

    command.__signature__ = inspect.signature(Settings)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.command(help=__doc__)(command)
    return app(arguments, prog_name="awares bench", standalone_mode=False) or 0


def run(settings: Settings) -> None:
    """Measure, write the tables to ``settings.out``, print them."""
    named = machine(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "machine.json").write_text(json.dumps(named, indent=2) + "\n")
    print(json.dumps(named, indent=2))
    if settings.interactions:
        _write_each(interactions(settings), ("latency.csv", "times.csv"), settings.out, named)
    if settings.pruners:
        _write_each(((table,) for table in pruners(settings)), ("pruners.csv",), settings.out, named)
    if settings.train:
        _write_each([(training_steps(settings),)], ("training.csv",), settings.out, named)


def machine(settings: Settings) -> dict[str, str]:
    """Hardware, versions and shape, for the tables."""
    gpu = settings.device == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} CPU"
    threads = {} if gpu else {"threads": str(torch.get_num_threads())}
    versions = {"awares": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
    shape = {"shape": settings.shape, "scale": str(settings.scale), "dtype": settings.precision}
    return {"device": device, **threads, **shape, "python": platform.python_version(), **versions}


# Interactions


def interactions(settings: Settings) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Per benchmark the table (time, ratios, phases, counts, roofline), and the single times."""
    model, processor = settings.build()
    work = {name: configs.workload(name, settings.rows, settings.image_size(name)) for name in settings.benchmarks}
    limits = {"max_new_tokens": configs.longest_turn(list(work.values()), processor)}
    gpu = find_gpu(settings)
    for name, rows in work.items():
        models, budgets = dict.fromkeys(latency.SYSTEMS, model), [LOOP, *settings.batch_tokens]
        jobs = latency.jobs(models, processor, rows, budgets, **limits)
        times, done, _ = latency.measure(jobs, settings.repetitions, settings.seed, settings.device)
        counts = latency.count_table(done, model.config, processor, model.dtype.itemsize)
        table = latency.time_table(times).merge(counts, on="system")
        table["roofline_ms"] = [
            _roofline(done[row.system], row.batch, row.system, model, processor, gpu) for row in table.itertuples()
        ]
        table.insert(0, "benchmark", name)
        table.insert(1, "image", "{}x{}".format(*rows.images[0].size))
        yield table, times.assign(benchmark=name)


def pruners(settings: Settings) -> Iterator[pd.DataFrame]:
    """Per benchmark and budget: ms per row of every pruner, ratio to ``full`` within a repetition, peak memory.

    Further columns, equal for all rows: RTR as the mean over layers, counted FLOPs, and the largest difference of a
    first logit from ``full``'s.
    """
    model, processor = settings.build()
    names = ["full", *(f"{name}_{percent}" for name in PRUNERS for percent in PERCENTS)]
    for name in settings.benchmarks:
        size = settings.image_size(name)
        work, length = (
            configs.workload(name, settings.rows, size),
            configs.answer_tokens(configs.BENCHMARKS[name].awares),
        )
        rows = {"id": work.row_ids, "image": work.images, "question": work.questions}
        first_row = {key: values[:1] for key, values in rows.items()}
        single = latency.system_jobs(names, model, processor, first_row, LOOP, max_new_tokens=length)
        counted = latency.flops_table(single)
        first = {job.system: _first_logits(job, model) for job in single}
        counted["logits_gap"] = [float((first[system] - first["full"]).abs().max()) for system in names]
        for budget in (LOOP, settings.batch_tokens[0]):
            jobs = latency.system_jobs(names, model, processor, rows, budget, max_new_tokens=length)
            times, done, _ = latency.measure(jobs, settings.repetitions, settings.seed, settings.device)
            table = latency.ratio_table(times).set_index("system").loc[names].reset_index()
            kept = {system: sum(one.layer_rtr for one in some) / len(some) for system, some in done.items()}
            table.insert(1, "layer_rtr", table.system.map(kept))
            table["peak_memory_mb"] = table.system.map(times.groupby("system").peak_memory.first() / 1e6)
            table.insert(0, "token_budget", budget)
            table.insert(0, "image", "{}x{}".format(*size))
            table.insert(0, "benchmark", name)
            yield table.merge(counted, on="system")


def _first_logits(job: latency.Job, model: Any) -> torch.Tensor:
    """Logits (rows, vocabulary) of the first token that ``job`` writes, before any processor."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, output: seen.append(output[:, -1].float()))
    try:
        job.work(None)
    finally:
        hook.remove()
    return seen[0]


def _roofline(
    done: Sequence[Trajectory], batch: Any, system: Any, model: Any, processor: Any, gpu: costs.Gpu | None
) -> float:
    """Least ms per row at this batch (rows alone, or all rows at once); nan without a known GPU."""
    if gpu is None:
        return float("nan")
    groups = [[one] for one in done] if batch == "1" else [list(done)]
    reuse, size = system != "awares_naive", model.dtype.itemsize
    parts = [costs.roofline_seconds(group, model.config, processor, gpu, reuse, size) for group in groups]
    return 1000 * sum(sum(part.values()) for part in parts) / len(done)


def find_gpu(settings: Settings) -> costs.Gpu | None:
    """``settings.gpu``, else the known GPU in the device's name; None for other GPUs and on a CPU."""
    name = settings.gpu or (torch.cuda.get_device_name().lower() if settings.device == "cuda" else "")
    known = [key for key in costs.GPUS if re.search(rf"\b{key}\b", name) and "pcie" not in name]  # data of SXM modules
    return costs.GPUS[known[0]] if known else None


# Training steps


class StepClock(TrainerCallback):
    """Records the time at the end of every optimiser step, and the peak memory."""

    def __init__(self, device: str) -> None:
        self.watch, self.memory = Stopwatch(device), latency.PeakMemory(device)
        self.ends: list[float] = []  # seconds on a clock with an arbitrary start

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.ends.append(self.watch.now())


def training_steps(settings: Settings) -> pd.DataFrame:
    """One SFT and one GRPO step: batch layout, tokens, seconds, tokens/s, peak memory (MB)."""
    params = settings.training_params()
    return pd.DataFrame([_time_sft(settings, params), _time_grpo(settings, params)])


def training_rows(count: int, image_size: Callable[[str], tuple[int, int]]) -> datasets.Dataset:
    """Curated rows of the sources' typical sizes; one in five is HR, as with the oracle (Fig. 5: 80.8 % LR)."""
    records = []
    for index in range(count):
        call, fifth = index % 5 == 0, index // 5  # sizes shift with every fifth row, so that calls meet all of them
        image = Image.new("RGB", image_size(SOURCE_ROWS[(index + fifth) % len(SOURCE_ROWS)]), "white")
        record = {"id": str(index), "image": image, "question": configs.QUESTION, "answers": ["forty-two"]}
        target = [configs.CALLS[fifth % len(configs.CALLS)][0]] if call else []
        records.append({**record, "label": "HR" if call else "LR", "target_crops": target})
    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    features = {"id": text, "image": datasets.Image(), "question": text, "answers": texts}
    return datasets.Dataset.from_list(
        records, features=datasets.Features({**features, "label": text, "target_crops": texts})
    )


def _time_sft(settings: Settings, params: Params) -> dict[str, Any]:
    (model, processor), section = settings.build(), params.sft
    rows = training_rows(section.batch_size, settings.image_size)
    samples = sft.plan_samples(rows, processor, params)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft.build_sft_trainer(params, rows, samples, model, processor, Path(folder))
        seconds, memory = _second_step(trainer, settings.device)
    tokens = sum(sample.length for sample in samples[section.batch_size :])
    return _step(
        "sft", f"{section.batch_size} samples, {section.per_device_batch_size} at a time", tokens, seconds, memory
    )


def _time_grpo(settings: Settings, params: Params) -> dict[str, Any]:
    (model, processor), section = settings.build(), params.grpo
    rows = training_rows(2 * section.batch_size // section.generations, settings.image_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo.build_grpo_trainer(params, rows, model, processor, Path(folder))
        seconds, memory = _second_step(trainer, settings.device)
    seen = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    layout = f"{section.batch_size} completions, G {section.generations}, {section.per_device_batch_size} at a time"
    return _step("grpo", layout, seen[1] - seen[0], seconds, memory)


def _second_step(trainer: Any, device: str) -> tuple[float, float]:
    """Train two steps; seconds of the second one and peak memory in bytes."""
    gc.collect()
    clock = StepClock(device)
    trainer.add_callback(clock)
    trainer.args.save_strategy = "no"
    trainer.train()
    if len(clock.ends) != 2:
        raise AwaresValueError(f"training ran {len(clock.ends)} steps instead of 2: check --overrides")
    return clock.ends[1] - clock.ends[0], clock.memory.read()


def _step(name: str, layout: str, tokens: float, seconds: float, memory: float) -> dict[str, Any]:
    rate = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    return {"step": name, "layout": layout, **rate, "peak_memory_mb": memory / 1e6}


def _write_each(
    measured: Iterable[tuple[pd.DataFrame, ...]], files: Sequence[str], out: Path, named: dict[str, str]
) -> None:
    """Append tables to ``files`` as they arrive, so that a kill loses one benchmark; print the first of each."""
    done = []
    for tables in measured:
        done.append(tables)
        for file, parts in zip(files, zip(*done, strict=True), strict=True):
            table = pd.concat(parts, ignore_index=True).round(6).assign(**named)
            table.to_csv(out / file, index=False, lineterminator="\n")
        hidden = ("rows", "image", "calls")
        shown = [name for name in tables[0] if not name.endswith(("_low", "_high")) and name not in hidden]
        print(f"\n{tables[0][shown].to_string(index=False, float_format=lambda value: f'{value:.3g}')}", flush=True)
