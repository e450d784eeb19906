"""How strongly the features of an SAE answer to the images of a run, or of a source that has no run.

Of a run with the vectors of the SAE's tower, or of images, a feature's value is known even where it does not fire: the value
before the threshold. A run that holds only codes knows those that were kept; the others are 0.
"""

import hashlib
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import scipy.sparse
from tqdm import tqdm

from curation import sae
from curation.decode import Decoded, DecodeError, decode_for
from curation.fitted import check_identity, check_pooled, find, parse_tower, read_json
from curation.shards import file_hash
from curation.sources import Shard, SourceChangedError, fetch, list_shards, load_listing, read_rows
from curation.tags import part
from curation.towers import Tower, loaded

LIMIT = 200_000  # images: beyond it a card gets no better


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted SAE with what names it."""

    model: str  # the folder's name, as in the tag table
    folder: Path
    sae: sae.Sae
    tower: Tower
    weights: str  # file hash


@dataclass(frozen=True, eq=False)
class Firing:
    """N images and the values of m features on them."""

    fitted: Fitted
    uids: list[str]
    parts: np.ndarray  # (N,) fit, estimate or report: from the image's bytes, of a run from the uid
    shards: list[Shard]  # where the images are
    vectors: np.ndarray | None  # (N, d) of the tower
    codes: scipy.sparse.csc_array | None  # (N, m) where there are no vectors

    @property
    def below(self) -> bool:
        """Whether values under the SAE's own threshold are known."""
        return self.vectors is not None

    def columns(self, features: Collection[int] | np.ndarray) -> np.ndarray:
        """(F,) features -> (N, F) float32 values, before the SAE's threshold where they are known."""
        chosen = np.asarray(features, np.int64)
        if self.codes is not None:
            return self.codes[:, chosen].toarray().astype(np.float32)
        return self.vectors.astype(np.float32) @ self.fitted.sae.w_enc.numpy()[:, chosen] + self.fitted.sae.b_enc.numpy()[chosen]


def read_fitted(model: str) -> Fitted:
    """An SAE by packaged name or folder, with the tower that it was fitted on.

    Raises:
        ValueError: there is none, it names no tower, its tower is another one now, or it is one of patch tokens.
    """
    folder = find(model, sae.INFO_FILE)
    metadata = read_json(folder / sae.INFO_FILE).get("metadata", {})
    if "tower_spec" not in metadata:
        raise ValueError(f"{model}: its {sae.INFO_FILE} names no tower (metadata.tower_spec)")
    check_pooled(model, metadata)
    tower = parse_tower(metadata["tower_spec"])
    check_identity(model, metadata["tower"], tower.identity, "sae")
    return Fitted(folder.name, folder, sae.load(model), tower, file_hash(folder / sae.WEIGHTS_FILE))


def of_run(fitted: Fitted, run: str, limit: int = LIMIT) -> Firing:
    """The images of an annotated run: from the vectors of the SAE's tower where the run has them, else from its codes.

    Of a larger run about `limit` images are taken, chosen by a hash of the uid.

    Raises:
        ValueError: the run has neither, or only those of another tower or SAE.
    """
    stages = read_json(Path(run) / "run.json")["description"]["stages"] if Path(run, "run.json").is_file() else {}
    shards, tower = load_listing(run), fitted.tower
    for stage, column in ((tower.name, "vector"), ("artifacts", "codes")):
        files = sorted(Path(run, "annotations", stage).glob("*.parquet"))
        described = stages.get(stage, {}).get("description", {})
        if not files or (stage == "artifacts" and described.get("weights") != fitted.weights):
            continue
        if stage != "artifacts":
            check_identity(
                run, described.get("tower", {}).get("identity", "a tower that its run.json does not name"), tower.identity, "sae"
            )
        share = limit / max(1, sum(pq.read_metadata(file).num_rows for file in files))
        uids, cells = [], []
        for file in tqdm(files, desc="read", unit="shard", file=sys.stderr, disable=not sys.stderr.isatty()):
            for row in pq.read_table(file, columns=["uid", column]).drop_null().to_pylist():
                if share >= 1 or int.from_bytes(hashlib.md5(row["uid"].encode()).digest()[:8], "big") < share * 2**64:
                    uids.append(row["uid"])
                    cells.append(row[column])
        if not uids:
            raise ValueError(f"{run}: no image of annotations/{stage} could be read")
        parts = np.array([part(uid.encode()) for uid in uids])
        if stage != "artifacts":
            vectors = np.frombuffer(b"".join(cells), "<f2").reshape(-1, tower.dim)
            return Firing(fitted, uids, parts, shards, vectors, None)
        entries = [(i, code["feature"], code["value"]) for i, codes in enumerate(cells) for code in codes]
        rows, features, values = zip(*entries, strict=True) if entries else ((), (), ())
        shape = (len(uids), fitted.sae.num_features)
        return Firing(fitted, uids, parts, shards, None, scipy.sparse.csc_array((values, (rows, features)), shape, dtype=np.float32))
    raise ValueError(
        f"{run} has neither vectors of {tower.identity} nor codes of {fitted.model} ({fitted.weights}); "
        f"annotate it with a recipe that holds Embedding of this tower, or Artifacts({fitted.model!r})"
    )


def of_images(fitted: Fitted, source: str, device: str = "cpu", limit: int = LIMIT, only: set[str] | None = None) -> Firing:
    """The images of a folder, of tars or of Parquet; the first `limit` that can be read, of `only` these keys where given.

    Raises:
        ValueError: none can be read.
    """
    encode, tower, shards = loaded(fitted.tower, device), fitted.tower, list_shards(source)
    uids, parts, vectors = [], [], []
    rows = (row for shard in shards for row in read_rows(shard) if only is None or row["key"] in only)
    for row in tqdm(rows, desc="embed", unit="image", file=sys.stderr, disable=not sys.stderr.isatty()):
        if len(uids) == limit:
            break
        try:
            vectors.append(encode.pooled(tower.prepare([seen(tower, decode_for(row["image"], "pixels"))])))
        except DecodeError as error:
            print(f"left out {row['uid']}: {error}", file=sys.stderr)
            continue
        uids.append(row["uid"])
        parts.append(part(row["image"]))
    if not uids:
        raise ValueError(f"no image of {source} could be read")
    return Firing(fitted, uids, np.array(parts), shards, np.concatenate(vectors), None)


def seen(tower: Tower, decoded: Decoded) -> np.ndarray:
    """What `k2 annotate` shows to this tower."""
    return decoded.view if tower.reads == "view" else decoded.pixels


def pictures(shards: list[Shard], uids: Collection[str]) -> Iterator[tuple[str, Decoded]]:
    """The images with these uids, decoded, in the order of the source; one that is broken, changed or gone is left out."""
    wanted = set(uids)
    for shard in shards:
        with suppress(OSError, SourceChangedError):
            for row in fetch([shard], wanted):
                with suppress(DecodeError):
                    yield row["uid"], decode_for(row["image"], "pixels")


def summary(firing: Firing) -> dict[str, Any]:
    """What names the SAE and the images, for a page or a JSON file."""
    fitted = firing.fitted
    training = fitted.sae.metadata.get("training", {})
    return {
        "model": fitted.model,
        "tower": fitted.tower.identity,
        "weights": fitted.weights,
        "num_features": fitted.sae.num_features,
        "num_images": len(firing.uids),
        "k": training.get("k"),
        "evaluation": fitted.sae.metadata.get("evaluation", {}),
    }
