"""Timing systems in one interleaved run: phases, ratios with spread, counted work (PAPER §5, latency).

Rows write the tokens of scripts, and the end of every phase is reported. Every repetition runs all jobs in a new random
order, so that a slowdown of the machine affects all of them; results are ratios within a repetition.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList

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
# full, half: one turn of the base model; awares: cache reuse; awares_naive: turn 2 prefills everything again;
# escalate_full: a row that calls gets the whole image (VisionThink's interaction)
TWO_TURN_SYSTEMS = ("awares", "awares_naive", "escalate_full")
TIMED_SYSTEMS = ("full", "half", *TWO_TURN_SYSTEMS)
LOOP = 1  # token budget under which every row runs alone


class Script(NamedTuple):
    """The output of a row, generated at its full cost."""

    crops: tuple[str, ...] = ()  # the call of turn 1; () = a direct answer
    answer_tokens: int | None = None  # of the last turn, with the end of the turn; None = the model decides


class ScriptedDecoder(Decoder):
    """A decoder that forces tokens by row id, in the first and in the second turn, and reports the end of phases."""

    scripts: Mapping[str, tuple[list[int], list[int]]] = {}  # ids of both turns
    on_phase_end: PhaseEnd = staticmethod(lambda phase, turn: None)

    def start(self, rows: Any, images: Any, call_bias: Any = None, names: Any = None) -> Output:
        self.turn, self.writing = 1, names
        return super().start(rows, images, call_bias, names)

    def extend(self, state: State, picked: Sequence[int], *arguments: Any) -> Output:
        self.turn, self.writing = 2, [self.names[row] for row in picked]
        return super().extend(state, picked, *arguments)

    def _pixels(self, images: list[Image]) -> Any:
        pixels = super()._pixels(images)
        self.on_phase_end("preprocess", self.turn)
        return pixels

    def _encode(self, images: Sequence[list[Image]]) -> tuple[list[Tensor], list[Tensor]]:
        encoded = super()._encode(images)
        self.on_phase_end("vision", self.turn)
        return encoded

    def _generate(self, state: State, *arguments: Any) -> Output:
        scripts = [torch.tensor(self.scripts.get(name, ([], []))[self.turn - 1]) for name in self.writing]
        tokens = pad_sequence(scripts, padding_value=FREE).long().to(state.ids.device)  # (longest, B)

        def force(ids: Tensor, scores: Tensor) -> Tensor:
            step = ids.shape[1] - state.ids.shape[1]
            if step == 0:
                self.on_phase_end("prefill", self.turn)
            if step >= len(tokens):
                return scores
            must, token = tokens[step][:, None], torch.arange(scores.shape[1], device=scores.device)
            # a forced token gets 0, because the model may not be allowed to write it
            return scores.masked_fill(must != FREE, float("-inf")).masked_fill(token == must, 0.0)

        self.processors = LogitsProcessorList([force])
        output = super()._generate(state, *arguments)
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
        decoder = self.decoder

        def written(script: Script) -> tuple[list[int], list[int]]:
            length = script.answer_tokens
            answer = decoder.tokenize("x") * (length - 1) + [decoder.end] if length else []
            call = decoder.tokenize(self.protocol.render_call(script.crops) + END_OF_TURN) if script.crops else answer
            return call, answer

        decoder.scripts = {name: written(script) for name, script in scripts.items()}
        longest = max((len(ids) for turns in decoder.scripts.values() for ids in turns), default=0)
        if longest > decoder.max_new_tokens:
            raise AwaresValueError(f"{longest} tokens scripted, max_new_tokens is {decoder.max_new_tokens}: raise it")
        if view:
            return self.answer(images, questions, view, row_ids=[*scripts])
        forced = [None if script.crops else () for script in scripts.values()]
        return self.run(images, questions, forced, float("-inf"), [*scripts])


class Workload(NamedTuple):
    """Rows for systems, each with its model: of TIMED_SYSTEMS, or of `baselines`, which report no phases."""

    models: Mapping[str, Any]
    processor: ImageOnlyProcessor
    rows: Any  # columns id, image, question
    scripts: Mapping[str, Sequence[Script]] = {}  # by system; one without scripts decodes freely
    limits: Mapping[str, Any] = {}  # options of the engine
    call_bias: float = 0.0

    def play(self, system: str, token_budget: int, on_phase_end: PhaseEnd | None = None) -> list[Trajectory]:
        """``system`` on all rows, in batches of ``token_budget`` tokens."""
        given = self.models[system], self.processor
        options = {"token_budget": token_budget, **self.limits}
        if system not in TIMED_SYSTEMS:
            return baselines.answer(system, baselines.SystemJob(Engine(*given, **options), self.rows))
        engine = ScriptedEngine(*given, reuse=system != "awares_naive", **options)
        engine.decoder.on_phase_end = on_phase_end or engine.decoder.on_phase_end
        two_turns, ids = system in TWO_TURN_SYSTEMS, self.rows["id"]
        shown = self.rows["image"], self.rows["question"]
        if two_turns and system not in self.scripts:
            return engine.run(*shown, call_bias=self.call_bias, row_ids=ids)
        scripts = self.scripts.get(system, [Script()] * len(ids))
        return engine.run_scripts(*shown, dict(zip(ids, scripts, strict=True)), "" if two_turns else system)


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


def time_jobs(
    play: Callable[..., list[Trajectory]],
    systems: Sequence[str],
    budgets: Sequence[int],
    repetitions: int,
    seed: int,
    device: str,
) -> tuple[pd.DataFrame, dict[str, list[Trajectory]], dict[str, np.ndarray]]:
    """Run each job, a system with a budget, once to warm up, then ``repetitions`` times in shuffled order.

    ``play``: as `Workload.play`. A line per job and repetition (seconds, peaks in bytes); trajectories per system, at
    the first budget; per system whose rows ran alone their seconds, (repetitions, rows).
    """
    records, done, alone = [], dict[str, list[Trajectory]](), dict[str, list[list[float]]]()
    jobs = [(system, budget) for budget in budgets for system in systems]
    for system, budget in jobs:
        done.setdefault(system, play(system, budget))
    rng = np.random.default_rng(seed)
    for repetition in range(repetitions):
        for place in rng.permutation(len(jobs)):
            (system, budget), watch = jobs[place], Stopwatch(device)
            begun = watch.last
            answered = play(system, budget, watch)
            seconds = watch.now() - begun
            if budget == LOOP:
                alone.setdefault(system, []).append([one.seconds for one in answered])
            record = {"system": system, "token_budget": budget, "repetition": repetition, "rows": len(answered)}
            record |= {"seconds": seconds, "peak_memory": watch.peak_memory()}
            records.append({**record, **{f"{phase}_{turn}": spent for (phase, turn), spent in watch.seconds.items()}})
    return pd.DataFrame(records), done, {system: np.array(seconds) for system, seconds in alone.items()}


def ratio_table(times: pd.DataFrame, over: str) -> pd.DataFrame:
    """Milliseconds per row by ``batch``, a column of ``times``, and system, their ratio to ``over``'s, and peak memory.

    Medians over repetitions with quartiles (``_low``, ``_high``); ``ratio`` is taken within a repetition.
    """
    seconds, rows = _seconds(times), times.groupby("system").rows.first()
    memory = times.groupby(["batch", "system"]).peak_memory.max() / 1e6
    table = _quartiles("ms", 1000 * seconds / rows).join(_quartiles("ratio", seconds.div(seconds[over], axis=0)))
    return table.assign(peak_memory_mb=memory)


def time_table(times: pd.DataFrame) -> pd.DataFrame:
    """As `ratio_table`, at batch 1 and at each system's best budget, relative to ``full`` at the same.

    ``speedup``: rows per second relative to batch 1, with quartiles. Phases, of both turns: medians, ms per row.
    """
    lines = _batches(times.assign(**{phase: times[f"{phase}_1"] + times[f"{phase}_2"] for phase in PHASES}))
    groups, seconds = lines.groupby(["batch", "system"]), _seconds(lines)
    table = groups[["token_budget", "rows"]].first().join(ratio_table(lines, "full"))
    table = table.join(_quartiles("speedup", seconds.rdiv(seconds.loc["1"], level="repetition")))
    table = table.join(1000 * groups[[*PHASES, "prefill_2"]].median().div(groups.rows.first(), axis=0))
    order = [pair for pair in itertools.product(("1", "best"), TIMED_SYSTEMS) if pair in table.index]
    return table.loc[order].swaplevel().reset_index()


def pair_table(times: pd.DataFrame, overs: Sequence[str], level: float) -> pd.DataFrame:
    """The time of each system relative to each of ``overs``, at batch 1 and at each one's best budget.

    The geometric mean over repetitions of the ratio within one, with the ``level`` interval of Student's t for its
    logarithm, which covers repetitions on this machine and rows.
    """
    logs, records = np.log(_seconds(_batches(times))), []
    systems = [system for system in TIMED_SYSTEMS if system in logs]
    for (batch, some), over, system in itertools.product(logs.groupby("batch"), overs, systems):
        if system != over:
            steps = some[system] - some[over]
            low, high = scipy.stats.ttest_1samp(steps, 0).confidence_interval(level)
            records.append((system, over, batch, *np.exp([steps.mean(), low, high])))
    return pd.DataFrame(records, columns=["system", "over", "batch", "ratio", "ratio_low", "ratio_high"])


def benchmark_table(alone: Mapping[str, np.ndarray], benchmarks: Sequence[str]) -> pd.DataFrame:
    """Ms per row by system and benchmark, and the average: medians over repetitions of means over rows, quartiles."""
    rows = {system: pd.DataFrame(1000 * seconds.T) for system, seconds in alone.items()}
    means = pd.concat({system: one.groupby(list(benchmarks), sort=False).mean().T for system, one in rows.items()})
    table = _quartiles("ms", means.assign(**{AVERAGE: means.mean(axis=1)})).loc[[*alone]]
    table = table.rename_axis(["system", "benchmark"]).reset_index()
    return table.assign(n=table.benchmark.map({**Counter(benchmarks), AVERAGE: len(benchmarks)}))


def _batches(times: pd.DataFrame) -> pd.DataFrame:
    """The lines of batch 1, and of the best batch: each system's fastest budget, except rows alone."""
    batched = times[times.token_budget != LOOP]
    fastest = batched.pivot_table("seconds", "token_budget", "system", aggfunc="median").idxmin()
    best = batched[batched.token_budget == batched.system.map(fastest)]
    return pd.concat([times[times.token_budget == LOOP].assign(batch="1"), best.assign(batch="best")])


def _seconds(lines: pd.DataFrame) -> pd.DataFrame:
    """By batch and repetition (index) and system (columns)."""
    return lines.pivot(index=["batch", "repetition"], columns="system", values="seconds")


def _quartiles(name: str, values: pd.DataFrame) -> pd.DataFrame:
    """By group and column of ``values`` (groups and repetitions x columns): median and quartiles, _low and _high."""
    names = {0.5: name, 0.25: f"{name}_low", 0.75: f"{name}_high"}
    found = values.groupby(level=0, sort=False).quantile([*names])
    return found.stack().unstack(1)[[*names]].rename(columns=names)


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
    table = pd.DataFrame(records).groupby("system", sort=False).mean()
    table = table.assign(**table.filter(regex="gflops$") / 1e9)
    return table.assign(gflops_ratio=table.gflops / table.gflops["full"]).reset_index()
