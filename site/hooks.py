"""mkdocs hooks: pages from the repository's Markdown files and from the notebooks that a run has published.

PROFILE=paper builds the site of another profile. A page keeps its path in the repository, so that links need no change;
a notebook's page is notebooks/NAME.md. A linked file is copied. A link to what is not published becomes plain text.
"""

import base64
import html
import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PROFILE = os.environ.get("PROFILE", "mini")
EXPLORED = ROOT / "reports" / PROFILE / "explorer" / "rows.js"
LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)#\s:]+)(#[^)\s]*)?\)")


def sources() -> dict[str, Path]:
    """Address of each page -> the Markdown file or notebook that it is made from."""
    listed = re.findall(r": (\S+\.md)$", (ROOT / "site/mkdocs.yml").read_text(), re.MULTILINE)
    found = {name: ROOT / name for name in listed if (ROOT / name).is_file()}
    if EXPLORED.is_file():
        found["explorer.md"] = ROOT / "site/explorer.md"
    for file in sorted((ROOT / "reports" / PROFILE).glob("**/notebooks/*.ipynb")):
        if (name := f"notebooks/{file.stem}.md") in listed:
            found[name] = file
    return found


PAGES = sources()


def on_config(config: Any) -> Any:
    config.nav = kept(config.nav)
    return config


def kept(entry: Any) -> Any:
    """A part of the navigation, without entries that have no page."""
    if isinstance(entry, str):
        return entry if entry in PAGES else None
    if isinstance(entry, dict):
        return {title: part for title, inner in entry.items() if (part := kept(inner))}
    return [part for one in entry if (part := kept(one))]


def on_files(files: Files, config: Any) -> Files:
    copied = {"explorer/rows.js": EXPLORED.read_bytes()} if EXPLORED.is_file() else {}
    for address, source in PAGES.items():
        text = source.read_text(encoding="utf-8")
        text = from_notebook(text, address, copied) if source.suffix == ".ipynb" else linked(text, address, copied)
        files.append(File.generated(config, address, content=text))
    for address, content in copied.items():
        files.append(File.generated(config, address, content=content))
    return files


def from_notebook(text: str, address: str, copied: dict[str, bytes]) -> str:
    """A notebook as Markdown: code folded, pictures as files."""
    parts = []
    for number, cell in enumerate(json.loads(text)["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(linked(source, address, copied))
            continue
        code = f"````python\n{source}\n````"
        parts.append(f'<details class="code" markdown="1"><summary>Code</summary>\n\n{code}\n\n</details>')
        for place, output in enumerate(cell["outputs"]):
            name = f"{address.removesuffix('.md')}-{number}-{place}.png"
            parts.append(shown(output, address, name, copied))
    return "\n\n".join(parts)


def shown(output: dict[str, Any], address: str, name: str, copied: dict[str, bytes]) -> str:
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
    if "image/png" in data:
        copied[name] = base64.b64decode(data["image/png"])
        alt = html.escape(output.get("metadata", {}).get("image/png", {}).get("alt", "figure"))
        return f'<p class="figure"><img loading="lazy" alt="{alt}" src="{posixpath.basename(name)}"></p>'
    if "text/markdown" in data:
        return linked(data["text/markdown"], address, copied)
    if "text/html" in data:
        return f'<div class="output">{without_gaps(data["text/html"])}</div>'
    text = data.get("text/plain") or "".join(output.get("text", output.get("traceback", [])))
    return f'<pre class="output">{html.escape(text)}</pre>'


def without_gaps(text: str) -> str:
    """HTML that Markdown leaves alone: no empty line, no scripts."""
    return re.sub(r"\n\s*\n", "\n", re.sub(r"<script\b.*?</script>", "", text, flags=re.DOTALL))


def linked(text: str, address: str, copied: dict[str, bytes]) -> str:
    """Markdown with the links of this site: to pages, to notebooks by their names, to files that are copied."""
    folder = posixpath.dirname(address)

    def replaced(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        page = re.sub(r"^(?:.*/)?notebooks/(\w+)\.ipynb$", r"notebooks/\1.md", path)
        if page not in PAGES:
            if not (ROOT / path).is_file():
                return words[1:-1]
            copied[path], page = (ROOT / path).read_bytes(), path
        return f"{words}({posixpath.relpath(page, folder or '.')}{anchor})"

    def named(match: re.Match[str]) -> str:
        page = "explorer.md" if match[1] == "explorer" else f"notebooks/{match[1]}.md"
        there = page in PAGES and page != address
        return f"[{match[0]}]({posixpath.relpath(page, folder or '.')})" if there else match[0]

    return re.sub(r"(?<!\[)`(\d\d_\w+|report|explorer)`", named, LINK.sub(replaced, text))
