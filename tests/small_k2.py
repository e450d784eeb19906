"""A K2 model of a few thousand weights, none of them zero, and files of it."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from k2model.dit import NANO, Config, DiT

SMALL = replace(NANO, width=64, num_blocks=2, num_heads=2, num_kv_heads=1)


def small_model(config: Config = SMALL, seed: int = 0) -> DiT:
    """Random weights everywhere, norm scales and tables too."""
    generator = torch.Generator().manual_seed(seed)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def small_file(path: Path, model: DiT | None = None, prefix: str = "", **extra: torch.Tensor) -> Path:
    """The model in the official layout, in the released mix of dtypes."""
    from k2model.export import released_dtype

    state = {name: tensor.to(released_dtype(name)) for name, tensor in (model or small_model()).state_dict().items()}
    save_file({prefix + name: tensor for name, tensor in (state | extra).items()}, path)
    return path


def outputs(model: DiT, seed: int = 1) -> torch.Tensor:
    """What a model says to a fixed input."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    latents = torch.randn(2, config.channels, 4, 6, generator=generator)
    text = torch.randn(2, 3, config.text_taps, config.text_dim, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([0.3, 0.8]), text)
