"""Start-up of the environment of `make vllm`: torchvision, built for CUDA, on a CPU torch, and weights that stay."""

import sys
from importlib import import_module


def define_operators():
    """Torchvision does not load without them, and only its CUDA build on a CUDA torch defines them."""
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        import_module("torch.library").define(f"torchvision::{name}", schema)


def keep_weights():
    """Without oneDNN, which packs a layer's weights: TRL could not load new ones."""
    import_module("vllm._custom_ops")._supports_onednn = False


class BeforeImport:
    """An import hook: it calls a function before the first import of a module."""

    waiting = {"torchvision": define_operators, "vllm.model_executor.layers.utils": keep_weights}

    def find_spec(self, name, path=None, target=None):
        self.waiting.pop(name, bool)()


sys.meta_path.insert(0, BeforeImport())
