"""What the repository ships as results: the tables of reports/mini, the README's copy of them, the trained policy."""

import hashlib
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from awares import AwaRes
from awares.config import load_params
from awares.data.rows import make_split
from awares.method import evaluation

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "reports" / "mini" / "tables"
SYSTEMS = {"full resolution": "full", "half resolution": "half", "SFT": "sft", "AwaRes (SFT, then GRPO)": "awares"}


def readme_table() -> dict[str, list[str]]:
    """The rows of the README's table of results: name -> cells."""
    lines = re.findall(r"^\| ([^|]+?) \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines if name in SYSTEMS}


def test_the_readme_shows_the_numbers_of_the_report() -> None:
    table = pd.read_csv(TABLES / "table1_main.csv")
    shown, params = readme_table(), load_params(path=ROOT / "params.yaml")
    assert set(shown) == set(SYSTEMS) and set(table.system) == {*SYSTEMS.values(), "no_image"}
    assert set(table[table.benchmark != "average"].n) == {params.evaluation.rows}
    tasks = [*params.data.tasks, "average"]
    for name, system in SYSTEMS.items():
        rows = table[table.system == system].set_index("benchmark")
        expected = [f"{rows.accuracy[task]:.1f}" for task in tasks]
        average = rows.loc["average"]
        expected[-1] += f" [{average.accuracy_low:.1f}, {average.accuracy_high:.1f}]"
        assert shown[name] == [*expected, f"{average.rtr:.3f}"], name


def test_the_policy_that_ships_answers_as_the_report_says() -> None:
    """In the mean, and row by row unless the main line was run here after the comparison."""
    params = load_params(path=ROOT / "params.yaml", overrides={"evaluation.rows": 8, "threads": 1})
    rows = make_split(params, "evaluation")
    done = AwaRes.from_pretrained().engine.run(rows["image"], rows["question"], row_ids=rows["id"])
    found = evaluation.scored("awares", rows, done).set_index("row_id")
    reported = pd.read_csv(TABLES / "table1_main.csv").query("system == 'awares' and benchmark == 'average'").iloc[0]
    # 48 rows: at most three standard errors below the report, and about as many tokens
    spread = (reported.accuracy * (100 - reported.accuracy) / len(rows)) ** 0.5
    assert 100 * found.score.mean() > reported.accuracy - 3 * spread
    assert found.rtr.mean() == pytest.approx(reported.rtr, abs=0.1)
    assert any(one.crops for one in done) and not all(one.crops for one in done)
    published = pd.read_parquet(ROOT / "reports" / "mini" / "comparison" / "answers.parquet")
    published = published[(published.system == "awares") & (published.seed == params.seed)].set_index("row_id")
    if 100 * published.score.mean() == pytest.approx(reported.accuracy, abs=1e-3):
        published, columns = published.loc[found.index], ["score", "answer", "call_status"]
        same = (found[columns] == published[columns]).all(axis=1) & (found.rtr - published.rtr).abs().lt(1e-6)
        assert same.sum() >= 46, found[~same]  # another processor's rounding may turn a row that lies on an edge


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


def md5(path: Path) -> str:
    """The hash of a file or folder as dvc.lock has it: that of a folder is the hash of the list of its files."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = [{"md5": md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listed.sort(key=lambda one: one["relpath"])
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def altered(root: Path, folder: str) -> list[str]:
    """What differs between dvc.lock and ``folder``: outputs with another hash, and files of no output."""
    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"].values()
    outs = {out["path"]: out["md5"] for stage in stages for out in stage["outs"] if out["path"].startswith(folder)}
    wrong = [path for path, expected in outs.items() if not (root / path).exists() or md5(root / path) != expected]
    files = (file.relative_to(root) for file in (root / folder).rglob("*") if file.is_file())
    return wrong + [str(file) for file in files if not {*map(str, file.parents), str(file)} & {*outs}]


@pytest.mark.skipif(not (ROOT / "dvc.lock").is_file(), reason="dvc.lock comes with the next publication")
@pytest.mark.parametrize("folder", ["reports/mini", "data/policy"])
def test_published_files_are_those_that_the_pipeline_wrote(folder: str) -> None:
    assert altered(ROOT, folder) == []
