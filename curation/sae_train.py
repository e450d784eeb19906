"""Training of the sparse autoencoder: BatchTopK or TopK, saved as JumpReLU.

* Start: decoder rows are data points (0.8) mixed with noise (0.2), encoder rows the same at half the norm. With a learning rate of 3e-3
  this found 40 % of the true features of a synthetic set in 200 steps, random rows 6 %.
* AuxK (Gao et al. 2024, arXiv:2406.04093): features that did not fire for `dead_rows` rows reconstruct the residual, so that they get a
  gradient.
* Archetypal (Fel et al. 2025, arXiv:2502.12892): decoder rows are convex mixtures of centroids of the data plus a short free part, so that
  other seeds find the same features.
* Inputs are centred and scaled while training (`sae_scale`); the file holds weights for the raw vectors.
* Under torch.distributed every process takes its share of each batch; the cut, the gradients and the losses are those of the whole batch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from curation import sae_search
from curation.sae_parallel import place, total
from curation.sae_search import Codes
from curation.sae_step import Weights, auxiliary, reconstruction

EPSILON = 6.25e-10  # Adam's, as in Gao et al.: gradients of rare features are tiny
UNDER = 0.97  # of the last cut: where the next search starts
AUX_ROWS = 4  # AuxK looks at every fourth row: with 200 dead features it would cost more than all else
NUM_CENTROIDS = 2048


@dataclass(frozen=True)
class Training:
    """What decides a training run, beside its data. Counts are in rows (vectors), never in steps: they keep their meaning when
    the batch changes."""

    num_features: int
    num_rows: int  # rows to see, epochs included
    k: int = 32  # number of features that fire: on average (BatchTopK), or at most (TopK)
    per_row: bool = False  # TopK: every row has its own k, instead of N * k in a batch
    batch_size: int = 1024
    learning_rate: float = 3e-3
    warmup: float = 0.05  # share of the steps
    decay: float = 0.2  # last share of the steps, linearly to 0
    blend: float = 0.8  # of the data point in a decoder row at the start
    encoder_norm: float = 0.5  # norm of an encoder row at the start; decoder rows have 1
    aux_weight: float = 1 / 32
    dead_rows: int = 1_000_000  # at most a tenth of num_rows: a short run has to notice as well
    prefixes: tuple[float, ...] = ()  # Matryoshka: shares of the features that have to reconstruct by themselves
    archetypal: float | None = None  # length of the free part of a decoder row, as a share of a row's own; None: rows are all free
    per_dimension: bool = False  # scale every dimension by its own deviation, not all by one number
    whiten: float = 0.0  # 0 to 1: how far directions are made equally loud
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.k <= self.num_features:
            raise ValueError(f"k {self.k} of {self.num_features} features; k counts the features that fire, from 1 to all")
        if self.num_rows < self.batch_size:
            raise ValueError(f"{self.num_rows} rows are less than one batch of {self.batch_size}")
        if not 0 <= self.whiten <= 1 or (self.whiten and self.per_dimension):
            raise ValueError(f"whiten is {self.whiten}; give 0 to 1, and not with per_dimension, which it replaces")
        if list(self.prefixes) != sorted(set(self.prefixes)) or not all(0 < share < 1 for share in self.prefixes):
            raise ValueError(f"prefixes are {self.prefixes}; give growing shares between 0 and 1, such as 0.0625 0.125 0.25 0.5625")

    @property
    def num_steps(self) -> int:
        return self.num_rows // self.batch_size

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the prefixes end; the last is all features."""
        return (*sorted({max(1, round(share * self.num_features)) for share in self.prefixes} - {self.num_features}), self.num_features)


class Trainee:
    """One SAE in training: its tensors, Adam's moments, and how long each feature has been silent.

    `step` takes one batch of normalised rows; `state` and `restore` hold all that the next step depends on.
    """

    def __init__(self, settings: Training, sample: Tensor, device: str = "cpu"):
        """`sample`: normalised rows (S, d), on the CPU, for the start values."""
        self.settings = settings
        generator = torch.Generator().manual_seed(settings.seed)
        if settings.archetypal is None:
            decoder, free = _points(sample, settings, generator), None
            tensors = [decoder]
        else:
            self.centroids = _centroids(sample, min(NUM_CENTROIDS, settings.num_features, len(sample))).to(device)
            mix = _mixtures(settings.num_features, len(self.centroids), generator)
            free = torch.zeros(settings.num_features, sample.shape[1])
            decoder, tensors = mix @ self.centroids.cpu(), [mix, free]
        encoder = settings.encoder_norm * normalize(decoder, dim=1)
        zeros = (torch.zeros(settings.num_features), torch.zeros(sample.shape[1]))
        self.tensors = [tensor.contiguous().to(device) for tensor in (encoder, *zeros, *tensors)]
        self.optimizer = torch.optim.Adam(self.tensors, lr=settings.learning_rate, eps=EPSILON, fused=True)
        self.silent = torch.zeros(settings.num_features, dtype=torch.long, device=device)  # rows since a feature fired
        self.floor: float | None = None
        self.steps = 0

    @property
    def weights(self) -> Weights:
        encoder, bias, b_dec, *decoder = self.tensors
        return Weights(encoder, bias, decoder[0] if len(decoder) == 1 else self._mixed(*decoder), b_dec)

    @property
    def dead(self) -> Tensor:
        """(m,) bool: features that have been silent for too many rows."""
        return self.silent > min(self.settings.dead_rows, self.settings.num_rows // 10)

    @torch.no_grad()
    def step(self, rows: Tensor) -> Tensor:
        """Train on normalised rows (N, d), this process's share of a batch; returns the loss of the whole batch.

        Raises:
            ValueError: the gradient is not finite; nothing was changed.
        """
        settings, weights = self.settings, self.weights
        num_rows = int(total(torch.tensor(len(rows), device=rows.device)))
        rank, world = place()
        order = sae_search.by_range(rows)
        rows, helps = rows[order], (rank + world * order) % AUX_ROWS == 0
        codes = self._codes(weights, rows)
        result = reconstruction(weights, rows, codes, settings.ends, num_rows)
        gradients, dead = result.gradients, self.dead.nonzero().squeeze(1)
        if len(dead) and settings.aux_weight:
            gradients = self._with_auxiliary(weights, rows[helps], -result.error[helps], gradients, dead)
        gradients = Weights(*(total(gradient) for gradient in gradients))
        self._update(weights, gradients)
        fired = torch.zeros_like(self.silent, dtype=torch.int32)
        fired[codes.features] = 1
        self.silent += num_rows
        self.silent[total(fired) > 0] = 0
        self.steps += 1
        return total(result.loss)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float | int | None]]:
        """(tensors, numbers) from which `restore` goes on to the bit."""
        tensors = {f"tensor{i}": tensor for i, tensor in enumerate(self.tensors)} | {"silent": self.silent}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{name}{i}": value for name, value in moments.items()}
        return tensors, {"floor": self.floor, "steps": self.steps}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, float | int | None]) -> None:
        for i, tensor in enumerate(self.tensors):
            tensor.copy_(tensors[f"tensor{i}"])
        self.silent.copy_(tensors["silent"])
        described = self.optimizer.state_dict()
        if numbers["steps"]:
            names = ("step", "exp_avg", "exp_avg_sq")
            described["state"] = {i: {name: tensors[f"{name}{i}"] for name in names} for i in range(len(self.tensors))}
        self.optimizer.load_state_dict(described)
        self.floor, self.steps = numbers["floor"], numbers["steps"]

    def _codes(self, weights: Weights, rows: Tensor) -> Codes:
        """The features that fire, by the settings' rule, over the whole batch; moves the floor for the next batch."""
        shifted, floor = rows - weights.b_dec, None if self.floor is None else UNDER * self.floor
        with torch.autocast("cuda", torch.bfloat16, enabled=rows.is_cuda):
            if self.settings.per_row:
                codes, self.floor = sae_search.topk(shifted, weights.encoder, weights.bias, self.settings.k, floor)
            else:
                codes, self.floor = sae_search.batch_topk(shifted, weights.encoder, weights.bias, self.settings.k, floor)
        return codes

    def _with_auxiliary(self, weights: Weights, rows: Tensor, residual: Tensor, gradients: Weights, dead: Tensor) -> Weights:
        """The gradients plus those of AuxK on these rows."""
        power = total(residual.square().sum()).clamp_min(1e-12)
        encoder, bias, decoder, b_dec = auxiliary(weights, rows, residual, dead, power).gradients
        weight = self.settings.aux_weight
        for whole, part in zip(gradients[:3], (encoder, bias, decoder), strict=True):
            whole.index_add_(0, dead, part, alpha=weight)
        return gradients._replace(b_dec=gradients.b_dec.add(b_dec, alpha=weight))

    def _update(self, weights: Weights, gradients: Weights) -> None:
        """One step of Adam; decoder rows keep norm 1 (those of an archetypal SAE stay in their hull)."""
        settings = self.settings
        encoder, bias, decoder, b_dec = gradients
        if settings.archetypal is None:
            # A step along a unit row would only be undone by the normalisation, but would fill Adam's moments.
            decoder.addcmul_(torch.linalg.vecdot(decoder, weights.decoder)[:, None], weights.decoder, value=-1)
            parts = [decoder]
        else:
            mix, free = self.tensors[3:]
            with torch.enable_grad():
                leaves = [mix.requires_grad_(), free.requires_grad_()]
                parts = list(torch.autograd.grad(self._mixed(*leaves), leaves, decoder))
            mix.requires_grad_(False)
            free.requires_grad_(False)
        every = [encoder, bias, b_dec, *parts]
        norm = float(torch.nn.utils.get_total_norm(every))
        if not math.isfinite(norm):
            at = f"step {self.steps} of {settings.num_steps}"
            raise ValueError(f"the gradient is {norm} at {at}; lower the learning rate ({settings.learning_rate})")
        if norm > 1:
            torch._foreach_mul_(every, 1 / norm)
        for tensor, gradient in zip(self.tensors, every, strict=True):
            tensor.grad = gradient
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate * schedule(self.steps, settings)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if settings.archetypal is None:
            self.tensors[3].div_(torch.linalg.vector_norm(self.tensors[3], dim=1, keepdim=True))

    def _mixed(self, mix: Tensor, free: Tensor) -> Tensor:
        """Decoder rows (m, d): convex mixtures of the centroids, plus a free part that is at most `archetypal` times as long."""
        mix = mix.relu()
        inside = (mix / mix.sum(1, keepdim=True).clamp_min(1e-12)) @ self.centroids
        most = self.settings.archetypal * torch.linalg.vector_norm(inside, dim=1, keepdim=True)
        return inside + free * (most / torch.linalg.vector_norm(free, dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1)


def schedule(step: int, settings: Training) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay."""
    rise = (step + 1) / max(1, settings.warmup * settings.num_steps)
    fall = (settings.num_steps - step) / max(1, settings.decay * settings.num_steps)
    return min(1.0, rise, fall)


def _points(sample: Tensor, settings: Training, generator: torch.Generator) -> Tensor:
    """Decoder rows (m, d) of norm 1 at the start: points of the sample, mixed with noise."""
    times = math.ceil(settings.num_features / len(sample))
    chosen = torch.randperm(len(sample), generator=generator).repeat(times)[: settings.num_features]
    points = normalize(sample[chosen], dim=1)
    noise = normalize(torch.randn(points.shape, generator=generator), dim=1)
    return normalize(settings.blend * points + (1 - settings.blend) * noise, dim=1)


def _centroids(sample: Tensor, num: int) -> Tensor:
    """(num, d) centroids of k-means on the sample; always of the same seed, so that SAEs of several seeds share a hull."""
    import faiss

    means = faiss.Kmeans(sample.shape[1], num, niter=10, seed=1234, min_points_per_centroid=1, max_points_per_centroid=64)
    means.train(np.ascontiguousarray(sample.numpy()))
    return torch.from_numpy(means.centroids.copy())


def _mixtures(num_features: int, num_centroids: int, generator: torch.Generator) -> Tensor:
    """Weights (m, centroids) at the start: most of one centroid, each in turn, and a little of all."""
    order = torch.randperm(num_centroids, generator=generator).repeat(math.ceil(num_features / num_centroids))[:num_features]
    mix = 0.2 / num_centroids * 2 * torch.rand(num_features, num_centroids, generator=generator)
    return mix.scatter_(1, order[:, None], 0.8)
