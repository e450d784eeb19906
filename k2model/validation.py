"""What the loss is made of: at fixed times and noise on rows that are not trained on, and of training by time, bucket and source.

The loss of a training batch jumps with its times: at t near 0 and 1 it is many times that of the middle. Validation asks for the same
images, noise and times again and again, so that two steps, two runs or two world sizes can be compared.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2model import flow

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (latents, t, text, text_mask), as the DiT


class Held(NamedTuple):
    """A batch that is not trained on. Rows after those that have a place are repeats that fill the rectangle, and do not count."""

    clean: Tensor  # (B, C, H, W) latents
    text: Tensor  # (B, L, taps, dim), of the captions as they are: nothing is dropped
    mask: Tensor | None  # (B, L) bool
    uids: Sequence[str]
    places: Sequence[int]  # of its first images among all that are held out


def fixed_times(num: int) -> list[float]:
    """The middles of `num` equal parts of (0, 1), not shifted: curves of different phases have the same axis."""
    return [(i + 0.5) / num for i in range(num)]


@torch.no_grad()
def validation_losses(velocity: Velocity, batches: Iterable[Held], num_images: int, num_times: int, seed: int) -> Tensor:
    """Mean square error of every held-out image at each time: (num_images, num_times) float64, on the CPU; 0 for images of other ranks.

    The noise of an image at a time is a function of (seed, uid, time), so it does not matter which rank or batch has it (but for the last
    bits of a matrix product). Add the tensors of all ranks, then `summary`. The model should be in eval mode and under the
    autocast of training; a sharded model is called equally often on all ranks, if they have equally many batches.
    """
    each = torch.zeros(num_images, num_times, dtype=torch.float64)
    for held in batches:
        found = []
        for i, time in enumerate(fixed_times(num_times)):
            noise = fixed_noise(seed, held.uids, i, tuple(held.clean.shape[1:])).to(held.clean.device)
            t = torch.full((len(held.uids),), time, device=held.clean.device)
            predicted = velocity(flow.noisy(held.clean, noise, t), t, held.text, held.mask)
            found.append(flow.loss(predicted, held.clean, noise)[: len(held.places)])
        each[torch.tensor(held.places, dtype=torch.long)] = torch.stack(found, 1).double().cpu()  # the device is waited for once a batch
    return each


def fixed_noise(seed: int, uids: Sequence[str], time: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape) of images at the `time`-th of the fixed times, made on the CPU."""
    generators = [torch.Generator().manual_seed(flow.number(seed, "validation", uid, time)) for uid in uids]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def summary(each: Tensor) -> dict[str, Any]:
    """`validation` of a row of metrics.jsonl, from `validation_losses` of all ranks: loss (over images and times), by_t, images, and
    standard_error and standard_error_by_t of these means (None for a single image).

    A standard error is the deviation of the images over the root of their number: s / sqrt(n) with n - 1 in s, of each image's mean over
    the times, and at each time. The times are the same for all and no part of it; the noise is drawn for each image and is. So it says
    how far the mean of *other* images would be, and is the wrong measure for two models on the same images and noise (two steps, or two
    runs of one seed on one packed set): there most of the deviation is common to both, and the error of the mean of the images'
    differences is many times smaller. Take it from the tables themselves, which losses.f32 keeps (docs/training.md).

    Raises:
        ValueError: no image was validated on.
    """
    num = len(each)
    if not num:
        raise ValueError("there is no image to validate on. Hold out more row groups, or turn validation off.")
    by_image, by_t = each.mean(1), each.mean(0)
    error = by_image.std() / num**0.5 if num > 1 else None
    error_by_t = each.std(0) / num**0.5 if num > 1 else None
    return {
        "loss": by_image.mean().item(),
        "standard_error": None if error is None else error.item(),
        "by_t": by_t.tolist(),
        "standard_error_by_t": None if error_by_t is None else error_by_t.tolist(),
        "images": num,
    }


class Ledger:
    """Training losses by time, bucket and source since they were last read.

    `sums` is all that it knows: (2, bins) float64 of sums and counts, the same shape on every rank, on the device of the losses. Reduce it
    (`all_reduce`, sum) before `read`; keep it in a checkpoint if rows of metrics do not end with it.

    Args:
        buckets: Names of all buckets that may come.
        sources: Names of all sources (packed sets) that may come.
        num_times: Equal parts of [0, 1].
    """

    def __init__(self, buckets: Sequence[str], sources: Sequence[str], num_times: int = 10, device: str | torch.device = "cpu"):
        self.num_times = num_times
        self.buckets, self.sources = list(dict.fromkeys(buckets)), list(dict.fromkeys(sources))
        size = num_times + len(self.buckets) + len(self.sources)
        self.sums = torch.zeros(2, size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, losses: Tensor, t: Tensor, bucket: str, source: str) -> None:
        """Losses (B,) and times (B,) of images of one row group: repeats that fill a batch are left out by the caller.

        Nothing is waited for on a GPU.

        Raises:
            ValueError: the ledger has no such bucket or source.
        """
        for kind, name, known in (("bucket", bucket, self.buckets), ("source", source, self.sources)):
            if name not in known:
                raise ValueError(f"the ledger has no {kind} {name!r}; it was made for {', '.join(known)}")
        values = losses.detach().to(self.sums.device, torch.float64)
        if not len(values):
            return
        both = torch.stack([values, torch.ones_like(values)])
        bins = (t.detach().to(self.sums.device) * self.num_times).long().clamp(0, self.num_times - 1)
        self.sums.index_add_(1, bins, both)
        whole = both.sum(1)
        self.sums[:, self.num_times + self.buckets.index(bucket)] += whole
        self.sums[:, self.num_times + len(self.buckets) + self.sources.index(source)] += whole

    def read(self) -> dict[str, Any]:
        """Means and counts since the last read: `loss_by_t` and `num_by_t` (lists; None where no image was), `loss_by_bucket`,
        `num_by_bucket`, `loss_by_source`, `num_by_source` (only those that had images). Then it starts again."""
        sums, counts = self.sums.tolist()
        self.sums.zero_()
        means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        row: dict[str, Any] = {"loss_by_t": means[: self.num_times], "num_by_t": [int(count) for count in counts[: self.num_times]]}
        start = self.num_times
        for kind, names in (("bucket", self.buckets), ("source", self.sources)):
            own = {name: (means[start + i], int(counts[start + i])) for i, name in enumerate(names) if counts[start + i]}
            row[f"loss_by_{kind}"] = {name: mean for name, (mean, _) in own.items()}
            row[f"num_by_{kind}"] = {name: count for name, (_, count) in own.items()}
            start += len(names)
        return row
