"""Training of the sparse autoencoder: BatchTopK, saved as JumpReLU.

* BatchTopK (Bussmann, Leask and Nanda 2024, arXiv:2412.06410): of a batch of N rows the N * k largest activations stay.
* Start: decoder rows are data points (0.8) mixed with noise (0.2), encoder rows their transpose at half the norm. With a
  learning rate of 3e-3 this found 40 % of the true features of a synthetic set in 200 steps, random rows 6 %.
* AuxK (Gao et al. 2024, arXiv:2406.04093): features that did not fire for `dead_rows` rows reconstruct the residual, so that
  they get a gradient. The decoder's bias takes no part in that: the residual is already without it.
* Inputs are centred and scaled while training; the file holds weights for the raw vectors.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.sae import Sae, activations, fold_normalisation

EPSILON = 6.25e-10  # Adam's, as in Gao et al.: gradients of rare features are tiny


@dataclass(frozen=True)
class Training:
    """What decides a training run, beside its data. Counts are in rows (vectors), never in steps: they keep their meaning when
    the batch changes."""

    num_features: int
    num_rows: int  # rows to see, epochs included
    k: int = 32  # mean number of features that fire
    batch_size: int = 1024
    learning_rate: float = 3e-3
    warmup: float = 0.05  # share of the steps
    decay: float = 0.2  # last share of the steps, linearly to 0
    blend: float = 0.8  # of the data point in a decoder row at the start
    encoder_norm: float = 0.5  # norm of an encoder row at the start; decoder rows have 1
    aux_weight: float = 1 / 32
    dead_rows: int = 1_000_000  # at most a tenth of num_rows: a short run has to notice as well
    per_dimension: bool = False  # scale every dimension by its own deviation, not all by one number
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.k <= self.num_features:
            raise ValueError(f"k {self.k} of {self.num_features} features; k counts the features that fire, from 1 to all")
        if self.num_rows < self.batch_size:
            raise ValueError(f"{self.num_rows} rows are less than one batch of {self.batch_size}")


@dataclass(frozen=True, eq=False)
class Weights:
    """The trained tensors, on normalised inputs."""

    w_enc: Tensor  # (d, m)
    b_enc: Tensor  # (m,)
    w_dec: Tensor  # (m, d), rows of norm 1
    b_dec: Tensor  # (d,)

    def tensors(self) -> list[Tensor]:
        return [self.w_enc, self.b_enc, self.w_dec, self.b_dec]


def train(
    batches: Iterator[np.ndarray],
    sample: np.ndarray,
    held_out: np.ndarray,
    settings: Training,
    metadata: Mapping[str, Any],
    matrices: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Sae, list[dict[str, float]]]:
    """Train on `batches` of raw vectors (B, d) and return the SAE on raw vectors, with a history of figures.

    Args:
        batches: Endless batches; exactly num_rows // batch_size are taken.
        sample: (S, d) rows for the mean, the scale and the start values.
        held_out: (H, d) rows that take no part in training; they set the thresholds.
        settings: See `Training`.
        metadata: Kept in the SAE; must name the `tower`.
        matrices: Dtype that the matrices will have on disk; they are rounded to it before the thresholds are set.
        device: Where to train.

    Raises:
        ValueError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    mean, scale = normalisation(sample, settings.per_dimension)
    weights = start((torch.from_numpy(sample) - mean) / scale, settings, generator, device)
    optimizer = torch.optim.Adam(weights.tensors(), lr=settings.learning_rate, eps=EPSILON)
    num_steps = settings.num_rows // settings.batch_size
    silent = torch.zeros(settings.num_features, dtype=torch.long, device=device)  # rows since a feature fired
    dead_rows, history = min(settings.dead_rows, settings.num_rows // 10), []
    for step, batch in enumerate(itertools.islice(batches, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, num_steps, settings)
        rows = ((torch.from_numpy(batch) - mean) / scale).to(device)
        reconstruction, auxiliary, fired = losses(weights, rows, settings.k, silent > dead_rows)
        loss = reconstruction + settings.aux_weight * auxiliary
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():  # a step along a unit row would only be undone by the normalisation, but would fill Adam's moments
            grad = weights.w_dec.grad
            grad.sub_((grad * weights.w_dec).sum(1, keepdim=True) * weights.w_dec)
        norm = torch.nn.utils.clip_grad_norm_(weights.tensors(), 1.0)
        if not torch.isfinite(norm):
            raise ValueError(f"the gradient is {norm} at step {step} of {num_steps}; lower the learning rate ({settings.learning_rate})")
        optimizer.step()
        with torch.no_grad():
            weights.w_dec.div_(weights.w_dec.norm(dim=1, keepdim=True))
            silent += len(rows)
            silent[fired] = 0
        if step % max(1, num_steps // 20) == 0 or step == num_steps - 1:
            dead = float((silent > dead_rows).float().mean())
            history.append({"rows": (step + 1) * settings.batch_size, "unexplained": reconstruction.item(), "dead": dead})
    return finish(weights, mean, scale, held_out, settings.k, metadata, matrices), history


def normalisation(sample: np.ndarray, per_dimension: bool) -> tuple[Tensor, Tensor]:
    """(mean (d,), scale () or (d,)), so that rows of (x - mean) / scale have a mean squared norm of 1.

    One scale keeps the tower's geometry. One per dimension gives quiet dimensions, where damage shows, the same say as loud ones.
    """
    deviation = sample.std(0, dtype=np.float64)
    if not deviation.any():
        raise ValueError(f"all {len(sample)} vectors are the same; there is nothing to learn")
    one = np.sqrt(np.square(deviation).sum())
    scale = np.where(deviation > 0, deviation, 1.0) * math.sqrt(len(deviation)) if per_dimension else one
    return torch.from_numpy(sample.mean(0, dtype=np.float64)).float(), torch.as_tensor(scale, dtype=torch.float32)


def start(sample: Tensor, settings: Training, generator: torch.Generator, device: str) -> Weights:
    """Start values from normalised rows (S, d)."""
    chosen = torch.randperm(len(sample), generator=generator).repeat(math.ceil(settings.num_features / len(sample)))[
        : settings.num_features
    ]
    points = torch.nn.functional.normalize(sample[chosen], dim=1)
    noise = torch.nn.functional.normalize(torch.randn(points.shape, generator=generator), dim=1)
    w_dec = torch.nn.functional.normalize(settings.blend * points + (1 - settings.blend) * noise, dim=1)
    tensors = (settings.encoder_norm * w_dec.T, torch.zeros(len(w_dec)), w_dec, torch.zeros(w_dec.shape[1]))
    return Weights(*(tensor.contiguous().to(device).requires_grad_() for tensor in tensors))


def schedule(step: int, num_steps: int, settings: Training) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay."""
    rise = (step + 1) / max(1, settings.warmup * num_steps)
    fall = (num_steps - step) / max(1, settings.decay * num_steps)
    return min(1.0, rise, fall)


def batch_topk(pre: Tensor, k: int) -> Tensor:
    """(N, m) pre-activations -> the N * k largest positive ones of the whole batch, 0 elsewhere."""
    positive = pre.relu()
    least = positive.detach().flatten().topk(len(pre) * k).values[-1]
    return torch.where((positive >= least) & (positive > 0), positive, 0.0)


def losses(weights: Weights, rows: Tensor, k: int, dead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(reconstruction, auxiliary, fired (m,) bool) for normalised rows (N, d) and the mask `dead` (m,).

    Both losses are shares of a squared norm: of the rows, whose mean is 1, and of the residual. The residual is a constant in
    the auxiliary one, so that reviving a dead feature never pulls on a live one.
    """
    pre = rows @ weights.w_enc + weights.b_enc
    values = batch_topk(pre, k)
    residual = rows - values @ weights.w_dec - weights.b_dec
    reconstruction = residual.square().sum(1).mean()
    fired = (values.detach() > 0).any(0)
    num_dead = int(dead.sum())
    if not num_dead:
        return reconstruction, reconstruction.new_zeros(()), fired
    top = pre[:, dead].relu().topk(min(num_dead, rows.shape[1] // 2), dim=1)
    revived = torch.zeros_like(pre[:, dead]).scatter(1, top.indices, top.values) @ weights.w_dec[dead]
    target = residual.detach()
    auxiliary = (target - revived).square().sum(1).mean() / target.square().sum(1).mean().clamp_min(1e-12)
    return reconstruction, auxiliary, fired


@torch.no_grad()
def finish(
    weights: Weights, mean: Tensor, scale: Tensor, held_out: np.ndarray, k: int, metadata: Mapping[str, Any], matrices: torch.dtype
) -> Sae:
    """Fold the normalisation, round the matrices, and set the thresholds with the weights that will be on disk."""
    tensors = [tensor.detach().cpu() for tensor in weights.tensors()]
    sae = Sae(*tensors, threshold=torch.zeros(len(tensors[1])), metadata=metadata)
    sae = fold_normalisation(sae, mean, scale, matrices)
    return replace(sae, threshold=threshold(sae, torch.from_numpy(held_out), k).expand(sae.num_features).contiguous())


def threshold(sae: Sae, held_out: Tensor, k: int) -> Tensor:
    """The value that k activations per held-out row (H, d) exceed on average: BatchTopK's cut, as one number for all features."""
    values = activations(sae, held_out).flatten()
    return values.sort(descending=True).values[min(len(held_out) * k, len(values) - 1)]


def shuffled(vectors: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of rows of (N, d), a new order in every epoch; a batch may hold the end of one epoch and the start of the next."""
    rest = np.zeros(0, np.int64)
    while True:
        while len(rest) < batch_size:
            rest = np.concatenate([rest, rng.permutation(len(vectors))])
        yield vectors[rest[:batch_size]]
        rest = rest[batch_size:]
