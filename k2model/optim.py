"""AdamW with K2's choice of what decays, Muon as an option, the learning rate of a phase, and gradient norms by part of the model."""

import re
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

FUSED = ("cpu", "cuda")  # where one kernel does the whole step of AdamW; on the CPU in a quarter of the time
MUON = re.compile(r"blocks\.\d+\..+\.weight")  # the matrices of the main blocks
PARTS = {"first": ("first.",), "time": ("tmlp.", "tproj."), "text": ("txtfusion.", "txtmlp."), "last": ("last.",)}


class Together:
    """Several optimizers of disjoint parameters that act as one: `param_groups`, `state`, `zero_grad` and `step` of torch's."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.state = optimizers[0].state
        for optimizer in optimizers[1:]:
            optimizer.state = self.state  # by parameter, so one table serves them all

    @property
    def param_groups(self) -> list[dict]:
        """The groups themselves: what is set in them holds."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()


Optimizer = torch.optim.Optimizer | Together


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW that decays matrices (a LoRA's too) and, as K2 does, the zero-centred norm scales; not biases and modulation tables.

    Frozen parameters are left out. Any module: that of the alignment's projector beside the model is one more optimizer (`Together`).
    """
    return _adamw(model.named_parameters(), lr, weight_decay, betas)


def muon(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> Together:
    """Muon for the matrices of the main blocks, AdamW for everything else: the first and last layers, text, time, norms and tables.

    K2's report: Muon with Moonlight's scaling was fast early, and spiky and worse later, until the first and the last linear layers were
    left out and the momentum was Nesterov's; then it beat AdamW. Moonlight (Liu et al. 2025, arXiv:2502.16982) scales an update by
    .2 sqrt(max(rows, columns)), the root mean square of AdamW's, so that learning rate and decay are those of AdamW. A LoRA has no
    matrix of a block, and gets AdamW alone.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        chosen = parameter.ndim == 2 and MUON.fullmatch(name)
        (matrices if chosen and parameter.requires_grad else rest).append((name, parameter))
    others = _adamw(rest, lr, weight_decay, betas)
    if not matrices:
        return Together(others)
    blocks = torch.optim.Muon(
        [parameter for _, parameter in matrices],
        lr=lr,
        weight_decay=weight_decay,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together(blocks, others)


def _adamw(parameters: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    decay, rest = [], []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (decay if name.endswith(("weight", "scale", "lora_A", "lora_B")) else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = all(parameter.device.type in FUSED for parameter in decay + rest)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=1e-8, fused=fused)


def warmup_stable_decay(step: int, num_steps: int, warmup: int, decay: int) -> float:
    """Factor of the learning rate at `step` (from 0) of `num_steps`: up over `warmup` steps, 1, down to 0 over the last `decay`."""
    return min(1.0, (step + 1) / max(warmup, 1), (num_steps - step) / max(decay, 1))


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>.<state name>`, which does not depend on the order of parameters."""
    return {
        f"{name}.{key}": value for name, parameter in model.named_parameters() for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, or its whole tensors where the parameters are sharded.

    Raises:
        ValueError: the state is another optimizer's.
    """
    parameters = dict(model.named_parameters())
    fused = {parameter: group.get("fused") for group in optimizer.param_groups for parameter in group["params"]}
    # Muon's groups have no `betas`; the check is by group, as a parameter's state names its optimizer and not its numbers.
    expected = {
        parameter: {"step", "exp_avg", "exp_avg_sq"} if "betas" in group else {"momentum_buffer"}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for full_name, value in tensors.items():
        name, key = full_name.rsplit(".", 1)
        parameter = parameters.get(name)
        if parameter not in expected or key not in expected[parameter]:
            raise ValueError(
                f"the optimizer's state has {full_name}, which this run's optimizer does not keep. "
                "Resume with the optimizer (adamw or muon) and the model of the recipe that wrote the checkpoint."
            )
        if key == "step":  # a fused kernel has its count beside the parameter, else it stays on the CPU
            value = value.to(parameter.device if fused[parameter] else "cpu")
        elif isinstance(parameter, DTensor) and not isinstance(value, DTensor):
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        else:
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value


def part_of(name: str, num_blocks: int) -> str:
    """The part of the model that a parameter belongs to: first, time, text, a third of the blocks, last; `other` outside of a DiT."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        third = 3 * int(block[1]) // num_blocks
        first, end = (-(-i * num_blocks // 3) for i in (third, third + 1))  # the blocks b with 3 b // num_blocks == third
        return f"block {first + 1}" if end == first + 1 else f"blocks {first + 1}-{end}"
    return next((part for part, starts in PARTS.items() if name.startswith(starts)), "other")


@torch.no_grad()
def grad_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of the gradient of each part of the model, in the model's order, and of all as `total`: float32 () each.

    Every gradient is read once; clip with `clip_gradients(model.parameters(), norms["total"], limit)`. Of sharded gradients (DTensor, on
    one mesh or several) the norms are those of the whole, the same on all ranks; all ranks have to call it.
    """
    num_blocks = 1 + max(
        (int(found[1]) for name, _ in model.named_parameters() if (found := re.match(r"blocks\.(\d+)\.", name))), default=0
    )
    pieces: dict[tuple, dict[str, list[Tensor]]] = {}  # by the process groups over which the pieces of a gradient lie, by part
    parts: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts[part := part_of(name, num_blocks)] = None
            over, local = _local(parameter.grad)
            pieces.setdefault(over, {}).setdefault(part, []).append(local)
    squares: dict[str, list[Tensor]] = {part: [] for part in parts}
    for over, found in pieces.items():
        own = torch.stack([get_total_norm(gradients).float().square() for gradients in found.values()])
        for group in over:
            dist.all_reduce(own, group=group)
        for part, square in zip(found, own.unbind(), strict=True):
            squares[part].append(square)
    sums = {part: torch.stack(own).sum() for part, own in squares.items()}
    total = torch.stack(list(sums.values())).sum().sqrt() if sums else torch.zeros(())
    return {part: square.sqrt() for part, square in sums.items()} | {"total": total}


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, limit: float) -> None:
    """Scale all gradients, of norm `norm`, so that it is at most `limit`: torch's `clip_grads_with_norm_`, on any meshes."""
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    gradients = [_local(parameter.grad)[1] for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))


def _local(gradient: Tensor) -> tuple[tuple[dist.ProcessGroup, ...], Tensor]:
    """The process groups that share a gradient out, and this rank's piece of it."""
    if not isinstance(gradient, DTensor):
        return (), gradient
    mesh = gradient.device_mesh
    groups = tuple(mesh.get_group(i) for i, place in enumerate(gradient.placements) if not place.is_replicate())
    return groups, gradient.to_local()
