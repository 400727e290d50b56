"""Rows of `data.origin: hub`: drawn by a seed over the whole of a source, free of the benchmarks' images, the same after any kill.

Three steps. *Collect*: the drawn rows of a source are read once and kept on disk, image files by their hash and one JSON line a
row, in chunks (`records.in_chunks`), so that the same command goes on after a kill. *Select*: rows whose image is near one of the benchmarks'
are dropped, validation rows are taken, then training rows that share no image with any of them. *Build*: a dataset from
the kept files. Nothing in the second and third step depends on when or how often the first was interrupted.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import scipy.fft
from PIL import Image

from awares.config import Params
from awares.data import rows as data
from awares.data import sources
from awares.data.sources import Opened, Source
from awares.engine.jsonl import Record, in_chunks, read_records
from awares.errors import AwaresError, AwaresFileError, AwaresValueError
from awares.method import crops, protocol
from awares.training import checkpoints as training

CHUNK = 64  # rows read between two writes: what a kill can cost
HASH_SIDE = 64  # px: a picture is shrunk to this before the transform
HASH_BITS = 16  # lowest frequencies kept a direction


# Perceptual hash


def perceptual_hash(image: Image.Image) -> str:
    """64 hex digits that change little when a picture is resized, re-encoded or slightly retouched.

    The picture is shrunk to 64 x 64 grey px; of its two-dimensional cosine transform (DCT-II) the 16 x 16 lowest frequencies are
    kept; each gives one bit, whether it lies above their median. The mean of the picture (the first coefficient) gives none.
    """
    grey = np.asarray(image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = scipy.fft.dctn(grey, norm="ortho")[:HASH_BITS, :HASH_BITS].ravel()
    low = np.where(np.abs(low) < 1e-6, 0.0, low)  # what is exactly nothing must not be decided by rounding
    bits = low > np.median(low[1:])
    bits[0] = False
    return np.packbits(bits).tobytes().hex()


def distances(hashes: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Bits by which each of ``hashes`` differs from the nearest of ``others``: (len(hashes),), 256 where there are none."""
    nearest = np.full(len(hashes), 256)
    known = _words(sorted(set(others)))
    if len(known):
        for index, word in enumerate(_words(hashes)):
            nearest[index] = int(np.bitwise_count(known ^ word).sum(axis=1).min())
    return nearest


def _words(hashes: Sequence[str]) -> np.ndarray:
    """(N, 4) of 64-bit words."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint64).reshape(len(hashes), 4)


# Collect


@dataclass(frozen=True)
class Collected:
    """What was drawn from a source. ``records``: one a drawn row, by ascending position in the published split.

    A record has id, row (position), state (row, empty or fault), and of a good row question, answers, call, image (sha256
    of its file under ``folder``/images) and phashes: of the image and of every picture that was joined to make it.
    """

    source: Source
    commit: str
    published: int
    records: list[Record]
    folder: Path


def collect(params: Params, kind: str, name: str) -> Collected:
    """Read what this run needs of one source, all of it for a benchmark. Goes on where a killed run stopped.

    Raises AwaresError before reading when the source has too few rows, and at the end for every row that cannot be used: all of
    them at once, with the mend.
    """
    source = sources.get_source(params, kind, name)
    with Opened(source, _hub_root(params)) as opened:
        opened.check()
        published = opened.count()
        wanted = _wanted(params, source, published)
        folder = training.checkpoint_folder(params.run_dir("data"), _inputs(params, source, opened.commit))
        draw = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
        read = {record["id"]: record for file in folder.glob("rows-*.jsonl") for record in read_records(file)}
        places = {source.row_id(index): index for index in wanted}
        files = folder / "images"
        files.mkdir(exist_ok=True)

        def work(chunk: list[str]) -> list[Record]:
            return [read.get(row_id) or _read(opened, places[row_id], files, params.crops.max_side) for row_id in chunk]

        records = in_chunks(folder / f"rows-{draw}.jsonl", list(places), CHUNK, work)
    _refuse_faults(source, records)
    return Collected(source, opened.commit, published, records, folder)


def _hub_root(params: Params) -> Path | None:
    return params.path(params.data.hub_root) if params.data.hub_root else None


def _wanted(params: Params, source: Source, published: int) -> list[int]:
    """Positions to read, ascending: a benchmark whole, else the first by a hash of seed and id, so over the whole split."""
    if source.kind != "training":
        return [index for index in range(published) if index not in source.skip]
    need = params.data.train_rows + params.data.validation_rows
    if published - len(source.skip) < need:
        raise AwaresValueError(
            f"{source.place}: {source.hub} has {published} rows in split {source.split}, fewer than the {need} of data.train_rows and "
            "data.validation_rows: lower them"
        )
    there = (index for index in range(published) if index not in source.skip)
    order = sorted(there, key=lambda index: rank(params.data.train_seed, source.row_id(index)))
    return sorted(order[: math.ceil(need * (1 + params.data.reserve))])


def rank(seed: int, row_id: str) -> str:
    """The place of a row in the order of ``seed``: sorting by it shuffles, whatever the order of reading."""
    return hashlib.sha256(f"{seed}:{row_id}".encode()).hexdigest()


def _inputs(params: Params, source: Source, commit: str) -> Record:
    """All that decides what a row is read as. Neither ``skip`` nor how many are drawn, so that a mended run need not read everything again."""
    declared = {**asdict(source), "skip": None, "place": None}
    code = training.code_of(__file__, *(str(module.__file__) for module in (sources, crops, protocol)))
    key = {"source": declared, "commit": commit, "max_side": params.crops.max_side, "code": code}
    return {"stage": f"data {source.kind}.{source.name}", **key}


def _read(opened: Opened, index: int, files: Path, max_side: int) -> Record:
    """One row: its image into ``files``, its words into a record. What is wrong with it is recorded, not raised."""
    record: Record = {"id": opened.source.row_id(index), "row": index}
    row = opened.at(index)
    try:
        draft = opened.draft(row, index)
        if draft is None:
            return {**record, "state": "empty"}
        encoded, picture = sources.fit(draft, max_side)
    except AwaresValueError as error:
        return {**record, "state": "fault", "fault": str(error)}
    digest = hashlib.sha256(encoded).hexdigest()
    _keep(files / digest, encoded)
    words = {"question": draft.question, "answers": list(draft.answers), "call": draft.call}
    phashes = [perceptual_hash(one) for one in (picture, *draft.pictures)]
    return {**record, "state": "row", **words, "image": digest, "phashes": phashes}


def _keep(file: Path, content: bytes) -> None:
    if not file.is_file():
        partial = file.with_name(f".{file.name}.partial")
        partial.write_bytes(content)
        partial.replace(file)


def _refuse_faults(source: Source, records: Sequence[Record]) -> None:
    """Every unusable row in one message; of a benchmark also the empty ones, since every row of it counts."""
    bad = [record for record in records if record["state"] == "fault"]
    if source.kind == "evaluation":
        bad += [{**record, "fault": "no question, answer or image"} for record in records if record["state"] == "empty"]
    if bad:
        listed = "; ".join(f"row {record['row']}: {record['fault']}" for record in bad[:20])
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        rows = ", ".join(str(record["row"]) for record in bad)
        raise AwaresValueError(
            f"{source.place}: {len(bad)} rows of {source.hub} cannot be used ({listed}{more}). Write skip: [{rows}] there "
            "and run again: what was read is kept"
        )


# Select


@dataclass(frozen=True)
class Selection:
    """The rows of every training source, by split, and how many fell out on the way."""

    collected: Mapping[str, Collected]
    splits: Mapping[str, Mapping[str, list[Record]]]  # split -> source -> records in the order of the draw
    counts: pd.DataFrame


def select(params: Params) -> Selection:
    """Validation and training rows of all hub sources of ``data.sources``, disjoint by image from each other and the benchmarks.

    Two images are one where their perceptual hashes differ by at most ``data.duplicate_distance`` bits; of a row with several pictures
    each counts. Validation rows are taken first, by ``data.validation_seed``; training rows follow in the order of the draw and
    leave out every image of any validation row. Raises AwaresError for a source that runs short.
    """
    sources.read_sources(params, "training")  # says what is wrong with the file
    return _select(params, params.path(params.data.sources_file).read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)  # asked for once a split
def _select(params: Params, declared: str) -> Selection:
    """`select`; ``declared`` is the text of the sources file, so that an edited one counts."""
    names = [name for name in params.data.sources if not name.endswith(".jsonl")]
    preflight(params)
    seen = benchmark_hashes(params)
    collected = {name: collect(params, "training", name) for name in names}
    limit = params.data.duplicate_distance
    clean = {name: apart(good(one), seen, limit) for name, one in collected.items()}
    held = {name: _held_out(clean[name], params) for name in names}
    held_hashes = [one for records in held.values() for one in phashes(records)]
    free = {name: apart(clean[name], held_hashes, limit) for name in names}
    train = {name: ranked(free[name], params.data.train_seed)[: params.data.train_rows] for name in names}
    counts = [_count(collected[name], clean[name], free[name], held[name], train[name]) for name in names]
    for name, taken in (*held.items(), *train.items()):
        _enough(collected[name], taken, params, "validation_rows" if taken is held[name] else "train_rows", counts)
    return Selection(collected, {"validation": held, "train": train}, pd.DataFrame(counts))


def preflight(params: Params) -> None:
    """Open every source and benchmark, count it and read its first row: minutes, before the hours of reading."""
    for kind in ("evaluation", "training"):
        names = list(sources.read_sources(params, "evaluation")) if kind == "evaluation" else params.data.sources
        for name in [name for name in names if not name.endswith(".jsonl")]:
            source = sources.get_source(params, kind, name)
            with Opened(source, _hub_root(params)) as opened:
                _wanted(params, source, opened.count())
                try:
                    opened.check()
                except AwaresFileError:
                    raise
                except AwaresError as error:
                    raise AwaresValueError(f"{source.place}, row {opened.first}: {error}") from error


def benchmark_hashes(params: Params) -> list[str]:
    """The perceptual hashes of every image of every benchmark in the sources file, evaluated or not."""
    tasks = sources.read_sources(params, "evaluation")
    return [one for task in tasks for one in phashes(good(collect(params, "evaluation", task)))]


def good(collected: Collected) -> list[Record]:
    """The records of usable rows."""
    return [record for record in collected.records if record["state"] == "row"]


def phashes(records: Sequence[Record]) -> list[str]:
    """The perceptual hashes of all pictures of ``records``."""
    return [one for record in records for one in record["phashes"]]


def apart(records: list[Record], hashes: Sequence[str], limit: int) -> list[Record]:
    """The records of whose pictures each differs from all of those behind ``hashes`` by more than ``limit`` bits."""
    shown = sorted(set(phashes(records)))
    far = dict(zip(shown, distances(shown, hashes) > limit, strict=True))
    return [record for record in records if all(far[one] for one in record["phashes"])]


def ranked(records: Sequence[Record], seed: int) -> list[Record]:
    """``records`` in the order of ``seed``."""
    return sorted(records, key=lambda record: rank(seed, record["id"]))


def _held_out(records: Sequence[Record], params: Params) -> list[Record]:
    return ranked(records, params.data.validation_seed)[: params.data.validation_rows]


def _count(one: Collected, clean: list[Record], free: list[Record], held: list[Record], train: list[Record]) -> Record:
    usable = len(good(one))
    return {
        "source": one.source.name,
        "published": one.published,
        "drawn": len(one.records),
        "empty": len(one.records) - usable,
        "of benchmarks": usable - len(clean),
        "of validation": len(clean) - len(free) - len(held),
        "validation": len(held),
        "train": len(train),
    }


def _enough(one: Collected, taken: list[Record], params: Params, key: str, counts: list[Record]) -> None:
    need = getattr(params.data, key)
    if len(taken) < need:
        row = next(count for count in counts if count["source"] == one.source.name)
        said = ", ".join(f"{name} {value}" for name, value in row.items() if name != "source")
        mend = "raise data.reserve" if len(one.records) < one.published - len(one.source.skip) else f"lower data.{key}"
        raise AwaresValueError(f"{one.source.place}: {len(taken)} of {need} rows for data.{key} ({said}): {mend}")


# Build


def load(params: Params, name: str, split: str) -> datasets.Dataset:
    """The rows of source (train, validation) or benchmark (evaluation) ``name``: what `data.load_source` gives for origin hub."""
    if split == "evaluation":
        one = collect(params, "evaluation", name)
        drawn = ranked(good(one), params.evaluation.seed)[: params.evaluation.rows]
        return build(one, sorted(drawn, key=lambda record: int(record["row"])), split)
    if split not in ("train", "validation"):
        raise AwaresValueError(f"origin hub has splits train, validation and evaluation, not {split!r}")
    selection = select(params)
    return build(selection.collected[name], selection.splits[split][name], split)


def build(one: Collected, records: Sequence[Record], split: str) -> datasets.Dataset:
    """Rows of `data.FEATURES` from the files that `collect` kept; memory-mapped, whatever their number."""
    text = json.dumps([one.source.name, one.commit, split, *(_digest(record) for record in records)])
    wanted = {
        "records": [list(records)],
        "files": [str(one.folder / "images")],
        "source": [one.source.name],
        "split": [split],
    }
    return datasets.Dataset.from_generator(
        _rows,
        features=data.FEATURES,
        gen_kwargs=wanted,
        cache_dir=str(one.folder / "built"),
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def _rows(records: list[list[Record]], files: list[str], source: list[str], split: list[str]) -> Iterator[Record]:
    for record in records[0]:
        yield {
            "id": record["id"],
            "image": {"bytes": (Path(files[0]) / record["image"]).read_bytes(), "path": None},
            "question": record["question"],
            "answers": record["answers"],
            "source": source[0],
            "question_boxes": [],
            "answer_boxes": [],
            "split": split[0],
        }


def _digest(record: Record) -> str:
    return hashlib.sha256(
        json.dumps([record[key] for key in ("id", "question", "answers", "image")]).encode()
    ).hexdigest()


# What was taken


def manifest(params: Params, splits: Mapping[str, datasets.Dataset]) -> list[Record]:
    """One record a row of ``splits``: id, split, source; hub id, config, published split and commit (empty for rows that are not from
    the hub); sha256 of the image file and of question and answers. It names every row for good.
    """
    origin = _origins(params)
    records = []
    for split, rows in splits.items():
        words = zip(
            rows["id"], rows["source"], rows["question"], rows["answers"], data.image_digests(rows), strict=True
        )
        for row_id, source, question, answers, image in words:
            text = hashlib.sha256(json.dumps([question, answers]).encode()).hexdigest()
            place = origin.get(("evaluation" if split == "evaluation" else "training", source), _NOWHERE)
            if not row_id.startswith(f"{source}-{place['published_split']}-"):
                place = _NOWHERE  # a row of the user's own under the name of a hub source
            records.append({"id": row_id, "split": split, "source": source, **place, "image": image, "text": text})
    return records


_NOWHERE = {"hub": "", "config": "", "published_split": "", "commit": ""}


def _origins(params: Params) -> dict[tuple[str, str], Record]:
    """(kind, source name) -> where its rows come from."""
    if params.data.origin != "hub":
        return {}
    found = {}
    for kind, names in (("training", params.data.sources), ("evaluation", params.data.tasks)):
        for name in [name for name in names if not name.endswith(".jsonl")]:
            source = sources.get_source(params, kind, name)
            with Opened(source, _hub_root(params)) as opened:
                place = {
                    "hub": source.hub,
                    "config": source.config,
                    "published_split": source.split,
                    "commit": opened.commit,
                }
            found[kind, name] = place
    return found


def provenance(params: Params) -> pd.DataFrame:
    """A row for every training source: how many rows were published, drawn, dropped and taken; id and licence.

    Empty for an origin that is not the hub.
    """
    if params.data.origin != "hub":
        return pd.DataFrame(columns=["source", "hub", "licence"])
    selection = select(params)
    names = [(one.source.hub, one.source.licence) for one in selection.collected.values()]
    return selection.counts.assign(hub=[hub for hub, _ in names], licence=[licence for _, licence in names])
