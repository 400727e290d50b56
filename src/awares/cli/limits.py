"""Limits of ``awares serve``, in a module without heavy imports: the command line shows them in its help."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes and counts that the server accepts; times in seconds."""

    image_bytes: int = 20 * 2**20  # of one image
    image_pixels: int = 50_000_000  # width x height, summed over the images of one request
    images: int = 16  # of one request
    body_bytes: int = 32 * 2**20
    prompt_tokens: int = 16384  # visual tokens included; in mode policy of the first turn
    max_tokens: int = 1024  # of one answer
    queue: int = 128  # requests held at a time, waiting or running
    timeout: float = 120.0  # from the head of a request to the end of its answer
    shutdown: float = 30.0  # for the requests under way when SIGTERM arrives
