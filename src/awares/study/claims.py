"""The paper's claims, decided by our runs.

data/paper/claims.csv has a line per claim: its section and tables in the paper, the wording, the quantity with its unit
and the ``expression`` that computes it, the side of the ``margin`` on which it ``holds`` (above, below, or within plus
and minus it), ``same`` (a smaller difference does not matter: half of the paper's effect), the ``paper``'s effect, how
we read it, who decides it here if not the runs (``decided_by``: generator, arithmetic) and why it fails.
"""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from awares.config import Params, find_file
from awares.errors import AwaresValueError
from awares.study.answers import MEASURES, PLUS, Answers, Estimate, MissingRows
from awares.study.verdicts import FAILS, Effect, Judgement, adjusted, decide, weigh

CLAIMS_FILE = Path("data/paper/claims.csv")
CLAIM_COLUMNS = "claim section quantity paper effect low high detectable seeds q verdict".split()
NOTES = "id claim tables holds margin same decided_by reading verdict note".split()
PRUNERS = tuple(f"{name}_{kept}" for kept in (50, 70) for name in ("visionzip", "holov", "sparsevlm", "fastv"))
LISTS = {"pruners": PRUNERS, "pruners_at_half": PRUNERS[:4]}


def read_claims() -> pd.DataFrame:
    """data/paper/claims.csv: margin, same (0 for none) and paper (nan for none) as numbers, the rest as text."""
    table = pd.read_csv(find_file(CLAIMS_FILE), dtype=str, keep_default_na=False)
    same, paper = (pd.to_numeric(table[column]) for column in ("same", "paper"))
    return table.assign(margin=table.margin.astype(float), same=same.fillna(0.0), paper=paper)


def evaluate(expression: str, answers: Answers) -> list[Effect]:
    """The effects of an expression of claims.csv.

    A Python expression of measures (answers.MEASURES) of policies and benchmarks, which are bare words; it may use
    - / and ``agreement(judge)``, ``time_ratio(system, over)``. A list is of several quantities.
    Raises MissingRows without the answers, AwaresValueError if it cannot be read.
    """
    policies, params, used = policies_of(expression), answers.params, list[tuple[str, tuple[str, ...]]]()

    def measured(measure: str, policy: str, *tasks: str) -> Estimate:
        used.append((measure, tasks))
        return answers.estimate(measure, policy, policies, tasks)

    names: dict[str, Any] = {word: word for word in re.findall(r"[a-z]\w*", expression)} | LISTS
    names |= {"agreement": partial(_agreement, params), "time_ratio": partial(_time_ratio, params)}
    names |= {name: partial(measured, name) for name in MEASURES}
    try:
        found = eval(expression, {"__builtins__": {}, **names})  # text of a file of this repository
    except (SyntaxError, NameError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise AwaresValueError(f"{CLAIMS_FILE}: {expression!r} cannot be computed ({error})") from error
    several = found if isinstance(found, list) else [found]
    effects = [answers.effect(one, *used[0]) if isinstance(one, Estimate) else one for one in several]
    if len(used) == 1:
        effects = [replace(effects[0], ends=(0.0, 100.0 if MEASURES[used[0][0]][1] == 100 else math.inf))]
    return effects


def policies_of(expression: str) -> tuple[str, ...]:
    """The policies whose answers an expression of claims.csv compares."""
    found, listed = re.findall(rf"(?:{'|'.join(MEASURES)})\((\w+)", expression), expression.rpartition(" in ")[2][:-1]
    return tuple(dict.fromkeys(one for name in found for one in (LISTS[listed] if name == "name" else (name,))))


def claims_table(answers: Answers, claims: pd.DataFrame) -> pd.DataFrame:
    """``claims`` with effect, low, high, detectable, seeds, p, q (one false discovery rate), verdict and note."""
    level = answers.params.evaluation.level
    findings, notes = list[Judgement](), list[str]()
    for one in claims.itertuples():
        try:
            effects = evaluate(one.expression, answers)
            findings.append(weigh(effects, one.holds, one.margin, one.same, level))
            borrowed = effects[0].seeds == 1 and effects[0].trainings
            notes.append("one training of each arm: its spread is that of the main line" if borrowed else "")
        except MissingRows as missing:
            findings.append(Judgement())
            notes.append(str(missing))
    numbers = pd.DataFrame(findings, claims.index, ["effect", *Judgement._fields[1:]]).drop(columns="statements")
    verdicts = [decide([one], level)[0] for one in findings]
    table = claims.join(numbers).assign(q=numbers.p, verdict=verdicts, note=notes)
    counted = table.decided_by == ""
    table.loc[counted, "q"] = adjusted(table.p[counted])
    table.loc[counted, "verdict"] = decide([findings[place] for place in np.flatnonzero(counted)], level)
    return table.assign(note=table.note.where((table.verdict != FAILS) | (table.reason == ""), table.reason))


def _agreement(params: Params, judge: str) -> Effect:
    found = _line(params, "tables/table2_judges.csv", judge_a=params.curation.judge, judge_b=judge)
    count = found.n + PLUS
    likely = (found.agreement * found.n + 50 * PLUS) / count  # plus four
    return Effect(found.agreement, (likely * (100 - likely) / count) ** 0.5, ends=(0.0, 100.0))


def _time_ratio(params: Params, system: str, over: str) -> Effect:
    found = _line(params, "latency/ratios.csv", system=system, over=over, batch="1")
    return Effect(found.ratio, (found.ratio_high - found.ratio_low) / (2 * 1.96))


def _line(params: Params, name: str, **wanted: str) -> pd.Series:
    """The line with the ``wanted`` values of a table below reports/<profile>; MissingRows if there is none."""
    file = params.report_dir() / name
    table = pd.read_csv(file, dtype={"batch": str}) if file.is_file() else pd.DataFrame(columns=[*wanted])
    table = table[(table[[*wanted]] == pd.Series(wanted)).all(axis=1)]
    if table.empty:
        raise MissingRows(f"{name} has no {' and '.join(wanted.values())}")
    return table.iloc[0]
