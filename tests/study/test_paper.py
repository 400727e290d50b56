"""The published numbers: whole, typed, as printed, and contradictory exactly where tables.yaml says so."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from awares.config import TASKS, find_file
from awares.errors import AwaresError
from awares.study import published as paper

SYSTEMS = [key for key, table in paper.load_paper().tables.items() if table.benchmarks]
ROWS = {"table1": 10, "table2": 4, "table3": 7, "table4": 7, "table5": 2, "table6": 6, "table7": 3, "table8": 5}
ROWS |= {"table9": 3, "table10": 2, "table11": 22, "figure4": 2, "figure5": 3, "ergo": 3}


def test_every_table_of_the_paper_is_there():
    found = {key: len(table.rows) for key, table in paper.load_paper().tables.items()}
    found.pop("text")
    assert found == ROWS


@pytest.mark.parametrize("key", SYSTEMS)
def test_benchmark_tables_are_long_and_complete(key):
    table = paper.published(key)
    assert table.benchmark.tolist() == [*TASKS, "average"] * ROWS[key]
    assert table[list(paper.load_paper().tables[key].measures)].notna().all(axis=None)
    assert table.accuracy.between(50, 100).all()


def test_published_values_are_typed():
    settings = paper.published("table8").set_index("variant").loc["weight_5"]
    assert settings.trajectory and not settings.phased and settings.tool_turn_weight == 5 and settings.rtr == 0.49
    lengths = paper.published("table6")
    assert lengths.n.sum() == 18805 and lengths.ratio.isna().all()
    assert (lengths.visionthink_sd > lengths.awares_sd).all()


def test_printed_cells_keep_their_digits_and_show_slips():
    cells = paper.printed("table4").set_index("system")
    assert cells.loc["grpo_only", "ocrbench accuracy"] == "72.20"
    assert cells.loc["reward_anls", "pope rtr"] == "0.23 [4]"
    assert set(paper.printed("table6").ratio) == {""}


# What is printed wrong is listed, and nothing else


def slips(kind):
    return {(t.key, s.row, s.column) for t in paper.load_paper().tables.values() for s in t.slips if s.kind == kind}


def test_printed_averages_are_means_of_their_cells_but_for_the_listed_slips():
    found = set()
    for key in SYSTEMS:
        table = paper.load_paper().tables[key]
        units = list(table.names) + list(table.columns)
        for row, cells in table.rows.items():
            for measure in table.measures:
                *parts, average = (cells[units.index(f"{name} {measure}")] for name in table.benchmarks)
                digits = len(average.partition(".")[2])
                if abs(np.mean([float(part) for part in parts]) - float(average)) > 0.5 * 10**-digits + 1e-9:
                    found.add((key, row, f"average {measure}"))
    assert found == slips("average") and len(found) == 4


def test_rtr_lies_between_the_floor_and_two_images_but_for_the_listed_slips():
    found = set()
    for key in SYSTEMS:
        table = paper.published(key)
        if "rtr" not in table:
            continue
        assert table.rtr.between(0, 1.25).all()  # the half view and the whole image after it
        first = table.columns[0]
        found |= {(key, row[first], f"{row.benchmark} rtr") for _, row in table[table.rtr < 0.25].iterrows()}
    assert found == slips("floor") and len(found) == 2


def test_shares_add_up_and_f1_is_that_of_precision_and_recall():
    judges = paper.published("table2").groupby("judge")[["llama_lr", "llama_hr"]].sum().sum(axis=1)
    assert judges.to_numpy() == pytest.approx(100, abs=4 * 0.005 + 1e-9)
    same = paper.published("table2").set_index(["judge", "label"])
    agreement = same.loc[("deepseek", "LR"), "llama_lr"] + same.loc[("deepseek", "HR"), "llama_hr"]
    assert agreement == pytest.approx(text("agreement of the judge with a second language model"))
    form = paper.published("table9")
    assert (form.valid + form.corrupt).to_numpy() == pytest.approx(100)
    assert (form.recoverable + form.incorrect).to_numpy() == pytest.approx(form.corrupt.to_numpy())
    cdp = paper.published("table7")
    found = 2 * cdp.precision * cdp.recall / (cdp.precision + cdp.recall)
    assert found.to_numpy() == pytest.approx(cdp.f1.to_numpy(), abs=0.01)  # what rounding the two may do


def text(quantity):
    return paper.published("text").set_index("quantity").printed[quantity]


def test_what_is_printed_twice_agrees_but_for_the_listed_conflicts():
    def row(key, name):
        table = paper.published(key)
        return table[table[table.columns[0]] == name].set_index("benchmark")[["accuracy", "rtr"]]

    for pair in (("table3", "weight_5"), ("table4", "sft")), (("table4", "sft"), ("table10", "llama")):
        assert row(*pair[0]).equals(row(*pair[1]))
    assert row("table3", "trajectory").equals(row("table3", "weight_1"))
    main, ablation = row("table1", "awares"), row("table4", "awares")
    differ = main.index[(main != ablation).any(axis=1)]
    assert list(differ) == ["vstar"]
    assert {("table1", "awares", "vstar rtr"), ("table4", "awares", "vstar rtr")} <= slips("conflict")
    recipes, knobs = paper.published("table3").query("benchmark == 'average'"), paper.published("table8")
    both = knobs.merge(recipes, on="variant", suffixes=("", "_3"))
    assert len(both) == 5 and (both.rtr == both.rtr_3).all() and (both.accuracy == both.accuracy_3).all()
    latency = paper.published("table5").query("system == 'awares'").set_index("benchmark").accuracy
    assert (latency - row("table4", "no_area_cost").accuracy).abs().max() <= 0.051
    assert ("table5", "awares", "average accuracy") in slips("conflict")


def test_no_slip_is_mended_in_the_text():
    assert text("RTR of single-turn SFT") == 0.66 and text("average lost by training on ANLS labels") == 2.8


# Beside ours


def test_side_by_side_keeps_the_blocks_apart():
    ours = pd.DataFrame({"policy": ["sft"], "precision": [12.345]})
    page = paper.side_by_side(ours, "table7").data
    measured, published = page.split("</section>")[:2]
    assert "measured here (profile mini)" in measured and "12.35" in measured and "77.8" not in measured
    assert "published (7B)" in published and "77.8" in published and "12.35" not in published
    assert "arXiv 2603.16932, Table 7" in published and "79.69 [1]" in published and "[1] cannot go" in published
    assert page.count("<table") == 2
    assert "profile paper" in paper.side_by_side(ours, "table7", profile="paper").data


def test_a_published_table_over_benchmarks_has_a_line_each():
    page = paper.side_by_side(pd.DataFrame({"benchmark": ["pope"]}), "table1").data
    lines = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in page.split("</section>")[1].split("<tr")[1:]]
    turned = pd.DataFrame(lines[1:], columns=lines[0]).set_index("")
    assert turned.loc["docvqa accuracy", "awares"] == "94.43" and turned.loc["average rtr", "visionthink"] == "0.61"
    assert turned.loc["vstar rtr", "awares"] == "0.42 [1]"


def test_unknown_table_is_named():
    with pytest.raises(AwaresError, match="the paper has no 'table12': known are table1, "):
        paper.published("table12")


# Faults of the file


RAW = yaml.load(find_file(Path(paper.FILE)).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def broken(tmp_path, key, change):
    """tables.yaml with nothing but table ``key``, which ``change`` has spoilt."""
    table = copy.deepcopy(RAW["tables"][key])
    change(table)
    file = tmp_path / "tables.yaml"
    file.write_text(yaml.safe_dump({**RAW, "tables": {key: table}}, sort_keys=False), encoding="utf-8")
    return file


def cell(row, column, value):
    return lambda table: table["cells"][row].__setitem__(column, value)


FAULTS = [
    ("table1", lambda t: t["cells"][1].pop(), r"table1, row 2 \(half\): 15 cells wanted, 14 found"),
    ("table1", lambda t: t["cells"][1].append("1"), r"table1, row 2 \(half\): 15 cells wanted, 16 found"),
    ("table1", cell(9, 14, "0,36"), r"row awares, column average rtr: '0,36' is not a number from 0 to 2"),
    ("table1", cell(9, 14, "36"), r"row awares, column average rtr: '36' is not a number from 0 to 2"),
    ("table1", cell(9, 13, "nan"), r"row awares, column average accuracy: 'nan' is not a number from 0 to 100"),
    ("table3", cell(0, 1, "x"), r"row turn, column trajectory: 'x' is not true or false"),
    ("table6", cell(0, 1, "2500.5"), r"row chartqa, column n: '2500.5' is not a whole number"),
    ("table9", cell(0, 0, "null"), r"table9, row None, column system: None is not a name"),
    ("table9", cell(1, 0, "turn"), r"table9: row turn stands twice"),
    ("table9", cell(1, 1, "null"), r"table9: lost says 0, but 1 cells are null"),
    ("table9", lambda t: t.update(section="99"), r"table9: the paper has no section '99'"),
    ("table9", lambda t: t.pop("caption"), r"table9: caption missing"),
    ("table9", lambda t: t.update(colums={}), r"table9: key colums is unknown"),
    ("table9", lambda t: t["columns"].update(valid="per mille"), r"column valid: unknown unit 'per mille'"),
    ("table9", lambda t: t.update(benchmarks=["pope"]), r"table9: give either columns, or benchmarks and measures"),
    ("table7", lambda t: t["slips"][0].update(row="sft"), r"table7, slips: there is no cell 'sft', 'fpr'"),
    ("table7", lambda t: t["slips"][0].update(kind="odd"), r"table7, slips: unknown kind 'odd'"),
]


@pytest.mark.parametrize(("key", "change", "message"), FAULTS)
def test_a_fault_names_table_and_row(tmp_path, key, change, message):
    with pytest.raises(AwaresError, match=message):
        paper.load_paper(broken(tmp_path, key, change))


def test_a_file_that_is_no_yaml_or_is_missing(tmp_path):
    file = tmp_path / "tables.yaml"
    file.write_text("tables: [", encoding="utf-8")
    with pytest.raises(AwaresError, match="tables.yaml is not YAML"):
        paper.load_paper(file)
    with pytest.raises(AwaresError, match="no such file"):
        paper.load_paper(tmp_path / "none.yaml")
    assert math.isnan(paper.published("table6").ratio[0])
