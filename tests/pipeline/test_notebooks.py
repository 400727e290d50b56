"""Every notebook has the pipeline's parameters, and runs end to end at smoke scale, on what the last one wrote.

The base model is random: the numbers mean nothing, but they must exist, add up, and agree with what the stages kept.
"""

import ast
import itertools
import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import published
import pytest
import yaml
from line import NOTEBOOKS, ROOT, SMOKE, Line

from awares.bench.latency import TIMED_SYSTEMS
from awares.engine.jsonl import read_records
from awares.engine.model import save_model
from awares.engine.rows import load_rows
from awares.method.evaluation import AVERAGE
from awares.settings import MAIN_SYSTEMS
from awares.study import publish

pytestmark = pytest.mark.notebooks


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_has_the_pipelines_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    (tagged,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert [node.targets[0].id for node in ast.parse(tagged.source).body] == ["profile", "variant", "overrides"]


@pytest.fixture(scope="module")
def line(tmp_path_factory, tiny):
    """The whole main line, once for all tests of this file, on this checkout's own code."""
    made = Line(tmp_path_factory.mktemp("line"), SMOKE)
    save_model(tiny.model, tiny.processor, made.folder / "base")
    made.run_main_line()
    return made


def test_no_stage_writes_where_another_has_written(line):
    # First: DVC would take it for a change, and run what follows once more
    assert {stage: line.files(stage) for stage in line.written} == line.written


def test_a_reward_written_in_a_cell_trains_another_policy(line, tmp_path):
    source = "def brief(rollouts, context):\n    return [-len(one.text) for one in rollouts]\n\n\nreward = brief"
    mine = line.run_edited("04_grpo", "grpo", "reward = None", source, tmp_path)
    weights = Path("adapter", "adapter_model.safetensors")
    assert (mine / weights).read_bytes() != (line.params.run_dir("grpo") / weights).read_bytes()
    log = pd.read_csv(mine / "curves.csv")
    assert (log.reward < 0).all() and "answer" not in log


def test_the_explorer_has_the_numbers_of_the_tables(line):
    folder = line.params.run_dir("operating_curve")
    found = json.loads((folder / "explorer" / "rows.js").read_text().removeprefix("const EXPLORER = ").rstrip(";\n"))
    dial, rows = pd.read_csv(folder / "tables" / "dial.csv").query("rows == 'all'"), pd.DataFrame(found["rows"])
    assert len(rows) == dial.n.max() and {*found["biases"]} == {*dial.call_bias} and ("view" in rows)
    for _, point in dial.iterrows():
        own = [one["call" if one["gap"] + point.call_bias > 0 else "direct"] for one in rows[point.system]]
        marks = pd.DataFrame(own).assign(rtr=[one["tokens"] / one["of"] for one in own])
        means = marks[["score", "rtr"]].groupby(rows.task).mean().mean()
        shares = [means.score, means.rtr, marks.crops.map(bool).mean()]
        assert shares == pytest.approx([point.accuracy / 100, point.rtr, point.call_rate / 100], abs=6e-5)


def test_report_publishes_what_the_pipeline_declares(line):
    assert {file.stem for file in publish.publish(line.params)} >= set(publish.STAGES)
    folder = line.params.report_dir()
    outs = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["report"]["outs"]
    declared = {Path(next(iter(out))).name for out in outs if isinstance(out, dict)}
    assert declared == {"figures", "notebooks", "explorer", "tables", "metrics.json"}
    assert {"table1_main", "gap", "dial", "checks"} <= {file.stem for file in (folder / "tables").glob("*.csv")}
    assert (folder / "figures" / "accuracy_vs_rtr.png").is_file()
    assert set(json.loads((folder / "metrics.json").read_text())) >= {"curation", "sft", "grpo", "evaluation"}
    assert (folder / "explorer" / "rows.js").is_file()


def test_released_rows_take_the_place_of_curation(tiny, tmp_path):
    """SFT goes on from what 01 makes of the released dataset; base model, judge and oracle are not used."""
    save_model(tiny.model, tiny.processor, tmp_path / "base")
    published.released(tmp_path / "hub", 32, 80_000)
    published.benchmarks(tmp_path / "hub", 2, 90_000)
    places = {"data.hub_root": str(tmp_path / "hub"), "curation.released": "awares"}
    made = Line(tmp_path, {**SMOKE, **places, "data.validation_rows": 2})
    made.run("01_released", "curation")  # own rows are not read: stage data has not run
    held_out = load_rows(made.params.run_dir("curation") / "validation" / "dataset")
    made.run("02_crop_distribution", "crop_distribution")
    assert made.table("crop_distribution", "evidence_size").empty  # DVC expects it
    made.run("03_sft", "sft")
    answered = read_records(made.params.run_dir("sft") / "validation.jsonl")
    assert [one["row_id"] for one in answered] == held_out["id"][:] and len(answered) == 10


def test_latency(line):
    line.run("07_latency", "latency", **{"latency.pruners": ["visionzip", "fastv"]})
    folder = line.params.report_dir() / "latency"
    place = pd.read_csv(folder / "table5_latency.csv", dtype={"batch": str}).set_index(["system", "batch"])
    assert sorted(place.index) == sorted(itertools.product(TIMED_SYSTEMS, ("1", "best")))
    assert (place.ratio.loc["full"] == 1).all() and (place.ms > 0).all()
    assert len(pd.read_csv(folder / "pruners.csv")) > 5
    assert publish.publish(line.params, "latency")[0].is_file()


@pytest.fixture(scope="module")
def unseen(line):
    """The main line's answers to rows that no stage has seen."""
    return line.run("05_evaluation", "evaluation", **{"evaluation.seed": line.params.evaluation.unseen_seed}).parent


def test_means_over_seeds_on_the_pipelines_rows_and_on_unseen_ones(line, unseen):
    folders = [line.params.run_dir("evaluation"), unseen]
    drawn = {one["row_id"] for one in read_records(folders[1] / "trajectories" / "awares.jsonl")}
    assert len(drawn) == 12 and not drawn & set(load_rows(line.params.run_dir("data") / "evaluation")["id"])
    for folder, (seed, gain) in itertools.product(folders, ((2, 1.0), (3, 5.0))):  # the same run, AwaRes better
        copy = Path(str(folder).replace("main-s1", f"main-s{seed}"))
        shutil.copytree(folder, copy)
        table = pd.read_csv(copy / "tables" / "table1_main.csv")
        table.loc[table.system == "awares", "accuracy"] += gain
        table.to_csv(copy / "tables" / "table1_main.csv", index=False)
    line.run("09_seeds", "seeds")
    out, row = line.params.report_dir() / "seeds", ("awares", AVERAGE)
    for folder, name in zip(folders, ("seeds", "unseen"), strict=True):
        main = pd.read_csv(folder / "tables" / "table1_main.csv").set_index(["system", "benchmark"]).accuracy
        means = pd.read_csv(out / f"table1_{name}.csv").set_index(["system", "benchmark"])
        assert means.accuracy[row] == pytest.approx(main[row] + 2, abs=1e-3) and (means.seeds == 3).all()
        paired = pd.read_csv(out / f"differences_{name}.csv").set_index(["a", "b"]).difference
        assert paired["awares", "full"] == pytest.approx(main[row] - main["full", AVERAGE], abs=1e-3)  # of trajectories
    decided = pd.read_csv(out / "claims.csv").set_index("id").loc["matches_full"]
    gap = pd.read_csv(out / "gap.csv").set_index("part").points["sum"]
    assert decided.seeds == 3 and gap == pytest.approx(decided.effect, abs=1e-3)  # on all rows
    assert len(pd.read_parquet(out / "answers.parquet")) == 12 * (3 + 3 * 2)


def test_evidence_of_every_size_and_shifted_rows(line):
    own = line.params.run_dir("grpo")
    for seed in line.params.seeds:
        shutil.copytree(own / "merged", Path(str(own).replace("main-s1", f"main-s{seed}")) / "merged")
    line.run("12_shift", "shift")
    folder = line.params.report_dir() / "shift"
    sizes = pd.read_csv(folder / "sizes.csv")
    assert sizes[sizes.system == "full"].groupby("measure").n.sum().tolist() == [18, 18]
    assert sizes.px.between(8, 48).all() and (sizes.value_low <= sizes.value).all()
    shifted = pd.read_csv(folder / "shifted.csv").set_index(["system", "benchmark"])
    assert shifted.n["awares", AVERAGE] == 6 and shifted.rtr["full", "typeface"] == 1  # the first kind of shift
    assert {file.name for file in publish.publish(line.params, "shift")} == {"12_shift.ipynb"}


def test_beyond_the_paper(line, unseen):
    """One variant is trained by the exact estimator; AwaRes+ is a copy of it."""
    more = {"ablations.beyond": ["exact", "plus"], "ablations.plus": [], "sft.share": 0.5, "plus_seeds": [1]}
    line.run("04_grpo", "grpo", "exact", **more)
    own, out = (line.with_values("exact", **more).run_dir(stage) for stage in ("grpo", "evaluation"))
    held_out = pd.read_csv(own / "held_out.csv")
    assert held_out.step.tolist() == [0, 1, 2] and held_out.held_out_rtr.between(0, 1.5).all()
    assert pd.read_csv(own / "curves.csv").call_rate.between(0, 1).all()
    line.run("06_ablations", "evaluation", "exact", **more)
    assert len(read_records(out / "unseen" / "awares.jsonl")) == 12
    shutil.copytree(out, line.with_values("plus", **more).run_dir("evaluation"))
    line.run("13_plus", "plus", **more)
    folder = line.params.report_dir() / "plus"
    gained = pd.read_csv(folder / "gains.csv").set_index("variant").loc["exact"]
    assert gained.n == 24 and gained.gain == pytest.approx(gained.reward - gained.reward_sft, abs=2e-4)
    bound = pd.read_csv(folder / "upper_bound.csv").set_index("system").reward
    assert bound["perfect decisions"] >= bound.drop("perfect decisions").max() - 1e-4
    both = pd.read_csv(folder / "differences.csv").set_index(["a", "b"])
    assert both.n.tolist() == [24, 24] and (folder / "prices.png").is_file()
    curve = pd.read_csv(folder / "curve.csv").set_index("variant")
    assert curve.gain["sft"] == 0 and (curve.n == 24).all()  # the SFT policy lies on its own curve
    for name in ("gap", "gap_by_size"):
        parts = pd.read_csv(folder / f"{name}.csv").iloc[:, [0, -3]].set_axis(["part", "points"], axis=1)
        total = parts.points[parts.part != "sum"].sum()
        assert total == pytest.approx(both.difference["plus", "full"], abs=1e-3)


@pytest.fixture(scope="module")
def ablations(line, unseen):
    """Two variants, scored with the policy of the *other* stage of the main line, so that their numbers are known."""
    policies = {"weight_1": ("sft", "grpo"), "no_area_cost": ("grpo", "sft")}
    folders = {}
    for name, (stage, other) in policies.items():
        own = line.with_values(name).run_dir(stage)
        shutil.copytree(line.params.run_dir(other) / "merged", own / "merged")
        shutil.copy(line.params.run_dir(stage) / "validation.jsonl", own)
        folders[name] = line.run("06_ablations", "evaluation", variant=name).parent
    return folders


def test_ablations_are_compared_with_the_main_line_and_the_paper(line, unseen, ablations):
    main, numbers = line.table("evaluation", "table1_main").set_index("system"), ["accuracy", "rtr", "n"]
    for name, own, other in (("weight_1", "sft", "awares"), ("no_area_cost", "awares", "sft")):
        both = [unseen / "trajectories" / f"{other}.jsonl", ablations[name] / "unseen" / f"{own}.jsonl"]
        first, again = ([[one["row_id"], one["answer"]] for one in read_records(file)] for file in both)
        assert first == again and len(first) == 12
        result = pd.read_csv(ablations[name] / "tables" / "result.csv").set_index("system")
        assert result.loc["main", numbers].to_numpy().tolist() == main.loc[own, numbers].to_numpy().tolist()
        assert result.loc[name, numbers].to_numpy().tolist() == main.loc[other, numbers].to_numpy().tolist()
    line.run("06_ablations_summary", "ablations")
    folder = line.params.report_dir() / "ablations"
    effects = pd.read_csv(folder / "effects.csv").set_index("variant")
    assert effects.change["no_area_cost"] == "grpo.lambda_area 0.0"
    written = [pd.read_csv(path / "tables" / "difference.csv").difference[0] for path in ablations.values()]
    files = [folder / "tables" / "table1_main.csv" for folder in (line.params.run_dir("evaluation"), unseen)]
    means = [pd.read_csv(file).query("benchmark == @AVERAGE").set_index("system").accuracy for file in files]
    gaps = [one["awares"] - one["sft"] for one in means]  # of each set, whose tasks have two rows each
    assert written == pytest.approx([gaps[0], -gaps[0]], abs=1e-3)
    both = sum(gaps) / 2
    assert effects.difference[[*ablations]].tolist() == pytest.approx([both, -both], abs=1e-3)
    assert (effects.n[[*ablations]] == 24).all()
    files = {str(file.relative_to(folder)) for file in publish.publish(line.params, "ablations")}
    assert {"notebooks/06_weight_1.ipynb", "notebooks/06_ablations_summary.ipynb"} <= files


def test_systems_are_compared_and_claims_decided(line, ablations):
    """A pruner and a control really run; the trained system's answers are AwaRes' own under its name."""
    named = {"comparison.systems": ["visionzip_50", "oracle_crop"], "ablations.systems": ["visionthink"]}
    named["ablations.beyond"] = []
    for name in named["comparison.systems"]:
        executed = line.run("10_systems", "systems", **{"comparison.systems": [name]})
        shutil.move(executed, executed.parent / name / "notebook.ipynb")
    main = line.params.run_dir("evaluation") / "trajectories"
    shutil.copytree(main, line.with_values("visionthink").run_dir("evaluation") / "trajectories")
    line.run("11_comparison", "comparison", **named)
    folder = line.params.report_dir()
    systems = pd.read_csv(folder / "comparison" / "table1_systems.csv")
    assert set(systems.system) == {*MAIN_SYSTEMS, *named["comparison.systems"], "visionthink"}
    average = systems[systems.benchmark == AVERAGE].set_index("system")
    assert average.rtr["visionzip_50"] == pytest.approx(0.5, abs=0.02) == average.layer_rtr["visionzip_50"]
    claims = pd.read_csv(folder / "comparison" / "claims.csv")
    assert len(claims) >= 25 and claims.effect.notna().sum() > 10
    files = publish.publish(line.with_values(**named), "comparison")
    assert folder / "comparison" / "notebooks" / "10_oracle_crop.ipynb" in files


def test_base_model_is_described_and_measured(line):
    """The shipped weights, whatever base.model is."""
    folder = line.run("00_base_model", "base_model", **{"data.validation_rows": 2}).parent
    reading = pd.read_csv(folder / "reading.csv")
    assert set(reading.view) == {"full", "half"} and set(reading.evidence) == {"small", "large", "all"}
    assert json.loads((folder / "metrics.json").read_text())["full_all"] >= 80
