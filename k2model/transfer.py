"""From the CPU to the device without waiting for it."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: str | torch.device) -> Tensor:
    """`tensor.to(device)`; from a CPU to a GPU through pinned memory, so that the CPU goes on while the GPU still has work to do.

    A plain copy waits for all that was asked of the GPU before. PyTorch keeps the pinned memory until the copy is done.
    """
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
