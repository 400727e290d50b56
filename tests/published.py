"""Small copies of the published datasets, each in exactly its published schema and layout, with pictures of our own."""

import io
import zipfile
from pathlib import Path

import datasets
from conftest import noise
from datasets import Features, Image, List, Value
from PIL import Image as Pictures


def encoded(seed: int, width: int = 168, height: int = 112, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise(width, height, seed).save(buffer, kind)
    return buffer.getvalue()


def picture(seed: int, **options) -> dict:
    return {"bytes": encoded(seed, **options), "path": f"{seed}.png"}


def write(root: Path, hub: str, rows: list[dict], features: Features, file: str, card: str = "") -> Path:
    """A repository folder with one parquet table and its dataset card."""
    folder = root / hub
    table = folder / file
    table.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(table)
    (folder / "README.md").write_text(f"---\nlicense: other\n{card}---\n")
    return folder


def config(name: str, split: str, path: str) -> str:
    return f"configs:\n- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}\n"


TEXT = Value("string")
TEXTS = List(TEXT)


def schema(texts: str, **others) -> Features:
    """Text columns, named in one string, and others."""
    return Features({**dict.fromkeys(texts.split(), TEXT), **others})


def chartqa(root: Path, count: int, seed: int) -> None:
    kind = datasets.ClassLabel(names=["human", "machine"])
    rows = [
        dict(image=picture(seed + i), query=f"What is bar {i}?", label=[str(i)], human_or_machine=i % 2)
        for i in range(count)
    ]
    features = schema("query", image=Image(), label=TEXTS, human_or_machine=kind)
    write(root, "HuggingFaceM4/ChartQA", rows, features, "data/train-00000-of-00001.parquet")


def docvqa(root: Path, count: int, seed: int) -> None:
    """Every page twice, as DocVQA asks several questions of a page. The card gives the number of rows."""
    numbers = {"questionId": Value("int32"), "docId": Value("int32")}
    texts = "question ucsf_document_id ucsf_document_page_no"
    features = schema(texts, question_types=TEXTS, image=Image(), answers=TEXTS, **numbers)
    page = {"question_types": ["form"], "ucsf_document_id": "abcd0001", "ucsf_document_page_no": "1"}
    rows = [
        dict(questionId=i, docId=i // 2, question=f"What is field {i}?", image=picture(seed + i // 2), **page)
        | {"answers": [f"Value {i}", f"value {i}"]}
        for i in range(count)
    ]
    card = f"dataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: {count}\n"
    card += config("default", "train", "data/train-*")
    write(root, "HuggingFaceM4/DocumentVQA", rows, features, "data/train-00000-of-00001.parquet", card)


def textvqa(root: Path, count: int, seed: int) -> None:
    numbers = dict.fromkeys(("question_id", "image_width", "image_height"), Value("int32"))
    lists = dict.fromkeys(("question_tokens", "answers", "image_classes", "ocr_tokens"), TEXTS)
    texts = "image_id question flickr_original_url flickr_300k_url set_name"
    plain = {
        "image_width": 168,
        "image_height": 112,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "set_name": "train",
    }
    plain |= {"question_tokens": ["what"], "image_classes": ["Sign"], "ocr_tokens": ["exit"]}
    rows = [
        dict(image_id=f"{i:016x}", question_id=i, question=f"what does sign {i} say?", **plain)
        | {"answers": ["stop", f"exit {i}", "", f"exit {i}", "stop it", f"exit {i}", "a", "b", "c", "d"]}
        | {"image": picture(seed + i, kind="JPEG")}
        for i in range(count)
    ]
    features = schema(texts, image=Image(), **numbers, **lists)
    write(root, "lmms-lab/textvqa", rows, features, "data/train-00000-of-00001.parquet")


def llava_multi(root: Path, count: int, seed: int) -> None:
    """Row i % 4: 0 one picture; 1 two, named in the questions; 2 two, each before its own question; 3 three."""
    features = Features(
        id=TEXT,
        images=List({"bytes": Value("binary"), "path": TEXT}),
        conversation=List({"role": TEXT, "content": TEXT}),
        source=TEXT,
    )
    rows: list[dict] = []
    files: dict[str, bytes] = {}
    for i in range(count):
        names = [f"coco/train2017/{i:06d}_{k}.jpg" for k in range((1, 2, 2, 3)[i % 4])]
        files |= {name: encoded(seed + 10 * i + k, 112, 84 + 28 * k, "JPEG") for k, name in enumerate(names)}
        said = {
            0: [f"<image>\nWhat is thing {i}?", f"thing {i}", "Is it red?", "yes"],
            1: [f"<image> <image> For the right image, what is thing {i}?", f"right {i}"],
            2: [f"<image>\nWhat is first {i}?", f"first {i}", f"<image>\nWhat is second {i}?", f"second {i}"],
            3: [f"For image 3, what is thing {i}? <image> <image> <image>", f"third {i}"],
        }[i % 4]
        turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
        images = [{"bytes": None, "path": name} for name in names]
        rows.append(dict(id=f"llava_{i}", images=images, conversation=turns, source="llava_665k_merged"))
    card = config("llava_665k_multi", "train", "llava_665k_multi/train-*")
    table = "llava_665k_multi/train-00000-of-00001.parquet"
    folder = write(root, "TIGER-Lab/Mantis-Instruct", rows, features, table, card)
    with zipfile.ZipFile(folder / "llava_665k_multi" / "train_images.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def visionthink_smart(root: Path, count: int, seed: int) -> None:
    """Published as what save_to_disk wrote: `load_dataset` refuses that on disk and passes over it on the hub."""
    info = {"id": TEXT, "tgt_height": Value("int64"), "tgt_width": Value("int64"), "use_tool": Value("bool")}
    features = schema("doc_id problem solution original_answer data_source", images=Image(), info=info)
    rows = [
        dict(images=picture(seed + i), doc_id=str(i), problem=f"<image>Who wrote book {i}?", solution=f"Author {i}")
        | {"info": {"id": str(i), "tgt_height": 56, "tgt_width": 84, "use_tool": i % 2 == 0}}
        | {"original_answer": "", "data_source": "x"}
        for i in range(count)
    ]
    columns = {name: [row[name] for row in rows] for name in features}
    folder = root / "Senqiao/VisionThink-Smart-Train"
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder, num_shards=2)


def benchmarks(root: Path, count: int, seed: int) -> None:
    """The six of PAPER §4, ``count`` rows each."""
    pictures = {name: [picture(seed + 1000 * k + i) for i in range(count)] for k, name in enumerate("cdoprv")}
    pictures["o"][0] = picture(seed + 9999, width=25, height=16)  # OCRBench has such small ones
    pictures["p"] = [pictures["p"][i // 2] for i in range(count)]

    def benchmark(hub: str, key: str, rows: list[dict], split: str = "test", folder: str = "data", **others) -> None:
        features = schema(" ".join(rows[0].keys() - others.keys()), image=Image(), **others)
        rows = [{**row, "image": one} for row, one in zip(rows, pictures[key], strict=True)]
        card = "" if folder == "data" else config(folder, split, f"{folder}/{split}-*")
        write(root, hub, rows, features, f"{folder}/{split}-00000-of-00001.parquet", card)

    numbers = range(count)
    chart = [{"type": "human_test", "question": f"How many {i}?", "answer": str(i)} for i in numbers]
    benchmark("lmms-lab/ChartQA", "c", chart)
    page = {"question": "Who?", "question_types": [], "ucsf_document_id": "x", "ucsf_document_page_no": "1"}
    page |= {"answers": ["Ann", "ann"], "data_split": "val"}
    lists = {"question_types": TEXTS, "answers": TEXTS, "docId": Value("int64")}
    pages = [{"questionId": str(i), "docId": i, **page} for i in numbers]
    benchmark("lmms-lab/DocVQA", "d", pages, "validation", "DocVQA", **lists)
    word = {"dataset": "IIIT5K", "question": " what is written in the image? ", "answer": ["CHAIN"]}
    words = [{**word, "question_type": "Regular Text Recognition"}] * count
    benchmark("echo840/OCRBench", "o", words, answer=TEXTS)
    dog = {"question_id": "1", "question": "Is there a dog in the image?", "category": "adversarial"}
    dog |= {"image_source": "COCO_val2014_1"}
    benchmark("lmms-lab/POPE", "p", [{"id": str(i), "answer": ("yes", "no")[i % 2], **dog} for i in numbers])
    asked = "Which way?\n\nA. Left\nB. Right\n"
    asked += "Please answer directly with only the letter of the correct option and nothing else."
    benchmark("lmms-lab/RealWorldQA", "r", [{"image_path": "1.webp", "question": asked, "answer": "B"}] * count)
    asked = "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
    asked += "Answer with the option's letter from the given choices directly."
    glove = {"text": asked, "category": "direct_attributes", "label": "A"}
    benchmark("lmms-lab/vstar-bench", "v", [{**glove, "question_id": str(i)} for i in numbers])


TRAINING = (chartqa, docvqa, textvqa, llava_multi, visionthink_smart)


def everything(root: Path, count: int = 16, tests: int = 4) -> Path:
    """Each dataset of data/sources.yaml but the released one: ``count`` training rows, ``tests`` rows per benchmark."""
    for number, make in enumerate(TRAINING, start=1):
        make(root, count, 10_000 * number)
    benchmarks(root, tests, 90_000)
    return root


def opened(content: bytes) -> Pictures.Image:
    return Pictures.open(io.BytesIO(content))


def released(root: Path, count: int, seed: int, pictures: int = 1000) -> None:
    """NimrodShabtay1986/AwaRes in the schema of data/sources.yaml; every second row calls. ``pictures`` take turns."""
    features = Features(images=List(Image()), messages=List({"role": TEXT, "content": TEXT}))
    rows = []
    for i in range(count):
        call = f"GET_CROPS: ['{i % 9}', '5']" if i != 3 else "GET_CROPS: ['all']"
        said = ["<image>What is this?", *([call, "<image>"] if i % 2 else []), f"a {i}"]
        messages = [{"role": "system", "content": "Look."}]
        messages += [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
        own = seed + i % pictures
        images = [picture(own), *([picture(own, width=84, height=56)] if i % 2 else [])]
        rows.append(dict(images=images, messages=messages))
    write(root, "NimrodShabtay1986/AwaRes", rows, features, "data/train-00000-of-00001.parquet")
