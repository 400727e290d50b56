"""Timing systems in one interleaved run: phases, ratios with spread, counted work (PAPER §5, latency).

Every repetition runs all jobs in a new random order, so that a slowdown of the machine affects all of them; results are
ratios within a repetition. `awares bench` and notebooks/07_latency use this module.
"""

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
import torch
from PIL.Image import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from awares.baselines import registry as baselines
from awares.bench import costs
from awares.bench.scripted import PHASES, PhaseEnd, Script, ScriptedEngine
from awares.engine.model import ImageOnlyProcessor
from awares.method.evaluation import AVERAGE
from awares.method.rollout import Engine, Trajectory

# full, half: one turn of the base model; awares: cache reuse; awares_naive: turn 2 prefills everything again;
# escalate_full: a row that calls gets the whole image (VisionThink's interaction)
POLICIES = ("awares", "awares_naive", "escalate_full")
SYSTEMS = ("full", "half", *POLICIES)
LOOP = 1  # token budget under which every row runs alone
Work = Callable[[PhaseEnd | None], list[Trajectory]]


@dataclass(frozen=True)
class Job:
    """One timed job: a system on all rows, in batches of ``token_budget`` tokens."""

    system: str
    token_budget: int
    work: Work


@dataclass(frozen=True)
class Workload:
    """Rows for all systems. ``scripts``: system -> one script per row; a system without scripts decodes freely."""

    images: Sequence[Image]
    questions: Sequence[str]
    row_ids: Sequence[str]
    scripts: Mapping[str, Sequence[Script]]
    call_bias: float = 0.0


class Measured(NamedTuple):
    """Result of `measure`."""

    times: pd.DataFrame  # one line per job and repetition
    played: dict[str, list[Trajectory]]  # per system, at its first budget
    alone: dict[str, np.ndarray]  # per system whose rows ran alone: seconds, (repetitions, rows)


class Stopwatch:
    """Seconds by (phase, turn), for `ScriptedEngine`; on a GPU every reading waits for the queued work."""

    def __init__(self, device: str) -> None:
        self.gpu = device.startswith("cuda")
        self.seconds = {(phase, turn): 0.0 for turn in (1, 2) for phase in PHASES}
        self.last = self.now()

    def __call__(self, phase: str, turn: int) -> None:
        now = self.now()
        self.seconds[phase, turn] += now - self.last
        self.last = now

    def now(self) -> float:
        """Seconds on a clock with an arbitrary start, once all queued work is done."""
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


class PeakMemory:
    """Peak memory since the start, in bytes: tensors on a GPU, else the process (Linux; nan elsewhere)."""

    def __init__(self, device: str) -> None:
        self.gpu = device.startswith("cuda")
        gc.collect()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        elif _CLEAR_REFS.exists():
            with contextlib.suppress(
                OSError, AttributeError
            ):  # glibc keeps freed memory; other libraries lack the call
                ctypes.CDLL(None).malloc_trim(0)
            _CLEAR_REFS.write_text("5")  # resets the process's peak

    def read(self) -> float:
        """Bytes."""
        if self.gpu:
            return float(torch.cuda.max_memory_allocated())
        if not _CLEAR_REFS.exists():
            return float("nan")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024.0 * int(status["VmHWM"].split()[0])


_CLEAR_REFS = Path("/proc/self/clear_refs")


# Rows and jobs


def spread(benchmarks: Sequence[str], count: int) -> list[int]:
    """Indices of ``count`` rows to time: equally many per benchmark (the first get the remainder), at even steps."""
    places: dict[str, list[int]] = {}
    for index, name in enumerate(benchmarks):
        places.setdefault(name, []).append(index)
    each, over = divmod(count, len(places))
    wanted = [min(len(where), each + (n < over)) for n, where in enumerate(places.values())]
    found = [where[len(where) * k // n] for n, where in zip(wanted, places.values(), strict=True) for k in range(n)]
    return sorted(found)


def jobs(
    models: Mapping[str, Any],
    processor: ImageOnlyProcessor,
    workload: Workload,
    budgets: Sequence[int],
    **limits: Any,
) -> list[Job]:
    """One job per system of ``models`` (system -> model) and token budget; ``limits`` go to the engine."""

    def job(system: str, budget: int) -> Job:
        def work(on_phase_end: PhaseEnd | None) -> list[Trajectory]:
            options = {"reuse": system != "awares_naive", "on_phase_end": on_phase_end, **limits}
            return play(ScriptedEngine(models[system], processor, token_budget=budget, **options), system, workload)

        return Job(system, budget, work)

    return [job(system, budget) for budget in budgets for system in models]


def system_jobs(
    names: Sequence[str], model: Any, processor: ImageOnlyProcessor, rows: Any, budget: int, **limits: Any
) -> list[Job]:
    """One job per system of `baselines` on ``rows``, with the weights ``model``; no phases are reported."""

    def job(name: str) -> Job:
        engine = Engine(model, processor, token_budget=budget, **limits)
        return Job(name, budget, lambda on_phase_end: baselines.answer(name, baselines.Job(engine, rows)))

    return [job(name) for name in names]


def play(engine: ScriptedEngine, system: str, workload: Workload) -> list[Trajectory]:
    """The answers of ``system`` to all rows of ``workload``."""
    images, questions, ids = workload.images, workload.questions, workload.row_ids
    scripts = workload.scripts.get(system)
    if system in POLICIES:
        if scripts:
            return engine.run_scripts(images, questions, ids, scripts)
        return engine.run(images, questions, call_bias=workload.call_bias, row_ids=ids)
    if scripts:
        return engine.answer_scripts(images, questions, system, ids, scripts)
    return engine.answer(images, questions, system, row_ids=ids)


def escalations(trajectories: Sequence[Trajectory]) -> list[Script]:
    """Scripts that call for the whole image in rows where a policy called; the answers are free."""
    return [Script(("all",) if one.call_status != "none" else ()) for one in trajectories]


def escalated(engine: ScriptedEngine, rows: Any, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """``trajectories`` of a policy on ``rows``; rows that called run again with the whole image as the crop."""
    scripts = escalations(trajectories)
    callers = [index for index, script in enumerate(scripts) if script.crops]
    some = rows.select(callers)
    again = engine.run_scripts(some["image"], some["question"], some["id"], [scripts[index] for index in callers])
    found = dict(zip(callers, again, strict=True))
    return [found.get(index, one) for index, one in enumerate(trajectories)]


# Measuring


def measure(work: Sequence[Job], repetitions: int, seed: int, device: str) -> Measured:
    """Run every job once to warm up (which gives its peak memory), then ``repetitions`` times in shuffled order.

    Columns of ``times``: system, token_budget, repetition, rows, seconds, peak_memory in bytes, and the seconds of
    every phase and turn, e.g. prefill_2.
    """
    records, peaks = [], []
    done: dict[str, list[Trajectory]] = {}
    alone: dict[str, list[list[float]]] = {}
    for job in work:
        memory = PeakMemory(device)
        done.setdefault(job.system, job.work(None))
        peaks.append(memory.read())
    rng = np.random.default_rng(seed)
    for repetition in range(repetitions):
        for index in rng.permutation(len(work)):
            job, watch = work[index], Stopwatch(device)
            begun = watch.last
            answered = job.work(watch)
            seconds, rows = watch.now() - begun, len(answered)
            if job.token_budget == LOOP:
                alone.setdefault(job.system, []).append([one.seconds for one in answered])
            parts = {f"{phase}_{turn}": value for (phase, turn), value in watch.seconds.items()}
            record = {"system": job.system, "token_budget": job.token_budget, "repetition": repetition, "rows": rows}
            records.append({**record, "seconds": seconds, "peak_memory": peaks[index], **parts})
    return Measured(pd.DataFrame(records), done, {system: np.array(seconds) for system, seconds in alone.items()})


def matmul_rate(device: str, dtype: str, size: int = 1024, repetitions: int = 20) -> float:
    """GFLOP/s of a square matrix product on ``device``, the best of ``repetitions``: a bound for any batching."""
    square = torch.rand(size, size, device=device, dtype=getattr(torch, dtype))
    watch, ends = Stopwatch(device), []
    for _ in range(repetitions + 1):
        _ = square @ square
        ends.append(watch.now())
    return 2 * size**3 / float(np.diff(ends).min()) / 1e9


def best_budgets(times: pd.DataFrame) -> dict[str, int]:
    """The token budget at which each system is fastest, except rows alone."""
    batched = times[times.token_budget != LOOP]
    middle = batched.groupby(["system", "token_budget"], sort=False).seconds.median().reset_index()
    fastest = middle.loc[middle.groupby("system").seconds.idxmin()].set_index("system").token_budget
    return {system: int(fastest[system]) for system in SYSTEMS if system in fastest.index}


def time_table(times: pd.DataFrame, reference: str = "full") -> pd.DataFrame:
    """Milliseconds per row at batch 1 and at each system's best budget, and the ratio to ``reference`` at the same.

    Medians over repetitions with quartiles (``_low``, ``_high``); ``ratio`` is taken within a repetition; ``speedup``:
    rows per second relative to batch 1. Phases are medians over both turns, ``prefill_2`` of the second turn.
    """
    best, records = best_budgets(times), []
    alone = _by_repetition(times, dict.fromkeys(best, LOOP))
    for batch, budgets in (("1", dict.fromkeys(best, LOOP)), ("best", best)):
        seconds = _by_repetition(times, budgets)
        for system, budget in budgets.items():
            part = times[(times.system == system) & (times.token_budget == budget)]
            rows = part.rows.iloc[0]
            record = {"system": system, "batch": batch, "token_budget": budget, "rows": rows}
            record |= quartiles("ms", 1000 * seconds[system] / rows)
            record |= quartiles("ratio", seconds[system] / seconds[reference])
            record |= quartiles("speedup", alone[system] / seconds[system])
            for phase in PHASES:
                record[phase] = 1000 * (part[f"{phase}_1"] + part[f"{phase}_2"]).median() / rows
            record["prefill_2"] = 1000 * part.prefill_2.median() / rows
            records.append({**record, "peak_memory_mb": part.peak_memory.iloc[0] / 1e6})
    return pd.DataFrame(records)


def ratio_table(times: pd.DataFrame, reference: str = "full") -> pd.DataFrame:
    """Milliseconds per row of jobs at one token budget each, and their ratio to ``reference`` within a repetition."""
    seconds = times.pivot(index="repetition", columns="system", values="seconds")
    records = []
    for system, part in times.groupby("system", sort=False):
        spread = quartiles("ms", 1000 * seconds[system] / part.rows.iloc[0])
        records.append({"system": system, **spread, **quartiles("ratio", seconds[system] / seconds[reference])})
    return pd.DataFrame(records)


def pair_table(times: pd.DataFrame, overs: Sequence[str], level: float) -> pd.DataFrame:
    """The time of each system relative to each of ``overs``, at batch 1 and at each one's best budget.

    Columns system, over, batch, ratio, ratio_low, ratio_high: the geometric mean over repetitions of the ratio within
    one, with the ``level`` interval of Student's t for its logarithm. It covers repetitions on this machine and rows.
    """
    best, records = best_budgets(times), []
    for batch, budgets in (("1", dict.fromkeys(best, LOOP)), ("best", best)):
        seconds = np.log(_by_repetition(times, budgets))
        for over in overs:
            for system in (name for name in best if name != over):
                steps = (seconds[system] - seconds[over]).to_numpy()
                half = steps.std(ddof=1) / len(steps) ** 0.5 * scipy.stats.t.ppf((1 + level) / 2, len(steps) - 1)
                ends = np.exp([steps.mean(), steps.mean() - half, steps.mean() + half])
                records.append((system, over, batch, *ends))
    return pd.DataFrame(records, columns=["system", "over", "batch", "ratio", "ratio_low", "ratio_high"])


def benchmark_table(alone: Mapping[str, np.ndarray], benchmarks: Sequence[str]) -> pd.DataFrame:
    """Milliseconds per row of rows that run alone (`Measured.alone`), by system and benchmark, and the average.

    Columns system, benchmark, ms (median over repetitions of the mean over rows) with quartiles, n rows.
    """
    names, records = np.array(benchmarks), []
    for system, seconds in alone.items():
        parts = {name: 1000 * seconds[:, names == name].mean(axis=1) for name in dict.fromkeys(benchmarks)}
        parts[AVERAGE] = np.mean(list(parts.values()), axis=0)
        for name, values in parts.items():
            count = len(names) if name == AVERAGE else int((names == name).sum())
            records.append({"system": system, "benchmark": name, **quartiles("ms", values), "n": count})
    return pd.DataFrame(records)


def flops_table(work: Sequence[Job], reference: str = "full") -> pd.DataFrame:
    """GFLOPs per row of each job by torch's counter, padding included; ``gflops_ratio`` to ``reference``."""
    records = []
    for job in work:
        # torch does not count a CPU's fused attention kernel
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            rows = len(job.work(None))
        records.append({"system": job.system, "gflops": counter.get_total_flops() / rows / 1e9})
    table = pd.DataFrame(records)
    return table.assign(gflops_ratio=table.gflops / table.gflops[table.system == reference].iloc[0])


def quartiles(name: str, values: Any) -> dict[str, float]:
    """``name``: the median of ``values``; ``name``_low and ``name``_high: its quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: float(middle), f"{name}_low": float(low), f"{name}_high": float(high)}


def _by_repetition(times: pd.DataFrame, budgets: Mapping[str, int]) -> pd.DataFrame:
    """Seconds of each system at its budget: one line per repetition, one column per system."""
    chosen = times[times.token_budget == times.system.map(budgets)]
    return chosen.pivot(index="repetition", columns="system", values="seconds")


# Counting


def count_table(
    done: Mapping[str, Sequence[Trajectory]], config: Any, processor: ImageOnlyProcessor, bytes_per_value: int
) -> pd.DataFrame:
    """Per system, means over rows: visual tokens, RTR, calls, GFLOPs by part and total, ratio to full's, cache in MB.

    ``prefill_2_gflops`` is a mean over the rows with a second turn, nan without any.
    """
    records = []
    for system, trajectories in done.items():
        found = [costs.trajectory_flops(one, config, processor, system != "awares_naive") for one in trajectories]
        tokens = [sum(turn.visual_tokens + turn.text_tokens for turn in one.turns) - 1 for one in trajectories]
        second = [one.prefill[1] for one in found if one.prefill[1]]
        parts = {f"{part}_gflops": np.mean([sum(getattr(one, part)) for one in found]) / 1e9 for part in PHASES[1:]}
        record = {
            "system": system,
            "visual_tokens": np.mean([one.visual_tokens for one in trajectories]),
            "rtr": np.mean([one.rtr for one in trajectories]),
            "calls": np.mean([one.call_status != "none" for one in trajectories]),
            **parts,
            "prefill_2_gflops": np.mean(second) / 1e9 if second else float("nan"),
            "gflops": np.mean([one.total for one in found]) / 1e9,
            "cache_mb": costs.cache_bytes(1, config, bytes_per_value) * np.mean(tokens) / 1e6,
        }
        records.append(record)
    table = pd.DataFrame(records)
    full = table.gflops[table.system == "full"]
    return table.assign(gflops_ratio=table.gflops / (full.iloc[0] if len(full) else float("nan")))


def response_table(done: Mapping[str, Sequence[Trajectory]], benchmarks: Sequence[str]) -> pd.DataFrame:
    """Response length per system and benchmark: characters of the answer (mean, sd), tokens written in all turns."""
    records = [
        (system, benchmark, len(one.answer), sum(turn.text_tokens for turn in one.turns[1::2]))
        for system, trajectories in done.items()
        for one, benchmark in zip(trajectories, benchmarks, strict=True)
    ]
    lengths = pd.DataFrame(records, columns=["system", "benchmark", "characters", "tokens"])
    parts = lengths.groupby(["system", "benchmark"], sort=False)
    columns = {
        "characters": ("characters", "mean"),
        "characters_sd": ("characters", "std"),
        "tokens": ("tokens", "mean"),
    }
    return parts.agg(**columns, n=("tokens", "size")).reset_index()
