"""Feature values whose bits depend on nothing but the vector and the weights.

A floating-point sum depends on its order, and a matrix product takes another order with every batch size, number of threads and
library; a value on the edge of two float32 numbers then falls to one side or the other, and with it the bytes of an annotation. Here
both sides are rounded to whole numbers, so small that every partial sum of their products stays below 2^53: float64 adds such numbers
without any error, in any order, at the speed of an ordinary product.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation.sae import Sae
from curation.schema import ARTIFACTS

CODES = ARTIFACTS.field("codes").type


@dataclass(frozen=True, eq=False)
class Columns:
    """Some features of an SAE, prepared for `values`."""

    features: np.ndarray  # (F,) int32
    weights: np.ndarray  # (d, F) float64, whole numbers of at most `bits` bits
    scale: np.ndarray  # (F,) powers of two: weights * scale are the encoder's, each rounded
    bias: np.ndarray  # (F,) float64
    threshold: np.ndarray  # (F,) float64
    bits: int


def columns(model: Sae, features: Sequence[int] | None = None) -> Columns:
    """These features of an SAE, or all of them. Weights are rounded to about 2^-21 of the largest of their feature."""
    chosen = np.arange(model.num_features) if features is None else np.asarray(features, np.int64)
    w_enc, b_enc, threshold = (getattr(model, name).double().numpy() for name in ("w_enc", "b_enc", "threshold"))
    bits = (53 - int(np.ceil(np.log2(model.dim)))) // 2
    largest = np.frexp(np.abs(w_enc[:, chosen]).max(0, initial=0))[1]  # |w| < 2^largest
    whole = np.rint(w_enc[:, chosen] * np.exp2(bits - largest))
    return Columns(chosen.astype(np.int32), whole, np.exp2(largest - bits), b_enc[chosen], threshold[chosen], bits)


def values(prepared: Columns, vectors: np.ndarray) -> np.ndarray:
    """(N, d) finite vectors -> (N, F) float32 values, 0 where a feature does not fire. Vectors are rounded to about 2^-22 of their
    largest component."""
    largest = np.frexp(np.maximum(vectors.max(1, initial=0), -vectors.min(1, initial=0)))[1]
    whole = np.multiply(vectors, np.exp2(prepared.bits - largest.astype(np.float64))[:, None], dtype=np.float64)
    sums = np.rint(whole, out=whole) @ prepared.weights  # exact
    pre = sums * np.exp2(largest - np.float64(prepared.bits))[:, None] * prepared.scale + prepared.bias
    return np.where(pre > prepared.threshold, pre, 0).astype(np.float32)


def codes(prepared: Columns, vectors: np.ndarray, k: int | None = None) -> pa.ListArray:
    """(N, d) vectors -> per row the features that fire, largest value first; at most `k` of them. The type is that of schema.ARTIFACTS."""
    found = values(prepared, vectors)
    if k is not None and k < found.shape[1]:
        kept = np.argpartition(-found, k - 1, axis=1)[:, :k]
        kept.sort(axis=1)
        rows = np.repeat(np.arange(len(found)), k)
        places, amounts = kept.ravel(), np.take_along_axis(found, kept, 1).ravel()
        rows, places, amounts = (part[amounts > 0] for part in (rows, places, amounts))
    else:
        rows, places = np.nonzero(found)
        amounts = found[rows, places]
    order = np.lexsort((places, -amounts, rows))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(found)))]).astype(np.int32)
    entries = pa.StructArray.from_arrays(
        [pa.array(prepared.features[places[order]], pa.int32()), pa.array(amounts[order], pa.float32())],
        fields=list(CODES.value_type),
    )
    return pa.ListArray.from_arrays(pa.array(offsets), entries, type=CODES)
