"""The stage `synthetic`: P(AI-generated) from a fitted probe on a tower's vector."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation import detector
from curation.decode import ImageBatch
from curation.fitted import check_identity, find, parse_tower, read_json
from curation.schema import SYNTHETIC
from curation.shards import describe, file_hash
from curation.towers import Tower, embed, loaded


@dataclass(frozen=True)
class Synthetic:
    """A probe by packaged name or folder; its JSON names the tower. The description carries the hash of the weights, so that
    another fit is another fingerprint.

    Args:
        model: "synthetic-effnet", "synthetic-compact", or the folder that `k2 synthetic fit` wrote.
        tower: Where the vectors come from; None takes the tower that the model names.

    Raises:
        ValueError: there is no such model, or it was fitted on another tower.
    """

    model: str = "synthetic-effnet"
    tower: Tower | None = None
    name: ClassVar[str] = "synthetic"
    schema: ClassVar[pa.Schema] = SYNTHETIC

    def __post_init__(self):
        info = read_json(find(self.model, detector.INFO_FILE) / detector.INFO_FILE)
        if self.tower is None:
            object.__setattr__(self, "tower", parse_tower(info["tower_spec"]))
        check_identity(self.model, info["tower"], self.tower.identity, "synthetic")

    @property
    def reads(self) -> str:
        return self.tower.reads

    def describe(self) -> dict[str, Any]:
        folder = find(self.model, detector.INFO_FILE)
        return {"class": "Synthetic", "weights": file_hash(folder / detector.WEIGHTS_FILE), "tower": describe(self.tower)}

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, np.ndarray]]:
        """Read the weights; the function returns `p_synthetic`, float32 in 0 to 1."""
        loaded(self.tower, device)
        probe = detector.load(self.model)

        def compute(batch: ImageBatch) -> dict[str, np.ndarray]:
            return {"p_synthetic": detector.predict(probe, embed(batch, self.tower, device).pooled, self.tower.identity)}

        return compute
