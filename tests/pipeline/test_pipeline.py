"""dvc.yaml: what it names exists, and the pipeline reruns what the README promises and nothing else.

The second half works on a copy of dvc.yaml in a separate repository, where papermill and the publisher are stand-ins
that write every output in no time. What reruns, what is restored and what a remote carries is real DVC.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT
from test_house import TREES, imported

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
NOTEBOOKS = [name for name, stage in STAGES.items() if "papermill" in stage["cmd"]]
# Modules that pass parameters and rows on or start processes. Stages that only show results depend on study/.
SHOWN = {*"config settings errors registry data/rows training/distributed bench/estimate bench/plan".split()}
SUMMARIES = ("crop_distribution", "report", "seeds", "ablations", "comparison", "plus")


@pytest.mark.parametrize("released, notebook", [("", "01_curation"), ("awares", "01_released")])
def test_released_rows_have_their_own_notebook(released, notebook):
    choice = re.search(r"notebook=\$\(.*?\) &&", STAGES["curation"]["cmd"])[0]
    command = choice.replace("${curation.released}", released) + " echo $notebook"
    assert subprocess.run(["sh", "-c", command], capture_output=True, text=True).stdout.strip() == notebook


@pytest.mark.parametrize("stage", [name for name in NOTEBOOKS if name != "report"])
def test_stage_depends_on_all_code_that_makes_its_results(stage):
    """The imports of the notebook, and theirs in turn."""
    notebooks = [ROOT / name for name in STAGES[stage]["deps"] if name.startswith("notebooks/")]
    assert all(notebook.stem in STAGES[stage]["cmd"] for notebook in notebooks)
    cells = [cell for notebook in notebooks for cell in nbformat.read(notebook, as_version=4).cells]
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    todo, used = imported(ast.parse(code)), set()
    while todo:
        used.add(name := todo.pop())
        inner = name not in SHOWN and not name.startswith("study/") or (name, stage) == ("data/rows", "data")
        if inner and f"{name}.py" in TREES:
            todo |= imported(TREES[f"{name}.py"]) - used
    deps = [name.removeprefix("src/awares/") for name in STAGES[stage]["deps"]]
    made_by = {f"{name}.py" for name in used - SHOWN if not name.startswith("study/")} & {*TREES}
    assert {name for name in made_by if not any(name == dep or name.startswith(f"{dep}/") for dep in deps)} == set()
    assert ("study" in deps) == (stage in SUMMARIES)


def test_what_a_variant_depends_on_is_named_key_by_key():
    """One more row under the operating curve must not run every variant again."""
    for name, stage in STAGES.items():
        if name.startswith("evaluation") or name in ("systems", "latency", "unseen"):
            assert not {"evaluation", "evaluation.dial_biases", "profiles.${profile}.evaluation"} & {*stage["params"]}
    both = {*STAGES["evaluation"]["params"], *STAGES["operating_curve"]["params"]}
    tracked = {key for key in both if key.startswith("evaluation.")}
    drawn = {"unseen_seed", "study_rows", "shift_seed", "graded_rows", "shifted_rows", "evidence_px"}  # by other stages
    assert tracked == {f"evaluation.{key}" for key in {*PARAMS["evaluation"]} - drawn}
    profile = {key.rsplit(".", 1)[1] for key in both if ".evaluation." in key}
    assert profile == set(PARAMS["profiles"]["mini"]["evaluation"])


STAND_IN = r"""#!/bin/sh
# papermill, or python -m awares.study.publish: writes what the stage writes, and notes that it ran.
beta=$(sed -n 's/^  beta: \([0-9.]*\).*/\1/p' params.yaml)
if test "$1" = -m; then
  paths=$(sed -n "s|^${4:-report} ||p" "$(dirname "$0")/published.txt" | sed "s|\${profile}|$3|g")
else
  run=$(dirname "$2")
  echo "$run" >> ran.txt
  paths=$(for name in FILES; do echo "$run/$name"; done)
fi
for path in $paths; do
  case $path in
    *.json) text='{"value": 1}' ;;
    *) text="step,reward,call_rate,kl,loss\n0,$beta,1,1,1" ;;
  esac
  case ${path##*/} in *.*) ;; *) path=$path/file ;; esac
  mkdir -p "${path%/*}" && printf "$text\n" > "$path"
done
"""
FILES = "train validation evaluation adapter merged trajectories tables metrics.json curves.csv notebook.ipynb"
OUTS = [(name, out) for name, stage in STAGES.items() for out in stage["outs"] if isinstance(out, dict)]
PUBLISHED = [f"{name} {next(iter(out))}\n" for name, out in OUTS]
FEW = {  # a few variants and systems represent all
    r"  curation: \[[^]]*\]": "  curation: [labels_anls]",
    r"  sft: \[[^]]*\]": "  sft: [weight_1]",
    r"  grpo: \[[^]]*\]": "  grpo: [beta_0, miss_cost_4]",
    r"  systems: \[visionthink[^]]*\]": "  systems: [visionthink]",
    r"  beyond: \[[^]]*\]": "  beyond: [exact]",
    r"  plus: \[[^]]*\]": "  plus: [plus_margin]",
    r"  systems: \[visionzip_50[^]]*\]": "  systems: [visionzip_50, oracle_crop]",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git and DVC repository with the real dvc.yaml and params.yaml, empty code and notebooks, and stand-ins."""
    folder = tmp_path_factory.mktemp("pipeline") / "repository"
    for name in {"dvc.yaml", ".dvcignore", *(name for stage in STAGES.values() for name in stage["deps"])}:
        if "${" not in name and not name.startswith(("runs/", "reports/")):
            file = folder / name if Path(name).suffix or name == ".dvcignore" else folder / name / "file"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text((ROOT / name).read_text() if name in ("dvc.yaml", ".dvcignore") else "")
    text = (ROOT / "params.yaml").read_text()
    for written, few in FEW.items():
        text, count = re.subn(written, few, text)
        assert count == 1, written
    (folder / "params.yaml").write_text(text)
    (folder / ".gitignore").write_text("/runs/\nran.txt\n")
    (folder.parent / "bin").mkdir()
    (folder.parent / "bin" / "published.txt").write_text("".join(PUBLISHED))
    for name in ("papermill", "python"):
        (folder.parent / "bin" / name).write_text(STAND_IN.replace("FILES", FILES))
        (folder.parent / "bin" / name).chmod(0o700)
    for line in ("git init -q", "git config user.email test@example.org", "git config user.name test", "dvc init -q"):
        call(folder, *line.split())
    call(folder, "dvc", "repro", "report")
    commit(folder, "first run")
    return folder


def call(folder, *command):
    """Run a command in ``folder`` with the stand-ins first on PATH; returns its output."""
    path = os.pathsep.join([str(folder.parent / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    program = [sys.executable, "-m", "dvc", *command[1:]] if command[0] == "dvc" else list(command)
    settings = {"PATH": path, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder.parent / "site")}
    done = subprocess.run(program, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commit(folder, message):
    call(folder, "git", "add", "-A")
    call(folder, "git", "commit", "-qm", message, "--allow-empty")


def reproduce(folder, *targets):
    """Run dvc repro; returns the runs whose commands were executed."""
    log = folder / "ran.txt"
    log.unlink(missing_ok=True)
    call(folder, "dvc", "repro", *(targets or ("report",)))
    return [line.removeprefix("runs/") for line in log.read_text().splitlines()] if log.exists() else []


def edit(folder, before, after):
    text = (folder / "params.yaml").read_text()
    assert before in text
    (folder / "params.yaml").write_text(text.replace(before, after, 1))


def test_grpos_parameter_and_code_rerun_nothing_before_it_and_results_return_from_the_cache(repository):
    assert reproduce(repository) == []
    edit(repository, "  beta: 0.05", "  beta: 0.0")
    after = [f"mini/{stage}/main-s1" for stage in ("grpo", "evaluation", "operating_curve")]
    assert reproduce(repository) == [*after, "mini/report"]
    diff = json.loads(call(repository, "dvc", "params", "diff", "--json"))
    assert diff["params.yaml"]["grpo.beta"].items() >= {"old": 0.05, "new": 0.0}.items()
    edit(repository, "  beta: 0.0", "  beta: 0.05")
    assert reproduce(repository) in ([], ["mini/report"])  # the report is published again, nothing expensive runs
    (repository / "src/awares/method/grpo.py").write_text("# edited\n")
    assert reproduce(repository)[0] == "mini/grpo/main-s1"
    (repository / "src/awares/method/grpo.py").unlink()


def test_profiles_do_not_disturb_each_other(repository):
    edit(repository, "train_rows: 10000", "train_rows: 9000")
    assert reproduce(repository) == []
    edit(repository, "profile: mini", "profile: paper")
    assert reproduce(repository)[0] == "paper/data/main"
    edit(repository, "profile: paper", "profile: mini")
    assert reproduce(repository) == []
    locked = yaml.safe_load((repository / "dvc.lock").read_text())["stages"]
    assert {"data@mini", "data@paper", "report@mini", "report@paper"} <= {*locked}


def test_seeds_share_everything_before_training_and_latency_runs_alone(repository):
    ran = reproduce(repository, "seeds")
    trained = [f"mini/{stage}/main-s{seed}" for stage in ("sft", "grpo", "evaluation") for seed in range(2, 7)]
    assert sorted(ran) == sorted([*trained, *(f"mini/unseen/main-s{seed}-e204" for seed in range(1, 7)), "mini/seeds"])
    assert reproduce(repository, "latency") == ["mini/latency/main-s1"]
    assert (repository / "reports/mini/latency").is_dir()
    assert reproduce(repository, "seeds", "latency", "report") == []


def test_an_ablation_repeats_only_what_it_changes(repository):
    lists = yaml.safe_load((repository / "params.yaml").read_text())["ablations"]
    labels, sft, grpo, systems, plus = (lists[name] for name in ("curation", "sft", "grpo", "systems", "plus"))
    wanted = {f"mini/curation/{name}" for name in (*labels, *systems, *plus)}
    wanted |= {f"mini/sft/{name}-s1" for name in (*labels, *sft, *systems, *plus)}
    wanted |= {f"mini/grpo/{name}-s1" for name in (*grpo, *systems, *plus)}
    wanted |= {f"mini/evaluation/{name}-s1" for name in (*labels, *sft, *grpo, *systems, *plus)}
    wanted |= {f"mini/{stage}/exact-s{seed}" for stage in ("grpo", "evaluation") for seed in (1, 2, 3)}  # `beyond`
    assert set(reproduce(repository, "ablations")) == wanted | {"mini/ablations"}
    assert reproduce(repository, "plus") == ["mini/plus"]
    for stage in ("data", "curation", "sft", "grpo", "evaluation"):  # work in progress is no output
        (repository / f"runs/mini/{stage}/.checkpoints/key").mkdir(parents=True)
        (repository / f"runs/mini/{stage}/.checkpoints/key/inputs.json").write_text("{}")
    edit(repository, "miss_cost_4: {grpo.alpha_miss: 4.0}", "miss_cost_4: {grpo.alpha_miss: 5.0}")
    mine = "  beta_0: {grpo.beta: 0.0}\n  beta_1: {grpo.beta: 1.0}"  # the user's own: its values and its name
    edit(repository, "  beta_0: {grpo.beta: 0.0}", mine)
    edit(repository, "[beta_0, miss_cost_4]", "[beta_0, miss_cost_4, beta_1]")
    again = {f"mini/{stage}/{name}-s1" for stage in ("grpo", "evaluation") for name in ("miss_cost_4", "beta_1")}
    assert set(reproduce(repository, "ablations", "report")) == again | {"mini/ablations"}


def test_the_comparison_runs_every_system_once(repository):
    ran = reproduce(repository, "comparison")
    assert ran == ["mini/systems/visionzip_50", "mini/systems/oracle_crop", "mini/comparison"]  # nothing is timed again
    assert (repository / "reports/mini/comparison").is_dir()
    (repository / "src/awares/baselines/systems").mkdir()
    (repository / "src/awares/baselines/systems/mine.py").write_text("# a system of the user's own\n")
    edit(repository, "  own: []", "  own: [mine]")
    assert reproduce(repository, "comparison") == ["mini/systems/mine", "mini/comparison"]
    assert reproduce(repository, "comparison", "report") == []


def test_a_second_clone_pulls_what_the_first_pushed(repository):
    remote, clone = repository.parent / "remote", repository.parent / "clone"
    call(repository, "dvc", "remote", "add", "-d", "local", str(remote))
    commit(repository, "remote, and everything that ran")
    call(repository, "dvc", "push", "-q")
    call(repository, "git", "clone", "-q", str(repository), str(clone))
    call(clone, "dvc", "pull", "-q", "--allow-missing")  # missing: what was never run
    for name in ("grpo/main-s1/merged/file", "sft/weight_1-s1/merged/file", "unseen/main-s3-e204/tables/file"):
        assert (clone / "runs/mini" / name).read_text() == (repository / "runs/mini" / name).read_text()
    assert reproduce(clone, "report", "ablations", "seeds", "comparison") == []
