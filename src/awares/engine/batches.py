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
    begin = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (max(lengths[begin : end + 1]) + room) * (end + 1 - begin) > budget:
            yield list(range(begin, end))
            begin = end
