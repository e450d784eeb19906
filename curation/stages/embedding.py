"""The stage `siglip`, `effnet` or `compact`: one tower's pooled vector per image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation.decode import ImageBatch
from curation.schema import embedding_schema
from curation.towers import Tower, embed, loaded


@dataclass(frozen=True)
class Embedding:
    """The tower's vector as it is (not normalised), in float16. The description carries the tower's identity."""

    tower: Tower

    @property
    def name(self) -> str:
        return self.tower.name

    @property
    def towers(self) -> tuple[Tower]:
        return (self.tower,)

    @property
    def reads(self) -> str:
        return self.tower.reads

    @property
    def schema(self) -> pa.Schema:
        return embedding_schema(self.tower.dim)

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, Any]]:
        """Read the tower's weights; the function returns `vector`, bytes of 2 * dim per image."""
        loaded(self.tower, device)

        def compute(batch: ImageBatch) -> dict[str, list[bytes]]:
            return {"vector": to_bytes(embed(batch, self.tower, device).pooled)}

        return compute


def to_bytes(vectors: np.ndarray) -> list[bytes]:
    """(N, dim) floats -> N little-endian float16 vectors. What float16 cannot hold (over 65504) is a bug of the tower."""
    with np.errstate(over="ignore"):
        half = vectors.astype("<f2")
    assert np.isfinite(half).all(), f"vectors up to {np.abs(vectors).max()} do not fit float16"
    return [row.tobytes() for row in half]
