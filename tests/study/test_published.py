"""What the repository ships as results: the tables of reports/mini, the README's copy of them, the trained policy."""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import yaml

from awares import AwaRes
from awares.config import load_params
from awares.data.rows import make_split
from awares.method import evaluation
from awares.study import claims, comparison
from awares.study.tables import TASK_WORDS
from awares.study.verdicts import FAILS, HOLDS, SAME, UNDECIDED

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "reports" / "mini"
TABLES = REPORTS / "tables"
PARAMS = load_params("mini", path=ROOT / "params.yaml")
SYSTEMS = {"full": "full resolution", "half": "half resolution", "sft": "SFT", "awares": "AwaRes (SFT, then GRPO)"}
PAGES = "comparison/table1_systems comparison/claims comparison/against_awares ablations/effects seeds/table1_seeds"
MARKS = "<!-- Results: test_published.py writes this part -->\n", "<!-- End of the results -->\n"


@functools.cache
def published() -> comparison.Answers:
    return comparison.published(PARAMS)


@functools.cache
def judged() -> pd.DataFrame:
    return claims.claims_table(published(), claims.read_claims()).set_index("id")


def signed(values: Sequence[float], digits: int, sign: str = "+") -> str:
    """A number with its interval."""
    value, low, high = (f"{value:{sign}.{digits}f}".replace("-", "−") for value in values)
    return f"{value} [{low}, {high}]"


def results() -> str:
    """The README's results: means over training seeds, and the headline claims, all from the published answers."""
    tables = published().tables.items()
    rows = [part.assign(system=name, seed=seed) for (kind, name, seed), part in tables if kind == "evaluation"]
    main = pd.concat(one.reset_index() for one in rows if one.system.iloc[0] in SYSTEMS)
    table = comparison.systems_table(main, PARAMS.evaluation).set_index(["system", "benchmark"])
    tasks = [*PARAMS.data.tasks, "average"]
    heads = [*(TASK_WORDS[name] for name in PARAMS.data.tasks), "average", "RTR"]
    rows, seeds = table.n["awares", tasks[0]], table.seeds.max()
    kept, found = table.rtr["awares", "average"], {name: f"{table.accuracy[name, 'average']:.1f} %" for name in SYSTEMS}
    lines = [f"AwaRes keeps {100 * kept:.0f} % of the visual tokens and answers {found['awares']} right, against "]
    lines[0] += f"{found['full']} at full and {found['half']} at half resolution."
    lines += ["", f"| {rows} rows per task, {seeds} trainings | {' | '.join(heads)} |"]
    lines += ["|---" + "|---:" * len(heads) + "|"]
    for system, shown in SYSTEMS.items():
        cells = [f"{table.accuracy[system, task]:.1f}" for task in tasks]
        average = table.loc[(system, "average")]
        cells[-1] = signed(average[["accuracy", "accuracy_low", "accuracy_high"]], 1, "")
        lines.append(f"| {shown} | {' | '.join(cells)} | {average.rtr:.3f} |")
    lines += ["", "| headline claim of the paper | paper | here | trainings | verdict |", "|---|---:|---:|---:|---|"]
    for one in judged().query("headline == 'yes'").itertuples():
        digits = 3 if one.expression.startswith("rtr") else 1
        sign = "+" if "-" in one.expression else ""
        paper = f"{one.paper:{sign}.{digits}f}".replace("-", "−")
        here = signed((one.effect, one.low, one.high), digits, sign)
        lines.append(f"| {one.claim} | {paper} | {here} | {one.seeds:.0f} | {one.verdict} |")
    counted = judged().query("decided_by == ''").verdict.value_counts()
    verdicts = ", ".join(f"{name} {counted.get(name, 0)}" for name in (HOLDS, FAILS, SAME, UNDECIDED))
    lines += ["", f"Verdicts on all {counted.sum()} claims: {verdicts}."]
    return "\n".join(lines) + "\n"


def test_the_readme_shows_what_follows_from_the_published_answers() -> None:
    """If it does not, replace the part between the two marks by what this test prints."""
    _, shown = (ROOT / "README.md").read_text().split(MARKS[0])
    assert shown.partition(MARKS[1])[0] == results(), results()


def test_the_readme_quotes_the_published_times() -> None:
    text = (ROOT / "README.md").read_text()
    (ratio,) = re.findall(r"one row at a time it takes (\S+) \[(\S+), (\S+)\] of full resolution's time", text)
    found = pd.read_csv(REPORTS / "latency" / "ratios.csv", dtype={"batch": str})
    found = found.query("system == 'awares' and over == 'full' and batch == '1'").squeeze()
    assert ratio == tuple(f"{found[name]:.2f}" for name in ("ratio", "ratio_low", "ratio_high"))


def same(file: Path, made: pd.DataFrame) -> None:
    """Whether a published table equals ``made``, to its four decimals."""
    table = pd.read_csv(file)
    if not {*made} <= {*table}:
        pytest.skip(f"{file.name} was published before it had these columns")
    pd.testing.assert_frame_equal(table[[*made]], made, check_dtype=False, rtol=0, atol=6e-5)


@pytest.mark.parametrize("name", [*PAGES.split(), "comparison/response_length"])
def test_the_tables_of_the_pages_follow_from_the_published_answers(name: str) -> None:
    scores = pd.read_parquet(REPORTS / "comparison" / "answers.parquet")
    file, by_task = REPORTS / f"{name}.csv", scores.groupby(["system", "benchmark", "seed"], sort=False)
    if name.endswith("claims"):
        same(file, judged().reset_index()[claims.CLAIM_COLUMNS])
    elif name.endswith("systems"):
        same(file, comparison.systems_table(scores, PARAMS.evaluation))
    elif name.endswith("against_awares"):
        systems = pd.read_csv(file).b.tolist()
        same(file, comparison.difference_table(published(), [("awares", name) for name in systems]))
    elif name.endswith("effects"):
        table = pd.read_csv(file)
        made = comparison.difference_table(published(), list(zip(table.variant, table.system, strict=True)))
        same(file, made.rename(columns={"a": "variant", "b": "system"}))
    elif name.endswith("seeds"):
        table = pd.read_csv(file).query("benchmark != 'average'").set_index(["system", "benchmark"])
        means = (100 * by_task.score.mean()).groupby(["system", "benchmark"]).agg(["mean", "min", "max"])
        for column, how in {"accuracy": "mean", "accuracy_low": "min", "accuracy_high": "max"}.items():
            assert table[column].to_dict() == pytest.approx(means[how].reindex(table.index).to_dict(), abs=6e-5)
    else:
        table = pd.read_csv(file).set_index(["system", "benchmark"])
        main = scores[scores.seed == PARAMS.seed].assign(characters=scores.answer.str.len())
        means = main.groupby(["system", "benchmark"]).characters.mean().reindex(table.index)
        assert table.characters.to_dict() == pytest.approx(means.to_dict(), abs=6e-5)


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


def md5(path: Path) -> str:
    """The hash of a file or folder as dvc.lock has it: that of a folder is the hash of the list of its files."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = [{"md5": md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listed.sort(key=lambda one: one["relpath"])
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


@pytest.mark.skipif(not (ROOT / "dvc.lock").is_file(), reason="dvc.lock comes with the next publication")
@pytest.mark.parametrize("folder", ["reports/mini", "data/policy"])
def test_published_files_are_those_that_the_pipeline_wrote(folder: str) -> None:
    stages = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"].values()
    outs = {out["path"]: out["md5"] for stage in stages for out in stage["outs"] if out["path"].startswith(folder)}
    assert not [path for path, expected in outs.items() if not (ROOT / path).exists() or md5(ROOT / path) != expected]
    files = [file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file()]
    assert not [file for file in files if not {*map(str, file.parents), str(file)} & {*outs}]  # of no stage
