"""Small copies of the published datasets: the published layout and the columns that we read, with our own pictures."""

import io
import zipfile
from pathlib import Path
from typing import Any

import datasets
from conftest import noise
from datasets import Features, Image, List, Value
from PIL import Image as Pictures

TEXT = Value("string")
TEXTS = List(TEXT)
CHAT = List({"role": TEXT, "content": TEXT})
WAY = "Which way?\n\nA. Left\nB. Right\n"
WAY += "Please answer directly with only the letter of the correct option and nothing else."


def file_of(image: Pictures.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encoded(seed: int, width: int = 168, height: int = 112, kind: str = "PNG") -> bytes:
    return file_of(noise(width, height, seed), kind)


def opened(content: bytes) -> Pictures.Image:
    return Pictures.open(io.BytesIO(content))


def picture(seed: int, **options: Any) -> dict[str, Any]:
    return {"bytes": encoded(seed, **options), "path": f"{seed}.png"}


def table(rows: list[dict], **others: Any) -> datasets.Dataset:
    """A table with the columns of ``rows``: ``image``, texts, and ``others`` with their types."""
    features = {name: others.get(name, Image() if name == "image" else TEXT) for name in rows[0]}
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, Features(features))


def publish(
    root: Path, hub: str, rows: datasets.Dataset, split: str = "train", folder: str = "data", card: str = ""
) -> Path:
    """A repository with one parquet table and its dataset card; a ``folder`` other than data is a configuration."""
    file = root / hub / folder / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    rows.to_parquet(file)
    name = "default" if folder == "data" else folder
    config = f"configs:\n- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {folder}/{split}-*\n"
    (root / hub / "README.md").write_text(f"---\nlicense: other\n{card}{config if name == folder or card else ''}---\n")
    return root / hub


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def llava_multi(root: Path, count: int, seed: int) -> None:
    """Row i % 4: 0 one picture; 1 two, named in the questions; 2 two, each before its own question; 3 three."""
    rows: list[dict] = []
    files: dict[str, bytes] = {}
    for i in range(count):
        names = [f"coco/train2017/{i:06d}_{k}.jpg" for k in range((1, 2, 2, 3)[i % 4])]
        files |= {name: encoded(seed + 10 * i + k, 112, 84 + 28 * k, "JPEG") for k, name in enumerate(names)}
        said = [
            (f"<image>\nWhat is thing {i}?", f"thing {i}", "Is it red?", "yes"),
            (f"<image> <image> For the right image, what is thing {i}?", f"right {i}"),
            (f"<image>\nWhat is first {i}?", f"first {i}", f"<image>\nWhat is second {i}?", f"second {i}"),
            (f"For image 3, what is thing {i}? <image> <image> <image>", f"third {i}"),
        ][i % 4]
        images = [{"bytes": None, "path": name} for name in names]
        rows.append({"images": images, "conversation": chat(*said)})
    made = table(rows, images=List({"bytes": Value("binary"), "path": TEXT}), conversation=CHAT)
    folder = publish(root, "TIGER-Lab/Mantis-Instruct", made, folder="llava_665k_multi")
    with zipfile.ZipFile(folder / "llava_665k_multi" / "train_images.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def training(root: Path, count: int) -> None:
    """The five training sources, ``count`` rows each.

    DocVQA asks twice about every page, and its card gives the number of rows. VisionThink's is what save_to_disk wrote:
    `load_dataset` refuses that on disk and passes over it on the hub.
    """
    numbers = range(count)
    bars = [{"image": picture(10_000 + i), "query": f"What is bar {i}?", "label": [str(i)]} for i in numbers]
    publish(root, "HuggingFaceM4/ChartQA", table(bars, label=TEXTS))
    pages = [
        {"question": f"What is field {i}?", "image": picture(20_000 + i // 2), "answers": [f"Value {i}", f"value {i}"]}
        for i in numbers
    ]
    card = f"dataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: {count}\n"
    publish(root, "HuggingFaceM4/DocumentVQA", table(pages, answers=TEXTS), card=card)
    signs = [
        {"question": f"what does sign {i} say?", "image": picture(30_000 + i, kind="JPEG")}
        | {"answers": ["stop", f"exit {i}", "", f"exit {i}", "stop it", f"exit {i}", "a", "b", "c", "d"]}
        for i in numbers
    ]
    publish(root, "lmms-lab-encoder/textvqa", table(signs, answers=TEXTS))
    llava_multi(root, count, 40_000)
    books = [
        {"images": picture(50_000 + i), "problem": f"<image>Who wrote book {i}?", "solution": f"It is Author {i}."}
        | {"original_answer": f"Author {i}"}
        for i in numbers
    ]
    table(books, images=Image()).save_to_disk(root / "Senqiao/VisionThink-Smart-Train", num_shards=2)


def benchmarks(root: Path, count: int, seed: int) -> None:
    """The six of PAPER §4, ``count`` rows each."""
    glove = "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
    glove += "Answer with the option's letter from the given choices directly."
    dog, numbers = "Is there a dog in the image?", range(count)
    rows: dict[str, list[dict]] = {
        "ChartQA": [{"question": f"How many {i}?", "answer": str(i)} for i in numbers],
        "DocVQA": [{"question": "Who?", "answers": ["Ann", "ann"]} for _ in numbers],
        "OCRBench": [{"question": " what is written in the image? ", "answer": ["CHAIN"]} for _ in numbers],
        "POPE": [{"question": dog, "answer": ("yes", "no")[i % 2]} for i in numbers],
        "RealWorldQA": [{"question": WAY, "answer": "B"} for _ in numbers],
        "vstar-bench": [{"text": glove, "label": "A"} for _ in numbers],
    }
    types = {"OCRBench": {"answer": TEXTS}, "DocVQA": {"answers": TEXTS}}
    for place, (name, listed) in enumerate(rows.items()):
        seeds = [seed + 1000 * place + (i // 2 if name == "POPE" else i) for i in numbers]
        shown = [{**row, "image": picture(one)} for row, one in zip(listed, seeds, strict=True)]
        if name == "OCRBench":  # has such small ones
            shown[0]["image"] = picture(seed + 9999, width=25, height=16)
        where = {"split": "validation", "folder": name} if name == "DocVQA" else {"split": "test"}
        owner = "echo840" if name == "OCRBench" else "lmms-lab-encoder"
        publish(root, f"{owner}/{name}", table(shown, **types.get(name, {})), **where)


def everything(root: Path, count: int = 16, tests: int = 4) -> Path:
    """Each dataset of data/sources.yaml but the released one: ``count`` training rows, ``tests`` rows per benchmark."""
    training(root, count)
    benchmarks(root, tests, 90_000)
    return root


def released(root: Path, count: int, seed: int, pictures: int = 1000) -> None:
    """NimrodShabtay1986/AwaRes in the schema of data/sources.yaml; every second row calls. ``pictures`` take turns."""
    rows = []
    for i in range(count):
        call = f"GET_CROPS: ['{i % 9}', '5']" if i != 3 else "GET_CROPS: ['all']"
        said = chat("<image>What is this?", *([call, "<image>"] if i % 2 else []), f"a {i}")
        own = seed + i % pictures
        images = [picture(own), *([picture(own, width=84, height=56)] if i % 2 else [])]
        rows.append({"images": images, "messages": [{"role": "system", "content": "Look."}, *said]})
    publish(root, "NimrodShabtay1986/AwaRes", table(rows, images=List(Image()), messages=CHAT))
