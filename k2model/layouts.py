"""The layouts that K2 checkpoints come in: the official one, diffusers' and ComfyUI's scaled FP8. Names, shapes, loading.

`open_checkpoint` looks at a file or folder, finds which layout it is and which model it holds, and checks every name and
shape before a single value is read. The official names are those of `k2model.dit`; the others are a renaming, and the
values of a tensor lie in the same order in all, so a conversion copies bytes.
"""

import hashlib
import json
import logging
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2model.dit import Config, DiT
from k2model.quantize import FP8, cast
from k2model.tensor_files import Stored, read_header

log = logging.getLogger(__name__)

# official <-> diffusers: the beginning of a name, then its end.
STARTS = {
    "first.": "img_in.",
    "tmlp.0.": "time_embed.linear_1.",
    "tmlp.2.": "time_embed.linear_2.",
    "tproj.1.": "time_mod_proj.",
    "txtmlp.0.scale": "txt_in.norm.weight",
    "txtmlp.1.": "txt_in.linear_1.",
    "txtmlp.3.": "txt_in.linear_2.",
    "txtfusion.": "text_fusion.",
    "blocks.": "transformer_blocks.",
    "last.norm.scale": "final_layer.norm.weight",
    "last.linear.": "final_layer.linear.",
    "last.modulation.lin": "final_layer.scale_shift_table",
}
INSIDE = {
    "mod.lin": "scale_shift_table",
    "prenorm.scale": "norm1.weight",
    "postnorm.scale": "norm2.weight",
    "attn.wq.weight": "attn.to_q.weight",
    "attn.wk.weight": "attn.to_k.weight",
    "attn.wv.weight": "attn.to_v.weight",
    "attn.gate.weight": "attn.to_gate.weight",
    "attn.wo.weight": "attn.to_out.0.weight",
    "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
    "attn.qknorm.knorm.scale": "attn.norm_k.weight",
    "mlp.gate.weight": "ff.gate.weight",
    "mlp.up.weight": "ff.up.weight",
    "mlp.down.weight": "ff.down.weight",
}
BLOCK = re.compile(r"((?:transformer_)?blocks|(?:txtfusion|text_fusion)\.(?:layerwise|refiner)_blocks)\.(\d+)\.(.+)")
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# A 432-tensor repack of Turbo carries a picture in two 6144 x 6144 "weights" (file metadata egg_w, egg_h, egg_c); no model has them.
PICTURE = ("last.up.weight", "last.down.weight")
# Beside a scaled FP8 weight. ComfyUI reads `<layer>.weight_scale` and the uint8 JSON `<layer>.comfy_quant` (comfy/ops.py,
# _load_quantized_module), or the metadata _quantization_metadata, or the older `<layer>.scale_weight` with a tensor
# `scaled_fp8` (comfy/utils.py, convert_old_quants; format: ComfyUI's QUANTIZATION.md). Input scales are for its own kernels.
SCALES = (".weight_scale", ".scale_weight")
BESIDE = (*SCALES, ".input_scale", ".scale_input", ".comfy_quant")


@dataclass(frozen=True)
class Checkpoint:
    """A K2 model on disk, its header read and checked: official name -> the stored tensor, in the order of the model."""

    path: Path
    layout: str  # official, diffusers, fp8 or comfy-fp8
    config: Config
    tensors: dict[str, Stored]
    scales: dict[str, Tensor]  # official name of a scaled FP8 weight -> float32 ()

    def digest(self) -> str:
        """A short hash (12 hex digits) that knows models apart: of names, dtypes, shapes, and the first values of every tensor."""
        found = hashlib.sha256()
        for name, stored in self.tensors.items():
            found.update(f"{name} {stored.dtype} {stored.shape}".encode())
            with open(stored.path, "rb") as file:
                file.seek(stored.start)
                found.update(file.read(min(1 << 16, math.prod(stored.shape) * stored.dtype.itemsize)))
        return found.hexdigest()[:12]

    def read(self, name: str, dtype: torch.dtype | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor in its official shape, or its rows from the first to before the second number, on the CPU.

        Without a dtype FP8 becomes bfloat16 and the rest stays as stored.
        """
        stored = self.tensors[name]
        stored = stored._replace(shape=official_shape(name, stored.shape))
        if rows is not None:
            row = math.prod(stored.shape[1:]) * stored.dtype.itemsize  # bytes
            stored = stored._replace(shape=(rows[1] - rows[0], *stored.shape[1:]), start=stored.start + rows[0] * row)
        wanted = dtype or (torch.bfloat16 if stored.dtype.itemsize == 1 else stored.dtype)
        whole = torch.empty(math.prod(stored.shape), dtype=wanted)
        done = 0
        for piece in cast(stored.pieces(), wanted, self.scales.get(name)):
            whole[done : done + len(piece)] = piece
            done += len(piece)
        return whole.view(stored.shape)


def to_diffusers(name: str) -> str:
    """The name of an official tensor in diffusers' Krea2Transformer2DModel."""
    return _rename(name, STARTS, INSIDE)


def to_official(name: str) -> str:
    """The official name of a tensor of diffusers' Krea2Transformer2DModel."""
    return _rename(name, _BACK_STARTS, _BACK_INSIDE)


_BACK_STARTS = {theirs: ours for ours, theirs in STARTS.items()}
_BACK_INSIDE = {theirs: ours for ours, theirs in INSIDE.items()}


def _rename(name: str, starts: dict[str, str], inside: dict[str, str]) -> str:
    block = BLOCK.fullmatch(name)
    if block:
        name = f"{block[1]}.{block[2]}.{inside.get(block[3], block[3])}"
    start = next((start for start in starts if name.startswith(start)), "")
    return starts.get(start, "") + name[len(start) :]


def official_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a stored tensor in the official layout: the six modulation vectors of a block are one there."""
    return (math.prod(shape),) if name.endswith(".mod.lin") else tuple(shape)


def diffusers_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an official tensor in diffusers, where a block's table is (6, width)."""
    return (6, shape[0] // 6) if name.endswith(".mod.lin") else tuple(shape)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find layout and model of a file, a folder of shards, a diffusers folder or a training checkpoint.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not a whole K2 model; the text names the first wrong tensor, what was expected, and what to do.
    """
    path = Path(path)
    files, settings = _files(path)
    found: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file, names in files.items():
        tensors, extra = read_header(file)
        lost = next((name for name in names if name not in tensors), None)
        if lost:
            raise ValueError(f"{file} lacks {lost}, which the index of {path} places there. Copy or download the folder again.")
        found |= tensors
        metadata |= extra
    layout, tensors, beside = _names(path, found)
    config = replace(_infer(path, tensors), **settings)
    scales = _scales(path, tensors, beside, metadata)
    _check(path, config, tensors)
    if scales:
        layout = "comfy-fp8"
    elif any(stored.dtype == FP8 for stored in tensors.values()) and layout == "official":
        layout = "fp8"
    return Checkpoint(path, layout, config, {name: tensors[name] for name in expected_shapes(config)}, scales)


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> DiT:
    """The model of a checkpoint in any layout, ready on `device`, made on `meta` and filled tensor by tensor.

    Args:
        dtype: Of all parameters; None keeps the stored mix (FP8 becomes bfloat16).

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = DiT(checkpoint.config)
    model.load_state_dict({name: checkpoint.read(name, dtype).to(device) for name in checkpoint.tensors}, assign=True)
    return model


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a model, in its order."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}


def diffusers_config(config: Config) -> dict[str, Any]:
    """config.json of diffusers' Krea2Transformer2DModel.

    Raises:
        ValueError: the model narrows its text (k2-1b), which diffusers' class cannot.
    """
    if config.fusion_width:
        raise ValueError(
            f"diffusers has no place for txtfusion.narrow.weight ({config.text_dim} -> {config.fusion_width}). Use --layout official."
        )
    shapes = expected_shapes(config)
    return {
        "_class_name": "Krea2Transformer2DModel",
        "_diffusers_version": "0.42.1",
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.rope_dims),
        "in_channels": config.token_dim,
        "intermediate_size": shapes["blocks.0.mlp.up.weight"][0],
        "norm_eps": config.eps,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_layers": config.num_blocks,
        "num_layerwise_text_blocks": config.num_fusion_blocks,
        "num_refiner_text_blocks": config.num_fusion_blocks,
        "num_text_layers": config.text_taps,
        "rope_theta": config.rope_theta,
        "text_hidden_dim": config.text_dim,
        "text_intermediate_size": shapes["txtfusion.refiner_blocks.0.mlp.up.weight"][0],
        "text_num_attention_heads": config.text_heads,
        "text_num_key_value_heads": config.text_heads,
        "timestep_embed_dim": config.time_dim,
    }


def _files(path: Path) -> tuple[dict[Path, list[str]], dict[str, float]]:
    """Files to read, with the names that an index places in each, and settings that shapes do not tell (rope_theta, eps)."""
    if path.is_file():
        return {path: []}, {}
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a .safetensors file, a folder of shards or a training checkpoint.")
    if not any(path.glob("*.safetensors*")) and (path / "transformer").is_dir():
        path = path / "transformer"  # the folder of a whole diffusers pipeline
    settings = {}
    if (path / "config.json").is_file():
        found = json.loads((path / "config.json").read_text())
        settings = {ours: found[theirs] for ours, theirs in (("rope_theta", "rope_theta"), ("eps", "norm_eps")) if theirs in found}
    if (path / "state.json").is_file():  # a training checkpoint: its other files are optimizer and codec
        if not (path / "model.safetensors").is_file():
            raise ValueError(f"{path} is a training checkpoint without model.safetensors (of a LoRA run?). Give a checkpoint of a model.")
        run = json.loads((path / "state.json").read_text()).get("config", {}).get("description", {})
        model = run.get("recipe", {}).get("model", {})
        return {path / "model.safetensors": []}, {key: model[key] for key in ("rope_theta", "eps") if key in model}
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        places: dict[Path, list[str]] = {}
        for name, file in json.loads(indexes[0].read_text())["weight_map"].items():
            places.setdefault(path / file, []).append(name)
        lost = next((file for file in places if not file.is_file()), None)
        if lost:
            raise ValueError(f"{lost} is missing; {indexes[0]} lists it. It should hold {places[lost][0]}. Copy or download it.")
        return dict(sorted(places.items())), settings
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no .safetensors. Give the folder (or file) that does.")
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} .safetensors and no index: {', '.join(f.name for f in files[:4])}. Give one of them.")
    return {files[0]: []}, settings


def _names(path: Path, found: dict[str, Stored]) -> tuple[str, dict[str, Stored], dict[str, Stored]]:
    """(official or diffusers, tensors by official name, what lies beside FP8 weights)."""
    names = list(found)
    if any(re.search(r"\.lora_(A|B|up|down)\b|\.lokr_", name) for name in names):
        raise ValueError(f"{path} is a LoRA ({names[0]}), not a model. Give the model, and the LoRA where a LoRA is asked for.")
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names)), "")
    inside = {name.removeprefix(prefix): stored for name, stored in found.items() if name.startswith(prefix)}
    if len(inside) < len(found):
        outside = next(name for name in names if not name.startswith(prefix))
        log.info("%s: %d tensors without the prefix %s are ignored, the first is %s", path, len(found) - len(inside), prefix, outside)
    for name in PICTURE:
        if inside.pop(name, None):
            log.info("%s: %s is ignored: it is an embedded picture and no weight of the model", path, name)
    beside = {name: inside.pop(name) for name in list(inside) if name.endswith(BESIDE) or name == "scaled_fp8"}
    diffusers = any(name.startswith(("transformer_blocks.", "text_fusion.")) for name in inside)
    tensors = {to_official(name): stored for name, stored in inside.items()} if diffusers else inside
    if not any(name.startswith("txtfusion.") for name in tensors):
        kind = next((kind for sign, kind in _FOREIGN.items() if any(name.startswith(sign) for name in inside)), "another model")
        first = next(iter(inside), "no tensor")
        raise ValueError(
            f"{path} is not a K2 model: txtfusion.projector.weight is missing; it looks like {kind} ({first}). Give a K2 model."
        )
    return ("diffusers" if diffusers else "official"), tensors, beside


_FOREIGN = {
    "double_blocks.": "FLUX",
    "single_transformer_blocks.": "FLUX in diffusers' layout",
    "joint_blocks.": "Stable Diffusion 3",
    "input_blocks.": "Stable Diffusion",
    "down_blocks.": "a UNet in diffusers' layout",
    "transformer_blocks.": "Qwen-Image or another model of diffusers",
    "encoder.": "an autoencoder",
    "model.": "a language model",
}


def _infer(path: Path, tensors: dict[str, Stored]) -> Config:
    """Sizes from shapes. Patches of 2 x 2, RoPE's theta and the norms' eps leave no trace there and are the released ones."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"{path}: {name} is missing, so the model cannot be told from its shapes. Copy or download it again.")
        found = tensors[name].shape
        if len(found) != rank or 0 in found:
            raise ValueError(f"{path}: {name} is {list(found)}, expected {rank} dimensions. It is not a K2 model, or a broken one.")
        return found

    def count(stack: str) -> int:
        return len({name.split(".")[stack.count(".")] for name in tensors if name.startswith(stack)})

    width, token_dim = shape("first.weight", 2)
    head_dim = shape("blocks.0.attn.qknorm.qnorm.scale", 1)[0]
    fusion_head = shape("txtfusion.layerwise_blocks.0.attn.qknorm.qnorm.scale", 1)[0]
    fusion_dim = shape("txtmlp.0.scale", 1)[0]
    narrowed = "txtfusion.narrow.weight" in tensors  # k2-1b and its like; the released model has none
    text_dim = shape("txtfusion.narrow.weight", 2)[1] if narrowed else fusion_dim
    for name, whole, part in (("blocks.0", width, head_dim), ("txtfusion.layerwise_blocks.0", fusion_dim, fusion_head)):
        if whole % part:
            raise ValueError(
                f"{path}: {name}.attn.qknorm.qnorm.scale is [{part}], expected a divisor of the width {whole}. "
                "It is broken, or of another model."
            )
    try:
        return Config(
            width=width,
            num_blocks=count("blocks."),
            num_heads=width // head_dim,
            num_kv_heads=shape("blocks.0.attn.wk.weight", 2)[0] // head_dim,
            text_dim=text_dim,
            fusion_width=fusion_dim if narrowed else None,
            text_taps=shape("txtfusion.projector.weight", 2)[1],
            text_heads=fusion_dim // fusion_head,
            num_fusion_blocks=count("txtfusion.layerwise_blocks."),
            channels=token_dim // Config.patch**2,
            time_dim=shape("tmlp.0.weight", 2)[1],
        )
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: no K2 model has these shapes: {error}. It is broken, or of another model.") from error


def _scales(path: Path, tensors: dict[str, Stored], beside: dict[str, Stored], metadata: dict[str, str]) -> dict[str, Tensor]:
    """The scales of scaled FP8 weights, by the official name of the weight."""
    formats = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
    for name, stored in beside.items():
        if name.endswith(".comfy_quant"):
            formats[name.removesuffix(".comfy_quant")] = json.loads(bytes(stored.read().tolist()))
    other = next(((layer, found) for layer, found in formats.items() if found.get("format") != "float8_e4m3fn"), None)
    if other:
        raise ValueError(f"{path}: {other[0]}.weight is quantized as {other[1].get('format')}; only float8_e4m3fn is read here")
    scales = {}
    for name, stored in beside.items():
        if not name.endswith(SCALES):
            continue
        weight = name.rsplit(".", 1)[0] + ".weight"
        weight = weight if weight in tensors else to_official(weight)
        if weight not in tensors:
            raise ValueError(f"{path}: {name} is the scale of {weight}, which is missing. Copy or download it again.")
        if math.prod(stored.shape) != 1:
            raise ValueError(f"{path}: {name} is {list(stored.shape)}, expected one value: only scales per tensor are read here")
        scales[weight] = stored.read().float().reshape(())
    return scales


def _check(path: Path, config: Config, tensors: dict[str, Stored]) -> None:
    """Every tensor of the model is there in its shape, and no other is."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{path}: {name} is missing, expected {list(shape)}. The file is not whole: copy or download it again.")
        stored = tensors[name]
        if official_shape(name, stored.shape) != shape:
            raise ValueError(
                f"{path}: {name} ({stored.name} in the file) is {list(stored.shape)}, expected {list(shape)} in a model of {config}. "
                "It is broken, or of another model."
            )
        if not stored.dtype.is_floating_point:
            raise ValueError(f"{path}: {name} is {stored.dtype}, expected a floating dtype. Weights of {stored.dtype} are not read here.")
    extra = next((name for name in tensors if name not in expected), None)
    if extra:
        stored = tensors[extra]
        raise ValueError(f"{path}: {stored.name} {list(stored.shape)} is no tensor of a K2 model of {config.num_blocks} blocks. Remove it.")
