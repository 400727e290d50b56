import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from awares.engine import chat_format
from awares.engine.model import load_model, load_processor, save_model, visual_tokens
from awares.errors import AwaresError
from awares.method import protocol


@pytest.fixture(scope="module")
def saved(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny.model, tiny.processor, folder)
    return folder


def test_weights_come_back_equal(tiny: SimpleNamespace, saved: Path) -> None:
    model = load_model(saved)
    old, new = tiny.model.state_dict(), model.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert not model.training
    assert load_model(saved, dtype="bfloat16").dtype == torch.bfloat16


def test_processor_template_and_parser_come_back_equal(tiny: SimpleNamespace, saved: Path) -> None:
    processor = load_processor(saved)
    assert processor.chat_template == processor.tokenizer.chat_template == chat_format.CHAT_TEMPLATE
    assert processor.tokenizer.response_template == chat_format.RESPONSE_TEMPLATE
    assert processor.tokenizer.padding_side == "left"
    assert processor.image_processor.size == tiny.processor.image_processor.size
    messages = protocol.messages("é?", tiny.noise(84, 56, 0), ["top"], [tiny.noise(84, 28, 1)], "ü")
    ours: list[Any] = [tiny.processor, processor]
    old, new = (p.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt") for p in ours)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_saved_files_can_be_read_by_others_and_nothing_is_printed(saved: Path, capfd) -> None:
    load_model(saved)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in saved.iterdir())
    assert capfd.readouterr() == ("", "")


def test_others_find_the_stock_processor_with_its_video_half(saved: Path) -> None:
    """It cannot be loaded here, for want of torchvision; without the second entry it refuses the folder."""
    config = json.loads((saved / "processor_config.json").read_text())
    assert getattr(transformers, config["processor_class"]).__name__ == "Qwen2_5_VLProcessor"
    video = config["video_processor"]
    assert hasattr(transformers, video["video_processor_type"])
    assert video["patch_size"] == config["image_processor"]["patch_size"]


def test_an_interrupted_save_leaves_the_old_folder(tiny: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    save_model(tiny.model, tiny.processor, tmp_path / "m")
    before = sorted(path.name for path in (tmp_path / "m").iterdir())
    monkeypatch.setattr(type(tiny.processor), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(tiny.model, tiny.processor, tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == before
    load_model(tmp_path / "m")


@pytest.mark.parametrize("size", [(28, 28), (224, 448), (333, 777), (29, 5000), (3000, 2500)])
def test_visual_tokens_are_the_processors(tiny: SimpleNamespace, size: tuple[int, int]) -> None:
    grid = tiny.processor.image_processor([tiny.noise(*size, 0)], return_tensors="pt")["image_grid_thw"]
    assert visual_tokens(size, tiny.processor) == grid.prod().item() // 4


def adapter(tiny: SimpleNamespace, saved: Path, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_model(saved), config).save_pretrained(str(folder))
    return folder


def logits(model, tiny: SimpleNamespace) -> torch.Tensor:
    messages = protocol.messages("q", tiny.noise(84, 56, 0))
    batch = tiny.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


def test_adapters_are_merged_in_order_or_trained_on_top(tiny: SimpleNamespace, saved: Path, tmp_path: Path) -> None:
    one, two = (adapter(tiny, saved, tmp_path / name, seed) for seed, name in enumerate(["one", "two"]))
    plain, first = logits(load_model(saved), tiny), logits(load_model(saved, adapter=one), tiny)
    assert (plain - first).abs().max() > 1e-2
    both = load_model(saved, adapter=[one, two])
    assert (logits(both, tiny) - first).abs().max() > 1e-2
    trainable = load_model(saved, adapter=[one, two], trainable=True)
    assert (logits(trainable, tiny) - logits(both, tiny)).abs().max() < 1e-4
    named = [name for name, weight in trainable.named_parameters() if weight.requires_grad]
    assert trainable.training and named and all("lora" in name for name in named)


def test_a_truncated_checkpoint_is_named(saved: Path, tiny: SimpleNamespace, tmp_path: Path) -> None:
    save_model(tiny.model, tiny.processor, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(AwaresError, match="cut: no readable safetensors checkpoint"):
        load_model(tmp_path / "cut")


def test_a_checkpoint_without_some_weights_is_named(tiny: SimpleNamespace, tmp_path: Path) -> None:
    kept = {name: weight for name, weight in tiny.model.state_dict().items() if "layers.1." not in name}
    tiny.model.save_pretrained(tmp_path / "part", state_dict=kept)
    with pytest.raises(AwaresError, match="part: incomplete checkpoint, .* weights missing"):
        load_model(tmp_path / "part")


def test_bad_requests_are_named(saved: Path, tmp_path: Path) -> None:
    for load in (load_model, load_processor):
        with pytest.raises(FileNotFoundError, match="nothing"):
            load(tmp_path / "nothing")
    with pytest.raises(AwaresError, match="base.dtype is 'int8'"):
        load_model(saved, dtype="int8")
    with pytest.raises(AwaresError, match="no adapter_config.json"):
        load_model(saved, adapter=tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(AwaresError, match="no GPU"):
            load_model(saved, device="cuda")


def test_a_tokenizer_without_the_tool_tokens_is_refused(saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        text = path.read_bytes()
        if path.name == "tokenizer.json":
            tokenizer = json.loads(text)
            tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<tool_call>"]
            text = json.dumps(tokenizer).encode()
        if path.name != "tokenizer_config.json":
            (tmp_path / path.name).write_bytes(text)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(AwaresError, match="lacks <tool_call>"):
        load_processor(tmp_path)
