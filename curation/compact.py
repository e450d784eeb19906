"""The compact tower: a small network on native-resolution crops, for what a tower that squashes the image cannot see.

A decoder, a codec, a scaler or a noise filter leaves its traces between neighbouring pixels. The network is the trunk of
EfficientNet-Lite0 (Tan and Le 2019; 3 million weights), read at five depths, so that both fine residuals and textures are in its
vector; `curation.compact_train` trained it on distortions and on real against generated crops, and its log says on what.

    boxes(image)                where the crops lie, from the calmest to the busiest place
    strip(image)                the crops, one above the other
    Network()(pixels)           features of each crop, and with `head` the log odds that a model made it
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

VERSION = "1"  # change it with anything but the weights: it is part of the tower's identity
SIDE = 128  # pixels of a crop
NUM_CROPS = 4
MAX_LATTICE = 8  # candidate places per axis: the cost of choosing does not grow with the image
DEPTHS = {1: 24, 2: 40, 3: 80, 4: 112, 6: 320}  # group of blocks -> its channels: the places where the trunk is read
SPREAD = (1, 2)  # of these the spread over the crop is taken, of deeper ones the mean: fine traces come with either sign
DIM = sum(DEPTHS.values())
WEIGHTS = Path(__file__).parent / "weights" / "compact" / "compact.safetensors"


class Network(nn.Module):
    """The trunk, its normalised features, and the log odds; without weights until some are loaded."""

    def __init__(self) -> None:
        import timm

        super().__init__()
        trunk = timm.create_model("tf_efficientnet_lite0")
        self.stem, self.blocks = nn.Sequential(trunk.conv_stem, trunk.bn1), trunk.blocks
        self.scale = nn.BatchNorm1d(DIM, affine=False)
        self.head = nn.Linear(DIM, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float, 0 to 255 -> (N, DIM) features, each of about zero mean and unit spread over the training crops."""
        x, found = self.stem((pixels - 127) / 128), []
        for depth, group in enumerate(self.blocks):
            x = group(x)
            if depth in DEPTHS:
                found.append(x.std((2, 3)) if depth in SPREAD else x.mean((2, 3)))
        return self.scale(torch.cat(found, 1))


def load(path: Path = WEIGHTS) -> Network:
    """The network with weights, in eval mode.

    Raises:
        ValueError: the file does not hold this network.
    """
    with torch.device("meta"):
        network = Network()
    weights = {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    try:
        network.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not hold the compact network: {what}; train it with `k2 synthetic train`") from error
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def boxes(image: np.ndarray) -> np.ndarray:
    """(NUM_CROPS, 4) int: top, left, bottom, right of the crops, in the frame of `padded(image)`.

    Candidates lie on an even lattice, on multiples of 8, so that a JPEG grid keeps its phase. They are ordered by their mean
    gradient and evenly spaced ranks are taken: traces show best in different places for every kind, and flat and textured places
    are in every vector. Small images repeat a place.
    """
    image = padded(image)
    places = [(top, left) for top in _offsets(image.shape[0]) for left in _offsets(image.shape[1])]
    views = np.stack([image[top : top + SIDE : 4, left : left + SIDE, 1] for top, left in places]).astype(np.int16)
    order = np.argsort(np.abs(np.diff(views, axis=2)).mean((1, 2)), kind="stable")
    ranks = np.linspace(0, len(order) - 1, NUM_CROPS).round().astype(int)
    chosen = np.array([places[i] for i in order[ranks]])
    return np.concatenate([chosen, chosen + SIDE], axis=1)


def padded(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), continued by mirroring to at least SIDE in height and width."""
    missing = [max(0, SIDE - length) for length in image.shape[:2]]
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric") if any(missing) else image


def strip(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of any size -> (NUM_CROPS * SIDE, SIDE, 3): its crops, one above the other."""
    whole = padded(image)
    return np.concatenate([whole[top:bottom, left:right] for top, left, bottom, right in boxes(image)])


def crops_of(strips: torch.Tensor) -> torch.Tensor:
    """(N, 3, NUM_CROPS * SIDE, SIDE) -> (N * NUM_CROPS, 3, SIDE, SIDE)."""
    cut = strips.unflatten(2, (NUM_CROPS, SIDE)).transpose(1, 2).flatten(0, 1)
    return cut.contiguous(memory_format=torch.channels_last)


def _offsets(length: int) -> list[int]:
    num = int(np.clip(1 + (length - SIDE) // 64, 1, MAX_LATTICE))
    return sorted({int(start) // 8 * 8 for start in np.linspace(0, length - SIDE, num)})
