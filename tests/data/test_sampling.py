"""Each published dataset is read in its own schema; what is drawn is seeded, clean, disjoint, and the same after a kill."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub.constants as hub_constants
import numpy as np
import published
import pytest
import yaml
from conftest import noise
from hub_server import Commits, Gate, commit_of, serving
from PIL import Image

from awares.config import TASKS, load_params
from awares.data import sampling, sources
from awares.data.rows import image_digests, make_split, rows_of_source
from awares.data.sources import OpenSource, open_source, read_sources
from awares.engine.rows import FEATURES, save_rows
from awares.errors import AwaresError, AwaresValueError

ROOT = Path(__file__).parents[2]
COUNT, TESTS = 12, 2
SINGLE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The library's own cache, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return published.everything(tmp_path_factory.mktemp("hub"), COUNT, TESTS)


@pytest.fixture
def own_hub(hub, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(hub, tmp_path / "hub"))


def settings(hub, runs, **more):
    values = {"data.hub_root": str(hub), "paths.runs": str(runs), "data.train_rows": 5, "data.validation_rows": 2}
    return load_params("paper", overrides={**values, **more}, path=ROOT / "params.yaml")


def declared(tmp_path, **changes):
    """A sources file of one's own: the committed one with ``kind.name`` -> changed keys."""
    raw = yaml.safe_load((ROOT / "data/sources.yaml").read_text())
    for place, keys in changes.items():
        kind, name = place.split("__")
        raw[kind][name].update(keys)
    file = tmp_path / "sources.yaml"
    file.write_text(yaml.safe_dump(raw))
    return str(file)


def opened(params, kind, name, **changes):
    """A source without the check of its first row; ``changes`` to its declaration."""
    source = read_sources(params, kind)[name].model_copy(update=changes)
    return OpenSource(source, Path(params.data.hub_root) if params.data.hub_root else None)


# Schemas


@pytest.mark.parametrize(
    ("kind", "name", "question", "answers"),
    [
        ("training", "chartqa", "What is bar 3?" + SINGLE, ("3",)),
        ("training", "docvqa", "What is field 3?" + SINGLE, ("Value 3", "value 3")),
        ("training", "textvqa", "what does sign 3 say?" + SINGLE, ("exit 3", "stop", "stop it", "a", "b", "c", "d")),
        ("training", "visionthink_smart", "Who wrote book 3?", ("Author 3",)),
        ("training", "llava_multi", "For image 3, what is thing 3?", ("third 3",)),
        ("evaluation", "chartqa", "How many 1?" + SINGLE, ("1",)),
        ("evaluation", "docvqa", "Who?" + SINGLE, ("Ann", "ann")),
        ("evaluation", "ocrbench", "what is written in the image?", ("CHAIN",)),
        ("evaluation", "pope", "Is there a dog in the image?" + SINGLE, ("no",)),
        (
            "evaluation",
            "realworldqa",
            "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option and nothing else.",
            ("B",),
        ),
        (
            "evaluation",
            "vstar",
            "What is the material of the glove?\nA. rubber\nB. cotton\nC. kevlar\nD. leather" + LETTER + LETTER,
            ("A",),
        ),
    ],
)
def test_every_source_is_read_in_its_published_schema(hub, tmp_path, kind, name, question, answers):
    draft = opened(settings(hub, tmp_path), kind, name).draft(3 if kind == "training" else 1)
    assert (draft.question, draft.answers) == (question, list(answers))
    if name != "llava_multi":
        assert draft.pictures[0].size == (168, 112) and draft.encoded


def test_pictures_of_a_conversation_stand_from_left_to_right(hub, tmp_path):
    conversations = opened(settings(hub, tmp_path), "training", "llava_multi")
    for index in range(8):
        draft = conversations.draft(index)
        made = [
            published.opened(published.encoded(40_000 + 10 * index + k, 112, 84 + 28 * k, "JPEG")) for k in range(3)
        ]
        assert "<image>" not in draft.question
        if index % 4 in (0, 2):  # one picture, or each before its own question: that one as it was published
            assert draft.encoded
            assert np.array_equal(draft.pictures[0], made[1 if "second" in draft.question else 0])
            continue
        count = len(draft.pictures)
        _, strip = sources.fit_image(draft, 2000)
        assert draft.encoded is None and count == (2 if index % 4 == 1 else 3)
        assert strip.size == (112 * count + sources.STRIP_GAP * (count - 1), 84 + 28 * (count - 1))
        for k in range(count):
            left = k * (112 + sources.STRIP_GAP)
            assert np.array_equal(strip.crop((left, 0, left + 112, 84 + 28 * k)), made[k])
        assert draft.answers == [f"right {index}" if count == 2 else f"third {index}"]


def test_the_sources_file_declares_what_params_and_the_paper_name():
    params = load_params("paper", path=ROOT / "params.yaml")
    assert set(read_sources(params, "training")) == set(params.data.sources)
    assert set(read_sources(params, "evaluation")) == set(TASKS)
    for kind in sources.NAMED_BY:
        for source in read_sources(params, kind).values():
            assert source.hub.count("/") == 1 and source.licence and source.homepage.startswith("https://")


# Drawing


def ids(rows):
    return list(rows["id"])


@pytest.fixture(scope="module")
def drawn(hub, tmp_path_factory):
    params = settings(hub, tmp_path_factory.mktemp("runs"))
    return params, {split: make_split(params, split) for split in ("train", "validation", "evaluation")}


def test_splits_have_the_mix_and_share_no_image(drawn):
    params, splits = drawn
    for split, count in (("train", 5), ("validation", 2), ("evaluation", TESTS)):
        names = TASKS if split == "evaluation" else params.data.sources
        assert sorted(splits[split]["source"]) == sorted(name for name in names for _ in range(count))
        assert splits[split].features == FEATURES and set(splits[split]["split"]) == {split}
    digests = {split: set(image_digests(rows)) for split, rows in splits.items()}
    assert not digests["train"] & digests["validation"]
    assert not digests["evaluation"] & (digests["train"] | digests["validation"])
    assert len({row_id for rows in splits.values() for row_id in ids(rows)}) == sum(map(len, splits.values()))


def test_rows_are_drawn_over_the_whole_by_the_seed(hub, tmp_path, drawn):
    _, splits = drawn
    places = [int(row_id[-6:]) for row_id in ids(rows_of_source(splits["train"], "chartqa"))]
    assert places != sorted(places) and max(places) > 6
    again = make_split(settings(hub, tmp_path), "train")
    other = make_split(settings(hub, tmp_path, **{"data.train_seed": 7}), "train")
    assert ids(again) == ids(splits["train"]) and ids(other) != ids(again)


def test_what_is_read_is_spread_over_the_whole_split(tmp_path):
    params, other = (settings("", tmp_path, **{"data.train_rows": 98, "data.train_seed": seed}) for seed in (101, 7))
    source = read_sources(params, "training")["chartqa"]
    places = sampling.drawn_positions(params, source, 10_000)
    assert len(places) == 125 and places == sorted(set(places))  # a quarter in reserve
    assert 4_000 < np.mean(places) < 6_000 and places[0] < 500 and places[-1] > 9_500
    assert sampling.drawn_positions(other, source, 10_000) != places


def test_streaming_draws_the_same_rows(hub, tmp_path, drawn):
    _, splits = drawn
    file = declared(tmp_path, training__chartqa={"streaming": True}, training__docvqa={"streaming": False})
    turned = make_split(settings(hub, tmp_path, **{"data.sources_file": file}), "train")
    assert ids(turned) == ids(splits["train"])
    assert image_digests(turned) == image_digests(splits["train"])


def test_evaluation_is_the_whole_benchmark_or_a_seeded_part(hub, tmp_path):
    assert ids(sampling.load_split(settings(hub, tmp_path), "pope", "evaluation")) == [
        "pope-test-000000",
        "pope-test-000001",
    ]
    part = {seed: {"evaluation.rows": 1, "evaluation.seed": seed} for seed in range(200, 208)}
    found = {
        ids(sampling.load_split(settings(hub, tmp_path, **keys), "chartqa", "evaluation"))[0] for keys in part.values()
    }
    assert len(found) == 2


def test_a_file_of_ones_own_stands_beside_the_hub(hub, tmp_path):
    noise(84, 84, 5).save(tmp_path / "mine.png")
    line = {"image": "mine.png", "question": "what?", "answers": ["x"], "source": "chartqa"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    params = settings(hub, tmp_path, **{"data.sources": ["chartqa", str(tmp_path / "mine.jsonl")]})
    rows = make_split(params, "train")
    assert ids(rows)[1] == "mine-1" and len(rows) == 6
    places = {record["id"]: record["hub"] for record in sampling.manifest(params, {"train": rows})}
    assert places["mine-1"] == "" and set(places.values()) == {"", "HuggingFaceM4/ChartQA"}


def test_the_manifest_names_every_row_for_good(drawn):
    params, splits = drawn
    records = {record["id"]: record for record in sampling.manifest(params, splits)}
    assert len(records) == sum(map(len, splits.values()))
    row = rows_of_source(splits["validation"], "docvqa").cast_column("image", datasets.Image(decode=False))[0]
    record = records[row["id"]]
    assert record["image"] == hashlib.sha256(row["image"]["bytes"]).hexdigest()
    assert record["text"] == hashlib.sha256(json.dumps([row["question"], row["answers"]]).encode()).hexdigest()
    assert (record["hub"], record["published_split"]) == ("HuggingFaceM4/DocumentVQA", "train")
    assert record["commit"].startswith("local:")


def test_generated_rows_have_a_manifest_too():
    params = load_params("mini", overrides={"data.train_rows": 1}, path=ROOT / "params.yaml")
    records = sampling.manifest(params, {"train": make_split(params, "train")})
    assert len(records) == 5 and {record["hub"] for record in records} == {""}
    assert sampling.provenance(params).empty


# Images


def altered(image, how):
    buffer = io.BytesIO()
    if how == "jpeg":
        image.save(buffer, "JPEG", quality=60)
        return Image.open(buffer)
    if how == "half":
        return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(image).astype(int) + 12, 0, 255).astype("uint8"))


@pytest.mark.parametrize("how", ["jpeg", "half", "brighter"])
def test_copies_of_a_picture_have_near_hashes_and_others_far_ones(how):
    pictures = [noise(224, 168, seed) for seed in range(12)]
    hashes = [sampling.perceptual_hash(picture) for picture in pictures]
    copies = [sampling.perceptual_hash(altered(picture, how)) for picture in pictures]
    limit = load_params("paper", path=ROOT / "params.yaml").data.duplicate_distance
    assert (sampling.hash_distances(copies, hashes) <= limit).all()
    assert all(sampling.hash_distances([copies[k]], hashes[:k] + hashes[k + 1 :])[0] > 2 * limit for k in range(12))
    assert sampling.hash_distances(hashes, []).tolist() == [256] * 12


def test_distance_counts_bits():
    assert sampling.hash_distances(["0" * 64, "f" + "0" * 63], ["1" + "0" * 63, "f" * 64]).tolist() == [1, 3]


def test_images_of_a_benchmark_are_left_out(own_hub, tmp_path):
    """Two training charts are a benchmark's pictures, smaller and as JPEG; two pages are another's, as they are."""
    stolen = [altered(altered(noise(168, 112, 90_000 + i), "half"), "jpeg") for i in range(2)]
    spoil(own_hub, "HuggingFaceM4/ChartQA", "image", {3: file_of(stolen[0]), 8: file_of(stolen[1])})
    spoil(own_hub, "HuggingFaceM4/DocumentVQA", "image", {0: published.encoded(95_000)})  # of V*
    params = settings(own_hub, tmp_path, **{"data.reserve": 1.0})
    train = make_split(params, "train")
    kept = set(ids(train)) | set(ids(make_split(params, "validation")))
    assert not kept & {"chartqa-train-000003", "chartqa-train-000008", "docvqa-train-000000"}
    counts = sampling.provenance(params).set_index("source")
    assert counts["of benchmarks"].to_dict() == {
        "chartqa": 2, "docvqa": 1, "textvqa": 0, "llava_multi": 0, "visionthink_smart": 0,
    }  # fmt: skip
    assert (counts["train"] == 5).all() and (counts["drawn"] == COUNT).all()


def test_every_picture_of_a_strip_counts_in_training_and_in_a_benchmark(own_hub, tmp_path):
    """Of a conversation's three pictures the middle one is POPE's; a training chart is the last of three in another benchmark."""
    pictures = [noise(112, 84, 1), altered(noise(168, 112, 93_000), "jpeg"), noise(112, 84, 2)]
    strip = [{"bytes": file_of(picture), "path": None} for picture in pictures]
    spoil(own_hub, "TIGER-Lab/Mantis-Instruct", "images", {7: strip})
    published.llava_multi(tmp_path / "made", 4, 70_000)
    shutil.move(tmp_path / "made/TIGER-Lab/Mantis-Instruct", own_hub / "lmms-lab/Strips")
    spoil(own_hub, "HuggingFaceM4/ChartQA", "image", {3: published.encoded(70_032, 112, 140)})
    entry = yaml.safe_load((ROOT / "data/sources.yaml").read_text())["training"]["llava_multi"]
    file = declared(tmp_path, evaluation__vstar={**entry, "hub": "lmms-lab/Strips"})
    params = settings(own_hub, tmp_path, **{"data.reserve": 1.0, "data.sources_file": file})
    counts = sampling.provenance(params).set_index("source")
    assert counts["of benchmarks"].to_dict() == {
        "chartqa": 1, "docvqa": 0, "textvqa": 0, "llava_multi": 1, "visionthink_smart": 0,
    }  # fmt: skip
    taken = {record["id"] for _, records in sampling.select_rows(params)[0].values() for record in records}
    assert not taken & {"chartqa-train-000003", "llava_multi-train-000007"}


def test_rows_of_a_held_out_image_are_left_out_of_training(drawn, hub, tmp_path):
    """DocVQA asks twice of each page: a page held out must not come back with its other question."""
    params = settings(hub, tmp_path, **{"data.train_rows": 3, "data.reserve": 2.0})
    drawn_rows, counts = sampling.select_rows(params)
    pages = {
        split: {record["row"] // 2 for record in drawn_rows[split, "docvqa"][1]} for split in ("train", "validation")
    }
    assert not pages["train"] & pages["validation"]
    assert counts.set_index("source")["of validation"]["docvqa"] > 0


def file_of(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def draft_of(image, kind="PNG"):
    content = file_of(image, kind)
    return sources.Draft([sources._decode(content)], "q", ["a"], encoded=content)


def test_large_pictures_are_capped_and_others_kept_as_published():
    kept = draft_of(noise(300, 200, 1), "JPEG")
    assert sources.fit_image(kept, 2000)[0] == kept.encoded
    for kind in ("JPEG", "PNG"):
        content, picture = sources.fit_image(draft_of(noise(2600, 1300, 2), kind), 2000)
        assert picture.size == (2000, 1000) == published.opened(content).size
        assert published.opened(content).format == kind
    assert sources.fit_image(draft_of(noise(25, 16, 3)), 2000)[1].size == (44, 28)
    with pytest.raises(AwaresError, match="longer than 200:1"):
        sources.fit_image(draft_of(noise(6000, 28, 4)), 2000)


# Faults


def spoil(root, hub, column, changes):
    """Rewrite rows of the published table."""
    table = next((root / hub).rglob("*.parquet"))
    rows = datasets.Dataset.from_parquet(str(table), cache_dir=str(root / "spoil"))
    features = rows.features
    values = rows.to_dict()
    raw = (
        rows.cast_column(column, datasets.Image(decode=False)) if isinstance(features[column], datasets.Image) else rows
    )
    values = {name: list(raw[name]) for name in features}
    for place, value in changes.items():
        values[column][place] = {"bytes": value, "path": None} if isinstance(value, bytes) else value
    datasets.Dataset.from_dict(values, features=features).to_parquet(table)
    shutil.rmtree(root / "spoil")


def test_torn_pictures_are_listed_at_once_and_can_be_skipped(own_hub, tmp_path, monkeypatch):
    spoil(own_hub, "lmms-lab/textvqa", "image", {4: b"no image", 7: published.encoded(1)[:300]})
    params = settings(own_hub, tmp_path, **{"data.reserve": 1.0})
    with pytest.raises(
        AwaresError, match=r"training.textvqa: 2 rows.*row 4: the image is corrupt.*row 7.*skip: \[4, 7\]"
    ):
        sampling.collect(params, opened(params, "training", "textvqa"))
    monkeypatch.setattr(sampling, "_read", None)  # nothing is read again
    again = sampling.collect(params, opened(params, "training", "textvqa", skip=[4, 7]))
    places = [record["row"] for record in again]
    assert not {4, 7} & set(places) and len(places) == COUNT - 2


def test_any_row_can_be_skipped_whatever_is_wrong_with_it(own_hub, tmp_path, monkeypatch):
    """The first one, which is read before all others, and rows that no reader can read."""
    spoil(own_hub, "lmms-lab/textvqa", "image", {0: b"no image"})
    params = settings(own_hub, tmp_path, **{"data.reserve": 1.0})
    with pytest.raises(AwaresError, match="training.textvqa, row 0: .*corrupt"):
        open_source(params, "training", "textvqa")
    columns, votes = sources.READERS["votes"]

    def read(row, row_id):
        if row_id.endswith("2"):
            raise TypeError("'NoneType' object is not iterable")  # as of a column that holds null
        if row_id.endswith("5"):
            raise AwaresValueError("a member of the archive is torn")
        return votes(row, row_id)

    monkeypatch.setitem(sources.READERS, "votes", (columns, read))
    with pytest.raises(AwaresError, match=r"2 rows.*row 2: the reader .*row 5.*skip: \[2, 5\]"):
        sampling.collect(params, opened(params, "training", "textvqa", skip=[0]))
    found = sampling.collect(params, opened(params, "training", "textvqa", skip=[0, 2, 5]))
    assert not {0, 2, 5} & {record["row"] for record in found}


def test_a_row_without_answer_is_passed_over_in_training_and_refused_in_a_benchmark(own_hub, tmp_path):
    spoil(own_hub, "HuggingFaceM4/ChartQA", "label", {2: [""], 5: []})
    params = settings(own_hub, tmp_path, **{"data.reserve": 1.0})
    states = {r["row"]: r["state"] for r in sampling.collect(params, opened(params, "training", "chartqa")).records}
    assert {row for row, state in states.items() if state == "empty"} == {2, 5}
    spoil(own_hub, "lmms-lab/ChartQA", "answer", {1: " "})
    with pytest.raises(AwaresError, match="evaluation.chartqa: 1 rows.*row 1: no question, answer or image"):
        sampling.collect(params, opened(params, "evaluation", "chartqa"))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"training__chartqa": {"columns": {"image": "image", "question": "ask", "answers": "label"}}},
         "training.chartqa.columns: .* no column ask"),
        ({"training__docvqa": {"hub": "nobody/DocumentVQA"}}, "training.docvqa: .*hf download nobody/DocumentVQA"),
        ({"training__docvqa": {"hub": "nobody"}}, "training.docvqa: .*hf download nobody"),
        ({"training__textvqa": {"split": "training"}}, "training.textvqa: .*correct config and split"),
        ({"evaluation__docvqa": {"config": "DocVqa"}}, "evaluation.docvqa: .*correct config and split"),
        ({"training__llava_multi": {"archive": "llava_665k_multi/pictures.zip"}}, "training.llava_multi.archive: .*pictures.zip"),
        ({"training__chartqa": {"reader": "magic"}}, "training.chartqa: .*reader must be one of plain"),
        ({"training__chartqa": {"reader": "conversation"}}, "training.chartqa: .*columns of reader conversation"),
        ({"training__chartqa": {"stream": True}}, "training.chartqa: unknown key stream"),
        ({"training__chartqa": {"rows": "many"}}, "training.chartqa: rows: .*integer"),
    ],
)  # fmt: skip
def test_faults_of_the_declaration_are_named_before_any_work(hub, tmp_path, changes, place):
    params = settings(hub, tmp_path, **{"data.sources_file": declared(tmp_path, **changes)})
    with pytest.raises(AwaresError, match=place):
        sampling.open_all(params)
    assert not list(tmp_path.glob("paper/data/**/rows-*.jsonl"))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"data.train_rows": 50}, "training.chartqa: .*has 12 rows in split train, fewer than the 52"),
        ({"data.train_rows": 11, "data.validation_rows": 1}, "training.docvqa: 10 of 11 rows for data.train_rows .*lower data.train_rows"),
        ({"data.sources": ["nothing"]}, "data.sources: 'nothing' is not declared in .*chartqa"),
        ({"data.sources_file": "data/none.yaml"}, "none.yaml: no such file; data.sources_file names it"),
    ],
)  # fmt: skip
def test_too_few_rows_and_unknown_names(hub, tmp_path, changes, place):
    with pytest.raises(AwaresError, match=place):
        make_split(settings(hub, tmp_path, **changes), "train")


def test_a_missing_picture_in_the_archive_is_a_fault_of_its_row(own_hub, tmp_path):
    spoil(own_hub, "TIGER-Lab/Mantis-Instruct", "images", {4: [{"bytes": None, "path": "coco/none.jpg"}]})
    params = settings(own_hub, tmp_path, **{"data.reserve": 1.0})
    with pytest.raises(AwaresError, match="row 4: llava_665k_multi/train_images.zip holds no coco/none.jpg"):
        sampling.collect(params, opened(params, "training", "llava_multi"))


def test_rows_of_the_hub_are_read_at_the_commit_that_the_manifest_keeps(own_hub, tmp_path, monkeypatch, drawn):
    """The hub's answers are real, its files are the copies, VisionThink's streamed from arrow files as there."""
    (own_hub / "Senqiao/VisionThink-Smart-Train/state.json").unlink()
    load, asked = datasets.load_dataset, {}

    def from_copy(path, revision, **how):
        asked[path] = (revision, how["streaming"])
        return load(str(own_hub / path), **how)

    monkeypatch.setattr(datasets, "load_dataset", from_copy)
    params = settings("", tmp_path)
    with serving(Commits):
        records = sampling.manifest(params, drawn[1])
        streamed = sampling.collect(params, opened(params, "training", "visionthink_smart"))
    declared = yaml.safe_load((ROOT / "data/sources.yaml").read_text())
    named = [one for kind in ("training", "evaluation") for one in declared[kind].values()]
    assert asked == {one["hub"]: (commit_of(one["hub"], one["revision"]), one["streaming"]) for one in named}
    assert len(records) == sum(map(len, drawn[1].values()))
    assert all(record["commit"] == asked[record["hub"]][0] for record in records)
    assert streamed.published == COUNT
    copied = sampling.collect(drawn[0], opened(drawn[0], "training", "visionthink_smart"))  # by load_from_disk
    assert streamed.records == copied.records


def test_gated_and_missing_datasets_say_what_to_do(tmp_path):
    params = settings("", tmp_path)
    with (
        serving(Gate),
        pytest.raises(AwaresError, match="training.chartqa: .*accept its terms at .*ChartQA and set HF_TOKEN"),
    ):
        open_source(params, "training", "chartqa")
    with serving(Gate), pytest.raises(AwaresError, match="evaluation.pope: .*correct the id, or set HF_TOKEN"):
        open_source(params, "evaluation", "pope")


def test_an_unreachable_hub_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AwaresError, match="training.chartqa: .*data.hub_root"):
        open_source(settings("", tmp_path), "training", "chartqa")


# Kills


def files_of(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def keep(params, folder):
    splits = {split: make_split(params, split) for split in ("train", "validation", "evaluation")}
    for split, rows in splits.items():
        save_rows(rows, folder / split)
    (folder / "manifest.json").write_text(json.dumps(sampling.manifest(params, splits)))
    return files_of(folder)


@pytest.mark.parametrize("name", ["chartqa", "textvqa", "llava_multi"])
def test_an_interrupted_collection_goes_on_to_the_same_records(hub, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sampling, "READ_CHUNK", 2)
    read, runs = sampling._read, {moment: settings(hub, tmp_path / str(moment)) for moment in ("never", 0, 1, 4, 8)}
    whole = sampling.collect(runs["never"], opened(runs["never"], "training", name))
    for moment in (0, 1, 4, 8):
        calls = []

        def torn(*values, calls=calls, moment=moment):
            calls.append(values)
            if len(calls) == moment + 1:
                raise KeyboardInterrupt
            return read(*values)

        params = runs[moment]
        monkeypatch.setattr(sampling, "_read", torn)
        with pytest.raises(KeyboardInterrupt):
            sampling.collect(params, opened(params, "training", name))
        again = sampling.collect(params, opened(params, "training", name))
        assert again.records == whole.records
        assert len(calls) <= len(whole.records) + 3  # only the torn chunk is read twice
        assert files_of(again.folder / "images") == files_of(whole.folder / "images")


def test_drawing_more_rows_reads_the_new_ones_alone(hub, tmp_path, monkeypatch):
    """The mend for too few rows, a larger data.reserve, costs no row that was read before."""
    few, many = (settings(hub, tmp_path, **{"data.reserve": reserve}) for reserve in (0.0, 0.5))
    first = sampling.collect(few, opened(few, "training", "chartqa"))
    calls, read = [], sampling._read
    monkeypatch.setattr(sampling, "_read", lambda *values: (calls.append(values[1]), read(*values))[1])
    more = sampling.collect(many, opened(many, "training", "chartqa"))
    before, after = ({one["row"] for one in found.records} for found in (first, more))
    assert before < after and set(calls) == after - before
    assert [one for one in more.records if one["row"] in before] == first.records


def test_a_killed_process_leaves_nothing_that_changes_the_rows(hub, tmp_path, monkeypatch):
    """The same command after a hard exit in the middle of collecting gives the same bytes."""
    monkeypatch.setattr(sampling, "READ_CHUNK", 2)
    two = {"data.sources": ["docvqa", "llava_multi"]}  # one that streams, one with an archive
    undisturbed = keep(settings(hub, tmp_path / "a", **two), tmp_path / "rows-a")
    program = (
        "import os, sys, json\n"
        "from awares.data import rows, sampling\n"
        "from awares.config import load_params\n"
        "sampling.READ_CHUNK, read, seen = 2, sampling._read, []\n"
        "def dies(*values):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 26: os._exit(9)\n"
        "    return read(*values)\n"
        "sampling._read = dies\n"
        "rows.make_split(load_params('paper', overrides=json.loads(sys.argv[1]), path=sys.argv[2]), 'train')\n"
    )
    params = settings(hub, tmp_path / "b", **two)
    values = {
        **two,
        "data.hub_root": str(hub),
        "paths.runs": str(tmp_path / "b"),
        "data.train_rows": 5,
        "data.validation_rows": 2,
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, json.dumps(values), str(ROOT / "params.yaml")]
    assert subprocess.run(command, env=environment, cwd=ROOT).returncode == 9
    assert list((tmp_path / "b").rglob("rows-*.jsonl"))
    assert keep(params, tmp_path / "rows-b") == undisturbed


def test_a_list_of_one_picture_is_that_picture_and_of_more_is_refused(hub, tmp_path):
    source = opened(settings(hub, tmp_path), "training", "chartqa")
    assert source._file([{"bytes": b"file", "path": None}]) == b"file"
    with pytest.raises(AwaresError, match="2 pictures"):
        source._file([b"one", b"two"])
