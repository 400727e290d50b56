"""dvc.yaml: what it names exists, and the pipeline has the manners that the README promises.

The manners are shown on a copy of dvc.yaml in a repository of its own, where papermill and the publisher are stand-ins
that write every declared output in no time. What reruns, what is restored, what a remote carries is DVC's own doing.
"""

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
MAIN_LINE = ("data", "curation", "crop_distribution", "sft", "grpo", "evaluation", "report")
NOTEBOOKS = [name for name, stage in STAGES.items() if "papermill" in " ".join(stage["cmd"])]
SHOWS = {"config", "data", "figures", "report", "publish"}  # they hand over or show: dvc.yaml says where they count


def notebook_of(stage):
    return re.search(r"notebooks/(\w+\.ipynb)", " ".join(STAGES[stage]["cmd"])).group(1)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_names_things_that_exist(stage):
    deps = [name for name in STAGES[stage]["deps"] if not name.startswith(("runs/", "reports/"))]
    assert [name for name in deps if name != "data/base" and not (ROOT / name.partition("${")[0]).exists()] == []
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for profile in params["profiles"]:
        for key in STAGES[stage]["params"]:
            found = params
            for part in key.replace("${item.profile}", profile).replace("${item.variant}", "main").split("."):
                assert part in found, f"{stage} tracks {key}, which params.yaml does not have"
                found = found[part]


def test_what_an_evaluation_depends_on_is_named_key_by_key():
    """A row more under the dial must not run every variant again; and nothing that the section holds may be forgotten."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    own, keys = "profiles.${item.profile}.evaluation.", {f"evaluation.{key}" for key in params["evaluation"]}
    main, unseen = set(STAGES["evaluation"]["params"]), set(STAGES["unseen"]["params"])
    assert {key for key in main if key.startswith("evaluation")} == keys - {"evaluation.unseen_seed"}
    assert {key for key in unseen if key.startswith("evaluation")} == keys - {"evaluation.seed"}
    sizes = {own + key for key in params["profiles"]["mini"]["evaluation"]}
    assert {key for key in main | unseen if key.startswith(own)} == sizes
    for stage in STAGES:
        tracked = set(STAGES[stage]["params"])
        assert not {"evaluation", own.rstrip(".")} & tracked, stage
        if stage.endswith("ablations_evaluation") or stage in ("system_evaluation", "systems", "latency"):
            assert not {"evaluation.dial_biases", "evaluation.unseen_seed"} & tracked, stage
            assert not any(key.startswith(own) for key in tracked), stage


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_command_line_passes_names_only(stage):
    command = " ".join(STAGES[stage]["cmd"])
    papermill = command.split("papermill")[1].split("python -m")[0]
    assert set(re.findall(r" (-[a-zA-Z])\b", papermill)) == {"-k", "-r"}
    assert re.findall(r"-r (\w+)", command) == ["profile", "variant", "overrides"]
    assert f"notebooks/{notebook_of(stage)}" in STAGES[stage]["deps"]


def imported(code):
    """The modules of awares that ``code`` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "awares":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("awares."):
            found.add(node.module.split(".")[1])
    return {name for name in found if (ROOT / "src" / "awares" / f"{name}.py").is_file()}


@pytest.mark.parametrize("stage", [name for name in NOTEBOOKS if name not in ("base_model", "report", "seeds")])
def test_stage_depends_on_all_modules_that_make_its_results(stage):
    """What the notebook imports, and what that imports in turn; the last stages read results, and rows as those drew them."""
    notebook = nbformat.read(ROOT / "notebooks" / notebook_of(stage), as_version=4)
    todo = imported("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    used = set()
    while todo:
        name = todo.pop()
        used.add(name)
        if name not in SHOWS:
            todo |= imported((ROOT / "src" / "awares" / f"{name}.py").read_text()) - used
    deps = {Path(name).stem for name in STAGES[stage]["deps"] if name.startswith("src/")}
    assert used - deps - SHOWS == set()
    assert stage != "data" or {"data", "suite"} <= deps


def test_expensive_outputs_are_cached():
    """With an uncached output, changing a parameter and back would run a training again."""
    for stage in ("data", "curation", "sft", "grpo", "evaluation", "sft_seeds", "grpo_seeds", "evaluation_seeds"):
        for kind in ("outs", "metrics", "plots"):
            assert all(isinstance(item, str) for item in STAGES[stage].get(kind, [])), f"{stage}: {kind} not cached"


def test_report_needs_no_further_seed():
    deps = " ".join(name for stage in MAIN_LINE for name in STAGES[stage]["deps"])
    assert "seeds" not in deps


# Manners


KEYS = {"AWARES_API_KEY": "sk-planted-pipeline-51fe", "HF_TOKEN": "hf_planted_pipeline_92ab"}

STAND_IN = '''#!{python}
"""papermill, or python -m awares.publish: writes what dvc.yaml declares for the stage, and notes that it ran."""
import os, sys
from pathlib import Path
import yaml
assert {{"AWARES_API_KEY", "HF_TOKEN"}} <= {{*os.environ}}
beta = yaml.load(open("params.yaml"), yaml.CSafeLoader)["grpo"]["beta"]
stages = yaml.load(open("dvc.yaml"), yaml.CSafeLoader)["stages"]
if sys.argv[1] == "-m":
    profile, stage, seed, tree = sys.argv[3], (sys.argv[4:] or ["report"])[0], "", ("reports/", "data/policy")
else:
    run = Path(sys.argv[2]).parent
    open("ran.txt", "a").write(f"{{run}}\\n")
    profile, stage, seed, tree = run.parts[1], run.parts[2], run.name.partition("-s")[2].partition("-")[0], ("runs/",)
system = run.name if sys.argv[1] != "-m" else ""
variant = sys.argv[sys.argv.index("variant") + 1] if "variant" in sys.argv else "main"
if variant != "main":
    stage = {{"evaluation": "sft_ablations_evaluation"}}.get(stage, stage + "_ablations")
items = [item for kind in ("outs", "metrics", "plots") for item in stages[stage].get(kind, [])]
for name in [item if isinstance(item, str) else next(iter(item)) for item in items]:
    names = {{"item.profile": profile, "seed": seed, "item.seed": seed, "item.variant": variant, "item.system": system}}
    names["evaluation.unseen_seed"] = run.name.rpartition("-e")[2] if tree == ("runs/",) else ""
    for key, value in names.items():
        name = name.replace("${{" + key + "}}", value)
    path = Path(name)
    if name.startswith(tree):
        file = path if path.suffix else path / "file"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = f"step,reward,call_rate,kl,loss\\n0,{{beta}},1,1,1\\n"
        file.write_text('{{"value": 1}}' if path.suffix == ".json" else rows)
'''


# Variants and systems are matrices: a few of each stand for all
FEW = {
    r"  curation: \[[^]]*\]": "  curation: [labels_anls]",
    r"  sft: \[[^]]*\]": "  sft: [weight_1]",
    r"  grpo: \[[^]]*\]": "  grpo: [beta_0, miss_cost_4]",
    r"  systems: \[visionthink[^]]*\]": "  systems: [visionthink]",
    r"  systems: \[visionzip_50[^]]*\]": "  systems: [visionzip_50, oracle_crop]",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git and DVC repository with the real dvc.yaml and params.yaml, empty modules and notebooks, and stand-ins."""
    folder = tmp_path_factory.mktemp("pipeline") / "repository"
    for name in ("src/awares", "notebooks", "data/base"):
        (folder / name).mkdir(parents=True)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    text = (ROOT / "params.yaml").read_text()
    for written, few in FEW.items():
        text, count = re.subn(written, few, text)
        assert count == 1, written
    (folder / "params.yaml").write_text(text)
    for stage in STAGES.values():
        for name in stage["deps"]:
            if name.startswith(("src/", "notebooks/", "data/sources", "data/served", "data/paper")):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text("")
    (folder / "data/base/model.txt").write_text("weights")
    (folder / ".gitignore").write_text("/runs/\nran.txt\n")
    tools = folder.parent / "bin"
    tools.mkdir()
    for name in ("papermill", "python"):
        (tools / name).write_text(STAND_IN.format(python=sys.executable))
        (tools / name).chmod(stat.S_IRWXU)
    call(folder, "git", "init", "-q")
    call(folder, "git", "config", "user.email", "test@example.org")
    call(folder, "git", "config", "user.name", "test")
    call(folder, "dvc", "init", "-q")
    call(folder, "dvc", "config", "core.analytics", "false")
    call(folder, "git", "add", "-A")
    call(folder, "git", "commit", "-qm", "start")
    call(folder, "dvc", "repro", "report")
    call(folder, "git", "add", "-A")
    call(folder, "git", "commit", "-qm", "first run")
    return folder


def call(folder, *command):
    """Run a command in ``folder`` with the stand-ins first on PATH and keys in the environment; its output, or an assertion with it."""
    path = os.pathsep.join([str(folder.parent / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    program = [sys.executable, "-m", "dvc", *command[1:]] if command[0] == "dvc" else list(command)
    settings = {"PATH": path, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder.parent / "site")}
    environment = {**os.environ, **settings, **KEYS}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [name for name, key in KEYS.items() if key in done.stdout + done.stderr]
    return done.stdout


def reproduce(folder, *targets):
    """Run dvc repro; the stages whose commands really ran, as run folders."""
    log = folder / "ran.txt"
    log.unlink(missing_ok=True)
    call(folder, "dvc", "repro", *(targets or ("report",)))
    return [line.removeprefix("runs/") for line in log.read_text().splitlines()] if log.exists() else []


def edit(folder, before, after):
    text = (folder / "params.yaml").read_text()
    assert before in text
    (folder / "params.yaml").write_text(text.replace(before, after, 1))


def test_main_line_runs_and_then_rests(repository):
    tables = repository / "reports" / "mini" / "tables"
    assert tables.is_dir() and not (repository / "runs" / "mini" / "sft" / "main-s2").exists()
    assert reproduce(repository) == []


def test_one_grpo_parameter_reruns_grpo_and_what_follows_and_comes_back_from_the_cache(repository):
    edit(repository, "  beta: 0.05", "  beta: 0.0")
    assert reproduce(repository) == ["mini/grpo/main-s1", "mini/evaluation/main-s1", "mini/report"]
    diff = json.loads(call(repository, "dvc", "params", "diff", "--json"))
    assert diff["params.yaml"]["grpo.beta"].items() >= {"old": 0.05, "new": 0.0}.items()
    edit(repository, "  beta: 0.0", "  beta: 0.05")
    assert reproduce(repository) in ([], ["mini/report"])  # the report is published anew, nothing expensive runs


def test_other_profile_reruns_nothing_here(repository):
    edit(repository, "profile: mini", "profile: paper")
    shown = call(
        repository, "dvc", "repro", "--dry", "--force", "report"
    )  # without --force, DVC wants the outputs that a dry run does not make
    stages = [
        name
        for name in ("data", "curation", "crop_distribution", "sft", "grpo", "evaluation", "report")
        if f"'{name}@paper'" in shown
    ]
    assert len(stages) == 7 and not (repository / "runs" / "paper" / "curation").exists()
    assert reproduce(repository)[0] == "paper/data"
    edit(repository, "profile: paper", "profile: mini")
    assert reproduce(repository) == []


def test_size_of_the_other_profile_does_not_matter(repository):
    edit(repository, "train_rows: 10000", "train_rows: 9000")
    assert reproduce(repository) == []
    edit(repository, "train_rows: 9000", "train_rows: 10000")


def test_seeds_share_everything_before_training(repository):
    ran = reproduce(repository, "seeds")
    assert sorted(ran) == sorted(
        [f"mini/{stage}/main-s{seed}" for stage in ("sft", "grpo", "evaluation") for seed in (2, 3)]
        + [f"mini/unseen/main-s{seed}-e204" for seed in (1, 2, 3)]
        + ["mini/seeds"]
    )
    assert reproduce(repository) == []


def test_latency_is_beside_the_main_line(repository):
    """It measures this machine: nothing published by the report waits for it."""
    assert reproduce(repository, "latency") == ["mini/latency/main-s1"]
    assert (repository / "reports" / "mini" / "latency").is_dir()
    assert reproduce(repository, "latency") == [] and reproduce(repository) == []
    assert not any("latency" in name for stage in MAIN_LINE for name in STAGES[stage]["deps"])


def test_an_ablation_repeats_only_what_it_changes(repository):
    params = yaml.safe_load((repository / "params.yaml").read_text())
    labels, cold, after, systems = (params["ablations"][name] for name in ("curation", "sft", "grpo", "systems"))
    ran = set(reproduce(repository, "ablations"))
    wanted = {f"mini/curation/{name}" for name in (*labels, *systems)}
    wanted |= {f"mini/sft/{name}-s1" for name in (*labels, *cold, *systems)}
    wanted |= {f"mini/grpo/{name}-s1" for name in (*after, *systems)} | {
        f"mini/evaluation/{name}-s1" for name in (*labels, *cold, *after, *systems)
    }
    assert ran == wanted | {"mini/ablations"}
    assert reproduce(repository, "ablations") == [] and reproduce(repository) == []
    for stage in ("curation", "sft", "grpo", "evaluation"):  # work in progress stands beside outputs, and is none
        (repository / "runs" / "mini" / stage / ".checkpoints" / "key").mkdir(parents=True)
        (repository / "runs" / "mini" / stage / ".checkpoints" / "key" / "inputs.json").write_text("{}")
    assert reproduce(repository, "ablations") == []
    edit(repository, "miss_cost_4: {grpo.alpha_miss: 4.0}", "miss_cost_4: {grpo.alpha_miss: 5.0}")
    assert reproduce(repository, "ablations") == [
        "mini/grpo/miss_cost_4-s1",
        "mini/evaluation/miss_cost_4-s1",
        "mini/ablations",
    ]
    edit(
        repository, "  beta_0: {grpo.beta: 0.0}", "  beta_0: {grpo.beta: 0.0}\n  beta_1: {grpo.beta: 1.0}"
    )  # adding one is an entry
    edit(repository, "[beta_0, miss_cost_4]", "[beta_0, miss_cost_4, beta_1]")
    assert reproduce(repository, "ablations") == ["mini/grpo/beta_1-s1", "mini/evaluation/beta_1-s1", "mini/ablations"]


def test_the_comparison_runs_every_system_once(repository):
    edit(repository, "[visionzip_50", "[visionzip_60, visionzip_50")  # adding one is a name
    ran = reproduce(repository, "comparison")
    systems = yaml.safe_load((repository / "params.yaml").read_text())["comparison"]["systems"]
    assert ran == [f"mini/systems/{name}" for name in systems] + ["mini/comparison"]  # and nothing is timed again
    assert (repository / "reports/mini/tables/claims.csv").is_file() and (
        repository / "reports/mini/tables/table1_main.csv"
    ).is_file()
    (repository / "src/awares/baselines/systems/mine.py").write_text("# README shows what stands here\n")
    edit(repository, "  own: []", "  own: [mine]")  # one of your own is a file and its name: no other system runs again
    assert reproduce(repository, "comparison") == ["mini/systems/mine", "mini/comparison"]
    assert reproduce(repository, "comparison") == [] and reproduce(repository) == []


def test_metrics_plots_and_graph(repository):
    metrics = json.loads(call(repository, "dvc", "metrics", "show", "--json"))
    assert "reports/mini/metrics.json" in metrics[""]["data"]
    call(repository, "dvc", "metrics", "diff")
    assert "report" in call(repository, "dvc", "dag", "--dot")
    call(repository, "dvc", "plots", "show")
    assert (repository / "dvc_plots" / "index.html").is_file()


def test_a_second_clone_pulls_what_the_first_pushed(repository):
    remote, clone = repository.parent / "remote", repository.parent / "clone"
    call(repository, "dvc", "remote", "add", "-d", "local", str(remote))
    call(repository, "git", "add", "-A")
    call(repository, "git", "commit", "-qm", "remote")
    call(repository, "dvc", "push", "-q")
    call(repository, "git", "clone", "-q", str(repository), str(clone))
    call(clone, "dvc", "pull", "-q", "--allow-missing")  # some stages have never run
    weights = [folder / "runs/mini/grpo/main-s1/merged/file" for folder in (repository, clone)]
    assert weights[0].read_text() == weights[1].read_text()
    assert reproduce(clone) == []


def test_an_experiment_changes_one_value_and_keeps_the_comments(repository):
    call(repository, "git", "add", "-A")
    call(repository, "git", "commit", "-qm", "before the experiment", "--allow-empty")
    (repository / "ran.txt").unlink(missing_ok=True)
    call(repository, "dvc", "exp", "run", "-q", "-S", "grpo.beta=0.1", "report")
    assert (repository / "ran.txt").read_text().splitlines()[0] == "runs/mini/grpo/main-s1"
    text = (repository / "params.yaml").read_text()
    assert "  beta: 0.1" in text and "# Table 11" in text and text.startswith("profile: mini")
    call(repository, "git", "checkout", "-q", "params.yaml")


# Last: it looks at all that the others wrote


def test_no_key_is_left_behind(repository):
    """Every stage had them: neither stands in dvc.lock, params.yaml, a log, the cache or any other file."""
    files = [path for path in repository.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {repository / "dvc.lock", repository / "params.yaml", repository / "ran.txt"} <= {*files}
    assert [path for path in files if any(key.encode() in path.read_bytes() for key in KEYS.values())] == []
