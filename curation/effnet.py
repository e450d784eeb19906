"""EfficientNet-Lite2 as the tower runs it: its network with the published weights, its view of an image, BatchNorm folded away."""

import numpy as np
import torch
from PIL import Image

from curation.checkpoints import effnet_path, timm_key

EFFNET_SIDE = 260  # pixels
EFFNET_DIM = 1280
EFFNET_CHANNELS = (16, 24, 48, 88, 120, 208, 352)  # after each group of blocks


def effnet_classifier() -> torch.nn.Module:
    """The whole EfficientNet-Lite2 with its ImageNet-1k head, in eval mode, on the CPU."""
    import timm

    # "tf": the weights come from TensorFlow, whose SAME padding is not symmetric at stride 2 and whose BatchNorm has eps 1e-3.
    # The symmetric variant loads as well, and is wrong: logits differ by up to 1.8 and 4 % of the images change class.
    net = timm.create_model("tf_efficientnet_lite2")
    weights = torch.load(effnet_path(), map_location="cpu", weights_only=True)
    blocks = [f"blocks.{stage}.{i}" for stage, modules in enumerate(net.blocks) for i in range(len(modules))]
    net.load_state_dict({timm_key(key, blocks): value for key, value in weights.items()}, strict=True)
    return net.eval().requires_grad_(False)


def fold_batch_norm(net: torch.nn.Module) -> torch.nn.Module:
    """Fold every BatchNorm into the convolution before it: the same function (to 1e-5), half as much again images per second."""
    for module in net.modules():
        convolution = None
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Conv2d):
                convolution = child
            elif isinstance(child, torch.nn.BatchNorm2d):
                convolution.weight, convolution.bias = torch.nn.utils.fusion.fuse_conv_bn_weights(
                    convolution.weight, convolution.bias, child.running_mean, child.running_var, child.eps, child.weight, child.bias
                )
                setattr(module, name, child.act)  # timm's BatchNormAct2d carries the activation
    return net


def effnet_square(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, 3) of any size -> its centre square at 260 x 260, as EfficientNet-Lite2 was evaluated."""
    height, width = image.shape[:2]
    half = min(height, width) * EFFNET_SIDE / 292 / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    return Image.fromarray(image).resize((EFFNET_SIDE, EFFNET_SIDE), Image.Resampling.BICUBIC, box=box)
