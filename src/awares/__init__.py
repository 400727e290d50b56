"""AwaRes: a vision-language model that looks at half resolution and asks for high-resolution crops where it needs them.

from awares import AwaRes
trajectory = AwaRes.from_pretrained().ask("page.png", "what is the total?")
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awares.policy import AwaRes

__version__ = "0.1.0"
__all__ = ["AwaRes", "__version__"]

# OpenMP threads spin while they wait, and slow down every other process. libgomp reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    """Import `AwaRes` on first use: torch takes seconds, and crops or metrics do not need it."""
    if name != "AwaRes":
        raise AttributeError(f"module 'awares' has no attribute {name!r}")
    from awares.policy import AwaRes

    return AwaRes
