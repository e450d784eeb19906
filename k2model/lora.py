"""LoRA: low-rank updates of the Linear layers of a frozen K2, W + weight x (alpha / rank) x B A (Hu et al. 2021).

Files come in two key styles, and both are read and written: that of peft and diffusers
(`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`) and that of ComfyUI and its trainers
(`diffusion_model.blocks.0.attn.wq.lora_A.weight`, or kohya's `lora_unet_blocks_0_attn_wq.lora_down.weight` with `.alpha`).
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from k2model import parallel
from k2model.layouts import to_diffusers, to_official
from k2model.tensor_files import read_header

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
KEY = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<part>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))")


@dataclass(frozen=True)
class Lora:
    """What is trained: the rank, and which layers."""

    rank: int = 16
    alpha: float = 16.0  # the update is scaled by alpha / rank
    targets: str = r"blocks\.\d+\.(attn|mlp)\.\w+"  # of the official layer name; as a whole

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"a LoRA needs a rank of at least 1 and an alpha above 0; got rank {self.rank}, alpha {self.alpha}")


class Update(NamedTuple):
    """The update of one layer: scale x up @ down."""

    down: Tensor  # (rank, in), A in peft
    up: Tensor  # (out, rank), B in peft
    scale: float  # alpha / rank

    def delta(self) -> Tensor:
        """float32 (out, in)."""
        return self.scale * (self.up.float() @ self.down.float())


class LoraLinear(nn.Linear):
    """A frozen Linear with a trained update. Its weight and bias keep their names in the state dict, beside lora_A and lora_B."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return super().forward(x) + (self.scale * update).to(x.dtype)


def attach(model: nn.Module, lora: Lora) -> int:
    """Freeze `model` and give the targeted layers a trained update, float32, without values yet (`init`); returns how many layers.

    The model may be on `meta`; `parallel.shard` comes afterwards.

    Raises:
        ValueError: no layer matches.
    """
    model.requires_grad_(False)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and re.fullmatch(lora.targets, name)]
    if not layers:
        raise ValueError(f"no Linear layer matches targets {lora.targets!r}; layers are named as blocks.0.attn.wq and txtmlp.1")
    for name in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(model.get_submodule(name), lora.rank, lora.alpha / lora.rank))
    return len(layers)


@torch.no_grad()
def init(model: nn.Module, seed: int) -> None:
    """Give the updates their first values, the same on every rank: A as peft starts it, B zero, so that nothing changes at first.

    A is Kaiming-uniform with a = sqrt(5): uniform of +-1 / sqrt(fan in). A rank draws all of it and keeps its piece.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            bound = 1 / math.sqrt(layer.in_features)
            parallel.put(layer.lora_A, torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator))
            layer.lora_B.zero_()


def num_parameters(model: nn.Module, lora: Lora) -> int:
    """How many values `attach` would train; the model may be on `meta`."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sum(lora.rank * sum(module.weight.shape) for name, module in linears.items() if re.fullmatch(lora.targets, name))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a model with updates, by official name: what a checkpoint keeps."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith((".lora_A", ".lora_B"))}


def updates(model: nn.Module) -> dict[str, Update]:
    """The updates of a model in training, whole, by official layer name. All ranks must call it."""
    return {
        name: Update(parallel.whole(module.lora_A.detach()), parallel.whole(module.lora_B.detach()), module.scale)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }


def save(layers: dict[str, Update], path: str | Path, style: str) -> None:
    """Write a LoRA file, whole or not at all. The scale is multiplied into B, so alpha = rank, which all readers assume.

    Args:
        style: `diffusers` or `comfyui`.

    Raises:
        ValueError: another style.
    """
    if style not in ("diffusers", "comfyui"):
        raise ValueError(f"a LoRA is saved in the key style diffusers or comfyui, not {style!r}")
    found = {}
    for layer, update in layers.items():
        key = f"diffusion_model.{layer}" if style == "comfyui" else f"transformer.{_layer(to_diffusers, layer)}"
        found[f"{key}.lora_A.weight"] = update.down.cpu().contiguous()
        found[f"{key}.lora_B.weight"] = (update.scale * update.up.float()).to(update.up.dtype).cpu().contiguous()
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    save_file(found, temporary, {"format": "pt"})
    os.replace(temporary, path)


def load(path: str | Path) -> dict[str, Update]:
    """The updates of a LoRA file in any of the key styles (or of a peft folder), by official layer name.

    Without `alpha` it is the rank, unless the file's metadata (diffusers) or adapter_config.json (peft) gives one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not a LoRA, or with parts that are none (LoKr, DoRA, biases); it names the first such key.
    """
    path = Path(path)
    settings = {}
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            settings = json.loads((path / "adapter_config.json").read_text())
        path = path / "adapter_model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a LoRA's .safetensors, or a folder of peft.")
    stored, metadata = read_header(path)
    if "lora_adapter_metadata" in metadata:  # what diffusers' save_lora_adapter writes
        settings = {key.removeprefix("transformer."): value for key, value in json.loads(metadata["lora_adapter_metadata"]).items()}
    if any(settings.get(key) for key in ("use_dora", "use_rslora", "alpha_pattern")):
        raise ValueError(f"{path} uses DoRA, rsLoRA or an alpha per layer, which are not read here. Merge it with peft first.")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        match = KEY.fullmatch(key)
        if not match:
            raise ValueError(f"{path}: {key} is no part of a LoRA (lora_A, lora_B, lora_down, lora_up, alpha). Give a plain LoRA of K2.")
        part = {"A": "down", "B": "up"}.get(match["part"], match["part"]) or "alpha"
        parts.setdefault(_official_layer(match["layer"]), {})[part] = tensor.read()
    found = {}
    for layer, values in parts.items():
        lost = next((part for part in ("down", "up") if part not in values), None)
        if lost:
            raise ValueError(f"{path}: {layer} has no lora_{lost}. The file is not whole: copy or download it again.")
        down, up = values["down"], values["up"]
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(f"{path}: {layer} has A {list(down.shape)} and B {list(up.shape)}; expected (rank, in) and (out, rank)")
        rank = down.shape[0]
        alpha = float(values["alpha"]) if "alpha" in values else settings.get("lora_alpha") or rank
        found[layer] = Update(down, up, alpha / rank)
    if not found:
        raise ValueError(f"{path} holds no tensors")
    return found


@torch.no_grad()
def merge(model: nn.Module, loras: Sequence[tuple[str | Path, float]]) -> dict[str, Tensor]:
    """Add LoRAs, each with its weight, to the weights in place; returns the weights as they were, for `restore`.

    All are summed in float32 and rounded once to the dtype of the weight, so their order does not matter much.

    Raises:
        FileNotFoundError, ValueError: as `load`; or a layer is not in the model, or of another size. Then nothing has changed.
    """
    weights = model.state_dict()
    wanted: dict[str, list[tuple[float, Update]]] = {}
    for path, weight in loras:
        for layer, update in load(path).items():
            shape = (update.up.shape[0], update.down.shape[1])
            target = weights.get(f"{layer}.weight")
            if target is None or target.ndim != 2:
                raise ValueError(f"{path}: the model has no layer {layer}. Is it a LoRA of K2, and of this size?")
            if tuple(target.shape) != shape:
                raise ValueError(f"{path}: {layer} is an update of {list(shape)}, the model's weight is {list(target.shape)}.")
            wanted.setdefault(layer, []).append((weight, update))
    base = {}
    for layer, terms in wanted.items():
        target = weights[f"{layer}.weight"]
        base[layer] = target.clone()
        total = sum(weight * update.delta() for weight, update in terms)
        target.copy_(target.float() + total.to(target.device))
    return base


@torch.no_grad()
def restore(model: nn.Module, base: dict[str, Tensor]) -> None:
    """Put back the weights that `merge` returned: exactly, where subtracting the update again would round."""
    weights = model.state_dict()
    for layer, weight in base.items():
        weights[f"{layer}.weight"].copy_(weight)


def apply(model: nn.Module, path: str | Path, weight: float) -> int:
    """Merge one LoRA into the weights, in place, for good; returns the number of layers changed. Errors as `merge`."""
    return len(merge(model, [(path, weight)]))


def _layer(rename, layer: str) -> str:
    return rename(f"{layer}.weight").removesuffix(".weight")


def _official_layer(key: str) -> str:
    """A layer in any key style to its official name; a name that is none of K2's stays as it is."""
    if key.startswith(("lora_unet_", "lora_transformer_", "lycoris_")):  # kohya: dots are underscores
        flat = re.sub(r"^(lora_unet|lora_transformer|lycoris)_", "", key)
        flat = re.sub(r"((?:transformer_)?blocks|layerwise_blocks|refiner_blocks)_(\d+)_", r"\1.\2.", flat)
        flat = re.sub(r"(txtfusion|text_fusion)_(?=\w)", r"\1.", flat)
        flat = re.sub(r"\.(attn|mlp|ff)_", r".\1.", flat)
        flat = re.sub(r"^(last|final_layer|time_embed|txt_in)_(?=linear)", r"\1.", flat)
        key = re.sub(r"^(tmlp|tproj|txtmlp)_", r"\1.", flat).replace("to_out_0", "to_out.0")
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return _layer(to_official, key)
