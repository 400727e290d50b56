"""Load and save models, processors and adapters; count tokens.

`AutoProcessor` needs torchvision for the processor's video half, and silently returns a bare tokenizer without it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoTokenizer, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.utils import logging as transformers_logging

from awares.engine import chat_format
from awares.errors import AwaresError, AwaresFileError, AwaresValueError

# By model_type: the class; the stock processor and its video half
CLASSES: dict[str, Any] = {"qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration}
CLASSES["qwen3_vl"] = transformers.Qwen3VLForConditionalGeneration
STOCK = {"qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor")}
STOCK["qwen3_vl"] = ("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GPU_FIX = "install torch's CUDA build and the driver that it needs (CUDA 13: 580 or newer; nvidia-smi shows yours)"
NO_WEIGHTS = f"no {ADAPTER_WEIGHTS} there, and only safetensors are read"
FLASH_WINDOWS = "flash_windows"  # see `attend_windows`
Grid = tuple[int, int]  # patches in height and width
Adapters = str | Path | Sequence[str | Path] | None
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImageOnlyProcessor(ProcessorMixin):
    """Qwen2.5-VL's processor for text and images: text with placeholders -> ids, type ids, pixel values, grids."""

    return_mm_token_type_ids = True  # without them the model silently falls back to 1-D positions

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or chat_format.CHAT_TEMPLATE)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As in `ProcessorMixin`, but images are tensors even if ``return_tensors`` is not set: TRL needs that."""
        if images is not None and kwargs.get("return_tensors") is None:
            kwargs["images_kwargs"] = {"return_tensors": "pt", **kwargs.get("images_kwargs", {})}
        return super().__call__(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return self.image_token * (patches // self.image_processor.merge_size**2)

    @property
    def model_input_names(self) -> list[str]:
        return super().model_input_names + ["mm_token_type_ids"]


def make_processor(tokenizer: Any, min_pixels: int = 56 * 56, max_pixels: int = 2000 * 2000) -> ImageOnlyProcessor:
    """A processor around ``tokenizer``; images are resized to between ``min_pixels`` and ``max_pixels`` (areas)."""
    chat_format.install(tokenizer)
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return ImageOnlyProcessor(Qwen2VLImageProcessorPil(size=size), tokenizer)


def load_processor(path: str | Path, pixels: tuple[int, int] = (0, 0)) -> ImageOnlyProcessor:
    """Processor of a checkpoint with our chat template; ``pixels``: least and most of a resized image, 0 = its own."""
    source = _source(path)
    with _reading(path, "cannot read tokenizer and image processor"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(source)
    missing = ", ".join(sorted({*chat_format.SPECIAL_TOKENS, *chat_format.TOOL_TOKENS} - set(tokenizer.get_vocab())))
    if missing:
        raise AwaresValueError(f"{path}: the tokenizer lacks {missing}: use that of a Qwen2.5-VL or Qwen3-VL")
    chat_format.install(tokenizer)
    if any(pixels):
        size: Any = image_processor.size
        least, most = pixels[0] or size["shortest_edge"], pixels[1] or size["longest_edge"]
        image_processor.size = replace(size, shortest_edge=least, longest_edge=most)
    return ImageOnlyProcessor(image_processor, tokenizer)


def load_config(path: str | Path) -> Any:
    """The configuration of a checkpoint folder (or hub name); AwaresError if it is missing or of another model type."""
    with _reading(path):
        config = AutoConfig.from_pretrained(_source(path))
    if config.model_type not in CLASSES:
        raise AwaresValueError(f"{path}: a model of type {config.model_type}; awares runs {', '.join(CLASSES)}")
    return config


def load_model(
    path: str | Path, dtype: str = "float32", device: str = "cpu", adapter: Adapters = None, trainable: bool = False
) -> Any:
    """A Qwen2.5-VL or Qwen3-VL in evaluation mode, with the LoRA ``adapter`` (or several, in order) merged in.

    ``trainable``: in training mode, with the last adapter on top as a trainable PeftModel. Only safetensors are read.
    AwaresFileError for a missing folder, AwaresValueError for a truncated checkpoint.
    """
    if dtype not in DTYPES:
        raise AwaresValueError(f"base.dtype is {dtype!r}: use one of {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise AwaresValueError(f"base.device is {device!r} but torch sees no GPU: {GPU_FIX}, or use cpu")
    model_class = CLASSES[load_config(path).model_type]
    options = {"dtype": DTYPES[dtype], "use_safetensors": True, "output_loading_info": True}
    with _reading(path):
        model, info = model_class.from_pretrained(_source(path), **options)
    lacking = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if lacking:
        raise AwaresValueError(f"{path}: incomplete checkpoint, {len(lacking)} weights missing, such as {lacking[0]}")
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter or ())
    for folder in adapters:
        model = _add_adapter(model, folder, trainable and folder is adapters[-1])
    return model.to(device).train(trainable)


def attend_windows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **options: Any
) -> tuple[Tensor, None]:
    """The vision tower's windows in one call: (1, heads, S, head_dim) each -> (1, S, heads, head_dim).

    By default transformers calls sdpa once a window: thousands of small kernels for a page. To an implementation with
    "flash" in its name it gives all windows together.
    ``cu_seq_lens_q`` in ``options``: the boundaries of the windows, (windows + 1,) from 0 to S. On CUDA in half
    precision this is one call of torch's variable-length kernel, else one sdpa call for each length of window.
    """
    bounds, longest = options["cu_seq_lens_q"], options["max_length_q"]
    if query.is_cuda and query.dtype != torch.float32 and query.shape[-1] % 8 == 0:
        attend: Any = varlen.varlen_attn
        packed = [one[0].transpose(0, 1) for one in (query, key, value)]
        return attend(*packed, bounds, bounds, longest, longest)[None], None
    bounds = bounds.cpu()
    output = torch.empty_like(query[0].transpose(0, 1))  # (S, heads, head_dim)
    for length in bounds.diff().unique().tolist():
        starts = bounds[:-1][bounds.diff() == length]
        places = (starts[:, None] + torch.arange(length)).to(query.device)  # (windows, length)
        parts: list[Any] = [one[0][:, places].transpose(0, 1) for one in (query, key, value)]
        output[places] = scaled_dot_product_attention(*parts).transpose(1, 2)
    return output[None], None


AttentionInterface.register(FLASH_WINDOWS, attend_windows)


def set_attention(model: Any, name: str) -> None:
    """Let ``model`` attend by ``name``: flash_windows (the vision tower alone), or one that transformers knows.

    "" changes nothing. AwaresValueError for a name that is unknown or needs a package that is not installed.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        if name == FLASH_WINDOWS:
            model.model.visual.config._attn_implementation = name
        elif name:
            model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise AwaresValueError(f"base.attn_implementation {name!r}: {str(error).splitlines()[0]}") from error


def adapter_folder(path: str | Path) -> Path | None:
    """The folder of the adapter ``path``, a folder or a hub name; None if it is not an adapter."""
    if Path(path).is_dir() or not _is_hub_name(str(path)):
        return Path(path) if Path(path, ADAPTER_CONFIG).is_file() else None
    try:
        with _reading(path):
            folder = Path(hf_hub_download(str(path), ADAPTER_CONFIG)).parent
    except AwaresFileError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise
    with _reading(path, NO_WEIGHTS):
        hf_hub_download(str(path), ADAPTER_WEIGHTS, revision=folder.name)  # of the same commit
    return folder


def save_model(model: Any, processor: ImageOnlyProcessor, path: str | Path) -> None:
    """Save weights (the adapter of a PEFT model) and processor; the folder appears only when it is complete."""
    partial = Path(f"{path}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _quiet():
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    stock, video = STOCK[model.config.model_type]  # other programs (vLLM) load them
    shared = ("merge_size", "patch_size", "temporal_patch_size", "image_mean", "image_std")
    half = {name: getattr(processor.image_processor, name) for name in shared}
    named = partial / "processor_config.json"
    config = json.loads(named.read_text()) | {"processor_class": stock}
    config |= {"video_processor": {"video_processor_type": video, **half}}
    named.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in filter(Path.is_file, partial.rglob("*")):
        file.chmod(0o644)  # safetensors files are readable only by their owner
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def patch_grid(size: tuple[int, int], processor: ImageOnlyProcessor) -> Grid:
    """Patches of an image of ``size`` (width, height) in px, after the processor's resizing."""
    images = processor.image_processor
    side, limits = images.patch_size * images.merge_size, images.size
    height, width = smart_resize(size[1], size[0], side, limits["shortest_edge"], limits["longest_edge"])
    return height // images.patch_size, width // images.patch_size


def visual_tokens(size: tuple[int, int], processor: ImageOnlyProcessor) -> int:
    """Visual tokens of an image of ``size`` (width, height) in px, after the processor's resizing (28 px a token)."""
    height, width = patch_grid(size, processor)
    return height * width // processor.image_processor.merge_size**2


def set_threads(threads: int) -> None:
    """CPU threads of torch. The number is a parameter, because sums of floats, and therefore ties, depend on it."""
    torch.set_num_threads(threads)


def _add_adapter(model: Any, adapter: str | Path, trainable: bool) -> Any:
    from peft import PeftModel

    folder = adapter_folder(adapter)
    if folder is None:
        raise AwaresFileError(f"{adapter}: no {ADAPTER_CONFIG} there: give an adapter's folder, or a hub name")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise AwaresFileError(f"{adapter}: {NO_WEIGHTS}")
    with _reading(folder, "adapter does not fit or is damaged"):
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    return peft_model if trainable else peft_model.merge_and_unload()


def _source(path: str | Path) -> str:
    """``path`` if it is a folder, or a hub name such as Qwen/Qwen2.5-VL-7B-Instruct."""
    text = str(path)
    if not Path(text).is_dir() and not _is_hub_name(text):
        raise AwaresFileError(f"{path}: no such model folder")
    return text


def _is_hub_name(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/")) and not Path(text).parent.exists()


@contextmanager
def _reading(path: str | Path, fault: str = "") -> Iterator[None]:
    """Turn any error of the libraries (plain Exception for damaged files) into an AwaresError with ``fault``."""
    try:
        with _quiet():
            yield
    except AwaresError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(path).is_dir():
            usual = "no readable safetensors checkpoint: fetch it again"
            raise AwaresValueError(f"{path}: {fault or usual} ({reason})") from error
        usual = "no such model folder, and not available from the hub"
        raise AwaresFileError(f"{path}: {fault or usual} ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and progress bars of transformers: they differ between runs of a notebook."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
