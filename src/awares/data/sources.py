"""Real datasets: the declarations in data/sources.yaml, opening them, and converting published rows to ours.

The YAML maps columns. A reader here does what a column mapping cannot express. `sampling` draws the rows.
"""

import copy
import hashlib
import io
import itertools
import logging
import re
import zipfile
import zlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from pydantic import BaseModel

from awares.config import Params, read_yaml
from awares.engine.images import MAX_ASPECT, MIN_SIDE, as_png, cap, check_size, is_plain, join_strip, open_image
from awares.engine.jsonl import Record
from awares.errors import AwaresFileError, AwaresValueError, validated
from awares.method.protocol import check_question

NAMED_BY = {"training": "data.sources", "evaluation": "data.tasks", "curated": "curation.released"}
NOT_FOUND = RepositoryNotFoundError, RevisionNotFoundError, FileNotFoundError
ARCHIVE_BLOCK = 2**18  # bytes that a read from an archive on the hub fetches at least; fsspec's default is 5 MB
HASHED_EDGE = 2**16  # bytes at both ends of a local file that are hashed: tables and archives keep their indices there


class Source(BaseModel, extra="forbid", strict=True, frozen=True):
    """One entry of the sources file, whose head explains the keys. ``place``: file and key, for messages."""

    name: str
    kind: str
    place: str
    hub: str
    revision: str
    config: str
    split: str
    streaming: bool
    reader: Literal["plain", "votes", "options", "conversation", "trajectory"]
    columns: dict[str, str]
    suffix: str
    licence: str
    homepage: str
    rows: int
    archive: str = ""
    skip: list[int] = []
    fallback: dict[str, str] = {}

    def row_id(self, index: int) -> str:
        """Id of the published row ``index``, which does not depend on the draw."""
        return f"{self.name}-{self.split}-{index:06d}"


def read_sources(params: Params, kind: str) -> dict[str, Source]:
    """The sources of ``kind`` (a key of NAMED_BY) in ``data.sources_file``; AwaresError naming file and key."""
    file = params.path(params.data.sources_file)
    head, declared = f"{file.name}: {kind}", read_yaml(file, "data.sources_file").get(kind)
    given = validated(dict[str, dict[str, Any]], declared, head)
    places = {name: {"name": name, "kind": kind, "place": f"{head}.{name}"} for name in given}
    return {name: validated(Source, given[name] | own, own["place"]) for name, own in places.items()}


def get_source(params: Params, kind: str, name: str) -> Source:
    """One source of :func:`read_sources`; AwaresError that lists the known ones for an unknown name."""
    if name not in (known := read_sources(params, kind)):
        fault = f"{name!r} is not declared in {params.data.sources_file}, which has {', '.join(known)}"
        raise AwaresValueError(f"{NAMED_BY[kind]}: {fault}")
    return known[name]


def open_source(params: Params, kind: str, name: str, check: bool = True) -> "OpenSource":
    """Open a declared source; ``check``: also read its first row, so that faults are found before hours of work."""
    root = params.path(params.data.hub_root) if params.data.hub_root else None
    opened = OpenSource(get_source(params, kind, name), root)
    if check:
        opened.check()
    return opened


class Draft(NamedTuple):
    """A published row in our terms. ``pictures``: as a reader finds them, then the contents of their files."""

    pictures: list[Any]
    question: str
    answers: list[Any]
    call: str = ""  # first turn of a released trajectory


class OpenSource:
    """A source to read by position, in ascending order if it streams; AwaresError if it is not available.

    ``source.hub`` is the first of its places that exists. ``commit``: that of the revision, or a digest of the files of
    a local copy. Nothing is downloaded before a row is read.
    """

    def __init__(self, source: Source, hub_root: Path | None) -> None:
        missing = []
        for hub, revision in {source.hub: source.revision, **source.fallback}.items():
            self.source = source.model_copy(update={"hub": hub, "revision": revision})
            self.local = hub_root / hub if hub_root else None
            try:
                commit = None if self.local else HfApi().dataset_info(hub, revision=revision).sha
                self.commit = _digest(self.local) if self.local else str(commit)
                break
            except NOT_FOUND as error:
                missing.append(self._unavailable(error))
            except Exception as error:  # the hub's client raises many types
                raise self._unavailable(error) from error
        else:
            raise missing[0]
        if missing:
            read = f"reading {self.source.hub}, because {source.hub} was not found"
            logging.getLogger(__name__).warning(f"{source.place}: {read}")
        self._stream: Any = None
        self._position = 0
        self._zip: zipfile.ZipFile | None = None

    @cached_property
    def rows(self) -> Any:
        """As `_open` gives them; a table that does not stream is downloaded."""
        return self._open(self.source.streaming)

    def check(self) -> None:
        """Read the first row without downloading a table, and its pictures; AwaresError for a wrong declaration."""
        first, other = next(index for index in itertools.count() if index not in self.source.skip), copy.copy(self)
        other.rows = self._open(streaming=True)
        try:
            for file in draft.pictures if (draft := other.draft(first)) else ():
                open_image(file, "the image", min_side=1)
        except AwaresValueError as error:
            raise AwaresValueError(f"{self.source.place}, row {first}: {error}") from error

    def count(self) -> int:
        """The number of rows: of the table, else of the dataset card, else by reading the whole stream."""
        if isinstance(self.rows, datasets.Dataset):
            return len(self.rows)
        card = (self.rows.info.splits or {}).get(self.source.split)
        return int(card.num_examples) if card and card.num_examples else sum(1 for _ in self.rows)

    def draft(self, index: int) -> Draft | None:
        """The published row ``index``; None without question, answer or image. AwaresValueError if unreadable."""
        row = self.rows[index].to_pylist()[0] if isinstance(self.rows, datasets.Dataset) else self._streamed(index)
        source = self.source
        if missing := [column for column in source.columns.values() if column not in row]:
            found = f"{source.hub} has no column {', '.join(missing)}, but {', '.join(row)}"
            raise AwaresFileError(f"{source.place}.columns: {found}: correct the mapping or pin an older revision")
        try:
            columns = {ours: row[theirs] for ours, theirs in source.columns.items()}
            draft = READERS[source.reader](columns, source.row_id(index))
        except (TypeError, KeyError, AttributeError) as error:
            raise AwaresValueError(f"the reader {source.reader} cannot read it, check columns ({error!r})") from error
        question = str(draft.question or "").replace("<image>", "").strip()
        answers = [str(answer).strip() for answer in draft.answers if answer is not None and str(answer).strip()]
        if not question or not answers or not draft.pictures or None in draft.pictures:
            return None
        check_question(question)
        files = [self._file(picture) for picture in draft.pictures]
        return Draft(files, question + source.suffix, list(dict.fromkeys(answers)), draft.call)

    def _file(self, picture: Any) -> bytes:
        """The file of a published picture: bytes, a member of the archive, or a local file."""
        if isinstance(picture, list) and len(picture) == 1:
            [picture] = picture
        if isinstance(picture, list):
            raise AwaresValueError(f"{len(picture)} pictures in the image column: use the reader `conversation`")
        if not isinstance(picture, dict):
            picture = {"bytes": picture} if isinstance(picture, bytes) else {"path": picture}
        if content := picture.get("bytes"):
            return bytes(content)
        if (path := picture.get("path")) and self.source.archive:
            return self._member(path)
        if path and Path(path).is_file():
            return Path(path).read_bytes()
        raise AwaresValueError("the image is missing: neither bytes nor a file")

    def _member(self, name: str) -> bytes:
        """A file of the archive. Over the network its bytes and at most ARCHIVE_BLOCK more are fetched."""
        archive = self.source.archive
        if self._zip is None:
            path = f"{self.local or f'datasets/{self.source.hub}@{self.commit}'}/{archive}"
            try:
                file: Any = path if self.local else HfFileSystem().open(path, "rb", block_size=ARCHIVE_BLOCK)
                self._zip = zipfile.ZipFile(file)
            except (OSError, zipfile.BadZipFile) as error:
                raise AwaresFileError(f"{self.source.place}.archive: cannot open {path} ({error})") from error
        try:
            return self._zip.read(name)
        except (KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise AwaresValueError(f"{archive} does not hold {name}, or only a corrupt one ({error})") from error

    def _open(self, streaming: bool) -> Any:
        """A Dataset that gives Arrow tables, or an IterableDataset; both with undecoded images."""
        source, folder = self.source, self.local
        place: dict[str, Any] = {"path": source.hub, "revision": self.commit}
        if folder:  # the library's cache distinguishes local folders by name only, ours by content
            cache = Path(datasets.config.HF_DATASETS_CACHE) / self.commit.replace(":", "-")
            place = {"path": str(folder), "cache_dir": str(cache)}
        try:
            if folder and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                saved = datasets.load_from_disk(str(folder))  # published by save_to_disk
                return (saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved).with_format("arrow")
            rows = datasets.load_dataset(**place, name=source.config, split=source.split, streaming=streaming)
        except Exception as error:
            raise self._unavailable(error) from error
        return rows.decode(False) if streaming else rows.with_format("arrow")

    def _unavailable(self, error: Exception) -> AwaresFileError:
        source, folder = self.source, self.local
        if folder and not folder.is_dir():
            fix = f'run `hf download {source.hub} --repo-type dataset --local-dir {folder}`, or set data.hub_root to ""'
        else:
            page = f"https://huggingface.co/datasets/{source.hub}"
            fix = f"correct config and split; or accept its terms at {page}, set HF_TOKEN; or set data.hub_root"
        others = "".join(f", nor {name}" for name in source.fallback if name != source.hub)
        what = f"{source.hub}{others}, config {source.config}, split {source.split}, revision {source.revision}"
        reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
        return AwaresFileError(f"{source.place}: cannot open {what} ({reason}): {fix}")

    def _streamed(self, index: int) -> Record:
        place = f"{self.source.place}: {self.source.hub}"
        if self._stream is None or index < self._position:
            self._stream, self._position = iter(self.rows.skip(index)), index
        try:
            row = next(itertools.islice(self._stream, index - self._position, None), None)
        except Exception as error:  # the network or a corrupt file; rows read before are kept
            raise AwaresFileError(f"{place}: cannot read row {index} ({error}): run again to continue") from error
        if row is None:
            raise AwaresFileError(f"{place} has no row {index}, which its dataset card promises")
        self._position = index + 1
        return row


def _digest(folder: Path) -> str:
    """Digest of every file's name, size and both ends."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(HASHED_EDGE))
            file.seek(max(0, size - HASHED_EDGE))
            digest.update(file.read())
    return f"local:{digest.hexdigest()[:16]}"


def _plain(row: Record, row_id: str) -> Draft:
    """Image, question, and one or several equivalent answers; the first one is canonical."""
    answers = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
    return Draft([row["image"]], row["question"], answers)


def _votes(row: Record, row_id: str) -> Draft:
    """TextVQA: answers of ten people. The most frequent is canonical; on a tie the earliest."""
    given = Counter(answer.strip() for answer in row["answers"] if (answer or "").strip())
    return Draft([row["image"]], row["question"], [answer for answer, _ in given.most_common()])


def _options(row: Record, row_id: str) -> Draft:
    """V*Bench: "... (A) red (B) blue" becomes the question and one line "A. red" per option, as in lmms-eval."""
    head, *options = re.split(r"\s*\([A-D]\)\s*", row["question"] or "")
    lines = [f"{letter}. {text.strip()}" for letter, text in zip("ABCD", options, strict=False)]
    return Draft([row["image"]], "\n".join([head.strip(), *lines]), [row["answers"]])


def _conversation(row: Record, row_id: str) -> Draft:
    """LLaVA-Multi (Mantis): one of the questions of a conversation about several pictures, drawn by a hash of the id.

    Its pictures become a strip from left to right, so "the left image" stays true. If each picture has a placeholder in
    front of the questions about it, only the picture of the drawn question is taken.
    """
    turns = [(turn["role"], turn["content"] or "") for turn in row["conversation"]]
    pairs = [(text, turns[at + 1][1]) for at, (role, text) in enumerate(turns[:-1]) if role == "user"]
    pictures = row["images"]
    if not pairs or not pictures:
        return NOTHING
    drawn = int(hashlib.sha256(row_id.encode()).hexdigest(), 16) % len(pairs)
    placeholders = [text.count("<image>") for text, _ in pairs]
    if sum(count > 0 for count in placeholders) > 1:
        latest = min(sum(placeholders[: drawn + 1]), len(pictures))
        pictures = [pictures[max(0, latest - 1)]]
    return Draft(pictures, pairs[drawn][0], [pairs[drawn][1]])


def _trajectory(row: Record, row_id: str) -> Draft:
    """The released AwaRes dataset, in an assumed schema: [system,] question, [call, crops,] answer; the image first."""
    turns = []
    for role, content in ((turn["role"], turn["content"]) for turn in row["messages"] if turn["role"] != "system"):
        text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or [])
        turns.append((role, text))
    replies = [text for role, text in turns if role == "assistant"]
    if not replies or turns[0][0] != "user":
        return NOTHING
    return Draft(row["images"][:1], turns[0][1], [replies[-1]], replies[0] if len(replies) > 1 else "")


NOTHING = Draft([], "", [])  # a row without a question about an image
# Readers, one per published format: (row under our column names, its id) -> Draft
READERS = {one.__name__[1:]: one for one in (_plain, _votes, _options, _conversation, _trajectory)}


def fit_image(files: list[bytes], max_side: int) -> tuple[bytes, list[Image.Image]]:
    """The file of a row's image, and its RGB picture, before the parts if it is a strip of several ``files``.

    No side is above ``max_side`` px (PAPER §1) or below one visual token: small pictures (OCRBench has 25 x 16 px) are
    enlarged. A file that fits and that `datasets` reads as we do is kept byte for byte; others are encoded again.
    """
    parts = [open_image(file, "the image", min_side=1) for file in files]
    image = parts[0] if len(parts) == 1 else join_strip(parts)
    if min(image.size) < MIN_SIDE and max(image.size) <= MAX_ASPECT * min(image.size):
        factor = MIN_SIDE / min(image.size)
        size = (max(MIN_SIDE, round(image.width * factor)), max(MIN_SIDE, round(image.height * factor)))
        picture = image.resize(size, Image.Resampling.BICUBIC)
    else:
        check_size(image.size, "image")
        picture = cap(image, max_side)
    shown = [picture, *(parts if len(parts) > 1 else ())]
    if len(parts) == 1 and picture.size == image.size and is_plain(files[0]):
        return files[0], shown
    if len(parts) > 1 or not files[0].startswith(b"\xff\xd8"):
        return as_png(picture, compress_level=3), shown
    picture.save(buffer := io.BytesIO(), "JPEG", quality=95)
    return buffer.getvalue(), shown
