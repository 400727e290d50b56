"""Timing systems in one interleaved run: phases, ratios with spread, counted work (PAPER §5, latency).

Rows write the tokens of scripts, and the end of every phase is reported. Every repetition runs all jobs in a new random
order, so that a slowdown of the machine affects all of them; results are ratios within a repetition.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import LogitsProcessor, LogitsProcessorList

from awares.baselines import registry as baselines
from awares.bench import costs
from awares.engine.chat_format import END_OF_TURN
from awares.engine.decode import Decoder, Output, State
from awares.engine.model import ImageOnlyProcessor
from awares.errors import AwaresValueError
from awares.method.evaluation import AVERAGE
from awares.method.rollout import Engine, ImageSource, Trajectory

PHASES = ("preprocess", "vision", "prefill", "decode")
FREE = -1  # in a script of token ids: the model decides
PhaseEnd = Callable[[str, int], None]  # called with a phase of `PHASES` that has just ended, and its turn: 1 or 2


class Script(NamedTuple):
    """The output of a row, generated at its full cost."""

    crops: tuple[str, ...] = ()  # the call of turn 1; () = a direct answer
    answer_tokens: int | None = None  # of the last turn, with the end of the turn; None = the model decides


class ForcedTokens(LogitsProcessor):
    """Makes B rows write ``scripts`` (token ids); ``first_step`` is called at the first step."""

    def __init__(self, scripts: Sequence[Sequence[int]], device: Any, first_step: Callable[[], None]) -> None:
        tokens = [torch.tensor(script, dtype=torch.long, device=device) for script in scripts]
        self.tokens = pad_sequence(tokens, batch_first=True, padding_value=FREE)  # (B, longest)
        self.first_step, self.step = first_step, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step == 0:
            self.first_step()
        must = self.tokens[:, self.step : self.step + 1]  # (B, 1), or (B, 0) after the scripts
        self.step += 1
        if not must.numel():
            return scores
        token = torch.arange(scores.shape[1], device=scores.device)
        # a forced token gets 0, because the model may not be allowed to write it
        return scores.masked_fill(must != FREE, float("-inf")).masked_fill(token == must, 0.0)


class ScriptedDecoder(Decoder):
    """A decoder that forces tokens by row id, in the first and in the second turn, and reports the end of phases."""

    scripts: tuple[Mapping[str, list[int]], Mapping[str, list[int]]] = ({}, {})
    on_phase_end: PhaseEnd = staticmethod(lambda phase, turn: None)
    turn = 1

    def start(self, rows: Any, images: Any, call_bias: Any = None, names: Any = None) -> Output:
        self._force(1, names)
        return super().start(rows, images, call_bias, names)

    def extend(self, state: State, picked: Sequence[int], *arguments: Any) -> Output:
        self._force(2, [self.names[row] for row in picked])
        return super().extend(state, picked, *arguments)

    def _force(self, turn: int, names: Sequence[str]) -> None:
        self.turn, scripts = turn, [self.scripts[turn - 1].get(name, []) for name in names]
        forced = ForcedTokens(scripts, self.model.device, lambda: self.on_phase_end("prefill", turn))
        self.processors = LogitsProcessorList([forced])

    def _pixels(self, images: list[Image]) -> Any:
        pixels = super()._pixels(images)
        self.on_phase_end("preprocess", self.turn)
        return pixels

    def _encode(self, images: Sequence[list[Image]]) -> tuple[list[Tensor], list[Tensor]]:
        encoded = super()._encode(images)
        self.on_phase_end("vision", self.turn)
        return encoded

    def _generate(self, *arguments: Any) -> Output:
        output = super()._generate(*arguments)
        self.on_phase_end("decode", self.turn)
        return output


class ScriptedEngine(Engine):
    """An engine whose rows can follow scripts; a batch reports its phases to ``decoder.on_phase_end``."""

    decoder_type = ScriptedDecoder
    decoder: ScriptedDecoder

    def run_scripts(
        self, images: Sequence[ImageSource], questions: Sequence[str], scripts: Mapping[str, Script], view: str = ""
    ) -> list[Trajectory]:
        """`run`, or `answer` from a ``view``, with a script per row id."""
        decoder, row_ids = self.decoder, [*scripts]
        lengths = {name: script.answer_tokens for name, script in scripts.items() if script.answer_tokens}
        answers = {name: decoder.tokenize("x") * (length - 1) + [decoder.end] for name, length in lengths.items()}
        texts = {name: self.protocol.render_call(script.crops) for name, script in scripts.items() if script.crops}
        calls = {name: decoder.tokenize(text + END_OF_TURN) for name, text in texts.items()}
        longest = max(map(len, [*calls.values(), *answers.values()]), default=0)
        if longest > decoder.max_new_tokens:
            raise AwaresValueError(f"{longest} tokens scripted, max_new_tokens is {decoder.max_new_tokens}: raise it")
        decoder.scripts = answers | calls, answers
        try:
            if view:
                return self.answer(images, questions, view, row_ids=row_ids)
            forced = [None if script.crops else () for script in scripts.values()]
            return self.run(images, questions, forced, float("-inf"), row_ids)
        finally:
            decoder.scripts = {}, {}


# full, half: one turn of the base model; awares: cache reuse; awares_naive: turn 2 prefills everything again;
# escalate_full: a row that calls gets the whole image (VisionThink's interaction)
TWO_TURN_SYSTEMS = ("awares", "awares_naive", "escalate_full")
TIMED_SYSTEMS = ("full", "half", *TWO_TURN_SYSTEMS)
LOOP = 1  # token budget under which every row runs alone


class TimedJob(NamedTuple):
    """A system on all rows, in batches of ``token_budget`` tokens; ``work`` reports phases to its argument, if any."""

    system: str
    token_budget: int
    work: Callable[[PhaseEnd | None], list[Trajectory]]


class Workload(NamedTuple):
    """Rows for all systems."""

    images: Sequence[Image]
    questions: Sequence[str]
    row_ids: Sequence[str]
    scripts: Mapping[str, Sequence[Script]] = {}  # by system; one without scripts decodes freely
    call_bias: float = 0.0


class Stopwatch:
    """Seconds by (phase, turn) and peak memory, from now on; on a GPU every reading waits for the queued work."""

    def __init__(self, device: str) -> None:
        self.gpu = device.startswith("cuda")
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
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

    def peak_memory(self) -> float:
        """Peak of the GPU's tensors in bytes; nan on a CPU."""
        return float(torch.cuda.max_memory_allocated()) if self.gpu else float("nan")


def spread(benchmarks: Sequence[str], count: int) -> list[int]:
    """Indices of ``count`` rows to time: equally many per benchmark (the first get the remainder), at even steps."""
    names = np.array(benchmarks)
    places = [np.flatnonzero(names == name) for name in dict.fromkeys(benchmarks)]
    each, over = divmod(count, len(places))
    wanted = [min(len(where), each + (index < over)) for index, where in enumerate(places)]
    return sorted(int(where[len(where) * k // n]) for n, where in zip(wanted, places, strict=True) for k in range(n))


def jobs(
    models: Mapping[str, Any], processor: ImageOnlyProcessor, workload: Workload, budgets: Sequence[int], **limits: Any
) -> list[TimedJob]:
    """One job per budget and system (TIMED_SYSTEMS, or of `baselines`: no phases); ``limits`` go to the engine."""
    images, questions, ids, scripts, call_bias = workload

    def play(system: str, budget: int, on_phase_end: PhaseEnd | None) -> list[Trajectory]:
        options = {"token_budget": budget, **limits}
        if system not in TIMED_SYSTEMS:
            rows = {"id": ids, "image": images, "question": questions}
            return baselines.answer(system, baselines.SystemJob(Engine(models[system], processor, **options), rows))
        engine = ScriptedEngine(models[system], processor, reuse=system != "awares_naive", **options)
        engine.decoder.on_phase_end = on_phase_end or engine.decoder.on_phase_end
        two_turns, chosen = system in TWO_TURN_SYSTEMS, scripts.get(system, [Script()] * len(ids))
        if two_turns and system not in scripts:
            return engine.run(images, questions, call_bias=call_bias, row_ids=ids)
        return engine.run_scripts(images, questions, dict(zip(ids, chosen, strict=True)), "" if two_turns else system)

    return [TimedJob(system, budget, partial(play, system, budget)) for budget in budgets for system in models]


def escalations(trajectories: Sequence[Trajectory]) -> list[Script]:
    """Scripts that call for the whole image in rows where a policy called; the answers are free."""
    return [Script(("all",) if one.call_status != "none" else ()) for one in trajectories]


def escalated(engine: ScriptedEngine, rows: Any, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """``trajectories`` of a policy on ``rows``; rows that called run again with the whole image as the crop."""
    some = rows.select([index for index, script in enumerate(escalations(trajectories)) if script.crops])
    again = engine.run_scripts(some["image"], some["question"], dict.fromkeys(some["id"], Script(("all",))))
    found = {one.row_id: one for one in again}
    return [found.get(one.row_id, one) for one in trajectories]


Measured = tuple[pd.DataFrame, dict[str, list[Trajectory]], dict[str, np.ndarray]]


def time_jobs(work: Sequence[TimedJob], repetitions: int, seed: int, device: str) -> Measured:
    """Run every job once to warm up, then ``repetitions`` times in shuffled order.

    A line per job and repetition (seconds, peaks in bytes); trajectories per system, at its first budget; per system
    whose rows ran alone their seconds, (repetitions, rows).
    """
    records, done, alone = [], dict[str, list[Trajectory]](), dict[str, list[list[float]]]()
    for job in work:
        done.setdefault(job.system, job.work(None))
    rng = np.random.default_rng(seed)
    for repetition in range(repetitions):
        for index in rng.permutation(len(work)):
            job, watch = work[index], Stopwatch(device)
            begun = watch.last
            answered = job.work(watch)
            seconds = watch.now() - begun
            if job.token_budget == LOOP:
                alone.setdefault(job.system, []).append([one.seconds for one in answered])
            record = {"system": job.system, "token_budget": job.token_budget, "repetition": repetition}
            record |= {"rows": len(answered), "seconds": seconds, "peak_memory": watch.peak_memory()}
            records.append({**record, **{f"{phase}_{turn}": spent for (phase, turn), spent in watch.seconds.items()}})
    return pd.DataFrame(records), done, {system: np.array(seconds) for system, seconds in alone.items()}


def ratio_table(times: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Milliseconds per row of the systems ``names``, at one budget each, their ratio to the first, and peak memory.

    Medians over repetitions with quartiles (``_low``, ``_high``); ``ratio`` is taken within a repetition.
    """
    systems, seconds = times.groupby("system"), _seconds(times)[list(names)]
    table = _quartiles("ms", 1000 * seconds / systems.rows.first())
    table = table.join(_quartiles("ratio", seconds.div(seconds[names[0]], axis=0)))
    return table.assign(peak_memory_mb=systems.peak_memory.max() / 1e6).loc[list(names)].reset_index()


def time_table(times: pd.DataFrame) -> pd.DataFrame:
    """`ratio_table` at batch 1 and at each system's best budget, relative to ``full`` at the same.

    ``speedup``: rows per second relative to batch 1, with quartiles. Phases, of both turns: medians, ms per row.
    """
    tables, alone = [], _seconds(times[times.token_budget == LOOP])
    times = times.assign(**{phase: times[f"{phase}_1"] + times[f"{phase}_2"] for phase in PHASES})
    for batch, budgets, chosen in _batches(times):
        systems = chosen.groupby("system")
        rows = systems.rows.first()
        table = pd.DataFrame({"batch": batch, "token_budget": budgets, "rows": rows})
        table = table.join(ratio_table(chosen, list(budgets)).set_index("system"))
        table = table.join(_quartiles("speedup", alone / _seconds(chosen)))
        tables.append(table.join(1000 * systems[[*PHASES, "prefill_2"]].median().div(rows, axis=0)).loc[list(budgets)])
    return pd.concat(tables).rename_axis("system").reset_index()


def pair_table(times: pd.DataFrame, overs: Sequence[str], level: float) -> pd.DataFrame:
    """The time of each system relative to each of ``overs``, at batch 1 and at each one's best budget.

    The geometric mean over repetitions of the ratio within one, with the ``level`` interval of Student's t for its
    logarithm, which covers repetitions on this machine and rows.
    """
    records = []
    for batch, budgets, chosen in _batches(times):
        logs = np.log(_seconds(chosen))
        for over in overs:
            for system in (name for name in budgets if name != over):
                steps = (logs[system] - logs[over]).to_numpy()
                half = steps.std(ddof=1) / len(steps) ** 0.5 * scipy.stats.t.ppf((1 + level) / 2, len(steps) - 1)
                ends = np.exp([steps.mean(), steps.mean() - half, steps.mean() + half])
                records.append((system, over, batch, *ends))
    return pd.DataFrame(records, columns=["system", "over", "batch", "ratio", "ratio_low", "ratio_high"])


def benchmark_table(alone: Mapping[str, np.ndarray], benchmarks: Sequence[str]) -> pd.DataFrame:
    """Ms per row by system and benchmark, and the average: medians over repetitions of means over rows, quartiles."""
    tables = []
    for system, seconds in alone.items():
        rows = pd.DataFrame(1000 * seconds.T).groupby(list(benchmarks), sort=False)
        means = rows.mean().T  # repetitions x benchmarks
        table = _quartiles("ms", means.assign(**{AVERAGE: means.mean(axis=1)})).rename_axis("benchmark").reset_index()
        table.insert(0, "system", system)
        tables.append(table.assign(n=[*rows.size(), len(benchmarks)]))
    return pd.concat(tables, ignore_index=True)


def flops_table(work: Sequence[TimedJob]) -> pd.DataFrame:
    """GFLOPs per row of each job by torch's counter, padding included; ``gflops_ratio`` to full's."""
    records = []
    for job in work:  # torch does not count a CPU's fused attention kernel
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            rows = len(job.work(None))
        records.append({"system": job.system, "gflops": counter.get_total_flops() / rows / 1e9})
    return _with_ratio(pd.DataFrame(records))


def _seconds(times: pd.DataFrame) -> pd.DataFrame:
    return times.pivot(index="repetition", columns="system", values="seconds")


def _quartiles(name: str, values: pd.DataFrame) -> pd.DataFrame:
    """Per column of ``values`` (repetitions x systems): ``name``, its median, and its quartiles, _low and _high."""
    names = {0.5: name, 0.25: f"{name}_low", 0.75: f"{name}_high"}
    return values.quantile([*names]).T.rename(columns=names)


def _batches(times: pd.DataFrame) -> Iterator[tuple[str, dict[str, int], pd.DataFrame]]:
    """Batch 1, then the best (each system's fastest budget, except rows alone): name, budgets, times."""
    batched = times[times.token_budget != LOOP]
    middle = batched.pivot_table("seconds", "token_budget", "system", aggfunc="median").idxmin()
    best = {system: int(middle[system]) for system in TIMED_SYSTEMS if system in middle}
    for batch, budgets in (("1", dict.fromkeys(best, LOOP)), ("best", best)):
        yield batch, budgets, times[times.token_budget == times.system.map(budgets)]


def count_table(
    done: Mapping[str, Sequence[Trajectory]], config: Any, processor: ImageOnlyProcessor, bytes_per_value: int
) -> pd.DataFrame:
    """Means over rows by system: visual tokens, RTR, calls, GFLOPs by part and total, ratio to full's, cache in MB."""
    records = []
    for system, one in ((system, one) for system, trajectories in done.items() for one in trajectories):
        flops = costs.trajectory_flops(one, config, processor, system != "awares_naive")
        tokens = sum(turn.visual_tokens + turn.text_tokens for turn in one.turns) - 1
        record = {"system": system, "visual_tokens": one.visual_tokens, "rtr": one.rtr}
        record |= {"calls": one.call_status != "none", **{f"{part}_gflops": sum(flops[part]) for part in PHASES[1:]}}
        second = flops["prefill"][1] or float("nan")  # the mean is over the rows with a second turn
        record |= {"prefill_2_gflops": second, "gflops": sum(map(sum, flops.values()))}
        records.append({**record, "cache_mb": costs.cache_bytes(tokens, config, bytes_per_value) / 1e6})
    table = pd.DataFrame(records).groupby("system", sort=False).mean().reset_index()
    return _with_ratio(table.assign(**table.filter(regex="gflops$") / 1e9))


def _with_ratio(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(gflops_ratio=table.gflops / table.gflops[table.system == "full"].iloc[0])
