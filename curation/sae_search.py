"""Which features fire: all pre-activations over a floor, exactly, at a fraction of the cost of the dense matrix.

On a CPU with int8 dot products (VNNI) the product of the rounded rows and encoder rows is computed first; a pre-activation whose
rounded value lies under the floor by more than the rounding can explain is left out, and only the others are computed in float32.
With x = x' + e and w = w' + f (x', w' the rounded ones) the Cauchy-Schwarz inequality bounds what rounding can explain:

    |x w - x' w'| = |e w + x' f| <= |e| |w| + |x'| |f|

so nothing over the floor is ever left out. Elsewhere the dense product is computed tile by tile.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from curation.sae_parallel import gathered, total

TILE = 1_500_000  # pre-activations at once: the tile stays in the cache between the product and the comparison
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)  # the tests hold what is used of it
FLOAT32 = 1e-5  # relative error of a float32 product of vectors, generously


class Codes(NamedTuple):
    """Features and values of N rows, as a CSR matrix (N, m): row i owns entries starts[i] to starts[i + 1], features ascending."""

    starts: Tensor  # (N + 1,) int32
    features: Tensor  # (nnz,) int32
    values: Tensor  # (nnz,)

    def take(self, kept: Tensor) -> "Codes":
        """The codes without the entries whose `kept` (nnz,) is false."""
        before = torch.cat([kept.new_zeros(1, dtype=torch.int32), kept.cumsum(0, dtype=torch.int32)])
        return Codes(before[self.starts], self.features[kept], self.values[kept])

    def counts(self) -> Tensor:
        """(N,) entries per row."""
        return self.starts.diff()


def above(rows: Tensor, encoder: Tensor, bias: Tensor, floor: float) -> Codes:
    """Every pre-activation of rows (N, d) x encoder (m, d) + bias (m,) that is at least `floor`. Rows of similar range beside each
    other (see `by_range`) make it faster, never different."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and floor > 0 and int8_dot():
        return _screened(rows, encoder, bias, floor)
    return _dense(rows, encoder, bias, floor)


def int8_dot() -> bool:
    """Whether this CPU multiplies int8 faster than float32; without VNNI it is many times slower."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


def by_range(rows: Tensor) -> Tensor:
    """Order of the rows (N, d) by their largest magnitude: a tile shares one step of rounding."""
    return rows.abs().amax(1).argsort()


def batch_topk(rows: Tensor, encoder: Tensor, bias: Tensor, k: int, floor: float | None) -> tuple[Codes, float]:
    """The N * k largest positive pre-activations of the whole batch (Bussmann et al. 2024, arXiv:2412.06410), and the least of them.

    `floor`: a guess of a value just under the least one (that of the step before); a wrong guess costs time only. Under
    torch.distributed `rows` is a part of the batch, and the cut is that of the whole.
    """
    wanted = k * int(total(torch.tensor(len(rows), device=rows.device)))
    if floor is None:
        floor = float(gathered(torch.tensor([_guess(rows, encoder, bias, k)], device=rows.device)).mean())
    while True:
        found = above(rows, encoder, bias, floor)
        values = gathered(found.values)
        if len(values) >= wanted or floor <= 0:
            break
        floor = 0.7 * floor if floor > 1e-6 else 0.0
    least = kth_largest(values, wanted)
    return found.take((found.values >= least) & (found.values > 0)), least


def topk(rows: Tensor, encoder: Tensor, bias: Tensor, k: int, floor: float | None) -> tuple[Codes, float]:
    """The k largest positive pre-activations of every row (Gao et al. 2024, arXiv:2406.04093), and a floor for the next batch: the
    10th percentile of the rows' k-th values. Rows with fewer than k over the floor are looked at again, all of their features."""
    found = above(rows, encoder, bias, floor if floor is not None else _guess(rows, encoder, bias, k))
    few = found.counts() < k
    width = max(k, int(found.counts().max()))
    values, features = rows.new_full((len(rows), width), -torch.inf), torch.zeros(len(rows), width, dtype=torch.int32, device=rows.device)
    filled = torch.arange(width, device=rows.device) < found.counts()[:, None]
    values[filled], features[filled] = found.values, found.features
    best = values.topk(min(k, width), dim=1)
    values, features = best.values, features.gather(1, best.indices)
    if few.any():
        dense = torch.addmm(bias, rows[few], encoder.T).topk(k, dim=1)
        values[few], features[few] = dense.values.to(values.dtype), dense.indices.int()  # bfloat16 under autocast
    least = values[:, -1].kthvalue(max(1, len(rows) // 10)).values
    features, order = features.sort(dim=1)
    values = values.gather(1, order)
    starts = torch.arange(0, values.numel() + 1, k, dtype=torch.int32, device=rows.device)
    codes = Codes(starts, features.flatten(), values.flatten())
    return codes.take(codes.values > 0), float(least.clamp_min(0))


def kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest of values (n,), or the least where there are not so many; infinity of none."""
    if not len(values):
        return float("inf")
    place = max(0, len(values) - k)
    if values.device.type == "cpu":  # numpy's partition is ten times as fast as kthvalue
        return float(np.partition(values.numpy(), place)[place])
    return float(values.kthvalue(place + 1).values)


def _guess(rows: Tensor, encoder: Tensor, bias: Tensor, k: int) -> float:
    """A floor from a few rows."""
    few = rows[:: max(1, len(rows) // 64)]
    values = torch.addmm(bias, few, encoder.T).flatten()
    return max(0.0, 0.9 * kth_largest(values, len(few) * k))


def _tiles(num_rows: int, num_features: int) -> list[slice]:
    step = max(16, TILE // num_features)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _dense(rows: Tensor, encoder: Tensor, bias: Tensor, floor: float) -> Codes:
    """`above` from the dense product; on an accelerator in one piece, under autocast where the caller asked for it."""
    if rows.device.type != "cpu":
        pre = torch.addmm(bias, rows, encoder.T)
        row, feature = (pre >= floor).nonzero(as_tuple=True)
        return Codes(_starts(torch.bincount(row, minlength=len(rows))), feature.int(), pre[row, feature].to(rows.dtype))
    counts, features, values = [], [], []
    for tile in _tiles(len(rows), len(encoder)):
        pre = torch.addmm(bias, rows[tile], encoder.T).numpy()
        index = np.flatnonzero(pre >= floor)  # eight times as fast as torch's nonzero
        counts.append(np.bincount(index // len(encoder), minlength=len(pre)))
        features.append((index % len(encoder)).astype(np.int32))
        values.append(pre.ravel()[index])
    joined = (torch.from_numpy(np.concatenate(parts)) for parts in (counts, features, values))
    return Codes(_starts(next(joined)), *joined)


def _screened(rows: Tensor, encoder: Tensor, bias: Tensor, floor: float) -> Codes:
    """`above` by the int8 product; see the head of this file."""
    num_features, tiles = len(encoder), _tiles(len(rows), len(encoder))
    coarse, steps, error, norm = _rounded(encoder)
    room, counts, features = floor - bias.numpy(), [], []
    # One tile's memory for all: fresh pages cost as much as the product.
    products = torch.empty(len(rows[tiles[0]]), num_features, dtype=torch.int32)
    over, grids = np.empty(products.shape, bool), torch.empty(2, len(products), rows.shape[1])
    for tile in tiles:
        part = rows[tile]
        grid, lost, product = grids[0, : len(part)], grids[1, : len(part)], products[: len(part)]
        step = max(float(part.abs().max()), 1e-30) / 127
        torch.mul(part, 1 / step, out=grid).round_()
        torch.add(part, grid, alpha=-step, out=lost)
        of_rows, of_lost = (float(torch.linalg.vecdot(t, t).max()) ** 0.5 * (1 + FLOAT32) for t in (grid, lost))
        slack = of_lost * norm + of_rows * step * error + FLOAT32 * (of_rows * step + of_lost) * norm
        least = np.floor(np.clip((room - slack) / (step * steps), -2e9, 2e9)).astype(np.int32)
        torch._int_mm(grid.to(torch.int8), coarse.T, out=product)
        index = np.flatnonzero(np.greater_equal(product.numpy(), least, out=over[: len(part)]))
        row = index // num_features
        counts.append(np.bincount(row, minlength=len(part)))
        features.append((index - row * num_features).astype(np.int32))
    candidates = torch.from_numpy(np.concatenate(features))
    found = Codes(_starts(torch.from_numpy(np.concatenate(counts))), candidates, rows.new_zeros(len(candidates)))
    values = at(found, rows, encoder).add_(bias[candidates])
    return found._replace(values=values).take(values >= floor)


def _rounded(encoder: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """(int8 (m, d), step (m,), length of the rounding error (m,), length (m,)) of encoder rows (m, d), one step per row."""
    coarse = torch.empty(encoder.shape, dtype=torch.int8)
    steps, error, norm = (torch.empty(len(encoder)) for _ in range(3))
    grids = torch.empty(2, 256, encoder.shape[1])
    for start in range(0, len(encoder), 256):  # in the cache
        part, where = encoder[start : start + 256], slice(start, start + 256)
        grid, lost = grids[:, : len(part)]
        step = torch.abs(part, out=lost).amax(1, keepdim=True).clamp_min_(1e-30).div_(127)  # six times as fast as the infinity norm
        coarse[where] = torch.div(part, step, out=grid).round_()
        torch.addcmul(part, grid, step, value=-1, out=lost)
        steps[where] = step[:, 0]
        error[where], norm[where] = torch.linalg.vecdot(lost, lost), torch.linalg.vecdot(part, part)
    return coarse, steps.numpy(), error.sqrt_().numpy() * (1 + FLOAT32), norm.sqrt_().numpy() * (1 + FLOAT32)


def _starts(counts: Tensor) -> Tensor:
    """(N,) entries per row -> (N + 1,) where every row starts."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def at(codes: Codes, left: Tensor, right: Tensor) -> Tensor:
    """(nnz,): the products of row i of left (N, d) and row j of right (m, d) at the places of the codes."""
    zero = csr(codes, len(right), torch.zeros_like(codes.values))
    return torch.sparse.sampled_addmm(zero, left, right.T, beta=0).values()


def csr(codes: Codes, num_features: int, values: Tensor | None = None) -> Tensor:
    """The codes, or other values at their places, as a sparse matrix (N, m)."""
    shape = (len(codes.starts) - 1, num_features)
    values = codes.values if values is None else values
    return torch.sparse_csr_tensor(codes.starts, codes.features, values, shape, check_invariants=False)
