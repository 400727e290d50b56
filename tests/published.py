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


def chartqa(root: Path, count: int, seed: int) -> None:
    features = Features(
        image=Image(), query=TEXT, label=TEXTS, human_or_machine=datasets.ClassLabel(names=["human", "machine"])
    )
    rows = [
        dict(image=picture(seed + i), query=f"What is bar {i}?", label=[str(i)], human_or_machine=i % 2)
        for i in range(count)
    ]
    write(root, "HuggingFaceM4/ChartQA", rows, features, "data/train-00000-of-00001.parquet")


def docvqa(root: Path, count: int, seed: int) -> None:
    """Every page twice, as DocVQA asks several questions of a page. The card gives the number of rows."""
    number = Value("int32")
    features = Features(
        questionId=number, question=TEXT, question_types=TEXTS, image=Image(), docId=number,
        ucsf_document_id=TEXT, ucsf_document_page_no=TEXT, answers=TEXTS,
    )  # fmt: skip
    rows = [
        dict(
            questionId=i, question=f"What is field {i}?", question_types=["form"], image=picture(seed + i // 2), docId=i // 2,
            ucsf_document_id="abcd0001", ucsf_document_page_no="1", answers=[f"Value {i}", f"value {i}"],
        )
        for i in range(count)
    ]  # fmt: skip
    card = f"dataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: {count}\n"
    card += config("default", "train", "data/train-*")
    write(root, "HuggingFaceM4/DocumentVQA", rows, features, "data/train-00000-of-00001.parquet", card)


def textvqa(root: Path, count: int, seed: int) -> None:
    features = Features(
        image_id=TEXT, question_id=Value("int32"), question=TEXT, question_tokens=TEXTS, image=Image(),
        image_width=Value("int32"), image_height=Value("int32"), flickr_original_url=TEXT, flickr_300k_url=TEXT,
        answers=TEXTS, image_classes=TEXTS, set_name=TEXT, ocr_tokens=TEXTS,
    )  # fmt: skip
    rows = [
        dict(
            image_id=f"{i:016x}", question_id=i, question=f"what does sign {i} say?", question_tokens=["what"],
            image=picture(seed + i, kind="JPEG"), image_width=168, image_height=112, flickr_original_url="", flickr_300k_url="",
            answers=["stop", f"exit {i}", "", f"exit {i}", "stop it", f"exit {i}", "a", "b", "c", "d"],
            image_classes=["Sign"], set_name="train", ocr_tokens=["exit"],
        )
        for i in range(count)
    ]  # fmt: skip
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
    """Published as what save_to_disk wrote: arrow files with dataset_info.json and state.json, which `load_dataset` refuses on disk and
    passes over on the hub.
    """
    info: dict = {"id": TEXT, "tgt_height": Value("int64"), "tgt_width": Value("int64"), "use_tool": Value("bool")}
    features = Features(
        images=Image(), doc_id=TEXT, problem=TEXT, solution=TEXT, info=info, original_answer=TEXT, data_source=TEXT
    )
    rows = [
        dict(
            images=picture(seed + i), doc_id=str(i), problem=f"<image>Who wrote book {i}?", solution=f"Author {i}",
            info={"id": str(i), "tgt_height": 56, "tgt_width": 84, "use_tool": i % 2 == 0}, original_answer="", data_source="x",
        )
        for i in range(count)
    ]  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in features}
    folder = root / "Senqiao/VisionThink-Smart-Train"
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder, num_shards=2)


def benchmarks(root: Path, count: int, seed: int) -> None:
    """The six of PAPER §4, ``count`` rows each."""
    rows: list[dict]
    pictures = {name: [picture(seed + 1000 * k + i) for i in range(count)] for k, name in enumerate("cdoprv")}
    small = picture(seed + 9999, width=25, height=16)  # OCRBench has such
    features = Features(type=TEXT, question=TEXT, answer=TEXT, image=Image())
    rows = [
        dict(type="human_test", question=f"How many {i}?", answer=str(i), image=p) for i, p in enumerate(pictures["c"])
    ]
    write(root, "lmms-lab/ChartQA", rows, features, "data/test-00000-of-00001.parquet")
    features = Features(
        questionId=TEXT, question=TEXT, question_types=TEXTS, image=Image(), docId=Value("int64"),
        ucsf_document_id=TEXT, ucsf_document_page_no=TEXT, answers=TEXTS, data_split=TEXT,
    )  # fmt: skip
    rows = [
        dict(
            questionId=str(i), question="Who?", question_types=[], image=p, docId=i, ucsf_document_id="x",
            ucsf_document_page_no="1", answers=["Ann", "ann"], data_split="val",
        )
        for i, p in enumerate(pictures["d"])
    ]  # fmt: skip
    card = config("DocVQA", "validation", "DocVQA/validation-*")
    write(root, "lmms-lab/DocVQA", rows, features, "DocVQA/validation-00000-of-00001.parquet", card)
    features = Features(dataset=TEXT, question=TEXT, question_type=TEXT, answer=TEXTS, image=Image())
    kind = "Regular Text Recognition"
    rows = [
        dict(
            dataset="IIIT5K", question=" what is written in the image? ", question_type=kind, answer=["CHAIN"], image=p
        )
        for p in [small, *pictures["o"][1:]]
    ]
    write(root, "echo840/OCRBench", rows, features, "data/test-00000-of-00001.parquet")
    features = Features(
        id=TEXT, question_id=TEXT, question=TEXT, answer=TEXT, image_source=TEXT, image=Image(), category=TEXT
    )
    rows = [
        dict(
            id=str(i), question_id="1", question="Is there a dog in the image?", answer=("yes", "no")[i % 2],
            image_source="COCO_val2014_1", image=pictures["p"][i // 2], category="adversarial",
        )
        for i in range(count)
    ]  # fmt: skip
    write(root, "lmms-lab/POPE", rows, features, "data/test-00000-of-00001.parquet")
    features = Features(image=Image(), image_path=TEXT, question=TEXT, answer=TEXT)
    asked = "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option and nothing else."
    rows = [dict(image=p, image_path="1.webp", question=asked, answer="B") for p in pictures["r"]]
    write(root, "lmms-lab/RealWorldQA", rows, features, "data/test-00000-of-00001.parquet")
    features = Features(image=Image(), text=TEXT, category=TEXT, label=TEXT, question_id=TEXT)
    asked = "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
    asked += "Answer with the option's letter from the given choices directly."
    rows = [
        dict(image=p, text=asked, category="direct_attributes", label="A", question_id=str(i))
        for i, p in enumerate(pictures["v"])
    ]
    write(root, "lmms-lab/vstar-bench", rows, features, "data/test-00000-of-00001.parquet")


TRAINING = (chartqa, docvqa, textvqa, llava_multi, visionthink_smart)


def everything(root: Path, count: int = 16, tests: int = 4) -> Path:
    """Every dataset of data/sources.yaml but the released one, ``count`` training rows and ``tests`` rows a benchmark."""
    for number, make in enumerate(TRAINING, start=1):
        make(root, count, 10_000 * number)
    benchmarks(root, tests, 90_000)
    return root


def opened(content: bytes) -> Pictures.Image:
    return Pictures.open(io.BytesIO(content))


def released(root: Path, count: int, seed: int, pictures: int = 1000) -> None:
    """NimrodShabtay1986/AwaRes in the schema that data/sources.yaml assumes; every second row calls. So many ``pictures`` take turns."""
    features = Features(images=List(Image()), messages=List({"role": TEXT, "content": TEXT}))
    rows = []
    for i in range(count):
        calls = i % 2 == 1
        said = [
            "<image>What is this?",
            f"GET_CROPS: ['{i % 9}', '5']" if i != 3 else "GET_CROPS: ['all']",
            "<image>",
            f"a {i}",
        ]
        turns = said if calls else [said[0], said[3]]
        messages = [{"role": "system", "content": "Look."}]
        messages += [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(turns)]
        own = seed + i % pictures
        images = [picture(own), picture(own, width=84, height=56)] if calls else [picture(own)]
        rows.append(dict(images=images, messages=messages))
    write(root, "NimrodShabtay1986/AwaRes", rows, features, "data/train-00000-of-00001.parquet")
