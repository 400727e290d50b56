"""The vision tower's windows in one attention call, as an implementation registered with transformers.

By default transformers calls sdpa once a window: thousands of small kernels for a page. For an implementation with
"flash" in its name it passes all windows together, with their boundaries.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

FLASH_WINDOWS = "flash_windows"


def attend_windows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **options: Any
) -> tuple[Tensor, None]:
    """Attention within windows: (1, heads, S, head_dim) each -> (1, S, heads, head_dim).

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
