"""The stage `artifacts`: the features of a sparse autoencoder that fire on an image's vector."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from curation import exact, reviews, sae
from curation.decode import ImageBatch
from curation.fitted import check_identity, check_pooled, find, parse_tower, read_json
from curation.schema import ARTIFACTS
from curation.shards import describe, file_hash
from curation.towers import Tower, embed, loaded


@dataclass(frozen=True)
class Artifacts:
    """A sparse autoencoder by packaged name or folder; its cfg.json names the tower. The description carries the hash of the
    weights, so that another fit is another fingerprint.

    To explore, every image keeps its `k` largest codes. To filter, `only_tags` computes the features of the tag table and nothing
    else (whatever their verdict: that is a choice, and choices are SQL); the description then carries which ones. A value is the same
    bits either way, in any batch, on any number of threads.

    Args:
        model: "sae-compact", or the folder that `k2 sae fit` wrote.
        tower: Where the vectors come from; None takes the tower that the model names.
        k: Codes kept per image, the largest first; of tagged features all that fire are kept.
        only_tags: Only the features of <model>.tags.csv.

    Raises:
        ValueError: there is no such model, it was fitted on another tower or on patch tokens, or it has no tags.
    """

    model: str = "sae-compact"
    tower: Tower | None = None
    k: int = 32
    only_tags: bool = False
    features: tuple[int, ...] | None = field(default=None, init=False)
    name: ClassVar[str] = "artifacts"
    schema: ClassVar[pa.Schema] = ARTIFACTS

    def __post_init__(self):
        folder = find(self.model, sae.INFO_FILE)
        metadata = read_json(folder / sae.INFO_FILE).get("metadata", {})
        check_pooled(self.model, metadata)
        if self.tower is None:
            if "tower_spec" not in metadata:
                raise ValueError(f"{self.model}: its {sae.INFO_FILE} names no tower (no metadata.tower_spec); give Artifacts(tower=...)")
            object.__setattr__(self, "tower", parse_tower(metadata["tower_spec"]))
        check_identity(self.model, metadata.get("tower", "a tower that its cfg.json does not name"), self.tower.identity, "sae")
        if self.only_tags:
            found = sorted({row["feature"] for row in reviews.read_rows(folder)})
            if not found:
                raise ValueError(
                    f"{reviews.table_path(folder)} names no feature; find some with `k2 sae tag --model {self.model} ...` first"
                )
            object.__setattr__(self, "features", tuple(found))

    @property
    def towers(self) -> tuple[Tower]:
        return (self.tower,)

    @property
    def reads(self) -> str:
        return self.tower.reads

    def describe(self) -> dict[str, Any]:
        weights = file_hash(find(self.model, sae.INFO_FILE) / sae.WEIGHTS_FILE)
        kept = {"k": self.k} if self.features is None else {"features": list(self.features)}
        return {"class": "Artifacts", "weights": weights, "tower": describe(self.tower), "sums": "exact"} | kept

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, pa.ListArray]]:
        """Read the weights; the function returns `codes`, per image a list of {feature, value}."""
        loaded(self.tower, device)
        prepared = exact.columns(sae.load(self.model), self.features)
        k = self.k if self.features is None else None

        def compute(batch: ImageBatch) -> dict[str, pa.ListArray]:
            return {"codes": exact.codes(prepared, embed(batch, self.tower, device).pooled, k)}

        return compute
