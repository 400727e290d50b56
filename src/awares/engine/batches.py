"""How rows are grouped: windows of open rows, and padded batches within a token budget."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

_Row = TypeVar("_Row")
WINDOW, WINDOW_PIXELS = 256, 2**28  # rows open at a time, and pixels of their images: 0.8 GB


def windows(rows: Iterable[_Row], pixels: Callable[[_Row], int]) -> Iterator[list[_Row]]:
    """``rows`` in parts of at most WINDOW rows that end once their images have WINDOW_PIXELS pixels."""
    part: list[_Row] = []
    total = 0
    for row in rows:
        part.append(row)
        total += pixels(row)
        if len(part) >= WINDOW or total >= WINDOW_PIXELS:
            yield part
            part, total = [], 0
    if part:
        yield part


def token_groups(lengths: Sequence[int], room: int, budget: int) -> Iterator[list[int]]:
    """Consecutive indices of ``lengths`` whose padded size, with ``room`` for answers, is within ``budget`` tokens."""
    group: list[int] = []
    for index, length in enumerate(lengths):
        longest = max([length, *(lengths[other] for other in group)]) + room
        if group and longest * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
