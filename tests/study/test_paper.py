"""The published numbers: whole, as printed, and contradictory exactly where their notes say so."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import TASKS

from awares.config import find_file
from awares.errors import AwaresError
from awares.study.published import PAPER, printed, side_by_side

ROWS = {"table1": 10, "table2": 4, "table3": 7, "table4": 7, "table5": 2, "table6": 6, "table7": 3, "table8": 5}
ROWS |= {"table9": 3, "table10": 2, "table11": 22, "figure4": 2, "figure5": 3, "ergo": 3, "text": 21}
OVER_BENCHMARKS = ["table1", "table3", "table4", "table5", "table10"]


def published(key):
    """The numbers of a published table, nan where lost."""
    return pd.read_csv(find_file(PAPER / f"{key}.csv")).drop(columns="note")


def noted(words):
    """(table, row, column) of the cells whose note has ``words``."""
    found = set()
    for key in ROWS:
        table = pd.read_csv(find_file(PAPER / f"{key}.csv"), dtype=str, keep_default_na=False)
        for row, notes in zip(table.iloc[:, 0], table.note, strict=True):
            found |= {(key, row, note.split(": ")[0]) for note in notes.split(" | ") if words in note}
    return found


def test_every_table_of_the_paper_is_there_and_typed():
    assert {key: len(published(key)) for key in pd.read_csv(find_file(PAPER / "tables.csv")).table} == ROWS
    for key in OVER_BENCHMARKS:
        scores = published(key)[[f"{name} accuracy" for name in (*TASKS, "average")]]
        assert scores.map(lambda value: 50 < value <= 100).all(axis=None) and published(key).notna().all(axis=None)
    with pytest.raises(AwaresError, match="'table12'.* table1, "):
        printed("table12")


def test_cells_keep_their_digits_and_show_their_notes():
    cells, reasons = printed("table4")
    cells = cells.set_index("system")
    assert cells.loc["grpo_only", "ocrbench accuracy"] == "72.20" and cells.loc["reward_anls", "pope rtr"] == "0.23 [4]"
    assert reasons[3] == "[4] below what the half-resolution view costs" and len(reasons) == 6
    assert set(printed("table6")[0].ratio) == {""}
    assert all(column in published(table) for table, _, column in noted(": "))


def test_newer_systems_have_a_source_a_date_and_a_second_copy_in_every_line():
    newer = pd.read_csv(find_file(PAPER / "newer.csv"), dtype=str, keep_default_na=False)
    assert set(newer.system) >= {"AdaptVision", "Q-Zoom", "Vision-RL2", "CARES"} and not newer.duplicated().any()
    assert newer.drop(columns="note").ne("").all(axis=None) and newer.value.astype(float).gt(0).all()
    assert pd.to_datetime(newer.date).notna().all() and newer.arxiv.str.fullmatch(r"\d{4}\.\d{5}").all()


def test_averages_are_means_of_their_cells_but_for_the_noted_ones():
    found = set()
    for key in OVER_BENCHMARKS:
        table = printed(key)[0].replace(r" \[\d\]", "", regex=True).set_index(printed(key)[0].columns[0])
        for measure in {name.split(" ")[1] for name in table if " " in name}:
            parts = table[[f"{name} {measure}" for name in TASKS]].astype(float).mean(axis=1)
            for row, average in table[f"average {measure}"].items():
                rounding = 0.5 * 10 ** -len(average.partition(".")[2])
                if abs(parts[row] - float(average)) > rounding + 1e-9:
                    found.add((key, row, f"average {measure}"))
    assert found == noted("the mean of the cells") and len(found) == 4


def test_numbers_that_follow_from_others_agree():
    judges = published("table2").groupby("judge")[["llama_lr", "llama_hr"]].sum().sum(axis=1)
    assert judges.to_numpy() == pytest.approx(100, abs=4 * 0.005 + 1e-9)
    form, cdp = published("table9"), published("table7")
    assert (form.valid + form.corrupt).to_numpy() == pytest.approx(100)
    assert (form.recoverable + form.incorrect).to_numpy() == pytest.approx(form.corrupt.to_numpy())
    f1 = 2 * cdp.precision * cdp.recall / (cdp.precision + cdp.recall)
    assert f1.to_numpy() == pytest.approx(cdp.f1.to_numpy(), abs=0.01)  # what rounding the two may do
    both = published("table8").merge(published("table3"), on="variant")
    assert len(both) == 5 and (both.rtr == both["average rtr"]).all()
    assert np.array_equal(both.accuracy, both["average accuracy"])


def test_side_by_side_keeps_the_blocks_apart_and_turns_a_table_over_benchmarks():
    page = side_by_side(pd.DataFrame({"policy": ["sft"], "precision": [12.345]}), "table7").data
    measured, shown = page.split("</section>")[:2]
    assert "(profile mini)" in measured and "12.35" in measured and "77.8" not in measured
    assert "77.8" in shown and "12.35" not in shown
    assert "arXiv 2603.16932, Table 7" in shown and "79.69 [1]" in shown and "[1] cannot go" in shown
    page = side_by_side(pd.DataFrame({"benchmark": ["pope"]}), "table1", profile="paper").data
    lines = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in page.split("</section>")[1].split("<tr")[1:]]
    turned = pd.DataFrame(lines[1:], columns=lines[0]).set_index("")
    assert turned.loc["docvqa accuracy", "awares"] == "94.43" and turned.loc["vstar rtr", "awares"] == "0.42 [1]"
