"""Real datasets: what data/sources.yaml declares of each, how it is opened, and how a published row becomes one of ours.

All that a column mapping can say stands in the YAML; what it cannot say is one reader here. `sampling` draws from these.
"""

import hashlib
import io
import itertools
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image, ImageOps

from awares.config import Params, read_yaml
from awares.engine.images import MAX_ASPECT, MIN_SIDE, cap, check_image, to_rgb
from awares.errors import AwaresError, AwaresFileError, AwaresValueError
from awares.method import protocol

KINDS = ("training", "evaluation", "curated")
GAP = 28  # px of white between the pictures of a strip
EDGE = 2**16  # bytes of a local file's beginning and end that are hashed

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One entry of the sources file, as its head explains. ``place``: the file and key, for messages."""

    name: str
    kind: str
    place: str
    hub: str
    revision: str
    config: str
    split: str
    streaming: bool
    reader: str
    columns: Mapping[str, str]
    suffix: str
    licence: str
    homepage: str
    rows: int
    archive: str = ""
    skip: tuple[int, ...] = ()

    def row_id(self, index: int) -> str:
        """Name of the published row ``index``: the same whatever is drawn."""
        return f"{self.name}-{self.split}-{index:06d}"


@dataclass(frozen=True)
class Draft:
    """A published row in our terms, its image not yet capped.

    ``call``: the released trajectory's first turn. ``pictures``: those that the image was joined from, where there are several.
    """

    image: Image.Image
    encoded: bytes | None  # the published file, where the image is one as it stands
    question: str
    answers: tuple[str, ...]
    call: str = ""
    pictures: tuple[Image.Image, ...] = ()


# Declarations


def read_sources(params: Params, kind: str) -> dict[str, Source]:
    """The sources of ``kind`` (of `KINDS`) in the file ``data.sources_file``, by name; AwaresError naming file and key."""
    file = params.path(params.data.sources_file)
    raw = read_yaml(file, "data.sources_file")
    if not isinstance(raw.get(kind), dict):
        raise AwaresValueError(f"{file.name}: no section {kind}; it has {', '.join(KINDS)}")
    return {name: _declared(name, kind, f"{file.name}: {kind}.{name}", entry) for name, entry in raw[kind].items()}


def get_source(params: Params, kind: str, name: str) -> Source:
    """One source of `read_sources`; AwaresError listing the known ones for another name."""
    known = read_sources(params, kind)
    if name not in known:
        key = {"training": "data.sources", "evaluation": "data.tasks", "curated": "curation.released"}[kind]
        raise AwaresValueError(
            f"{key}: {name!r} is not declared in {params.data.sources_file}: it has {', '.join(known)}"
        )
    return known[name]


def _declared(name: str, kind: str, place: str, entry: Any) -> Source:
    if not isinstance(entry, dict):
        raise AwaresValueError(f"{place} must be a mapping, not {entry!r}")
    known = [one for one in fields(Source) if one.name not in ("name", "kind", "place")]
    for key in entry:
        if key not in {one.name for one in known}:
            raise AwaresValueError(f"{place}: unknown key {key}: known are {', '.join(one.name for one in known)}")
    missing = [one.name for one in known if one.default is MISSING and one.name not in entry]
    if missing:
        raise AwaresValueError(f"{place}: {', '.join(missing)} missing")
    for one in known:
        _check_kind(f"{place}.{one.name}", entry.get(one.name), one)
    if entry["reader"] not in READERS:
        raise AwaresValueError(f"{place}.reader: unknown {entry['reader']!r}, choose from {', '.join(READERS)}")
    wanted = set(READERS[entry["reader"]].columns)
    if set(entry["columns"]) != wanted:
        raise AwaresValueError(f"{place}.columns: reader {entry['reader']} wants {', '.join(sorted(wanted))}")
    return Source(name=name, kind=kind, place=place, **{**entry, "skip": tuple(entry.get("skip") or ())})


def _check_kind(key: str, value: Any, one: Any) -> None:
    if value is None and one.default is not MISSING:
        return
    kinds = {"streaming": bool, "rows": int, "columns": dict, "skip": list}
    kind = kinds.get(one.name, str)
    if type(value) is not kind:
        raise AwaresValueError(f"{key} must be a {kind.__name__}, not {value!r}")


# Opening


class Opened:
    """A source that is ready to be read: its rows by position, and its archive of images if it has one.

    ``commit``: what the revision stood for, or a digest of the files of a local copy. Rows come in ascending order: a
    streaming source is read front to back, once. Raises AwaresError with the mend for what cannot be had.
    """

    def __init__(self, source: Source, hub_root: Path | None) -> None:
        self.source = source
        self.local = _local(source, hub_root) if hub_root else None
        self.commit = _digest(self.local) if self.local else _resolve(source)
        self.rows = self._open()
        self._stream: Any = None
        self._position = 0
        self._stack = ExitStack()
        self._zip: zipfile.ZipFile | None = None

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Read the first row whole, so that a moved column or a missing archive shows before hours of work."""
        self.draft(self.at(self.first), self.first)

    @property
    def first(self) -> int:
        """The first position that is not to be skipped."""
        return next(index for index in itertools.count() if index not in self.source.skip)

    def count(self) -> int:
        """Published rows: from the table, else from the dataset card, else by reading the stream through once."""
        if isinstance(self.rows, datasets.Dataset):
            return len(self.rows)
        splits = self.rows.info.splits or {}
        if self.source.split in splits and splits[self.source.split].num_examples:
            return int(splits[self.source.split].num_examples)
        return sum(1 for _ in self.rows)

    def at(self, index: int) -> Record:
        """The published row at position ``index``, images undecoded; AwaresError when a column has gone."""
        row = self._fetch(index)
        missing = [column for column in self.source.columns.values() if column not in row]
        if missing:
            raise AwaresValueError(
                f"{self.source.place}.columns: {self.source.hub} has no column {', '.join(missing)} any more; it has "
                f"{', '.join(row)}. Correct the mapping or pin an older revision"
            )
        return {ours: row[theirs] for ours, theirs in self.source.columns.items()}

    def draft(self, row: Record, index: int) -> Draft | None:
        """``row`` through the source's reader; None for one that asks nothing of an image or has no answer.

        AwaresValueError for one that cannot be read.
        """
        try:
            return READERS[self.source.reader](row, self, index)
        except (TypeError, KeyError, AttributeError) as error:
            raise AwaresValueError(f"the reader {self.source.reader} cannot read it ({error!r})") from error

    def member(self, name: str) -> bytes:
        """A file of the archive. Over the hub only its own bytes travel, not the archive's."""
        if self._zip is None:
            archive = self._stack.enter_context(self._open_archive())
            try:
                self._zip = self._stack.enter_context(zipfile.ZipFile(archive))
            except zipfile.BadZipFile as error:
                raise AwaresFileError(
                    f"{self.source.place}.archive: {self.source.archive} is torn ({error})"
                ) from error
        try:
            return self._zip.read(name)
        except KeyError as error:
            raise AwaresValueError(f"{self.source.archive} holds no {name}") from error
        except (zipfile.BadZipFile, zlib.error) as error:
            raise AwaresValueError(f"{name} in {self.source.archive} is torn ({error})") from error

    def _open(self) -> datasets.Dataset | datasets.IterableDataset:
        source = self.source
        try:
            if self.local and any((self.local / name).is_file() for name in ("state.json", "dataset_dict.json")):
                saved = datasets.load_from_disk(
                    str(self.local)
                )  # a copy of a repository that was saved by save_to_disk
                rows: Any = saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
            else:
                # The library keys its cache of a local folder with a card by the folder's name alone: ours is keyed by content.
                cache = Path(datasets.config.HF_DATASETS_CACHE) / self.commit.replace(":", "-")
                here = {"path": str(self.local), "cache_dir": str(cache)}
                there = {"path": source.hub, "revision": self.commit}
                place: dict[str, Any] = here if self.local else there
                rows = datasets.load_dataset(
                    **place, name=source.config, split=source.split, streaming=source.streaming
                )
        except Exception as error:  # datasets raises many kinds; all mean that the declared thing is not there
            raise _unavailable(source, error) from error
        return rows.decode(False) if isinstance(rows, datasets.IterableDataset) else _undecoded(rows)

    def _open_archive(self) -> BinaryIO:
        source = self.source
        try:
            if self.local:
                return (self.local / source.archive).open("rb")
            path = f"datasets/{source.hub}@{self.commit}/{source.archive}"
            return cast(BinaryIO, HfFileSystem().open(path, "rb"))
        except OSError as error:
            raise AwaresFileError(
                f"{source.place}.archive: {source.archive} is not in {source.hub} ({error})"
            ) from error

    def _fetch(self, index: int) -> Record:
        if isinstance(self.rows, datasets.Dataset):
            return self.rows[index]
        if self._stream is None or index < self._position:
            self._stream, self._position = iter(self.rows.skip(index)), index
        try:
            for row in self._stream:
                self._position += 1
                if self._position > index:
                    return row
        except Exception as error:  # the network, a torn file: what was read before is kept
            raise AwaresFileError(
                f"{self.source.place}: reading {self.source.hub} broke off after row {self._position} ({error}): run again, "
                "it goes on from there"
            ) from error
        raise AwaresFileError(
            f"{self.source.place}: {self.source.hub} ends at row {self._position}, before row {index}: its dataset card promises more"
        )


def _undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    for name, feature in rows.features.items():
        raw = datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, raw)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, datasets.List(raw))
    return rows


def _local(source: Source, root: Path) -> Path:
    folder = root / source.hub
    if not folder.is_dir():
        raise AwaresFileError(
            f"{folder}: no copy of {source.hub} there; data.hub_root names the folder. Fetch it with `hf download "
            f'{source.hub} --repo-type dataset --local-dir {folder}`, or set data.hub_root to ""'
        )
    return folder


def _digest(folder: Path) -> str:
    """Of every file the name, the size, and the first and last 64 KiB, where tables and archives keep their indices."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read())
    return f"local:{digest.hexdigest()[:16]}"


def _resolve(source: Source) -> str:
    try:
        return str(HfApi().dataset_info(source.hub, revision=source.revision).sha)
    except Exception as error:  # the client raises many kinds, from no network to a private repository
        raise _unavailable(source, error) from error


def _unavailable(source: Source, error: Exception) -> AwaresError:
    """The message for a dataset that cannot be opened, with the mend that fits."""
    text = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    if isinstance(error, GatedRepoError) or "gated" in text.lower():
        mend = f"accept its terms at https://huggingface.co/datasets/{source.hub} and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError) or isinstance(error, datasets.exceptions.DatasetNotFoundError):
        mend = "correct the id, or set HF_TOKEN if it is private"
    elif "split" in text.lower() or "config" in text.lower():
        mend = "correct config and split"
    else:
        mend = "check the network, or point data.hub_root at a folder of copies"
    what = f"{source.hub}, config {source.config}, split {source.split}, revision {source.revision}"
    return AwaresFileError(f"{source.place}: cannot open {what} ({text}): {mend}")


# Readers: one for each way of publishing


@dataclass(frozen=True)
class Reader:
    """``read(row, opened, index)``; ``columns``: the names of ours that the mapping must give."""

    columns: tuple[str, ...]
    read: Callable[[Record, Opened, int], Draft | None]

    def __call__(self, row: Record, opened: Opened, index: int) -> Draft | None:
        return self.read(row, opened, index)


def _plain(row: Record, opened: Opened, index: int) -> Draft | None:
    """Image, question, and one answer or several of equal standing; the first is the canonical one."""
    answers = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
    return _draft(row["image"], row["question"], answers, opened)


def _votes(row: Record, opened: Opened, index: int) -> Draft | None:
    """TextVQA: ten people's answers. The commonest is the canonical one; among equals the one given first."""
    given = [answer.strip() for answer in row["answers"] if (answer or "").strip()]
    votes = Counter(given)
    return _draft(row["image"], row["question"], sorted(votes, key=lambda answer: -votes[answer]), opened)


_OPTION = re.compile(r"\s*\([A-D]\)\s*")


def _options(row: Record, opened: Opened, index: int) -> Draft | None:
    """V*Bench: "... (A) red (B) blue" becomes the question and one line "A. red" an option, as lmms-eval asks it.

    The published text ends with an instruction of its own, which stays with the last option there and here.
    """
    head, *options = _OPTION.split(row["question"] or "")
    lines = [f"{letter}. {text.strip()}" for letter, text in zip("ABCD", options, strict=False)]
    return _draft(row["image"], "\n".join([head.strip(), *lines]), [row["answers"]], opened)


def _conversation(row: Record, opened: Opened, index: int) -> Draft | None:
    """LLaVA-Multi (Mantis): several pictures and several questions, each on one picture that it names ("for the left
    image, ...", "image 2"). One row of ours = one of its questions.

    The policy looks at one image, so the pictures become a strip from left to right, at their native sizes, tops level:
    every name that the source uses stays true there, and a crop of the left half is the left picture. In the few conversations
    that set a placeholder before each picture's own questions (the question then names none) that picture alone is taken.
    The question is drawn by a hash of the row's id. Conversations without an image give no row.
    """
    turns = [(turn["role"], turn["content"] or "") for turn in row["conversation"]]
    pairs = [(said, turns[at + 1][1]) for at, (role, said) in enumerate(turns[:-1]) if role == "user"]
    if not pairs or not row["images"]:
        return None
    drawn = int(hashlib.sha256(opened.source.row_id(index).encode()).hexdigest(), 16) % len(pairs)
    marks = [said.count("<image>") for said, _ in pairs]
    shown = list(range(len(row["images"])))
    if sum(mark > 0 for mark in marks) > 1:
        seen = sum(marks[: drawn + 1])
        shown = [max(0, min(seen, len(shown)) - 1)]
    question, answer = pairs[drawn]
    pictures = [row["images"][place] for place in shown]
    if len(pictures) == 1:
        return _draft(pictures[0], question, [answer], opened)
    decoded = [_image(_bytes(picture, opened)) for picture in pictures]
    draft = _draft(side_by_side(decoded), question, [answer], opened)
    return draft and replace(draft, pictures=tuple(decoded))


def _trajectory(row: Record, opened: Opened, index: int) -> Draft | None:
    """The released AwaRes dataset. Assumed schema: ``messages`` of role and content as the released policy sees them, and
    ``images``, of which the first is the picture at full resolution: [system,] user question, assistant answer, or
    assistant GET_CROPS, user crops, assistant answer.
    """
    turns = [(turn["role"], _words(turn["content"])) for turn in row["messages"] if turn["role"] != "system"]
    said = [text for role, text in turns if role == "assistant"]
    if not turns or turns[0][0] != "user" or not said or not row["images"]:
        return None
    call = said[0] if len(said) > 1 else ""
    draft = _draft(row["images"][0], turns[0][1], [said[-1]], opened)
    return draft and replace(draft, call=call)


READERS: dict[str, Reader] = {
    "plain": Reader(("image", "question", "answers"), _plain),
    "votes": Reader(("image", "question", "answers"), _votes),
    "options": Reader(("image", "question", "answers"), _options),
    "conversation": Reader(("images", "conversation"), _conversation),
    "trajectory": Reader(("images", "messages"), _trajectory),
}


def _draft(picture: Any, question: Any, answers: list[Any], opened: Opened) -> Draft | None:
    """A draft with the source's suffix behind the question; None without question, answer or image."""
    asked = str(question or "").replace("<image>", "").strip()
    accepted = tuple(
        dict.fromkeys(str(answer).strip() for answer in answers if answer is not None and str(answer).strip())
    )
    if picture is None or not asked or not accepted:
        return None
    protocol.check_question(asked)
    encoded = None if isinstance(picture, Image.Image) else _bytes(picture, opened)
    image = picture if encoded is None else _image(encoded)
    return Draft(image, encoded, asked + opened.source.suffix, accepted)


def _words(content: Any) -> str:
    """The text of a message, whose content is text or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or [])


# Images


def _bytes(picture: Any, opened: Opened) -> bytes:
    """The file of a published picture: bytes, or a name in the archive or on this disk."""
    if isinstance(picture, list):
        if len(picture) != 1:
            raise AwaresValueError(
                f"{len(picture)} pictures in the image column, one is wanted: use the reader `conversation`"
            )
        return _bytes(picture[0], opened)
    if isinstance(picture, bytes):
        return picture
    held = picture if isinstance(picture, dict) else {"bytes": None, "path": picture}
    if held.get("bytes"):
        return cast(bytes, held["bytes"])
    if opened.source.archive and held.get("path"):
        return opened.member(held["path"])
    if held.get("path") and Path(held["path"]).is_file():
        return Path(held["path"]).read_bytes()
    raise AwaresValueError("the image is missing: neither bytes nor a file")


def _image(encoded: bytes) -> Image.Image:
    """Decoded and upright; AwaresError when it cannot be."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
            turned.format = image.format
            return turned
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise AwaresValueError(f"the image is corrupt ({error})") from error


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """The pictures in one strip from left to right, tops level, `GAP` px of white between, none resized."""
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    strip = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        strip.paste(to_rgb(image, "image"), (left, 0))
        left += image.width + GAP
    return strip


def fit(draft: Draft, max_side: int) -> tuple[bytes, Image.Image]:
    """File and RGB picture of a draft: no side above ``max_side`` (PAPER §1), none below one visual token.

    A published file that fits is kept byte for byte. Anything else is written anew: as JPEG (quality 95) where it was one, else
    as PNG. Small pictures (OCRBench has some of 25 x 16 px) are enlarged, as the image processor would do.
    """
    image = draft.image
    factor = max(1.0, MIN_SIDE / min(image.size))
    if factor > 1 and max(image.size) <= MAX_ASPECT * min(image.size):
        size = (max(MIN_SIDE, round(image.width * factor)), max(MIN_SIDE, round(image.height * factor)))
        picture = to_rgb(image, "image").resize(size, Image.Resampling.BICUBIC)
    else:
        picture = cap(check_image(image, "image"), max_side)
    if draft.encoded is not None and picture.size == image.size:
        return draft.encoded, picture
    buffer = io.BytesIO()
    options: dict[str, Any] = {"format": "JPEG", "quality": 95} if image.format == "JPEG" else {"format": "PNG"}
    picture.save(buffer, **options)
    return buffer.getvalue(), picture
