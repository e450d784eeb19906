"""How alike and how varied sets of embeddings are: kernel and Frechet distances of two sets, the effective number of images in one.

All are functions of float arrays (N, d), one row per image, of any one tower. Nothing here knows what made the images.
"""

import numpy as np
from scipy.spatial.distance import pdist


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of x (N, d) and y (M, d) with the kernel (a.b / d + 1)^3: KID's formula.

    Binkowski et al. 2018 (arXiv:1801.01401), there on Inception features. Unlike a Frechet distance its mean does not depend on the
    number of images, which is why it is the one to report for hundreds of them. Near 0, and possibly below, for equal distributions.

    Raises:
        ValueError: a set has fewer than two rows, or the widths differ.
    """
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"sets of shape {x.shape} and {y.shape}: a kernel distance needs two rows of each, of one width")
    x, y = x.astype(np.float64), y.astype(np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) - 2 * kernel(x, y).mean())


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to x (N, d) and y (M, d) (Dowson and Landau 1982): FID's formula.

    Biased upwards, the more the fewer rows there are for d: compare only sets of one size, and reduce d first.
    """
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # The square root of a product of two covariances has a trace that needs only its eigenvalues, which are real and not negative.
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * roots)


def vendi_score(x: np.ndarray) -> float:
    """The effective number of different images among x (N, d): 1 when all point the same way, N when all are orthogonal.

    The exponential of the Shannon entropy of the eigenvalues of the cosine similarities over N (Friedman and Dieng 2022,
    arXiv:2210.02410). It grows with N: compare sets of one size.

    Raises:
        ValueError: no row, or a row of zeros, which has no direction.
    """
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not len(x) or not (norms > 0).all():
        raise ValueError(f"{len(x)} rows, {int((norms == 0).sum())} of them zero: a Vendi score needs vectors with a direction")
    units = x.astype(np.float64) / norms
    # The N x N similarities and the d x d products have the same eigenvalues but for zeros.
    values = np.linalg.eigvalsh((units @ units.T if len(x) <= x.shape[1] else units.T @ units) / len(x))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def mean_cosine_distance(x: np.ndarray) -> float:
    """Mean of 1 - cosine over all pairs of rows (N, d): 0 for one picture over and over. N of at least 2."""
    return float(pdist(x.astype(np.float64), "cosine").mean())
