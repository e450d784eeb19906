"""The stage `artifacts`: the features of a sparse autoencoder that fire on an image's vector."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import torch

from curation import sae
from curation.decode import ImageBatch
from curation.fitted import check_identity, find, parse_tower, read_json
from curation.schema import ARTIFACTS
from curation.shards import describe, file_hash
from curation.towers import Tower, embed, loaded


@dataclass(frozen=True)
class Artifacts:
    """A sparse autoencoder by packaged name or folder; its cfg.json names the tower. The description carries the hash of the
    weights, so that another fit is another fingerprint.

    Args:
        model: "sae-effnet", or the folder that `k2 sae fit` wrote.
        tower: Where the vectors come from; None takes the tower that the model names.
        k: Codes kept per image, the largest first.

    Raises:
        ValueError: there is no such model, or it was fitted on another tower.
    """

    model: str = "sae-effnet"
    tower: Tower | None = None
    k: int = 32
    name: ClassVar[str] = "artifacts"
    schema: ClassVar[pa.Schema] = ARTIFACTS

    def __post_init__(self):
        metadata = read_json(find(self.model, sae.INFO_FILE) / sae.INFO_FILE).get("metadata", {})
        if self.tower is None:
            if "tower_spec" not in metadata:
                raise ValueError(f"{self.model}: its {sae.INFO_FILE} names no tower (no metadata.tower_spec); give Artifacts(tower=...)")
            object.__setattr__(self, "tower", parse_tower(metadata["tower_spec"]))
        check_identity(self.model, metadata.get("tower", "a tower that its cfg.json does not name"), self.tower.identity, "sae")

    @property
    def towers(self) -> tuple[Tower]:
        return (self.tower,)

    @property
    def reads(self) -> str:
        return self.tower.reads

    def describe(self) -> dict[str, Any]:
        weights = file_hash(find(self.model, sae.INFO_FILE) / sae.WEIGHTS_FILE)
        return {"class": "Artifacts", "weights": weights, "tower": describe(self.tower), "k": self.k}

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, list]]:
        """Read the weights; the function returns `codes`, per image a list of {feature, value}."""
        loaded(self.tower, device)
        # float64: a value that the number of threads moves in its last bit must not move the bytes of an annotation.
        model = sae.load(self.model).to(torch.float64)

        def compute(batch: ImageBatch) -> dict[str, list]:
            return {"codes": sae.codes(model, embed(batch, self.tower, device).pooled, self.tower.identity, self.k)}

        return compute
