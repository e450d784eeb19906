"""The tag table: what a feature of a sparse autoencoder means, above which value, who says so, and of which encoder it holds.

`k2 sae tag` proposes rows from evidence (curation/tag_select.py); a person signs them (`k2 sae review`, or a name in the column
`reviewers`). Removal takes all of: the verdict "artifact", a reviewer, and the very encoder and SAE that the run was annotated with.
"""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from curation.schema import TAGS
from curation.shards import write_bytes

PARTS = {"fit": 0.6, "estimate": 0.8, "report": 1.0}  # cumulative shares; the SAE itself is trained on `fit` only
VERDICTS = ("artifact", "style", "content", "mixed", "unknown")


def part(encoded: bytes) -> str:
    """fit, estimate or report, from the image's bytes alone: the same picture is in the same part in every command."""
    position = int.from_bytes(hashlib.md5(encoded).digest()[:8], "big") / 2**64
    return next(name for name, end in PARTS.items() if position < end)


@dataclass(frozen=True)
class Tag:
    """One row of the tag table (schema.TAGS, in its order)."""

    model: str  # the SAE's folder name
    feature: int
    tag: str  # the proposed name: the kinds of damage that it answers to, joined by "+"
    verdict: str  # one of VERDICTS
    threshold: float
    reviewers: str = ""  # names joined by ";"; empty: a proposal that nobody signed
    tower: str = ""  # identity of the encoder
    weights: str = ""  # short hash of the SAE's weights file

    @property
    def signed(self) -> bool:
        return any(name.strip() for name in self.reviewers.split(";"))


def fires(values: np.ndarray, tags: Sequence[Tag]) -> np.ndarray:
    """(n, m) -> (n,) bool: does any artifact tag hold?"""
    hit = np.zeros(len(values), bool)
    for tag in tags:
        if tag.verdict == "artifact":
            hit |= values[:, tag.feature] > tag.threshold
    return hit


def write_csv(tags: Sequence[Tag], path: Path) -> None:
    """The tag table; a header alone when there is no tag."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(TAGS.names)
    for tag in tags:
        row = dict(zip(TAGS.names, astuple(tag), strict=True))
        writer.writerow((row | {"threshold": f"{tag.threshold:.6g}"}).values())
    write_bytes(buffer.getvalue().encode(), path)


def read_csv(path: Path) -> list[Tag]:
    """The rows of a tag table.

    Raises:
        ValueError: columns or verdicts that we do not know.
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != TAGS.names:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {TAGS.names}; make it again with `k2 sae tag`")
        rows = list(reader)
    for row in rows:
        if row["verdict"] not in VERDICTS:
            raise ValueError(f"{path}: verdict {row['verdict']!r} of feature {row['feature']}; choose from {', '.join(VERDICTS)}")
    return [Tag(**row | {"feature": int(row["feature"]), "threshold": float(row["threshold"])}) for row in rows]
