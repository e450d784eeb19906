"""AdamW with K2's choice of what decays, and the learning rate of a phase."""

import torch
from torch import Tensor, nn


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW that decays matrices (a LoRA's too) and, as K2 does, the zero-centred norm scales; not biases and modulation tables.

    Frozen parameters are left out.
    """
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if name.endswith(("weight", "scale", "lora_A", "lora_B")) else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=1e-8)


def warmup_stable_decay(step: int, num_steps: int, warmup: int, decay: int) -> float:
    """Factor of the learning rate at `step` (from 0) of `num_steps`: up over `warmup` steps, 1, down to 0 over the last `decay`."""
    return min(1.0, (step + 1) / max(warmup, 1), (num_steps - step) / max(decay, 1))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>.<state name>`, which does not depend on the order of parameters."""
    return {
        f"{name}.{key}": value for name, parameter in model.named_parameters() for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, key = full_name.rsplit(".", 1)
        # AdamW keeps its step count on the CPU, whatever the device of the parameter.
        optimizer.state[parameters[name]][key] = value if key == "step" else value.to(parameters[name].device)
