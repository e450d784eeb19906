"""The scale on which an SAE is trained: x = mean + z @ scale, where z has a mean squared norm of 1. It is folded into the weights after."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEAST_VARIANCE = 1e-4  # of the mean variance: quieter directions are rounding, and are not made louder than these


class Scale(NamedTuple):
    """x = mean + z @ scale; `scale` is one number (), one per dimension (d,) or a matrix (d, d)."""

    mean: Tensor  # (d,)
    scale: Tensor
    inverse: Tensor
    gamma: float  # length of the mean / length of the deviations: over about 1, features that never fire come from a bad centre

    def normalised(self, vectors: np.ndarray | Tensor, device: str = "cpu") -> Tensor:
        """(N, d) float16 or float32 -> (N, d) float32, on the device."""
        centred = torch.as_tensor(vectors).to(device, torch.float32) - self.mean.to(device)
        inverse = self.inverse.to(device)
        return centred @ inverse if inverse.ndim == 2 else centred.mul_(inverse)


def measure(sample: np.ndarray, per_dimension: bool = False, whiten: float = 0.0) -> Scale:
    """The scale of rows (S, d).

    One number keeps the tower's geometry. One per dimension gives quiet dimensions, where damage shows, the same say as loud ones.
    `whiten` (alpha, 0 to 1) does so for directions: z = (x - mean) C^(-alpha / 2), up to one number, with C the covariance; 1 is whitening
    in full, 0.5 half of it. gamma predicts features that are dead from the start (arXiv:2605.31518); the centring removes that cause.

    Raises:
        ValueError: all rows are the same.
    """
    vectors = sample.astype(np.float64)
    mean = vectors.mean(0)
    deviation = vectors.std(0)
    if not deviation.any():
        raise ValueError(f"all {len(sample)} vectors are the same; there is nothing to learn")
    length = math.sqrt(np.square(deviation).sum())
    gamma = float(np.linalg.norm(mean) / length)
    if whiten:
        variance, axes = np.linalg.eigh(np.cov(vectors.T, bias=True).reshape(len(mean), -1))
        variance = np.maximum(variance, LEAST_VARIANCE * variance.mean())
        factor = variance ** (whiten / 2)
        factor *= math.sqrt(np.sum(variance / np.square(factor)))
        scale, inverse = (axes * factor) @ axes.T, (axes / factor) @ axes.T
    else:
        scale = np.where(deviation > 0, deviation, 1.0) * math.sqrt(len(mean)) if per_dimension else np.float64(length)
        inverse = 1 / scale
    return Scale(torch.from_numpy(mean).float(), *(torch.as_tensor(part, dtype=torch.float32) for part in (scale, inverse)), gamma)
