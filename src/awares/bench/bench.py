"""`awares bench`: its tables, written as they arrive. ``settings`` are the options of that command (`cli.main`)."""

import importlib.metadata
import itertools
import platform
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from PIL import Image
from transformers import TrainerCallback

from awares.bench import configs, latency
from awares.config import Params, as_mapping, load_params
from awares.errors import AwaresValueError
from awares.method import grpo, sft

SOURCE_ROWS = ("chartqa", "docvqa", "pope", "realworldqa", "ocrbench")  # image sizes of the training rows, in turn
DEVICE, DTYPE = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")


def measure(settings: Any) -> None:
    """Measure, print and write the tables (a kill loses one benchmark). AwaresError for bad settings."""
    if DEVICE == "cpu" and settings.shape != configs.MINI and settings.scale > 0.05:
        raise AwaresValueError(f"--shape {settings.shape} needs a CUDA GPU: use --scale 0.001 or --shape mini")
    names = settings.benchmarks or [*configs.BENCHMARKS]
    if unknown := {*names} - {*configs.BENCHMARKS}:
        raise AwaresValueError(f"--benchmarks {', '.join(unknown)}: use {', '.join(configs.BENCHMARKS)}")
    tables = [interactions(settings, names)] if settings.rows else []
    if settings.train:  # two steps of each training
        fixed = {"base.device": DEVICE, "base.dtype": DTYPE, "base.attn_implementation": settings.attention}
        fixed |= {"sft.epochs": 2, "sft.checkpoints": 1, "grpo.max_steps": 2, "grpo.answer_reward": "anls"}
        fixed |= {"grpo.max_completion_length": 32, **as_mapping("overrides", settings.overrides or {})}
        params = load_params("paper", overrides=fixed)
        tables.append(("training.csv", _time_step(step, settings, params)) for step in ("sft", "grpo"))
    settings.out.mkdir(parents=True, exist_ok=True)
    cpu = {"device": f"{platform.processor() or platform.machine()} CPU", "threads": str(torch.get_num_threads())}
    about = cpu if DEVICE == "cpu" else {"device": torch.cuda.get_device_name()}
    about |= {"shape": settings.shape, "scale": str(settings.scale), "dtype": DTYPE}
    about |= {"attention": settings.attention or "default", "python": platform.python_version()}
    about |= {name: importlib.metadata.version(name) for name in ("awares", "torch", "transformers", "trl", "peft")}
    done = defaultdict(list)
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    for file, table in itertools.chain(*tables):
        done[file].append(table)
        together = pd.concat(done[file], ignore_index=True).round(6).assign(**about)
        together.to_csv(settings.out / file, index=False, lineterminator="\n")
        if file != "times.csv":
            shown = table.loc[:, ~table.columns.str.contains("_low$|_high$|^rows$|^image$|^calls$")]
            print(f"\n{shown.to_string(index=False, float_format='{:.3g}'.format)}", flush=True)


def interactions(settings: Any, benchmarks: list[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """File names and tables: of every benchmark its single times, and times, ratios, phases and counts."""
    model, processor = configs.build(settings.shape, settings.scale, DTYPE, DEVICE, settings.attention)
    models, budgets = dict.fromkeys(latency.TIMED_SYSTEMS, model), (latency.LOOP, settings.batch_tokens)
    for name in benchmarks:
        width, height = size = configs.image_size(name, settings.shape, settings.scale)
        work = latency.Workload(models, processor, *configs.workload(name, settings.rows, size))
        times, played, _ = latency.time_jobs(work.play, [*models], budgets, settings.repetitions, 1, DEVICE)
        counts = latency.count_table(played, model.config, processor, model.dtype.itemsize)
        table = latency.time_table(times).merge(counts, on="system")
        for one in (times, table):
            one.insert(0, "benchmark", name)
        table.insert(1, "image", f"{width}x{height}")
        yield "times.csv", times
        yield "latency.csv", table


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


def _time_step(step: str, settings: Any, params: Params) -> pd.DataFrame:
    """Train two steps; batch layout, tokens, seconds, tokens/s of the second one, and peak memory (MB)."""
    model, processor = configs.build(settings.shape, settings.scale, DTYPE, DEVICE, settings.attention)
    section: Any = getattr(params, step)
    size = section.batch_size
    trainer: Any
    callback: Any = TrainerCallback()
    count = size if step == "sft" else 2 * size // section.generations
    rows = training_rows(count, lambda name: configs.image_size(name, settings.shape, settings.scale))
    with tempfile.TemporaryDirectory() as folder:
        if step == "sft":
            samples = sft.plan_samples(rows, processor, params)
            trainer = sft.build_sft_trainer(params, rows, samples, model, processor, Path(folder))
        else:
            trainer = grpo.build_grpo_trainer(params, rows, model, processor, Path(folder))
        ends, clock = list[float](), latency.Stopwatch(DEVICE)
        callback.on_step_end = lambda *_, **__: ends.append(clock.now())
        trainer.add_callback(callback)
        trainer.args.save_strategy = "no"
        trainer.train()
    if len(ends) != 2:
        raise AwaresValueError(f"training ran {len(ends)} steps instead of 2: check --overrides")
    if step == "sft":
        layout, tokens = f"{size} samples", sum(sample.length for sample in samples[size:])
    else:
        seen = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
        layout, tokens = f"{size} completions, G {section.generations}", seen[1] - seen[0]
    seconds, layout = ends[1] - ends[0], f"{layout}, {section.per_device_batch_size} at a time"
    record = {"step": step, "layout": layout, "tokens": tokens, "seconds": seconds}
    record |= {"tokens_per_second": tokens / seconds, "peak_memory_mb": clock.peak_memory() / 1e6}
    return pd.DataFrame([record])
