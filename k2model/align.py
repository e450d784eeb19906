"""iREPA: image tokens of an early block learn to look like a frozen teacher's patch tokens; K2 does so in its first epoch at 256 px.

Singh et al. 2025, "What matters for Representation Alignment", arXiv:2512.10794, with the constants of its latent-diffusion runs: a
projector that is one 3 x 3 convolution over the grid of image tokens (text has none), teacher tokens normalised over space with
gamma = .6, a scalar, and eps = 1e-6, minus the cosine averaged over tokens, coefficient 1. (Their training script has a kernel of
1 x 1 unless a flag is given, and PRX takes each token's mean over channels for gamma: both are other methods.) K2's report names
neither teacher, block nor weight.

    tap = Tap(model, irepa.block)                   # once; `tap.remove()` at the end of the first epoch
    velocity = model(x, t, text, mask)
    found = projector(tap.take(), grid_of(latents, patch))
    align = loss(found, target(teacher(images), found.shape[1:3], irepa.gamma))      # (B,), to be weighted and averaged as the main loss
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2model.dit import DiT

KERNEL = 3
EPS = 1e-6
Teacher = Callable[[Tensor], Tensor]  # uint8 images (B, 3, H, W) -> patch tokens (B, h, w, C) of the whole image, without gradient


@dataclass(frozen=True)
class Irepa:
    """Alignment in a recipe.

    Args:
        teacher: A description with `dim` and `load(device) -> Teacher`; `pipelines.teachers` has them.
        block: The tokens after so many of the model's blocks. The paper has 8 of 28 and 4 of 12, PRX 8 of 16.
        weight: Of the alignment's loss beside the main one.
        gamma: Share of a teacher's mean token that is taken away: 0 none, 1 all.

    Raises:
        ValueError: a number is out of its range.
    """

    teacher: Any
    block: int
    weight: float = 1.0
    gamma: float = 0.6

    def __post_init__(self) -> None:
        if self.block < 1 or self.weight <= 0 or not 0 <= self.gamma <= 1:
            raise ValueError(f"block counts from 1, weight is above 0, gamma lies in 0 to 1; got {self}")


class Projector(nn.Module):
    """Image tokens of the DiT to the teacher's width: one convolution over their grid, so that neighbours are seen together.

    Its weights (`state_dict`) are part of a checkpoint as long as the alignment lasts, and are thrown away after it.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(width, dim, KERNEL, padding=KERNEL // 2)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h * w, width) in raster order -> (B, h, w, dim)."""
        found = self.conv(tokens.unflatten(1, grid).permute(0, 3, 1, 2))
        return found.permute(0, 2, 3, 1).contiguous()  # FSDP warns of outputs that are views


class Tap:
    """The image tokens that leave a block of the model, kept from each forward pass until they are taken.

    One hook for the whole time of alignment: a new one for every step would make a compiled block compile again.

    Raises:
        ValueError: the model has no such block.
    """

    def __init__(self, model: DiT, block: int):
        if not 1 <= block <= len(model.blocks):
            raise ValueError(f"alignment taps block {block} of a model that has {len(model.blocks)}; choose from 1 to {len(model.blocks)}")
        self._tokens: Tensor | None = None
        self._handle = model.blocks[block - 1].register_forward_hook(self._keep)

    def take(self) -> Tensor:
        """(B, M, width) in raster order, with its gradient, of the last forward pass; once."""
        assert self._tokens is not None, "no forward pass since the last take"
        tokens, self._tokens = self._tokens, None
        return tokens

    def remove(self) -> None:
        """The model is as it was before."""
        self._handle.remove()
        self._tokens = None

    def _keep(self, block: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        self._tokens = image_tokens(output)


def image_tokens(output: tuple[Tensor, Tensor]) -> Tensor:
    """(B, M, width) in raster order from what a block returns: (image tokens, text tokens). The one place that knows that."""
    return output[0]


def grid_of(latents: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of image tokens of latents (B, C, H, W)."""
    return latents.shape[2] // patch, latents.shape[3] // patch


@torch.no_grad()
def target(tokens: Tensor, grid: tuple[int, int], gamma: float) -> Tensor:
    """The teacher's tokens (B, h, w, C) on the model's grid, then normalised there, float32."""
    return spatially_normalised(resampled(tokens.float(), grid), gamma)


def resampled(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h, w, C) on another grid of the same picture: bilinear, averaging where the new grid is coarser."""
    if tuple(tokens.shape[1:3]) == tuple(grid):
        return tokens
    moved = F.interpolate(tokens.permute(0, 3, 1, 2), tuple(grid), mode="bilinear", antialias=True)
    return moved.permute(0, 2, 3, 1)


def spatially_normalised(tokens: Tensor, gamma: float, eps: float = EPS) -> Tensor:
    """(f - gamma mean) / (std + eps) of tokens (B, h, w, C): mean and standard deviation are each image's and channel's, over space.

    Patch tokens share a large common part, which tells images apart and not places; without it the cosine between places has contrast.
    """
    deviation, mean = torch.std_mean(tokens, (1, 2), keepdim=True)
    return (tokens - gamma * mean) / (deviation + eps)


def loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Minus the cosine of (B, h, w, C) and (B, h, w, C), averaged over the places of each image: (B,) in [-1, 1], float32."""
    return -F.cosine_similarity(found.float(), wanted.float(), dim=-1).mean((1, 2))
