"""Teachers of `k2model.align`: descriptions that load to functions of images, made of curation's towers or of a DINO.

Each sees the whole image as packed, the same pixels that the codec encodes, and answers with a grid of tokens over all of it. Nothing
goes to the network.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curation import compact
from curation.effnet import EFFNET_DIM, EFFNET_SIDE, fold_batch_norm
from curation.towers import Compact, EffNet, Siglip
from k2model.align import Teacher

TOKEN = 16  # pixels a side of an image token of the DiT
EFFNET_STRIDE = 32
MAPS = (3, 4)  # the groups of the compact tower's blocks with a place per TOKEN pixels


@dataclass(frozen=True)
class TowerTeacher:
    """A tower of curation as a teacher.

    * Siglip squashes the image to its square, as it was trained; its patch tokens after the last norm.
    * EffNet runs over the whole image at about its usual area; its last map, a token per 32 px.
    * Compact runs over the whole image as it is; the two maps with a place per 16 px, less their mean over its training crops and in
      units of their spread, side by side (192). Without that a constant has a cosine of .98 to the target, and there is nothing to
      learn. (The shipped network's last map, of 320 channels, is constant.) Its channels were made for traces of damage and
      generation: it is at hand, not the best teacher.
    """

    tower: Siglip | EffNet | Compact

    @property
    def dim(self) -> int:
        """Channels of a token."""
        if isinstance(self.tower, Compact):
            return sum(compact.DEPTHS[depth] for depth in MAPS)
        return EFFNET_DIM if isinstance(self.tower, EffNet) else self.tower.dim

    def load(self, device: str | torch.device) -> Teacher:
        """Read the weights.

        Raises:
            ValueError: they are not on this disk.
        """
        if isinstance(self.tower, Compact):
            return _compact(self.tower, device)
        forward, name = self.tower.load(str(device)).forward, type(self.tower).__name__

        @torch.no_grad()
        def tokens(images: Tensor) -> Tensor:
            pixels = images.to(device).float()
            if isinstance(self.tower, Siglip):
                side = self.tower.prepare([]).shape[1]
                grid, pixels = None, resized(pixels, (side, side))
            else:
                height, width = images.shape[2:]
                scale = EFFNET_SIDE / (height * width) ** 0.5 / EFFNET_STRIDE
                grid = max(1, round(height * scale)), max(1, round(width * scale))
                pixels = resized(pixels, (EFFNET_STRIDE * grid[0], EFFNET_STRIDE * grid[1]))
            found = forward(pixels)[1]
            grid = grid or (round(found.shape[1] ** 0.5),) * 2
            assert found.shape[1:] == (grid[0] * grid[1], self.dim), f"{name}: tokens {tuple(found.shape)} on a grid of {grid}"
            return found.unflatten(1, grid)

        return tokens


@dataclass(frozen=True)
class Dino:
    """A DINOv2 or DINOv3 vision transformer of timm (`vit_base_patch14_dinov2`, `vit_base_patch16_dinov3`), patch tokens after the last
    norm. The image is resized so that its grid of patches is the DiT's grid of tokens.

    The published weights could not be had where this was written: it is tested with random ones.

    Args:
        model: timm's name.
        weights: Path of timm's weights for it (.safetensors or .pth).
    """

    model: str
    weights: str

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return _empty_dino(self.model).num_features

    def load(self, device: str | torch.device) -> Teacher:
        """Read the weights.

        Raises:
            ValueError: timm has no DINO of this name, or the file is not there or does not hold it.
        """
        import timm
        from timm.models import load_checkpoint

        network = _empty_dino(self.model)
        if not Path(self.weights).is_file():
            hub = network.pretrained_cfg.get("hf_hub_id", "its repository")
            raise ValueError(
                f"no weights of {self.model} at {self.weights}, and nothing is downloaded while training. "
                f"Fetch them once with `hf download {hub} model.safetensors`, and give the path of the file."
            )
        network = timm.create_model(self.model, pretrained=False, num_classes=0, dynamic_img_size=True)  # with its tables of positions
        try:
            load_checkpoint(network, self.weights, strict=True, weights_only=True)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{self.weights} does not hold {self.model}: {str(error)[:300]}") from error
        network = network.eval().requires_grad_(False).to(device)
        mean, std = (torch.tensor(network.pretrained_cfg[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
        patch = network.patch_embed.patch_size[0]

        @torch.no_grad()
        def tokens(images: Tensor) -> Tensor:
            grid = images.shape[2] // TOKEN, images.shape[3] // TOKEN
            pixels = resized(images.to(device).float(), (patch * grid[0], patch * grid[1]))
            found = network.forward_features((pixels / 255 - mean) / std)
            return found[:, network.num_prefix_tokens :].unflatten(1, grid)

        return tokens


@cache
def _empty_dino(model: str) -> nn.Module:
    """timm's network without values, for images of any size."""
    import timm

    if "dino" not in model or not timm.is_model(model):
        known = ", ".join(name for name in timm.list_models("vit_*dino*") if "base" in name or "large" in name)
        raise ValueError(f"timm has no DINO {model!r}; there are, among others: {known}")
    with torch.device("meta"):
        return timm.create_model(model, pretrained=False, num_classes=0, dynamic_img_size=True)


def _compact(tower: Compact, device: str | torch.device) -> Teacher:
    """The trunk of the compact tower over whole images."""
    network = compact.load(tower.path)
    fold_batch_norm(network)
    network.to(device)
    first = sum(channels for depth, channels in compact.DEPTHS.items() if depth < MAPS[0])
    own = slice(first, first + sum(compact.DEPTHS[depth] for depth in MAPS))
    mean, spread = network.scale.running_mean[own], (network.scale.running_var[own] + network.scale.eps).sqrt()

    @torch.no_grad()
    def tokens(images: Tensor) -> Tensor:
        x, maps = network.stem((images.to(device).float() - 127) / 128), []
        for depth, group in enumerate(network.blocks[: MAPS[-1] + 1]):
            x = group(x)
            if depth in MAPS:
                maps.append(x)
        return (torch.cat(maps, 1).permute(0, 2, 3, 1) - mean) / spread

    return tokens


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Float (B, C, H, W) to another size, bicubic, averaging where it shrinks; as it is where it has that size."""
    if tuple(pixels.shape[2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)
