"""What is committed is clean (no machine's paths, no registry, no large file), and the guides name what exists."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
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


def parameter_keys(node: Any, prefix: str = "") -> set[str]:
    """Dotted keys of params.yaml, inner ones included."""
    if not isinstance(node, dict):
        return set()
    names = {f"{prefix}{name}": value for name, value in node.items()}
    return set(names).union(*(parameter_keys(value, f"{name}.") for name, value in names.items()))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_guide_names_only_paths_that_exist(guide: Path) -> None:
    text = guide.read_text()
    words = [word.strip("\"'(),;:") for span in code_spans(text) for word in span.split()]
    paths = {word.partition(":")[0] for word in words if PATH_LIKE.fullmatch(word.partition(":")[0])}
    assert [path for path in paths if not any(ROOT.glob(path.removesuffix("/")))] == []
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (guide.parent / link).exists()] == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_guide_names_only_commands_that_exist(guide: Path) -> None:
    """`make` targets, `dvc repro` stages, `-S` keys and `python -m awares.x` modules."""
    text, library = "\n".join(code_spans(guide.read_text())), ROOT / "src" / "awares"
    targets = set(re.findall(r"^([a-z]\w*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?<![\w/-])make ([a-z]\w*)", text)) <= targets
    runs = re.findall(r"dvc (?:repro|exp run)((?: +[^\s#&|;]+)*)", text)
    named = [word for run in runs for word in re.sub(r"(?:-S|--set-param|-n|--name) +\S+", "", run).split()]
    stages = {word.partition("@")[0] for word in named if not word.startswith("-")}
    assert stages <= set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    keys = set(re.findall(r"(?:-S|--set-param) +[\"']?(?:[\w.]+:)?([\w.]+)=", text))
    assert keys <= parameter_keys(yaml.safe_load((ROOT / "params.yaml").read_text()))
    modules = {".".join(path.relative_to(library).with_suffix("").parts) for path in library.rglob("*.py")}
    assert set(re.findall(r"python -m awares\.([\w.]+)", text)) <= modules
