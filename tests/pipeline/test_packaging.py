"""Pins agree with what is installed, guides name what exists, and what is committed has no path of a machine."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
DIRECT = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
# What a CUDA build of torch brings: torch pins these itself, and a machine without a GPU has none of them.
TORCH_BRINGS = re.compile(r"^(nvidia|cuda|triton)(-|$)")


def test_pins_are_exact_complete_and_installed() -> None:
    """Every package that a pinned one needs is pinned, so one command installs the same packages everywhere."""
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in LINES) and len(PINS) == len(LINES)
    assert [str(one) for one in DIRECT if not one.specifier.contains(PINS[canonicalize_name(one.name)])] == []
    found = reversed([*metadata.distributions()])  # of two with one name, the first is used
    installed = {canonicalize_name(one.name): one for one in found}
    assert sys.platform != "linux" or PINS.keys() <= installed.keys()  # other systems need fewer
    for name in PINS.keys() & installed.keys():
        assert Version(installed[name].version).public == PINS[name]
        wants = map(Requirement, installed[name].requires or [])
        needed = {canonicalize_name(one.name) for one in wants if not one.marker or one.marker.evaluate({"extra": ""})}
        assert [one for one in needed - PINS.keys() if not TORCH_BRINGS.match(one)] == []


def test_environment_yml_and_the_python_versions_agree() -> None:
    lines = next(entry["pip"] for entry in ENVIRONMENT if isinstance(entry, dict))
    assert "-c constraints.txt" in lines and "-e .[dev]" in lines
    for requirement in map(Requirement, [line for line in lines if not line.startswith("-")]):
        assert str(requirement.specifier) == f"=={PINS[canonicalize_name(requirement.name)]}"
    python = next(entry for entry in ENVIRONMENT if str(entry).startswith("python")).removeprefix("python")
    checked = re.search(r"version_info < \((\d+), (\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    assert checked and PROJECT["requires-python"] == f">={'.'.join(checked.groups())}"
    assert SpecifierSet(python).contains("3.11.7") and f">={'.'.join(checked.groups())}" in python


@pytest.mark.parametrize(
    "own, expected", [({}, "500"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "a"}, "None")]
)
def test_import_is_light_and_sets_how_threads_wait(own: dict[str, str], expected: str) -> None:
    code = "import os, sys, awares; print({'torch', 'transformers'} & set(sys.modules), os.getenv('GOMP_SPINCOUNT'))"
    given: Any = {"capture_output": True, "text": True, "env": {"PYTHONPATH": str(ROOT / "src"), **own}}
    assert subprocess.run([sys.executable, "-c", code], **given).stdout.split() == ["set()", expected]


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
