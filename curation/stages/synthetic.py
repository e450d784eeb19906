"""The stage `synthetic`: how likely a model made the image, from pixels, semantics and what the file declares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation import detector
from curation.declared import LOG_ODDS, declared
from curation.decode import READS, ImageBatch
from curation.fitted import check_identity, find, parse_tower, read_json
from curation.manifest import Reader
from curation.schema import SYNTHETIC
from curation.shards import describe, file_hash
from curation.stages.provenance import facts
from curation.towers import Tower, embed, loaded

_WORDS = tuple(LOG_ODDS)  # a word travels to the towers as its place here


@dataclass(frozen=True)
class Synthetic:
    """A detector by packaged name or folder; its JSON names the towers. The description carries the hash of the weights, so that
    another fit is another fingerprint.

    The bytes are read for what they declare even where the stage `provenance` reads them too: 0.04 ms an image.

    Args:
        model: "synthetic", or the folder that `k2 synthetic fit` wrote.
        towers: Where the vectors come from; None takes those that the model names. Fewer of them leave their evidence out.

    Raises:
        ValueError: there is no such model, or it was fitted on other towers.
    """

    model: str = "synthetic"
    towers: tuple[Tower, ...] | None = None
    name: ClassVar[str] = "synthetic"
    schema: ClassVar[pa.Schema] = SYNTHETIC

    def __post_init__(self):
        info = read_json(find(self.model, detector.INFO_FILE) / detector.INFO_FILE)
        if self.towers is None:
            object.__setattr__(self, "towers", tuple(parse_tower(spec) for spec in info["tower_specs"].values()))
        branches = {detector.branch_of(tower): tower for tower in self.towers}
        for branch, tower in branches.items():
            check_identity(f"{self.model} ({branch})", info["towers"].get(branch, "no tower"), tower.identity, "synthetic")
        if not branches or len(branches) != len(self.towers):
            raise ValueError(f"{self.model} takes one tower for {' and one for '.join(info['towers'])}; got {len(self.towers)} towers")

    @property
    def reads(self) -> str:
        return max((tower.reads for tower in self.towers), key=READS.index)

    def describe(self) -> dict[str, Any]:
        folder = find(self.model, detector.INFO_FILE)
        return {"class": "Synthetic", "weights": file_hash(folder / detector.WEIGHTS_FILE), "towers": describe(self.towers)}

    def prepare(self, batch: ImageBatch) -> np.ndarray:
        """int8 (N,): what each file declares, as a place in the list of words."""
        read_manifest = Reader()
        return np.array([_WORDS.index(declared(facts(encoded, read_manifest))) for encoded in batch.encoded], np.int8)

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, Any]]:
        """Read the weights; the function returns every column of the schema but uid and error."""
        for tower in self.towers:
            loaded(tower, device)
        model = detector.load(self.model)
        branches = {detector.branch_of(tower): tower for tower in self.towers}
        identities = {branch: tower.identity for branch, tower in branches.items()}

        def compute(batch: ImageBatch) -> dict[str, Any]:
            inputs = batch.cache.get((self, "inputs"))
            words = [_WORDS[place] for place in (self.prepare(batch) if inputs is None else inputs)]
            vectors = {branch: embed(batch, tower, device).pooled for branch, tower in branches.items()}
            scores = detector.score(model, vectors, identities, words)
            nothing = [None] * len(batch)
            columns = {name: nothing if column is None else column for name, column in scores._asdict().items()}
            columns["declared"] = words
            return {name: columns[name] for name in SYNTHETIC.names[1:-1]}

        return compute
