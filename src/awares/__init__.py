"""AwaRes: a vision-language model that looks at half resolution and requests high-resolution crops where it needs them.

from awares import AwaRes
trajectory = AwaRes.from_pretrained().ask("page.png", "what is the total?")
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awares.policy import AwaRes as AwaRes

__version__ = "0.1.0"

# OpenMP threads spin while they wait, and slow down every other process. libgomp reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "500")


def __getattr__(name: str) -> Any:
    """Import `AwaRes` on first use: torch takes seconds, and crops or metrics do not need it."""
    if name == "AwaRes":
        return import_module("awares.policy").AwaRes
    raise AttributeError(f"module 'awares' has no attribute {name!r}")
