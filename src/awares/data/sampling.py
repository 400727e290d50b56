"""Rows of ``data.origin: hub``: a seeded draw over whole sources, without benchmark images, the same after any kill.

1. *Collect*: read the drawn rows of a source once and keep image files by hash and one JSON line per row, in chunks.
2. *Select*: drop rows whose image is near a benchmark's, take validation rows, then training rows without their images.
3. *Build*: a dataset from the kept files.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import joblib
import numpy as np
import pandas as pd
import scipy.fft
from PIL import Image

from awares.config import Params
from awares.data import sources
from awares.data.rows import image_digests
from awares.data.sources import Draft, OpenSource
from awares.engine import images
from awares.engine.jsonl import Record, in_chunks, read_records
from awares.engine.keys import checkpoint_folder, code_of
from awares.engine.rows import FEATURES
from awares.errors import AwaresValueError
from awares.method import protocol

READ_CHUNK = 64  # rows between two writes, which a kill can lose
PARALLEL_FROM = 32  # rows of a chunk from which starting processes pays
HASH_SIDE = 64  # px: size of the grey picture that is transformed
HASH_BITS = 16  # lowest frequencies kept per direction


def perceptual_hash(image: Image.Image) -> str:
    """64 hex digits that change little when a picture is resized, re-encoded or retouched.

    Each of the 16 x 16 lowest frequencies of its DCT-II in 64 x 64 grey px gives one bit: is it above their median?
    """
    grey = np.asarray(image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = scipy.fft.dctn(grey, norm="ortho")[:HASH_BITS, :HASH_BITS].ravel()
    low = np.where(np.abs(low) < 1e-6, 0.0, low)  # rounding must not decide about zeros
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean
    return np.packbits(bits).tobytes().hex()


def hash_distances(hashes: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """(len(hashes),): bits by which each hash differs from the nearest of ``others``; 256 if there are none."""
    parts = [bytes.fromhex("".join(part)) for part in (hashes, set(others))]
    words, known = (np.frombuffer(part, dtype=np.uint64).reshape(-1, 4) for part in parts)
    return np.array([np.bitwise_count(known ^ word).sum(axis=1).min(initial=256) for word in words], dtype=int)


def collect(params: Params, opened: OpenSource) -> list[Record]:
    """The usable rows that this run needs of a source, all of a benchmark, by ascending position.

    A record has id, row (position), question, answers, call, image (sha256 of its file in the image folder) and phashes
    (of the image and of all parts of a strip). Continues where a killed run stopped. AwaresError for a source with too
    few rows and, after reading, for all unusable rows; those without question, answer or image only in a benchmark.
    """
    folder = _image_folder(params, opened)
    wanted = drawn_positions(params, opened)
    read = {record["id"]: record for file in folder.parent.glob("rows-*.jsonl") for record in read_records(file)}
    positions = {opened.source.row_id(index): index for index in wanted}

    def work(chunk: list[str]) -> list[Record]:
        drafts = [_read(opened, positions[row_id]) for row_id in chunk if row_id not in read]
        processes = min(params.threads, os.cpu_count() or 1) if len(drafts) >= PARALLEL_FROM else 1
        keep = joblib.delayed(_keep)
        kept = joblib.Parallel(processes)(keep(*draft, folder, params.crops.max_side) for draft in drafts)
        found = {record["id"]: record for record in kept}
        return [read.get(row_id) or found[row_id] for row_id in chunk]

    file = folder.with_name(f"rows-{_sha256(json.dumps(wanted))[:16]}.jsonl")
    records = in_chunks(file, list(positions), READ_CHUNK, work)
    source, refused = opened.source, ("fault", "empty") if opened.source.kind == "evaluation" else ("fault",)
    if bad := [record for record in records if record["state"] in refused]:
        listed = "; ".join(f"row {record['row']}: {record['fault']}" for record in bad[:20])
        skip = f"skip: {[record['row'] for record in bad]} there and run again: rows read so far are kept"
        raise AwaresValueError(f"{source.place}: {len(bad)} rows of {source.hub} are unusable ({listed}). Write {skip}")
    return [record for record in records if record["state"] == "row"]


def _image_folder(params: Params, opened: OpenSource) -> Path:
    """The folder of a source's images, named by all that determines how a row is read, not by ``skip`` or counts."""
    source, code = opened.source, code_of(__file__, *(str(module.__file__) for module in (sources, images, protocol)))
    declared = source.model_dump(exclude={"skip", "place", "fallback"})
    key = {"source": declared, "commit": opened.commit, "code": code, "max_side": params.crops.max_side}
    work = checkpoint_folder(params.run_dir("data"), {"stage": f"data {source.kind}.{source.name}", **key})
    (work / "images").mkdir(exist_ok=True)
    return work / "images"


def drawn_positions(params: Params, opened: OpenSource) -> list[int]:
    """Positions to read, ascending: all of a benchmark, else the first ones in the order of :func:`ranked`."""
    source, published = opened.source, opened.count()
    present = [index for index in range(published) if index not in source.skip]
    if source.kind != "training":
        return present
    need = params.data.train_rows + params.data.validation_rows
    if len(present) < need:
        fault = f"has {published} rows in split {source.split}, fewer than the {need} of data.train_rows and"
        raise AwaresValueError(f"{source.place}: {source.hub} {fault} data.validation_rows: lower them")
    order = sorted(present, key=lambda index: _sha256(f"{params.data.train_seed}:{source.row_id(index)}"))
    return sorted(order[: math.ceil(need * (1 + params.data.reserve))])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(opened: OpenSource, index: int) -> tuple[Record, Draft | None]:
    """One row and the beginning of its record. A fault is recorded, not raised."""
    record: Record = {"id": opened.source.row_id(index), "row": index}
    try:
        draft = opened.draft(index)
    except AwaresValueError as error:
        return {**record, "state": "fault", "fault": str(error)}, None
    return (record if draft else {**record, "state": "empty", "fault": "no question, answer or image"}), draft


def _keep(record: Record, draft: Draft | None, folder: Path, max_side: int) -> Record:
    """The whole record of one row, its image stored in ``folder``."""
    if not draft:
        return record
    try:
        encoded, shown = sources.fit_image(draft.pictures, max_side)
    except AwaresValueError as error:
        return {**record, "state": "fault", "fault": str(error)}
    digest = hashlib.sha256(encoded).hexdigest()
    file = folder / digest
    if not file.is_file():
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        partial.write_bytes(encoded)
        partial.replace(file)
    text = {"question": draft.question, "answers": draft.answers, "call": draft.call}
    return {**record, "state": "row", **text, "image": digest, "phashes": [*map(perceptual_hash, shown)]}


Drawn = dict[tuple[str, str], tuple[OpenSource, list[Record]]]  # (split, source) -> its rows in the order of the draw


def select_rows(params: Params) -> tuple[Drawn, pd.DataFrame]:
    """Validation and training rows of all hub sources, sharing no image with each other or with a benchmark.

    The table counts what was published, drawn, dropped and taken per source. Two images are the same if their hashes
    (of any part of a strip) differ by at most ``data.duplicate_distance`` bits. AwaresError for too few rows left.
    """
    sources.read_sources(params, "training")  # raises if the file is missing or wrong
    return _select(params, params.path(params.data.sources_file).read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)  # called once per split
def _select(params: Params, declared: str) -> tuple[Drawn, pd.DataFrame]:
    """:func:`select_rows`; ``declared``: the text of the sources file, so that an edit is noticed."""
    data, limit = params.data, params.data.duplicate_distance
    training = {name: opened for (kind, name), opened in open_all(params).items() if kind == "training"}
    tested = benchmark_hashes(params)
    usable = {name: collect(params, opened) for name, opened in training.items()}
    clean = {name: far_from(records, tested, limit) for name, records in usable.items()}
    held = {name: ranked(records, data.validation_seed)[: data.validation_rows] for name, records in clean.items()}
    near = [one for records in held.values() for one in all_hashes(records)]
    rows, counts = {}, []
    for name, opened in training.items():
        free, drawn = far_from(clean[name], near, limit), len(drawn_positions(params, opened))
        train = ranked(free, data.train_seed)[: data.train_rows]
        count = {"source": name, "published": opened.count(), "drawn": drawn, "empty": drawn - len(usable[name])}
        count["of benchmarks"] = len(usable[name]) - len(clean[name])
        count["of validation"] = len(clean[name]) - len(free) - len(held[name])
        count |= {"validation": len(held[name]), "train": len(train)}
        for key, taken in (("validation_rows", held[name]), ("train_rows", train)):
            if len(taken) < getattr(data, key):
                all_drawn = drawn == opened.count() - len(opened.source.skip)
                fix = f"lower data.{key}" if all_drawn else "raise data.reserve"
                found = f"{len(taken)} of {getattr(data, key)} rows for data.{key} ({count})"
                raise AwaresValueError(f"{opened.source.place}: {found}: {fix}")
            rows[key.removesuffix("_rows"), name] = opened, taken
        counts.append({**count, "hub": opened.source.hub, "licence": opened.source.licence})
    return rows, pd.DataFrame(counts)


def open_all(params: Params, check: bool = True) -> dict[tuple[str, str], OpenSource]:
    """(kind, name) -> every benchmark and training source; ``check`` finds faults in minutes, before hours of work."""
    names = [("evaluation", name) for name in sources.read_sources(params, "evaluation")]
    names += [("training", name) for name in params.data.sources if not name.endswith(".jsonl")]
    found = {(kind, name): sources.open_source(params, kind, name, check) for kind, name in names}
    for opened in found.values() if check else ():
        drawn_positions(params, opened)
    return found


def benchmark_hashes(params: Params) -> list[str]:
    """Perceptual hashes of all images of all benchmarks in the sources file, evaluated or not."""
    opened = [sources.open_source(params, "evaluation", name) for name in sources.read_sources(params, "evaluation")]
    return [one for source in opened for one in all_hashes(collect(params, source))]


def all_hashes(records: Sequence[Record]) -> list[str]:
    """The perceptual hashes of all pictures of ``records``."""
    return [one for record in records for one in record["phashes"]]


def far_from(records: list[Record], hashes: Sequence[str], limit: int) -> list[Record]:
    """The records whose pictures all differ from all ``hashes`` by more than ``limit`` bits."""
    shown = sorted(set(all_hashes(records)))
    far = dict(zip(shown, hash_distances(shown, hashes) > limit, strict=True))
    return [record for record in records if all(far[one] for one in record["phashes"])]


def ranked(records: Sequence[Record], seed: int) -> list[Record]:
    """``records`` shuffled by ``seed``, independent of their order before."""
    return sorted(records, key=lambda record: _sha256(f"{seed}:{record['id']}"))


def load_split(params: Params, name: str, split: str) -> datasets.Dataset:
    """The rows of source (train, validation) or benchmark (evaluation) ``name``."""
    if split == "evaluation":
        opened = sources.open_source(params, "evaluation", name)
        drawn = ranked(collect(params, opened), params.evaluation.seed)[: params.evaluation.rows]
        return build_rows(params, opened, sorted(drawn, key=lambda record: int(record["row"])), split)
    return build_rows(params, *select_rows(params)[0][split, name], split)


def build_rows(params: Params, opened: OpenSource, records: Sequence[Record], split: str) -> datasets.Dataset:
    """A memory-mapped dataset with columns FEATURES from the files that :func:`collect` kept."""
    folder, source = _image_folder(params, opened), opened.source.name
    constant = {"source": source, "question_boxes": [], "answer_boxes": [], "split": split}

    def rows() -> Iterator[Record]:
        for record in records:
            image = {"bytes": (folder / record["image"]).read_bytes(), "path": None}
            yield {**{key: record[key] for key in ("id", "question", "answers")}, "image": image, **constant}

    keys = ("id", "question", "answers", "image")
    digests = [_sha256(json.dumps([record[key] for key in keys])) for record in records]
    fingerprint = _sha256(json.dumps([source, opened.commit, split, *digests]))[:16]
    cache = str(folder.with_name("built"))
    return datasets.Dataset.from_generator(rows, features=FEATURES, cache_dir=cache, fingerprint=fingerprint)


def row_manifest(params: Params, splits: Mapping[str, datasets.Dataset]) -> list[Record]:
    """Per row of ``splits``: id, split, source, place on the hub (empty for other rows), sha256 of image and text."""
    opened = open_all(params, check=False) if params.data.origin == "hub" else {}
    records = []
    for split, rows in splits.items():
        columns = (rows[name] for name in ("id", "source", "question", "answers"))
        for row_id, source, question, answers, image in zip(*columns, image_digests(rows), strict=True):
            origin, place = opened.get(("evaluation" if split == "evaluation" else "training", source)), [""] * 4
            if origin and row_id.startswith(f"{source}-{origin.source.split}-"):  # else a row of a user's file
                place = [origin.source.hub, origin.source.config, origin.source.split, origin.commit]
            hub = dict(zip(("hub", "config", "published_split", "commit"), place, strict=True))
            text = _sha256(json.dumps([question, answers]))
            records.append({"id": row_id, "split": split, "source": source, **hub, "image": image, "text": text})
    return records
