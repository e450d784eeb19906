"""Image codecs: pixels (B, 3, H, W) in [-1, 1] to latents (B, 16, H/8, W/8) of about unit variance, and back."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FACTOR = 8
CHANNELS = 16


@dataclass(frozen=True)
class QwenImageVae:
    """The autoencoder of the released K2 (`AutoencoderKLQwenImage`, f8, 16 channels), for still images.

    It is made for video: every convolution also runs over time, and of the frames before the first there are only zeros.
    On one frame only the last time slice of a kernel meets anything, so it is kept as a 2-D convolution: the same
    numbers for about a third of the work.
    """

    path: str = "Qwen/Qwen-Image"  # a folder, or a name in the hub cache
    subfolder: str | None = "vae"
    dtype: str = "bfloat16"

    def load(self, device: str | torch.device) -> "QwenImageCodec":
        """
        Raises:
            ValueError: the weights are not at hand.
        """
        from diffusers import AutoencoderKLQwenImage

        try:
            model = AutoencoderKLQwenImage.from_pretrained(
                self.path, subfolder=self.subfolder, torch_dtype=getattr(torch, self.dtype), low_cpu_mem_usage=False
            )
        except OSError as error:
            raise ValueError(f"cannot load the VAE {self.path!r} ({error}). Give a folder with its weights.") from error
        return QwenImageCodec(still(model.eval().requires_grad_(False)).to(device))


class StillConv(nn.Conv2d):
    """What is left of a causal 3-D convolution on a clip (B, C, 1, H, W) of one frame."""

    def __init__(self, conv: nn.Conv3d):
        # diffusers' class pads itself, (left, right, top, bottom, before, after), and tells nn.Conv3d that it does not.
        left, _, top, *_ = conv._padding
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[1:],
            conv.stride[1:],
            (top, left),
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.weight = nn.Parameter(conv.weight[:, :, -1].clone(), requires_grad=conv.weight.requires_grad)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.squeeze(2)).unsqueeze(2)


def still(model: Any) -> Any:
    """Turn diffusers' `AutoencoderKLQwenImage`, in place, into one for single frames: 2-D kernels, and no layer that only joins frames.

    Its encoder and decoder are then called without a frame cache. The same numbers but for the order of sums.
    """
    for parent in [*model.modules()]:
        for name, layer in [*parent.named_children()]:
            if name == "time_conv":  # runs from the second frame on
                delattr(parent, name)
            elif isinstance(layer, nn.Conv3d):
                setattr(parent, name, StillConv(layer))
    return model


class QwenImageCodec:
    """Latents are normalised per channel with the mean and standard deviation stored beside the weights."""

    def __init__(self, model: Any):
        """`model` is diffusers' autoencoder after `still`."""
        self.model = model
        self.mean = torch.tensor(model.config.latents_mean, device=model.device).view(1, -1, 1, 1)
        self.std = torch.tensor(model.config.latents_std, device=model.device).view(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Mean of the posterior, float32."""
        moments = self.model.quant_conv(self.model.encoder(images.to(self.model.dtype).unsqueeze(2))).squeeze(2)
        return (moments.chunk(2, dim=1)[0].float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = (latents.float() * self.std + self.mean).to(self.model.dtype).unsqueeze(2)
        return self.model.decoder(self.model.post_quant_conv(latents)).squeeze(2).float().clamp(-1, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing was fitted, so there is nothing to keep in a checkpoint."""
        return {}


@dataclass(frozen=True)
class Pca:
    """A linear codec fitted on the data: the 16 first principal components of 8 x 8 x 3 patches, each of unit variance.

    Blurrier than a trained VAE, but it needs no weights, and training on its latents is the same problem. Scaling every
    component to variance 1 is what K2 does to its VAE's channels.
    """

    num_batches: int = 8  # packed batches that it is fitted on, the first of the plan


@dataclass(frozen=True)
class PcaCodec:
    mean: Tensor  # (192,) in the order (channel, row, column)
    basis: Tensor  # (16, 192) orthonormal rows, largest variance first
    std: Tensor  # (16,)

    def encode(self, images: Tensor) -> Tensor:
        kernel = (self.basis / self.std[:, None]).view(CHANNELS, 3, FACTOR, FACTOR)
        return F.conv2d(images.float(), kernel, bias=-(self.basis @ self.mean) / self.std, stride=FACTOR)

    def decode(self, latents: Tensor) -> Tensor:
        kernel = (self.basis * self.std[:, None]).view(CHANNELS, 3, FACTOR, FACTOR)
        mean = self.mean.view(1, 3, FACTOR, FACTOR).repeat(1, 1, *latents.shape[2:])
        return (F.conv_transpose2d(latents.float(), kernel, stride=FACTOR) + mean).clamp(-1, 1)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "basis": self.basis, "std": self.std}

    def to(self, device: str | torch.device) -> "PcaCodec":
        return PcaCodec(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def fit_pca(batches: Iterable[Tensor]) -> PcaCodec:
    """Fit the PCA codec on image batches (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: fewer patches than it takes to see 16 directions.
    """
    count, total, square = 0, torch.zeros(192, dtype=torch.float64), torch.zeros(192, 192, dtype=torch.float64)
    for images in batches:
        patches = F.unfold(images.cpu(), FACTOR, stride=FACTOR).transpose(1, 2).reshape(-1, 192).double()
        count += len(patches)
        total += patches.sum(0)
        square += patches.T @ patches
    mean = total / max(count, 1)
    variance, vectors = torch.linalg.eigh(square / max(count, 1) - torch.outer(mean, mean))
    variance, basis = variance.flip(0)[:CHANNELS], vectors.T.flip(0)[:CHANNELS]
    if count <= CHANNELS or variance[-1] < 1e-9:
        raise ValueError(
            f"the PCA codec needs images with detail: {count} patches have {int((variance > 1e-9).sum())} directions of the {CHANNELS} it "
            "must see. Pack more images, or raise Pca.num_batches."
        )
    # An eigenvector's sign is free; make its largest entry positive, so that the codec is a function of the data alone.
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    return PcaCodec(mean.float(), basis.float().contiguous(), variance.sqrt().float())


def load_pca(path: str | Path) -> PcaCodec:
    """A codec from the `tensors()` that were saved with safetensors.

    Raises:
        ValueError: the file holds something else.
    """
    tensors = load_file(path)
    if set(tensors) != {"mean", "basis", "std"}:
        raise ValueError(f"{path} is not the linear codec of a training run: it holds {', '.join(sorted(tensors)[:3])} ...")
    return PcaCodec(**tensors)
