"""Start-up of the environment of `make vllm`: torchvision, built for CUDA, on a CPU; weights that stay; drafts."""

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


def accept_drafts():
    """The CPU build replaces the kernels of speculative decoding by its own, but misses this wrapper of one."""
    greedy = import_module("vllm.v1.sample.rejection_sampler")._rejection_greedy_sample
    greedy.kernel = import_module("vllm.utils.cpu_triton_utils").rejection_greedy_sample_kernel


class BeforeImport:
    """An import hook: it calls a function before the first import of a module."""

    waiting = {"torchvision": define_operators, "vllm.model_executor.layers.utils": keep_weights}
    waiting["vllm.v1.worker.cpu_model_runner"] = accept_drafts

    def find_spec(self, name, path=None, target=None):
        self.waiting.pop(name, bool)()


sys.meta_path.insert(0, BeforeImport())
