"""What is committed is clean (no outputs, no machine's paths, no registry), and the README speaks of what exists."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
GUIDES = (README, ROOT / "src" / "awares" / "README.md", ROOT / "data" / "launch" / "README.md")
# Written with classes and groups so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:(?:work|root|farm)/|(?:home|Users)/\w|(?:var/)?tmp/[a-z])")
REGISTRY = re.compile(
    r"index[-]url|registry[=]|files[.]pythonhosted|pypi[.]org|://[a-z0-9.-]*(?:mirror|proxy)[.:/]", re.I
)
# Embedded pictures are letters and slashes at random.
BASE64 = re.compile(r"[A-Za-z0-9+/=]{200,}")
# First names of paths that the checkout holds; what a run makes (runs/) is not promised by it.
PATH_LIKE = re.compile(
    r"(?:notebooks|src|tests|data|reports|\.ci|\.dvc)/[\w./*-]*|[\w.-]+\.(?:md|toml|yml|yaml|cff|lock)|Makefile|LICENSE"
)


def tracked() -> list[Path]:
    """Files that git tracks or would add; a source archive without git has nothing to check."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


TRACKED = tracked()
needs_git = pytest.mark.skipif(not TRACKED, reason="not a git checkout")


def leaks(text: str) -> list[str]:
    """Paths of one machine and addresses of package registries in a text."""
    plain = BASE64.sub("", text)
    return [match.group() for pattern in (MACHINE_PATH, REGISTRY) for match in pattern.finditer(plain)]


def read_text(path: Path) -> str | None:
    """The text of a file, None for a binary one."""
    content = path.read_bytes()
    return None if b"\0" in content[:8192] else content.decode("utf-8", errors="replace")


def notebook_faults(notebook: dict[str, Any]) -> list[str]:
    """What a source notebook must not carry: results, counts, traces of a run, the kernel of one machine."""
    faults = []
    for number, cell in enumerate(notebook["cells"]):
        if cell.get("outputs") or cell.get("execution_count") is not None:
            faults.append(f"cell {number} has outputs or an execution count")
        if {"execution", "papermill"} & set(cell["metadata"]):
            faults.append(f"cell {number} has metadata of a run")
    if "papermill" in notebook["metadata"]:
        faults.append("metadata of a papermill run")
    kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3":
        faults.append(f"kernel {kernel!r}, not 'python3', which every environment has")
    return faults


def code_spans(markdown: str) -> list[str]:
    """Inline code, and the lines of fenced blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL))
    return inline + [line for block in fenced for line in block.splitlines()]


def missing_paths(markdown: str, root: Path = ROOT, folder: str = ".") -> list[str]:
    """Paths in code spans, and links relative to the page's ``folder``, that the checkout does not have."""
    words = [word.strip("\"'(),;:") for span in code_spans(markdown) for word in span.split()]
    paths = [word.partition(":")[0] for word in words if PATH_LIKE.fullmatch(word.partition(":")[0])]
    paths += [f"{folder}/{link}" for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", markdown)]
    paths = [Path(path).as_posix() for path in paths]
    return sorted({path for path in paths if not ((root / path).exists() or any(root.glob(path)))})


def unknown_commands(markdown: str, targets: set[str], stages: set[str], keys: set[str]) -> list[str]:
    """`make` targets, `dvc repro` stages, `-S` keys and `python -m awares.x` modules that do not exist."""
    text = "\n".join(code_spans(markdown))
    library = ROOT / "src" / "awares"
    modules = {".".join(path.relative_to(library).with_suffix("").parts) for path in library.rglob("*.py")}
    wanted = [("make", re.findall(r"(?<![\w/-])make ([a-z]\w*)", text), targets)]
    runs = re.findall(r"dvc (?:repro|exp run)((?: +[^\s#&|;]+)*)", text)
    named = [word for run in runs for word in re.sub(r"(?:-S|--set-param|-n|--name) +\S+", "", run).split()]
    wanted.append(("dvc stage", [word.partition("@")[0] for word in named if not word.startswith("-")], stages))
    wanted.append(("parameter", re.findall(r"(?:-S|--set-param) +[\"']?(?:[\w.]+:)?([\w.]+)=", text), keys))
    wanted.append(("module awares.", re.findall(r"python -m awares\.([\w.]+)", text), modules))
    return [f"{kind} {name}" for kind, names, known in wanted for name in names if name not in known]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]\w*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def dvc_stages() -> set[str]:
    pipeline = ROOT / "dvc.yaml"
    return set(yaml.safe_load(pipeline.read_text())["stages"]) if pipeline.is_file() else set()


def parameter_keys(node: Any, prefix: str = "") -> set[str]:
    """Dotted keys of params.yaml, inner ones included."""
    if not isinstance(node, dict):
        return set()
    names = {f"{prefix}{name}": value for name, value in node.items()}
    return set(names).union(*(parameter_keys(value, f"{name}.") for name, value in names.items()))


@needs_git
def test_no_machine_path_and_no_registry_in_tracked_files() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): faults[:3]
        for path in TRACKED
        if (text := read_text(path)) is not None and (faults := leaks(text))
    }
    assert not found, f"a path of one machine or the address of a package registry: {found}"


@needs_git
def test_no_tracked_file_is_too_large() -> None:
    large = [path.relative_to(ROOT).as_posix() for path in TRACKED if path.stat().st_size > 25 * 2**20]
    assert not large, f"over 25 MiB: {large}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.name)
def test_source_notebooks_are_stripped(path: Path) -> None:
    assert not notebook_faults(json.loads(path.read_text())), f"{path.name}: make format strips it"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_guide_names_only_paths_and_commands_that_exist(guide: Path) -> None:
    assert not missing_paths(guide.read_text(), folder=guide.parent.relative_to(ROOT).as_posix())
    parameters = parameter_keys(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert not unknown_commands(guide.read_text(), make_targets(), dvc_stages(), parameters)


def test_readme_gives_the_two_commands() -> None:
    spans = code_spans(README.read_text())
    assert {"make repro", "make test"} <= {span.partition("#")[0].strip() for span in spans}


def test_the_checks_bite(tmp_path: Path) -> None:
    for folder in ("work", "root", "farm", "tmp", "var/tmp", "home/someone", "Users/someone"):
        assert leaks(f"see '/{folder}/main/x.py'") and not leaks(f"see runs/{folder}/main/x.py")
    for text in ("--extra-index" + "-url x", "https://pypi" + ".org/simple", "https://some" + "-mirror.example/simple"):
        assert leaks(text)
    assert not leaks("src=data:image/png;base64," + "A" * 300 + "/tmp" + "/a" + "A" * 300)
    assert not leaks("https://example.org/abs/paper, a://b")
    cell: dict[str, Any] = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    clean: dict[str, Any] = {"cells": [cell], "metadata": {"kernelspec": {"name": "python3"}}}
    assert not notebook_faults(clean)
    changes: list[dict[str, Any]] = [{"outputs": [{}]}, {"execution_count": 1}, {"metadata": {"papermill": {}}}]
    for change in changes:
        assert notebook_faults({**clean, "cells": [{**cell, **change}]})
    assert notebook_faults({**clean, "metadata": {"kernelspec": {"name": "conda-env-x-py"}}})
    (tmp_path / "data").mkdir()
    assert missing_paths("`data/*`", tmp_path) == ["data/*"]
    assert not missing_paths("`data/` and `runs/x`, [site](https://example.org)", tmp_path)
    text = "`src/a.py:f`, [b](docs/b.md)\n```bash\ncat reports/c.csv  # c\n```\n"
    assert missing_paths(text, tmp_path) == ["docs/b.md", "reports/c.csv", "src/a.py"]
    known = ({"repro"}, {"sft"}, {"grpo.beta"})
    good = "`make repro`, make sure\n```\ndvc repro -f sft@mini\ndvc exp run -n a -S grpo.beta=0 sft\n```\n"
    assert unknown_commands(good, *known) == []
    bad = "`make all`\n```\ndvc repro nothing\ndvc exp run -S 'grpo.gamma=0'\npython -m awares.nothing\n```\n"
    assert unknown_commands(bad, *known) == [
        "make all",
        "dvc stage nothing",
        "parameter grpo.gamma",
        "module awares. nothing",
    ]
