"""Published datasets are read in their own schema; the draw is seeded, clean, disjoint, and the same after a kill."""

import hashlib
import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub.constants as hub_constants
import numpy as np
import published
import pyarrow
import pytest
import yaml
from conftest import ROOT, TASKS, noise
from hub_server import Archive, Gate, commit_of, serving
from published import encoded, file_of
from pyarrow import parquet

from awares.config import load_params
from awares.data import sampling, sources
from awares.data.rows import image_digests, make_split, rows_of_source
from awares.data.sources import OpenSource, open_source, read_sources
from awares.engine.images import STRIP_GAP
from awares.engine.rows import FEATURES
from awares.errors import AwaresError, AwaresValueError

DECLARED = yaml.safe_load((ROOT / "data/sources.yaml").read_text())
COUNT, TESTS = 12, 2
SPLITS = ("train", "validation", "evaluation")
WORD = "\nAnswer the question with a single word."
SINGLE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
ALL_DRAWN = {"data.reserve": 1.0}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The published datasets, and the library's own cache away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield published.everything(tmp_path_factory.mktemp("hub"), COUNT, TESTS)


@pytest.fixture
def own_hub(hub, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(hub, tmp_path / "hub"))


def settings(hub, runs, **more):
    """Few rows; ``more`` settings, or with a name like training__chartqa changed keys of the committed sources file."""
    raw, values = json.loads(json.dumps(DECLARED)), {}
    for name, value in more.items():
        kind, _, source = name.partition("__")
        if source:
            raw[kind][source] |= value
            values["data.sources_file"] = str(runs / "sources.yaml")
            (runs / "sources.yaml").write_text(yaml.safe_dump(raw))
        else:
            values[name] = value
    values = {"data.hub_root": str(hub), "paths.runs": str(runs), "data.train_rows": 5, **values}
    return load_params("paper", overrides={"data.validation_rows": 2, **values})


def opened(params, kind, name, **changes):
    """A source without the check of its first row; ``changes`` to its declaration."""
    source = read_sources(params, kind)[name].model_copy(update=changes)
    return OpenSource(source, Path(params.data.hub_root) if params.data.hub_root else None)


def collect(params, kind, name, **changes):
    return sampling.collect(params, opened(params, kind, name, **changes))


def row_numbers(records):
    return {record["row"] for record in records}


def rewrite(root, hub, column, changes):
    """Change rows of the published table."""
    file = next((root / hub).rglob("*.parquet"))
    table = parquet.read_table(file)
    field, values = table.field(column), table[column].to_pylist()
    for place, value in changes.items():
        values[place] = {"bytes": value, "path": None} if isinstance(value, bytes) else value
    columns = {name: table[name] for name in table.column_names} | {column: pyarrow.array(values, field.type)}
    parquet.write_table(pyarrow.table(columns, table.schema), file)


@pytest.mark.parametrize(
    ("kind", "name", "question", "answers"),
    [
        ("training", "chartqa", "What is bar 3?" + WORD, "3"),
        ("training", "docvqa", "What is field 3?" + SINGLE, "Value 3,value 3"),
        ("training", "textvqa", "what does sign 3 say?" + SINGLE, "exit 3,stop,stop it,a,b,c,d"),
        ("training", "visionthink_smart", "Who wrote book 3?", "Author 3"),
        ("training", "llava_multi", "For image 3, what is thing 3?", "third 3"),
        ("evaluation", "chartqa", "How many 1?" + WORD, "1"),
        ("evaluation", "docvqa", "Who?" + SINGLE, "Ann,ann"),
        ("evaluation", "ocrbench", "what is written in the image?", "CHAIN"),
        ("evaluation", "pope", "Is there a dog in the image?" + SINGLE, "no"),
        ("evaluation", "realworldqa", published.WAY, "B"),
        ("evaluation", "vstar", "What is the material of the glove?\nA. rubber\nB. cotton\nC. kevlar\nD. leather"
         + LETTER + LETTER, "A"),
    ],
)  # fmt: skip
def test_every_source_is_read_in_its_published_schema(hub, tmp_path, kind, name, question, answers):
    params = settings(hub, tmp_path)
    draft = opened(params, kind, name).draft(3 if kind == "training" else 1)
    assert (draft.question, draft.answers) == (question, answers.split(","))
    assert name == "llava_multi" or published.opened(*draft.pictures).size == (168, 112)
    assert set(read_sources(params, "training")) == set(params.data.sources)
    assert set(read_sources(params, "evaluation")) == set(TASKS)


def test_pictures_of_a_conversation_are_joined_from_left_to_right(hub, tmp_path):
    conversations = opened(settings(hub, tmp_path), "training", "llava_multi")
    for index in range(8):
        draft = conversations.draft(index)
        files = [encoded(40_000 + 10 * index + k, 112, 84 + 28 * k, "JPEG") for k in range(3)]
        assert "<image>" not in draft.question
        if index % 4 in (0, 2):  # one picture, or each in front of its own question: that one as it was published
            assert draft.pictures == [files[1 if "second" in draft.question else 0]]
            continue
        count = 2 if index % 4 == 1 else 3
        _, (strip, *parts) = sources.fit_image(draft.pictures, 2000)
        assert len(parts) == count and draft.answers == [f"right {index}" if count == 2 else f"third {index}"]
        assert strip.size == (112 * count + STRIP_GAP * (count - 1), 84 + 28 * (count - 1))
        for k in range(count):
            left = k * (112 + STRIP_GAP)
            assert np.array_equal(strip.crop((left, 0, left + 112, 84 + 28 * k)), published.opened(files[k]))


def test_large_pictures_are_capped_and_others_kept_as_published():
    assert sources.fit_image([content := encoded(1, 300, 200, "JPEG")], 2000)[0] == content
    for kind in ("JPEG", "PNG"):
        kept = published.opened(sources.fit_image([encoded(1, 2600, 1300, kind)], 2000)[0])
        assert (kept.size, kept.format) == ((2000, 1000), kind)
    assert published.opened(sources.fit_image([encoded(1, 25, 16)], 2000)[0]).size == (44, 28)
    with pytest.raises(AwaresError, match="6000x28"):
        sources.fit_image([encoded(1, 6000, 28)], 2000)


@pytest.fixture(scope="module")
def drawn(hub, tmp_path_factory):
    params = settings(hub, tmp_path_factory.mktemp("runs"))
    return params, {split: make_split(params, split) for split in SPLITS}


def test_splits_have_the_mix_and_share_no_image_and_the_manifest_identifies_every_row(drawn):
    params, splits = drawn
    for split, count in zip(SPLITS, (5, 2, TESTS), strict=True):
        names = TASKS if split == "evaluation" else params.data.sources
        assert sorted(splits[split]["source"]) == sorted(name for name in names for _ in range(count))
        assert splits[split].features == FEATURES and set(splits[split]["split"]) == {split}
    train, validation, evaluation = (set(image_digests(rows)) for rows in splits.values())
    assert not train & validation and not evaluation & (train | validation)
    records = {record["id"]: record for record in sampling.row_manifest(params, splits)}
    assert len(records) == sum(map(len, splits.values()))
    row = rows_of_source(splits["validation"], "docvqa").cast_column("image", datasets.Image(decode=False))[0]
    record = records[row["id"]]
    assert record["image"] == hashlib.sha256(row["image"]["bytes"]).hexdigest()
    assert record["text"] == hashlib.sha256(json.dumps([row["question"], row["answers"]]).encode()).hexdigest()
    assert (record["hub"], record["published_split"]) == ("HuggingFaceM4/DocumentVQA", "train")
    assert record["commit"].startswith("local:")


def test_rows_are_drawn_over_the_whole_by_the_seed_streaming_or_not(hub, tmp_path, drawn):
    train = drawn[1]["train"]
    places = [int(row_id[-6:]) for row_id in rows_of_source(train, "chartqa")["id"]]
    assert places != sorted(places) and max(places) > 6
    assert make_split(settings(hub, tmp_path, **{"data.train_seed": 7}), "train")["id"][:] != train["id"][:]
    turned = {"training__chartqa": {"streaming": True}, "training__docvqa": {"streaming": False}}
    same = make_split(settings(hub, tmp_path, **turned), "train")
    assert same["id"][:] == train["id"][:] and image_digests(same) == image_digests(train)


def test_images_of_a_benchmark_are_left_out(own_hub, tmp_path):
    """Changed copies count as well, and every picture of a strip counts, in training and in a benchmark."""
    half, small = (noise(168, 112, 90_000).resize((84, 56)), noise(168, 112, 90_001).resize((126, 84)))
    brighter = noise(168, 112, 93_000).point(lambda value: value + 12)  # of POPE
    stolen = [file_of(half, "JPEG", quality=60), file_of(small, "JPEG")]
    last = encoded(70_032, 112, 140)  # the last of three pictures in a benchmark
    rewrite(own_hub, "HuggingFaceM4/ChartQA", "image", {3: stolen[0], 8: stolen[1], 5: last})
    rewrite(own_hub, "HuggingFaceM4/DocumentVQA", "image", {0: encoded(94_000)})  # of RealWorldQA
    strip = [{"bytes": file_of(one), "path": None} for one in (noise(112, 84, 1), brighter, noise(112, 84, 2))]
    rewrite(own_hub, "TIGER-Lab/Mantis-Instruct", "images", {7: strip})
    published.llava_multi(tmp_path / "made", 4, 70_000)
    shutil.move(tmp_path / "made/TIGER-Lab/Mantis-Instruct", own_hub / "lmms-lab-encoder/Strips")
    strips = {**DECLARED["training"]["llava_multi"], "hub": "lmms-lab-encoder/Strips"}
    params = settings(own_hub, tmp_path, evaluation__vstar=strips, **ALL_DRAWN)
    counts = sampling.select_rows(params)[1].set_index("source")
    dropped = {"chartqa": 3, "docvqa": 1, "textvqa": 0, "llava_multi": 1, "visionthink_smart": 0}
    assert counts["of benchmarks"].to_dict() == dropped
    assert (counts["train"] == 5).all() and (counts["drawn"] == COUNT).all()
    taken = {record["id"] for _, records in sampling.select_rows(params)[0].values() for record in records}
    assert not taken & {f"chartqa-train-{place:06d}" for place in (3, 5, 8)}
    assert not taken & {"docvqa-train-000000", "llava_multi-train-000007"}


def test_rows_of_a_held_out_image_are_left_out_of_training(hub, tmp_path):
    """DocVQA asks twice about each page: a page held out must not come back with its other question."""
    rows, counts = sampling.select_rows(settings(hub, tmp_path, **{"data.train_rows": 3, "data.reserve": 2.0}))
    held, train = ({row // 2 for row in row_numbers(rows[split, "docvqa"][1])} for split in ("validation", "train"))
    assert not held & train and counts.set_index("source")["of validation"]["docvqa"] > 0


def test_unusable_rows_are_listed_at_once_and_can_be_skipped(own_hub, tmp_path, monkeypatch):
    """Rows without an answer are passed over in training and refused in a benchmark."""
    rewrite(own_hub, "HuggingFaceM4/ChartQA", "label", {2: [""], 5: []})
    rewrite(own_hub, "lmms-lab-encoder/ChartQA", "answer", {1: " "})
    rewrite(own_hub, "TIGER-Lab/Mantis-Instruct", "images", {4: [{"bytes": None, "path": "coco/none.jpg"}]})
    rewrite(own_hub, "lmms-lab-encoder/textvqa", "image", {0: b"no image", 4: b"no image", 7: encoded(1)[:300]})
    params = settings(own_hub, tmp_path, **ALL_DRAWN)
    assert row_numbers(collect(params, "training", "chartqa")) == {*range(COUNT)} - {2, 5}
    with pytest.raises(AwaresError, match=r"evaluation.chartqa: 1 rows.*row 1: .*skip: \[1\]"):
        collect(params, "evaluation", "chartqa")
    with pytest.raises(AwaresError, match="row 4: llava_665k_multi/train_images.zip .*coco/none.jpg"):
        collect(params, "training", "llava_multi")
    with pytest.raises(AwaresError, match="training.textvqa, row 0: .*corrupt"):
        open_source(params, "training", "textvqa")
    votes, faults = sources.READERS["votes"], {"2": TypeError("null"), "5": AwaresValueError("torn member")}

    def read(row, row_id):
        if row_id[-1] in faults:
            raise faults[row_id[-1]]
        return votes(row, row_id)

    monkeypatch.setitem(sources.READERS, "votes", read)
    with pytest.raises(AwaresError, match=r"row 0: .*row 2: .*row 4: .*corrupt.*row 5.*skip: \[0, 2, 4, 5, 7\]"):
        collect(params, "training", "textvqa")
    monkeypatch.setattr(sampling, "_read", None)  # nothing is read again
    skip = [0, 2, 4, 5, 7]
    assert row_numbers(collect(params, "training", "textvqa", skip=skip)) == {*range(COUNT)} - {*skip}


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"training__chartqa": {"columns": {"image": "image", "question": "ask", "answers": "label"}}},
         "training.chartqa.columns: .*ask"),
        ({"training__docvqa": {"hub": "nobody/DocumentVQA"}}, "training.docvqa: .*hf download nobody/DocumentVQA"),
        ({"evaluation__docvqa": {"config": "DocVqa"}}, "evaluation.docvqa: .*config and split"),
        ({"evaluation__vstar": {"hub": "no/vstar"}}, "evaluation.vstar: cannot .*no/vstar, nor lmms-lab/vstar-bench"),
        ({"training__llava_multi": {"archive": "no.zip"}}, "training.llava_multi.archive: .*no.zip"),
        ({"training__chartqa": {"reader": "magic"}}, "training.chartqa: reader: .*plain"),
        ({"training__chartqa": {"reader": "conversation"}}, "training.chartqa, row 0: .*conversation .*columns"),
        ({"data.train_rows": 50}, "training.chartqa: .*52"),
        ({"data.sources": ["nothing"]}, "data.sources: 'nothing' .*chartqa"),
        ({"data.sources_file": "data/none.yaml"}, "none.yaml: .*data.sources_file"),
        ({"data.train_rows": 11, "data.validation_rows": 1}, "docvqa: 10 of 11 rows .*: lower data.train_rows"),
    ],
)  # fmt: skip
def test_faults_of_declarations_and_numbers_are_named(hub, tmp_path, changes, place):
    with pytest.raises(AwaresError, match=place):
        make_split(settings(hub, tmp_path, **changes), "train")
    read = list(tmp_path.glob("paper/data/**/rows-*.jsonl"))
    assert not read or "data.validation_rows" in changes  # else before any work


def test_rows_of_the_hub_are_read_at_the_commit_that_the_manifest_keeps(own_hub, tmp_path, monkeypatch, caplog, drawn):
    """The hub's answers are real, its files are the copies, VisionThink's streamed from arrow files as there.

    POPE has not moved on this hub. A check of all sources streams: no table is downloaded before the last is checked.
    """
    (own_hub / "Senqiao/VisionThink-Smart-Train/state.json").unlink()
    shutil.move(own_hub / "lmms-lab-encoder/POPE", own_hub / "lmms-lab/POPE")
    load, requested = datasets.load_dataset, []

    def place(one):
        return one["hub"], commit_of(one["hub"], one["revision"])

    def from_copy(path, revision, **how):
        requested.append((path, revision, how["streaming"]))
        return load(str(own_hub / path), **how)

    monkeypatch.setattr(datasets, "load_dataset", from_copy)
    params = settings("", tmp_path)
    places = [one for kind in ("evaluation", "training") for one in map(place, DECLARED[kind].values())]
    ((old, pinned),) = DECLARED["evaluation"]["pope"]["fallback"].items()
    places[3] = old, commit_of(old, pinned)
    archive = own_hub / "TIGER-Lab/Mantis-Instruct/llava_665k_multi/train_images.zip"
    Archive.content = archive.read_bytes()
    with serving(Archive):
        sampling.open_all(params)
        assert requested[: len(places)] == [(*place, True) for place in places]
        records = sampling.row_manifest(params, drawn[1])
        streamed = collect(params, "training", "visionthink_smart")
    assert {(record["hub"], record["commit"]) for record in records} == set(places)
    assert "evaluation.pope: reading lmms-lab/POPE, because lmms-lab-encoder/POPE was not found" in caplog.text
    assert streamed == collect(drawn[0], "training", "visionthink_smart")  # by load_from_disk


def test_processes_share_the_work_and_give_the_same_rows(hub, tmp_path, monkeypatch):
    alone = collect(settings(hub, tmp_path / "alone"), "training", "llava_multi")
    monkeypatch.setattr(sampling, "PARALLEL_FROM", 2)
    monkeypatch.setattr(sampling, "perceptual_hash", None)  # in this process; the others import their own
    params = settings(hub, tmp_path, threads=2)
    assert collect(params, "training", "llava_multi") == alone
    assert len(list((tmp_path / "paper").glob("**/images/*"))) == len({one["image"] for one in alone})


def test_gated_missing_and_unreachable_datasets_say_what_to_do(tmp_path, monkeypatch):
    params = settings("", tmp_path)
    with serving(Gate):
        for kind, name, hub in (("training", "chartqa", "ChartQA"), ("evaluation", "pope", "POPE")):
            with pytest.raises(AwaresError, match=f"{kind}.{name}: .*terms at .*{hub}, set HF_TOKEN"):
                open_source(params, kind, name)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AwaresError, match="training.chartqa: .*data.hub_root"):
        open_source(params, "training", "chartqa")


@pytest.mark.parametrize("name", ["textvqa", "llava_multi"])
def test_a_killed_collection_continues_to_the_same_records(hub, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sampling, "READ_CHUNK", 2)
    read, params = sampling._read, settings(hub, tmp_path)
    whole = collect(settings(hub, tmp_path / "whole"), "training", name)
    calls = []

    def torn(*arguments):
        calls.append(arguments)
        if len(calls) in (1, 6):
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(sampling, "_read", torn)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collect(params, "training", name)
        for file in (tmp_path / "paper").rglob("rows-*.jsonl"):  # as a kill in the middle of a write leaves it
            file.write_bytes(file.read_bytes() + b'{"id": "chart')
            (file.parent / "images" / f".{whole[0]['image']}.partial").write_bytes(b"torn")
    assert collect(params, "training", name) == whole
    assert len(calls) <= len(whole) + 4  # only the torn chunk is read twice
    rows = sampling.build_rows(params, opened(params, "training", name), whole, "train")
    assert image_digests(rows) == [record["image"] for record in whole]
