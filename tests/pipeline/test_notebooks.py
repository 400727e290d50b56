"""Every notebook is a tidy source, and runs end to end through papermill at smoke scale, each on what the last one wrote.

The base model here is random: what the numbers say is nonsense, what is checked is that they are there, add up, and agree
with what the stages kept. Labels come from the ANLS judge without a threshold, so that both kinds of row exist.
"""

import ast
import itertools
import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import published
import pytest
import yaml
from conftest import TASKS, under_other_names

from awares.bench.latency import TIMED_SYSTEMS
from awares.config import MAIN_SYSTEMS, load_params
from awares.data.rows import make_split
from awares.engine.model import save_model
from awares.engine.rows import load_rows, save_rows
from awares.method.evaluation import AVERAGE
from awares.study import publish

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMOKE = {
    "threads": 1,
    "data.train_rows": 8,
    "data.validation_rows": 4,
    "curation.judge": "anls",
    "curation.anls_threshold": 0.0,
    "protocol.max_new_tokens": 12,
    "curation.max_new_tokens": 12,
    "sft.batch_size": 8,
    "sft.per_device_batch_size": 4,
    "sft.epochs": 1,
    "sft.checkpoints": 2,
    "sft.selection_rows": 4,
    "grpo.batch_size": 8,
    "grpo.per_device_batch_size": 4,
    "grpo.generations": 4,
    "grpo.max_steps": 2,
    "grpo.max_completion_length": 16,
    "grpo.save_steps": 1,
    "evaluation.rows": 2,
    "evaluation.frontier_rows": 2,
    "evaluation.bootstrap": 50,
    "latency.rows": 6,
    "latency.repetitions": 2,
    "latency.batch_tokens": [4096],
    "evaluation.call_bias": 30.0,  # a random model never calls by itself
    "evaluation.dial_biases": [-30.0, 0.0],
    "evaluation.dial_rows": 8,
    "report.gallery": 2,
}


# Sources


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_source_is_stripped_and_stable(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert [cell.id for cell in notebook.cells] == [str(number) for number in range(len(notebook.cells))]
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path))
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_source_reads_like_an_article(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for before, cell in zip(cells, cells[1:], strict=False):
        assert cell.cell_type == "markdown" or before.cell_type == "markdown", f"no prose before:\n{cell.source}"
    for cell in code_cells(path):
        nodes = list(ast.walk(ast.parse(cell.source)))
        shown = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom, ast.List))]
        listed = {line for node in shown for line in range(node.lineno, (node.end_lineno or 0) + 1)}
        assert len(cell.source.splitlines()) - len(listed) <= 16, f"long cell:\n{cell.source}"
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not [node for node in nodes if isinstance(node, (ast.ClassDef, ast.Lambda))], cell.source
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]  # the idea of a chapter, no plumbing
        assert all(len(ast.unparse(node).splitlines()) <= 10 for node in functions) and len(functions) < 2, cell.source
        assert "dvc" not in cell.source.lower() and not cell.source.startswith(("!", "%"))
    assert str(ROOT) not in path.read_text() and "/home/" not in path.read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_parameters_are_names_and_overrides(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = [node.targets[0].id for node in ast.parse(tagged[0].source).body]
    assert names == ["profile", "variant", "overrides"]


# The line


class Line:
    """The stages' notebooks under ``profile``, executed into a folder of their own; its base model stands in ``base``."""

    def __init__(self, folder: Path, values: dict, profile: str = "mini") -> None:
        places = {"paths.runs": folder / "runs", "paths.reports": folder / "reports", "base.model": folder / "base"}
        self.values = {**values, **{key: str(path) for key, path in places.items()}}
        self.profile, self.params = profile, load_params(profile, "main", self.values, ROOT / "params.yaml")
        self.printed = folder / "printed.txt"  # what the notebooks print: the pipeline shows it
        self.written: dict[str, set] = {}  # of a stage: its files as it left them

    def with_values(self, variant: str = "main", **more):
        return load_params(self.profile, variant, {**self.values, **more}, ROOT / "params.yaml")

    def run(self, name: str, stage: str, variant: str = "main", **more) -> Path:
        """Execute notebook ``name`` (or the edited copy at that path) as the pipeline does; the executed copy."""
        executed = self.with_values(variant, **more).run_dir(stage) / "notebook.ipynb"
        executed.parent.mkdir(parents=True, exist_ok=True)
        overrides = yaml.safe_dump({**self.values, **more}, default_flow_style=True, width=10**6).strip()
        parameters = {"profile": self.profile, "variant": variant, "overrides": overrides}
        source = Path(name) if name.endswith(".ipynb") else ROOT / "notebooks" / f"{name}.ipynb"
        options = {"kernel_name": "python3", "progress_bar": False, "cwd": ROOT / "notebooks"}
        with self.printed.open("a") as shown:
            papermill.execute_notebook(source, executed, parameters, **options, stdout_file=shown, stderr_file=shown)
        return executed

    def files(self, stage: str) -> set[tuple[str, int]]:
        """What lies in the folder of ``stage``: path and size of every file."""
        return {(str(path), path.stat().st_size) for path in self.params.run_dir(stage).rglob("*") if path.is_file()}

    def table(self, stage: str, name: str) -> pd.DataFrame:
        return pd.read_csv(self.params.run_dir(stage) / "tables" / f"{name}.csv")

    def metrics(self, stage: str) -> dict:
        return json.loads((self.params.run_dir(stage) / "metrics.json").read_text())


@pytest.fixture(scope="module")
def line(tmp_path_factory, tiny):
    """The whole main line, once for all tests of this file, on this checkout's own code."""
    folder = tmp_path_factory.mktemp("line")
    save_model(tiny.model, tiny.processor, folder / "base")
    made = Line(folder, SMOKE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "src"))
        for name, stage in publish.STAGES.items():
            made.run(name, stage)
            made.written[stage] = made.files(stage)
        yield made


pytestmark = pytest.mark.notebooks


def test_no_stage_writes_where_another_has_written(line):
    # DVC would take it for a change, and run what follows once more
    assert {stage: line.files(stage) for stage in line.written} == line.written


def test_data_rows(line):
    splits = {split: load_rows(line.params.run_dir("data") / split) for split in ("train", "validation", "evaluation")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 40, "validation": 20, "evaluation": 12}
    assert set(splits["evaluation"]["source"]) == set(TASKS)
    assert set(splits["train"]["split"]) == {"train"}
    assert line.metrics("data")["rows"]["train"] == 40


def test_curation_labels(line):
    curated = load_rows(line.params.run_dir("curation") / "train" / "dataset")
    assert set(curated["label"]) == {"LR", "HR"}
    hr = 100 * curated["label"][:].count("HR") / len(curated)
    assert line.metrics("curation")["train"]["hr"] == pytest.approx(hr)
    agreement = line.table("curation", "table2_judges")
    assert len(agreement) == 3 and agreement.agreement.between(0, 100).all()
    assert len((line.params.run_dir("curation") / "train" / "verdicts.jsonl").read_text().splitlines()) == 40


def test_crop_distribution_adds_up(line):
    crops = line.table("crop_distribution", "crops")
    asked = crops[crops.n > 0].groupby("source").share.sum()
    assert asked.tolist() == pytest.approx([100] * len(asked), abs=0.01)
    labels = line.table("crop_distribution", "labels").set_index("source")
    assert labels.hr["all sources"] == pytest.approx(line.metrics("curation")["train"]["hr"], abs=0.01)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_trainings_keep_policy_curves_and_answers(line, stage):
    folder = line.params.run_dir(stage)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() and (
        folder / "merged" / "config.json"
    ).is_file()
    curves = pd.read_csv(folder / "curves.csv")
    assert curves.step.tolist() == list(range(1, len(curves) + 1))
    assert len((folder / "validation.jsonl").read_text().splitlines()) == 20
    if stage == "grpo":
        assert {"reward", "answer", "tool_cost", "call_rate", "kl", "malformed"} <= set(curves) and len(curves) == 2


def test_a_reward_written_in_a_cell_trains_another_policy(line, tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "04_grpo.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if cell.source == "reward = None")
    cell.source = "def brief(rollouts, context):\n    return [-len(one.text) for one in rollouts]\n\n\nreward = brief"
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    shutil.copytree(line.params.path(line.params.paths.runs), tmp_path / "runs")
    executed = line.run(str(tmp_path / "mine.ipynb"), "grpo", **{"paths.runs": str(tmp_path / "runs")})
    mine, published = (
        folder / "adapter/adapter_model.safetensors" for folder in (executed.parent, line.params.run_dir("grpo"))
    )
    assert mine.read_bytes() != published.read_bytes()
    log = pd.read_csv(executed.parent / "curves.csv")
    assert (log.reward < 0).all() and "answer" not in log


def test_main_table(line):
    main = line.table("evaluation", "table1_main")
    assert main.columns.tolist() == [*("system", "benchmark", "accuracy", "accuracy_low", "accuracy_high", "rtr", "n")]
    pairs = list(zip(main.system, main.benchmark, strict=True))
    assert sorted(pairs) == sorted((system, task) for system in MAIN_SYSTEMS for task in (*TASKS, AVERAGE))
    for system, rows in main.groupby("system"):
        average = rows[rows.benchmark == AVERAGE].squeeze()
        tasks = rows[rows.benchmark != AVERAGE]
        assert average.accuracy == pytest.approx(tasks.accuracy.mean(), abs=1e-3), system
        assert average.rtr == pytest.approx(tasks.rtr.mean(), abs=1e-3) and average.n == tasks.n.sum()
    rtr = main[main.benchmark == AVERAGE].set_index("system").rtr
    assert rtr["full"] == 1 and rtr["no_image"] == 0 and rtr["half"] < 0.5


def test_policy_tables(line):
    flow = line.table("evaluation", "fig5_policy_flow")
    assert flow.groupby("policy").share.sum().tolist() == pytest.approx([100] * 3, abs=0.01)
    form = line.table("evaluation", "table9_format").set_index("system")
    assert set(form.index) == {"sft", "awares"} and (form.calls == 12).all()  # the bias made every row call
    assert (form.valid + form.corrupt).tolist() == pytest.approx([100, 100])
    assert set(line.table("evaluation", "table7_cdp").policy) == {"sft", "awares"}
    errors = line.table("evaluation", "errors").groupby("system").rows.sum()
    assert (errors == 12).all()


def test_dial_holds_table_1_and_moves_one_way(line):
    dial = line.table("operating_curve", "dial")
    assert set(zip(dial.system, dial.rows, dial.call_bias, dial.n, strict=True)) == {
        (system, rows, bias, n)
        for system in ("sft", "awares")
        for rows, n in (("all", 8), ("frontier", 2))
        for bias in (-30.0, 0.0, 30.0)
    }
    assert ((dial.accuracy_low <= dial.accuracy) & (dial.accuracy <= dial.accuracy_high)).all()
    assert dial.groupby(["system", "rows"]).rtr.apply(lambda rtr: rtr.is_monotonic_increasing).all()
    stored = line.params.run_dir("evaluation") / "trajectories" / "awares.jsonl"
    free = [json.loads(text) for text in stored.read_text().splitlines()][:8]
    turned = dial[(dial.system == "awares") & (dial.rows == "all") & (dial.call_bias == 30)].squeeze()
    tasks = pd.DataFrame({"task": [one["row_id"].split("-")[0] for one in free]})
    tasks["rtr"] = [one["visual_tokens"] / one["full_visual_tokens"] for one in free]
    assert turned.rtr == pytest.approx(tasks.groupby("task").rtr.mean().mean(), abs=1e-3)
    assert turned.call_rate == pytest.approx(100 * sum(bool(one["crops"]) for one in free) / 8)
    curve = line.table("operating_curve", "frontier_curve")
    best = line.table("operating_curve", "frontier").set_index("policy")
    for system, part in curve.groupby("system"):
        assert part.rtr.is_monotonic_increasing and part.accuracy.is_monotonic_increasing
        assert part.accuracy.iloc[-1] == pytest.approx(best.frontier_accuracy[system], abs=1e-3)


def test_report_publishes_tables_figures_notebooks_and_pages(line):
    folder = line.params.report_dir()
    files = publish.publish(line.params)
    assert {file.stem for file in files} >= set(publish.STAGES)
    for stage, name in (("evaluation", "table1_main"), ("evaluation", "table7_cdp"), ("curation", "table2_judges")):
        assert (folder / "tables" / f"{name}.csv").read_bytes() == (
            line.params.run_dir(stage) / "tables" / f"{name}.csv"
        ).read_bytes()
    assert pd.read_csv(folder / "tables" / "checks.csv").check.is_unique
    assert {"fig5_policy_flow.png", "accuracy_vs_rtr.png", "dial.png", "grpo.png"} <= {
        file.name for file in (folder / "figures").iterdir()
    }
    assert set(json.loads((folder / "metrics.json").read_text())) >= {"curation", "sft", "grpo", "evaluation"}
    page = (folder / "html" / "05_evaluation.html").read_text()
    assert "<script" not in page and "data:image/png;base64" in page and 'src="http' not in page


def test_released_rows_take_the_place_of_curation(tiny, tmp_path, monkeypatch):
    """Both trainings go on from what 01 makes of the released dataset; base model, judge and oracle are not asked."""
    save_model(tiny.model, tiny.processor, tmp_path / "base")
    published.released(tmp_path / "hub", 32, 80_000)
    published.benchmarks(tmp_path / "hub", 2, 90_000)
    places = {"data.hub_root": str(tmp_path / "hub"), "curation.released": "awares"}
    made = Line(tmp_path, {**SMOKE, **places, "data.validation_rows": 2})
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made.run("01_released", "curation")  # own rows are not read: stage data has not run
    rows = {split: load_rows(made.params.run_dir("curation") / split / "dataset") for split in ("train", "validation")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 22, "validation": 10}
    assert not set(rows["train"]["id"]) & set(rows["validation"]["id"])
    assert made.metrics("curation")["both_wrong"] is None
    with pytest.raises(papermill.PapermillExecutionError, match="01_released"):
        made.run("01_curation", "curation")
    made.run("02_crop_distribution", "crop_distribution")
    for stage, name in (("curation", "luck"), ("crop_distribution", "evidence_size")):  # DVC expects them
        assert made.table(stage, name).empty
    made.run("03_sft", "sft")
    answered = (made.params.run_dir("sft") / "validation.jsonl").read_text().splitlines()
    assert [json.loads(text)["row_id"] for text in answered] == rows["validation"]["id"][:]


MY_RULE = '''
def half_of_widest(boxes, section):
    """The half of the image that contains the centre of the widest box, and the centre of the image."""
    left, top, right, bottom = max(boxes, key=lambda box: box[2] - box[0])
    return ["left" if left + right < 1000 else "right", "center"]


rule = half_of_widest
'''


def test_a_crop_rule_in_a_cell_gives_other_target_crops(tiny, tmp_path, monkeypatch):
    """One cell of 01 is replaced, and no file of the library. Labels and boxes remain as they are."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    save_model(tiny.model, tiny.processor, tmp_path / "base")
    made = Line(tmp_path, {**SMOKE, "data.train_rows": 4, "data.validation_rows": 2})
    for split in ("train", "validation"):
        save_rows(make_split(made.params, split), made.params.run_dir("data") / split)
    notebook = nbformat.read(ROOT / "notebooks" / "01_curation.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "rule = None" in cell.source)
    cell.source = MY_RULE
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    curated = {}
    for source in (ROOT / "notebooks" / "01_curation.ipynb", tmp_path / "mine.ipynb"):
        made.run(str(source), "curation")
        curated[source.stem] = load_rows(made.params.run_dir("curation") / "train" / "dataset").to_pandas()
    own, mine = curated["01_curation"], curated["mine"]
    assert own.label.tolist() == mine.label.tolist() and "HR" in mine.label.tolist()
    targets, chosen = own.target_crops.map(tuple), mine[mine.label == "HR"].target_crops.map(tuple)
    assert {*chosen} <= {("left", "center"), ("right", "center")} and not {*chosen} & {*targets}


def test_executed_notebooks_are_byte_stable(line):
    """Running again with the same inputs publishes the same bytes, and none of them names this machine."""
    executed = line.params.run_dir("crop_distribution") / "notebook.ipynb"
    once = nbformat.writes(publish.stable_copy(nbformat.read(executed, as_version=4), ROOT))
    line.run("02_crop_distribution", "crop_distribution")
    again = nbformat.writes(publish.stable_copy(nbformat.read(executed, as_version=4), ROOT))
    assert once == again and str(ROOT) not in once


def test_unseen_evaluation_seed_draws_other_rows_beside_the_pipelines_own(line):
    before = (line.params.run_dir("evaluation") / "tables" / "table1_main.csv").read_bytes()
    line.run("05_evaluation", "evaluation", **{"evaluation.seed": 2024})
    fresh = line.with_values(**{"evaluation.seed": 2024}).run_dir("evaluation")
    assert fresh.name == "main-s1-e2024"
    asked = [json.loads(text)["row_id"] for text in (fresh / "trajectories" / "awares.jsonl").read_text().splitlines()]
    assert len(asked) == 12 and not set(asked) & set(load_rows(line.params.run_dir("data") / "evaluation")["id"])
    assert (line.params.run_dir("evaluation") / "tables" / "table1_main.csv").read_bytes() == before


def test_latency(line):
    line.run("07_latency", "latency", **{"latency.pruners": ["visionzip", "fastv"]})
    folder = line.params.report_dir() / "latency"
    table = pd.read_csv(folder / "table5_latency.csv", dtype={"batch": str})
    assert sorted(zip(table.system, table.batch, strict=True)) == sorted(
        itertools.product(TIMED_SYSTEMS, ("1", "best"))
    )
    place = table.set_index(["system", "batch"])
    assert (place.ratio.loc["full"] == 1).all() and (place.speedup.xs("1", level="batch") == 1).all()
    assert (place.ms_low <= place.ms).all() and (place.ms <= place.ms_high).all() and (place.ms > 0).all()
    parts = place[["preprocess", "vision", "prefill", "decode"]].sum(axis=1)
    assert (parts / place.ms).between(0.5, 1.5).all()  # medians of parts do not add up to the median of the whole
    assert (place.loc["awares"].prefill_2_gflops <= 0.6 * place.loc["awares_naive"].prefill_2_gflops).all()
    assert (place.loc["awares"].gflops < place.loc["awares_naive"].gflops).all()
    written = (line.params.run_dir("evaluation") / "trajectories" / "half.jsonl").read_text().splitlines()
    answers = [len(json.loads(text)["answer"]) for text in written]
    lengths = pd.read_csv(folder / "table6_response_length.csv").query("system == 'half'")
    assert (lengths.characters * lengths.n).sum() == pytest.approx(sum(answers), abs=0.01)
    times = pd.read_csv(line.params.run_dir("latency") / "times.csv")
    assert len(times) == 2 * 2 * len(TIMED_SYSTEMS) and (times.rows == 6).all()
    pruners = pd.read_csv(folder / "pruners.csv").set_index("system")
    assert "full" in pruners.index and pruners.ratio["full"] == 1 and (pruners.ms_low > 0).all()
    assert list(pruners.index) == [
        "full",
        *(f"{one}_{share}" for one in ("visionzip", "fastv") for share in (100, 70, 50)),
    ]
    for one in ("visionzip", "fastv"):
        assert pruners.gflops[[f"{one}_{share}" for share in (100, 70, 50)]].is_monotonic_decreasing
    by_task = pd.read_csv(folder / "table5_benchmarks.csv").set_index(["system", "benchmark"])
    assert by_task.n["awares"].to_dict() == {**dict.fromkeys(TASKS, 1), "average": 6} and (by_task.ms > 0).all()
    assert set(pd.read_csv(folder / "ratios.csv").over) == {"full", "awares"}
    assert (folder / "accuracy_time.png").is_file() and publish.publish(line.params, "latency")[0].is_file()


def raised(table, shift):
    """The table1_main.csv in ``table``, AwaRes ``shift`` points better."""
    read = pd.read_csv(table)
    read.loc[read.system == "awares", "accuracy"] += shift
    read.to_csv(table, index=False)


def test_means_over_seeds(line):
    elsewhere = {"evaluation.seed": line.params.evaluation.unseen_seed}
    line.run("05_evaluation", "evaluation", **elsewhere)
    for other in ({}, elsewhere):
        own = line.with_values(**other).run_dir("evaluation")
        for seed, shift in ((2, 1.0), (3, 5.0)):
            copy = line.with_values(seed=seed, **other).run_dir("evaluation")
            shutil.copytree(own, copy)
            raised(copy / "tables" / "table1_main.csv", shift * (2 if other else 1))
    line.run("09_seeds", "seeds")
    out = line.params.report_dir() / "seeds"
    checks = pd.read_csv(out / "checks.csv").set_index("check").value
    row = ("awares", AVERAGE)
    for other, name, on, gain in (({}, "table1_seeds", "", 2), (elsewhere, "table1_unseen", " on unseen rows", 4)):
        own = line.with_values(**other).run_dir("evaluation") / "tables" / "table1_main.csv"
        main = pd.read_csv(own).set_index(["system", "benchmark"])
        means = pd.read_csv(out / f"{name}.csv").set_index(["system", "benchmark"])
        assert means.accuracy[row] == pytest.approx(main.accuracy[row] + gain, abs=1e-3)
        assert means.accuracy_high[row] - means.accuracy_low[row] == pytest.approx(2.5 * gain, abs=1e-3)
        assert (means.seeds == 3).all()
        gap = means.accuracy["full", AVERAGE] - means.accuracy[row]
        assert checks[f"full less AwaRes{on}, mean over seeds (points)"] == pytest.approx(gap, abs=1e-3)
    paired = pd.read_csv(out / "differences_unseen.csv").set_index(["a", "b"])
    lower = checks["full less AwaRes on unseen rows, lower end of the interval (points)"]
    assert lower == pytest.approx(-paired.high["awares", "full"], abs=1e-3)
    average = main.accuracy.xs(
        AVERAGE, level="benchmark"
    )  # of the unseen rows, each seed's trajectories being the same
    assert paired.difference["awares", "full"] == pytest.approx(average["awares"] - average["full"], abs=1e-3)
    assert publish.publish(line.params, "seeds")[0].is_file()


@pytest.fixture(scope="module")
def ablations(line):
    """One variant of either training, really run; the tables of the others are copies under their names."""
    ran = {"weight_1": ("03_sft", "sft"), "beta_0": ("04_grpo", "grpo")}
    folders = {}
    for name, (notebook, stage) in ran.items():
        line.run(notebook, stage, variant=name)
        folders[name] = line.run("06_ablations", "evaluation", variant=name).parent
    under_other_names(line, folders)
    return folders


def test_a_variant_is_set_beside_the_main_line(line, ablations):
    for name, system in (("weight_1", "sft"), ("beta_0", "awares")):
        result = pd.read_csv(ablations[name] / "tables" / "result.csv")
        assert set(result.system) == {"main", name} and set(result.benchmark) == {*TASKS, AVERAGE}
        main = line.table("evaluation", "table1_main")
        columns = ["accuracy", "rtr", "n"]
        ours, theirs = result[result.system == "main"], main[main.system == system]
        assert ours[columns].to_numpy().tolist() == theirs[columns].to_numpy().tolist()
        executed = nbformat.read(ablations[name] / "notebook.ipynb", as_version=4)
        assert f"<code>{name}</code>" in str(executed.cells) or f"`{name}` less the main line" in str(executed.cells)
    assert not (line.params.run_dir("sft").with_name("beta_0-s1")).exists()


def test_ablations_stand_together_beside_the_paper(line, ablations):
    executed = line.run("06_ablations_summary", "ablations")
    folder = line.params.report_dir() / "ablations"
    effects = pd.read_csv(folder / "effects.csv")
    assert set(effects.variant) == {name for names in line.params.ablations.values() for name in names}
    assert "grpo.beta 0.0" in effects.set_index("variant").change["beta_0"]
    assert (folder / "effects.png").is_file() and (folder / "sweeps.png").is_file()
    text = str(nbformat.read(executed, as_version=4).cells)
    assert text.count("measured here (profile mini)") == text.count("published (") == 6
    answers = pd.read_parquet(folder / "answers.parquet").set_index("system").loc["beta_0"]
    result = pd.read_csv(ablations["beta_0"] / "tables" / "result.csv").set_index(["system", "benchmark"])
    average = answers.groupby("benchmark").score.mean().mean()
    assert 100 * average == pytest.approx(result.accuracy["beta_0", AVERAGE], abs=1e-4)
    asked = pd.read_parquet(folder / "first_turns.parquet")
    assert set(asked.system) == set(effects.variant) and asked.groupby("system").row_id.nunique().nunique() == 1
    assert {"notebooks/06_beta_0.ipynb", "html/06_ablations_summary.html"} <= {
        str(file.relative_to(folder)) for file in publish.publish(line.params, "ablations")
    }


def test_systems_are_compared_and_claims_decided(line, ablations):
    """A pruner and a control really run; the trained system's answers are AwaRes' own under its name."""
    asked = {"comparison.systems": ["visionzip_50", "oracle_crop"]}
    for name in asked["comparison.systems"]:
        executed = line.run("10_systems", "systems", **{"comparison.systems": [name]})
        shutil.move(executed, executed.parent / name / "notebook.ipynb")
    main = line.params.run_dir("evaluation") / "trajectories"
    for system in line.params.ablations["systems"]:
        copy = line.with_values(system).run_dir("evaluation") / "trajectories"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(main, copy)
    line.run("11_comparison", "comparison", **asked)
    folder = line.params.report_dir()
    systems = pd.read_csv(folder / "tables" / "table1_systems.csv")
    assert set(systems.system) == {*MAIN_SYSTEMS, *asked["comparison.systems"], *line.params.ablations["systems"]}
    assert (systems.groupby("system").benchmark.nunique() == 7).all()
    pruned = systems[(systems.system == "visionzip_50") & (systems.benchmark == AVERAGE)]
    assert pruned.rtr.item() == pytest.approx(0.5, abs=0.02) == pruned.layer_rtr.item()
    claims = pd.read_csv(folder / "tables" / "claims.csv")
    assert set(claims.verdict) <= {"holds", "does not hold", "undecided"} and len(claims) >= 25
    assert claims.effect.notna().sum() > 10
    answers = pd.read_parquet(folder / "comparison" / "answers.parquet")
    means = answers.groupby(["system", "benchmark"]).score.mean()
    tabled = systems[systems.benchmark != AVERAGE].set_index(["system", "benchmark"]).accuracy
    assert (100 * means).to_dict() == pytest.approx(tabled.to_dict(), abs=1e-3)
    assert set(pd.read_parquet(folder / "comparison" / "first_turns.parquet").system) == {"sft", "awares"}
    files = publish.publish(line.with_values(**asked), "comparison")
    assert folder / "comparison" / "notebooks" / "10_oracle_crop.ipynb" in files


def test_the_report_writes_the_tables_that_the_pipeline_declares(line):
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    declared = {
        Path(next(iter(out))).name
        for out in stages["report"]["outs"]
        if isinstance(out, dict) and "/tables/" in next(iter(out))
    }
    beside = {Path(next(iter(out))).name for out in stages["comparison"]["outs"] if isinstance(out, dict)}
    assert {file.name for file in (line.params.report_dir() / "tables").glob("*.csv")} - beside == declared


def test_base_model_is_described_and_measured(line):
    """The shipped weights, whatever base.model is."""
    folder = line.run("00_base_model", "base_model", **{"data.validation_rows": 2}).parent
    reading = pd.read_csv(folder / "reading.csv")
    assert set(reading.view) == {"full", "half"} and set(reading.evidence) == {"small", "large", "all"}
    assert json.loads((folder / "metrics.json").read_text())["full_all"] >= 80
