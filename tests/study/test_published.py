"""What the repository ships as results: the tables of reports/mini, the README's copy of them, the trained policy."""

import re
from pathlib import Path

import pandas as pd
import pytest

from awares import AwaRes
from awares.config import load_params
from awares.data.rows import make_split
from awares.method import evaluation

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "reports" / "mini" / "tables"
SYSTEMS = {"full resolution": "full", "half resolution": "half", "cold start (SFT)": "sft", "AwaRes": "awares"}


def readme_table() -> dict[str, list[str]]:
    """The rows of the README's table of results: name -> cells."""
    lines = re.findall(r"^\| ([^|]+?) \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines if name in SYSTEMS}


def test_the_readme_shows_the_numbers_of_the_report() -> None:
    table = pd.read_csv(TABLES / "table1_main.csv")
    shown = readme_table()
    assert set(shown) == set(SYSTEMS)
    tasks = [*load_params(path=ROOT / "params.yaml").data.tasks, "average"]
    for name, system in SYSTEMS.items():
        rows = table[table.system == system].set_index("benchmark")
        expected = [f"{rows.accuracy[task]:.1f}" for task in tasks]
        average = rows.loc["average"]
        expected[-1] += f" [{average.accuracy_low:.1f}, {average.accuracy_high:.1f}]"
        assert shown[name] == [*expected, f"{average.rtr:.3f}"], name


def test_the_published_rows_are_as_many_as_params_yaml_says() -> None:
    table = pd.read_csv(TABLES / "table1_main.csv")
    params = load_params(path=ROOT / "params.yaml")
    assert set(table[table.benchmark != "average"].n) == {params.evaluation.rows}
    assert set(table.system) == {"full", "half", "no_image", "sft", "awares"}
    assert set(table.benchmark) == {*params.data.tasks, "average"}


def test_the_policy_that_ships_reads_what_the_report_says() -> None:
    params = load_params(
        path=ROOT / "params.yaml", overrides={"evaluation.rows": 8, "evaluation.seed": 301, "threads": 1}
    )
    rows = make_split(params, "evaluation")
    done = AwaRes.from_pretrained().engine.run(rows["image"], rows["question"], row_ids=rows["id"])
    found = evaluation.scored("awares", rows, done)
    reported = pd.read_csv(TABLES / "table1_main.csv").query("system == 'awares' and benchmark == 'average'").iloc[0]
    # 48 rows: at most three standard errors below the report, and about as many tokens
    spread = (reported.accuracy * (100 - reported.accuracy) / len(rows)) ** 0.5
    assert 100 * found.score.mean() > reported.accuracy - 3 * spread
    assert found.rtr.mean() == pytest.approx(reported.rtr, abs=0.1)
    assert {one.call_status for one in done} <= {"none", "valid", "recovered"} and any(one.crops for one in done)


def test_the_policy_that_ships_answers_as_the_report_says_row_by_row() -> None:
    params = load_params(path=ROOT / "params.yaml", overrides={"evaluation.rows": 8, "threads": 1})
    published = pd.read_parquet(ROOT / "reports" / "mini" / "comparison" / "answers.parquet")
    mine = published[(published.system == "awares") & (published.seed == params.seed)].set_index("row_id")
    main = pd.read_csv(TABLES / "table1_main.csv").query("system == 'awares' and benchmark == 'average'").iloc[0]
    if 100 * mine.score.mean() != pytest.approx(main.accuracy, abs=1e-3):
        pytest.skip("the main line was run here after the comparison: `dvc repro comparison@mini` brings them together")
    rows = make_split(params, "evaluation")
    done = AwaRes.from_pretrained().engine.run(rows["image"], rows["question"], row_ids=rows["id"])
    found = evaluation.scored("awares", rows, done).set_index("row_id").join(mine, suffixes=("", "_published"))
    assert len(found) == 48 and found.answer_published.notna().all()
    same = (found.score == found.score_published) & (found.rtr - found.rtr_published).abs().lt(1e-6)
    for name, kept in (("answer", found.answer_published), ("call_status", found.call_status_published)):
        same &= pd.Series({one.row_id: getattr(one, name) for one in done}) == kept
    # another processor's rounding may turn a row that lies on an edge
    assert same.sum() >= 46, found[~same]
    assert any(one.crops for one in done) and not all(one.crops for one in done)


def test_every_table_and_figure_of_the_paper_has_its_counterpart_in_the_index() -> None:
    index = (ROOT / "reports" / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", index)
    assert links and not [link for link in links if not (ROOT / "reports" / link).is_file()]
    rows = re.findall(r"^\| (Table|Fig\.) ([^|]+?) \|", index, re.MULTILINE)
    numbers = {kind: [n for name, text in rows if name == kind for n in _span(text)] for kind in ("Table", "Fig.")}
    assert numbers == {"Table": [*range(1, 12)], "Fig.": [*range(1, 16)]}


def _span(text: str) -> list[int]:
    """``1, 2, 3`` and ``9 to 14`` as numbers."""
    first, *rest = (int(n) for n in re.findall(r"\d+", text))
    return [*range(first, rest[-1] + 1)] if " to " in text else [first, *rest]
