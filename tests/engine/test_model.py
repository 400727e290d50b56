import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import save_adapter

from awares.engine import chat_format
from awares.engine import model as models
from awares.engine.model import load_model, load_processor, save_model, set_attention, visual_tokens
from awares.errors import AwaresError
from awares.method import protocol


def test_weights_processor_and_template_come_back_equal(tiny: SimpleNamespace, saved: Path, capfd) -> None:
    model, processor = load_model(saved), load_processor(saved)
    kept = tiny.model.state_dict()
    assert model.state_dict().keys() == kept.keys() and not model.training
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert load_model(saved, dtype="bfloat16").dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "") and all(path.stat().st_mode & 0o444 == 0o444 for path in saved.iterdir())
    assert processor.chat_template == processor.tokenizer.chat_template == chat_format.CHAT_TEMPLATE
    assert processor.tokenizer.response_template == chat_format.RESPONSE_TEMPLATE
    assert processor.tokenizer.padding_side == "left"
    assert processor.image_processor.size == tiny.processor.image_processor.size
    messages = protocol.messages("é?", tiny.noise(84, 56, 0), ["top"], [tiny.noise(84, 28, 1)], "ü")
    ours: list[Any] = [tiny.processor, processor]
    old, new = (p.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt") for p in ours)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    config = json.loads((saved / "processor_config.json").read_text())  # others look for the stock processor
    assert hasattr(transformers, config["processor_class"])
    assert hasattr(transformers, config["video_processor"]["video_processor_type"])


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


def logits(model, tiny: SimpleNamespace) -> torch.Tensor:
    messages = protocol.messages("q", tiny.noise(84, 56, 0))
    batch = tiny.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


def test_adapters_are_merged_in_order_or_trained_on_top(tiny: SimpleNamespace, saved: Path, tmp_path: Path) -> None:
    one, two = (save_adapter(saved, tmp_path / name, seed) for seed, name in enumerate(["one", "two"]))
    plain, first = logits(load_model(saved), tiny), logits(load_model(saved, adapter=one), tiny)
    assert (plain - first).abs().max() > 1e-2
    both = load_model(saved, adapter=[one, two])
    assert (logits(both, tiny) - first).abs().max() > 1e-2
    trainable = load_model(saved, adapter=[one, two], trainable=True)
    assert (logits(trainable, tiny) - logits(both, tiny)).abs().max() < 1e-4
    named = [name for name, weight in trainable.named_parameters() if weight.requires_grad]
    assert trainable.training and named and all("lora" in name for name in named)


def test_bad_folders_and_requests_are_named(tiny: SimpleNamespace, saved: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(saved, tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    kept = {name: weight for name, weight in tiny.model.state_dict().items() if "layers.1." not in name}
    tiny.model.save_pretrained(tmp_path / "part", state_dict=kept)
    config = shutil.copytree(saved, tmp_path / "other") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "qwen2_vl"}))
    given: list[tuple[Any, str]] = [
        ({"path": tmp_path / "cut"}, "cut: no readable safetensors"),
        ({"path": tmp_path / "part"}, "part: .* weights missing"),
        ({"path": tmp_path / "other"}, "qwen2_vl.*qwen2_5_vl, qwen3_vl"),
        ({"path": tmp_path / "nothing"}, "nothing"),
        ({"path": saved, "dtype": "int8"}, "base.dtype is 'int8'"),
        ({"path": saved, "adapter": tmp_path}, "adapter_config.json"),
    ]
    if not torch.cuda.is_available():
        given.append(({"path": saved, "device": "cuda"}, "base.device"))
    for options, named in given:
        with pytest.raises(AwaresError, match=named):
            load_model(**options)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_processor(tmp_path / "nothing")
    with pytest.raises(AwaresError, match="base.attn_implementation 'fastest'"):
        set_attention(tiny.model, "fastest")
    folder = shutil.copytree(saved, tmp_path / "old")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["content"] != "<tool_call>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(AwaresError, match="lacks <tool_call>"):
        load_processor(folder)


@pytest.mark.parametrize("sizes", [[(620, 400)], [(400, 330), (112, 112), (140, 512)]])
def test_windows_in_one_call_equal_single_ones(tiny: SimpleNamespace, sizes: Any, monkeypatch: Any) -> None:
    images = [tiny.noise(width, height, 0) for width, height in sizes]
    pixels, config = tiny.processor.image_processor(images, return_tensors="pt"), tiny.model.model.visual.config
    calls, found, work = [0, 0], [], torch.nn.functional.scaled_dot_product_attention
    for number, name in enumerate((config._attn_implementation, models.FLASH_WINDOWS)):

        def counted(*given: Any, at: int = number, **options: Any) -> Any:
            calls[at] += 1
            return work(*given, **options)

        for place in (torch.nn.functional, models):
            monkeypatch.setattr(place, "scaled_dot_product_attention", counted)
        monkeypatch.setattr(config, "_attn_implementation", name)
        with torch.no_grad():
            found.append(tiny.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output)
    assert all(map(torch.equal, *found)) and calls[1] < calls[0] / 2
