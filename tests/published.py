"""Small copies of the published datasets, each in exactly its published schema and layout, with pictures of our own."""

import io
import zipfile
from pathlib import Path
from typing import Any

import datasets
from conftest import noise
from datasets import ClassLabel, Features, Image, List, Value
from PIL import Image as Pictures

TEXT = Value("string")
TEXTS = List(TEXT)


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


CHAT = List({"role": TEXT, "content": TEXT})


def chartqa(root: Path, count: int, seed: int) -> None:
    rows = [
        {"image": picture(seed + i), "query": f"What is bar {i}?", "label": [str(i)], "human_or_machine": i % 2}
        for i in range(count)
    ]
    kinds = ClassLabel(names=["human", "machine"])
    publish(root, "HuggingFaceM4/ChartQA", table(rows, label=TEXTS, human_or_machine=kinds))


def docvqa(root: Path, count: int, seed: int) -> None:
    """Every page twice, as DocVQA asks several questions of a page. The card gives the number of rows."""
    page = {"question_types": ["form"], "ucsf_document_id": "abcd0001", "ucsf_document_page_no": "1"}
    rows = [
        {"questionId": i, "docId": i // 2, "question": f"What is field {i}?", "image": picture(seed + i // 2), **page}
        | {"answers": [f"Value {i}", f"value {i}"]}
        for i in range(count)
    ]
    types = {"questionId": Value("int32"), "docId": Value("int32"), "question_types": TEXTS, "answers": TEXTS}
    card = f"dataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: {count}\n"
    publish(root, "HuggingFaceM4/DocumentVQA", table(rows, **types), card=card)


def textvqa(root: Path, count: int, seed: int) -> None:
    plain = {"question_tokens": ["what"], "image_classes": ["Sign"], "ocr_tokens": ["exit"], "set_name": "train"}
    plain |= {"image_width": 168, "image_height": 112, "flickr_original_url": "", "flickr_300k_url": ""}
    rows = [
        {"image_id": f"{i:016x}", "question_id": i, "question": f"what does sign {i} say?", **plain}
        | {"answers": ["stop", f"exit {i}", "", f"exit {i}", "stop it", f"exit {i}", "a", "b", "c", "d"]}
        | {"image": picture(seed + i, kind="JPEG")}
        for i in range(count)
    ]
    types = dict.fromkeys(("question_id", "image_width", "image_height"), Value("int32"))
    types |= dict.fromkeys(("question_tokens", "answers", "image_classes", "ocr_tokens"), TEXTS)
    publish(root, "lmms-lab/textvqa", table(rows, **types))


def llava_multi(root: Path, count: int, seed: int) -> None:
    """Row i % 4: 0 one picture; 1 two, named in the questions; 2 two, each before its own question; 3 three."""
    rows, files = [], {}
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
        row = {"id": f"llava_{i}", "images": images, "conversation": chat(*said), "source": "llava_665k_merged"}
        rows.append(row)
    made = table(rows, images=List({"bytes": Value("binary"), "path": TEXT}), conversation=CHAT)
    folder = publish(root, "TIGER-Lab/Mantis-Instruct", made, folder="llava_665k_multi")
    with zipfile.ZipFile(folder / "llava_665k_multi" / "train_images.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def visionthink_smart(root: Path, count: int, seed: int) -> None:
    """Published as what save_to_disk wrote: `load_dataset` refuses that on disk and passes over it on the hub."""
    rows = [
        {"images": picture(seed + i), "doc_id": str(i), "problem": f"<image>Who wrote book {i}?"}
        | {"solution": f"Author {i}", "original_answer": "", "data_source": "x"}
        | {"info": {"id": str(i), "tgt_height": 56, "tgt_width": 84, "use_tool": i % 2 == 0}}
        for i in range(count)
    ]
    info = {"id": TEXT, "tgt_height": Value("int64"), "tgt_width": Value("int64"), "use_tool": Value("bool")}
    folder = root / "Senqiao/VisionThink-Smart-Train"
    table(rows, images=Image(), info=info).save_to_disk(folder, num_shards=2)


def benchmarks(root: Path, count: int, seed: int) -> None:
    """The six of PAPER §4, ``count`` rows each."""
    glove = "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
    glove += "Answer with the option's letter from the given choices directly."
    page = {"question": "Who?", "question_types": [], "ucsf_document_id": "x", "ucsf_document_page_no": "1"}
    page |= {"answers": ["Ann", "ann"], "data_split": "val"}
    word = {"dataset": "IIIT5K", "question": " what is written in the image? ", "answer": ["CHAIN"]}
    word |= {"question_type": "Regular Text Recognition"}
    dog = {"question_id": "1", "question": "Is there a dog in the image?", "category": "adversarial"}
    dog |= {"image_source": "COCO_val2014_1"}
    numbers = range(count)
    rows: dict[str, list[dict]] = {
        "ChartQA": [{"type": "human_test", "question": f"How many {i}?", "answer": str(i)} for i in numbers],
        "DocVQA": [{"questionId": str(i), "docId": i, **page} for i in numbers],
        "OCRBench": [word for _ in numbers],
        "POPE": [{"id": str(i), "answer": ("yes", "no")[i % 2], **dog} for i in numbers],
        "RealWorldQA": [{"image_path": "1.webp", "question": WAY, "answer": "B"} for _ in numbers],
        "vstar-bench": [
            {"text": glove, "category": "direct_attributes", "label": "A", "question_id": str(i)} for i in numbers
        ],
    }
    types = {"OCRBench": {"answer": TEXTS}}
    types["DocVQA"] = {"question_types": TEXTS, "answers": TEXTS, "docId": Value("int64")}
    for place, (name, listed) in enumerate(rows.items()):
        seeds = [seed + 1000 * place + (i // 2 if name == "POPE" else i) for i in numbers]
        shown = [{**row, "image": picture(one)} for row, one in zip(listed, seeds, strict=True)]
        if name == "OCRBench":  # has such small ones
            shown[0]["image"] = picture(seed + 9999, width=25, height=16)
        where = {"split": "validation", "folder": name} if name == "DocVQA" else {"split": "test"}
        owner = "echo840" if name == "OCRBench" else "lmms-lab"
        publish(root, f"{owner}/{name}", table(shown, **types.get(name, {})), **where)


def everything(root: Path, count: int = 16, tests: int = 4) -> Path:
    """Each dataset of data/sources.yaml but the released one: ``count`` training rows, ``tests`` rows per benchmark."""
    for number, make in enumerate((chartqa, docvqa, textvqa, llava_multi, visionthink_smart), start=1):
        make(root, count, 10_000 * number)
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
