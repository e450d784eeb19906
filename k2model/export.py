"""From one checkpoint layout to another: what would be written, as a list on `meta`, and the writing, streamed.

Official and diffusers' layouts hold the same bytes under other names, so between them nothing is computed and the way
back gives the same file. FP8 comes in two forms with official names: a plain cast (`fp8`), and ComfyUI's scaled layout
(`comfy-fp8`) with `<layer>.weight_scale`, float32 (), and `<layer>.comfy_quant`, the uint8 JSON that names the format.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from k2model.dit import Config
from k2model.layouts import Checkpoint, diffusers_config, diffusers_shape, expected_shapes, to_diffusers
from k2model.quantize import FP8, cast, is_quantized, quantized, scale_of
from k2model.tensor_files import New, Stored, write_file, write_folder

LAYOUTS = ("official", "diffusers", "fp8", "comfy-fp8")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def released_dtype(name: str) -> torch.dtype:
    """The dtype of a tensor in Krea's files: bfloat16 for the matrices of all blocks, float32 for the rest."""
    inside = name.startswith(("blocks.", "txtfusion.layerwise_blocks.", "txtfusion.refiner_blocks."))
    return torch.bfloat16 if inside and name.endswith(".weight") else torch.float32


def on_meta(config: Config) -> Checkpoint:
    """A checkpoint of this model in the released dtypes with names and shapes but no values, to plan on."""
    shapes = expected_shapes(config)
    nowhere = Path(os.devnull)
    stored = {name: Stored(nowhere, name, released_dtype(name), shape, 0) for name, shape in shapes.items()}
    return Checkpoint(nowhere, "official", config, stored, {})


def plan(checkpoint: Checkpoint, layout: str, dtype: str = "keep") -> list[New]:
    """What a checkpoint becomes in `layout`: names, dtypes and shapes, with the values still where they are.

    Args:
        layout: official, diffusers, fp8 or comfy-fp8.
        dtype: Of what does not become FP8: keep (as stored; scaled FP8 becomes bfloat16), released (Krea's mix of bfloat16
            and float32), bf16, fp16 or fp32.

    Raises:
        ValueError: an unknown layout or dtype.
    """
    if layout not in LAYOUTS or dtype not in ("keep", "released", *DTYPES):
        raise ValueError(f"layout {layout!r}, dtype {dtype!r}: choose from {', '.join(LAYOUTS)}, and keep, released, {', '.join(DTYPES)}")
    shapes = expected_shapes(checkpoint.config)
    if layout == "diffusers":
        diffusers_config(checkpoint.config)  # refuses what diffusers cannot hold
    out: list[New] = []
    for name, stored in checkpoint.tensors.items():
        shape, scale = shapes[name], checkpoint.scales.get(name)
        if layout == "comfy-fp8" and is_quantized(name, shape):
            out += _scaled(name, shape, stored, scale)
        elif layout == "fp8" and is_quantized(name, shape):
            copied = stored.dtype == FP8 and scale is None
            out.append(New(name, FP8, shape, stored.pieces if copied else functools.partial(_plain, stored, scale)))
        else:
            wanted = _dtype(name, stored, scale, dtype)
            pieces = stored.pieces if wanted == stored.dtype and scale is None else functools.partial(_cast, stored, wanted, scale)
            if layout == "diffusers":
                name, shape = to_diffusers(name), diffusers_shape(name, shape)
            out.append(New(name, wanted, shape, pieces))
    return out


def write(tensors: list[New], config: Config, layout: str, to: str | Path, shard_bytes: int = 10**10) -> None:
    """Write a plan: one file where `to` ends in .safetensors, else a folder, in shards of at most `shard_bytes`.

    It is written beside `to` under a temporary name and renamed when it is whole.

    Raises:
        ValueError: `to` is there already, cannot hold this layout, or its disk is too full.
    """
    to = Path(to)
    single = to.suffix == ".safetensors"
    check_target(to, layout)
    to.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(tensor.num_bytes for tensor in tensors), shutil.disk_usage(to.parent).free
    if needed > free:
        raise ValueError(f"{to} needs {needed:,} bytes and {to.parent} has {free:,} free. Make room, or write elsewhere.")
    temporary = to.with_name(f".{to.name}.tmp")
    _remove(temporary)  # what a killed process left
    try:
        if single:
            write_file(tensors, temporary, {"format": "pt"})
        else:
            temporary.mkdir()
            write_folder(tensors, temporary, "diffusion_pytorch_model" if layout == "diffusers" else "model", shard_bytes, {"format": "pt"})
            if layout == "diffusers":
                (temporary / "config.json").write_text(json.dumps(diffusers_config(config), indent=2) + "\n")
        os.replace(temporary, to)
    except BaseException:
        _remove(temporary)
        raise


def check_target(to: Path, layout: str) -> None:
    """Raises: ValueError: `to` is there already, or is a single file where diffusers' layout needs a folder."""
    if to.exists():
        raise ValueError(f"{to} is there already and is not overwritten. Remove it, or write elsewhere.")
    if layout == "diffusers" and to.suffix == ".safetensors":
        raise ValueError(f"diffusers' layout is a folder with config.json; {to} is a single file. Give a folder, or --layout official.")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _dtype(name: str, stored: Stored, scale: Tensor | None, wanted: str) -> torch.dtype:
    if wanted == "keep":
        return stored.dtype if scale is None else torch.bfloat16
    return released_dtype(name) if wanted == "released" else DTYPES[wanted]


def _cast(stored: Stored, dtype: torch.dtype, scale: Tensor | None):
    return cast(stored.pieces(), dtype, scale)


def _plain(stored: Stored, scale: Tensor | None):
    return quantized(_values(stored, scale))


def _values(stored: Stored, scale: Tensor | None):
    return stored.pieces() if scale is None else cast(stored.pieces(), torch.float32, scale)


def _scaled(name: str, shape: tuple[int, ...], stored: Stored, scale: Tensor | None) -> list[New]:
    """A matrix in ComfyUI's layout: FP8 values, their scale, and the note that says so."""
    layer = name.removesuffix(".weight")
    # FP8 matrix products need sides that are multiples of 16; ComfyUI multiplies a layer with this word in the dtype of its input.
    note: dict[str, str | bool] = {"format": "float8_e4m3fn"}
    if any(side % 16 for side in shape):
        note["full_precision_matrix_mult"] = True
    text = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    found: Callable[[], Tensor]
    if scale is not None:
        found = functools.partial(torch.clone, scale)
        values = stored.pieces
    else:

        @functools.cache
        def found() -> Tensor:
            try:
                return scale_of(stored.pieces())
            except ValueError as error:
                raise ValueError(f"{stored.path}: {stored.name}: {error}") from error

        def values():
            return quantized(stored.pieces(), found())

    return [
        New(name, FP8, shape, values),
        New(f"{layer}.weight_scale", torch.float32, (), lambda: [found().reshape(1)]),
        New(f"{layer}.comfy_quant", torch.uint8, tuple(text.shape), lambda: [text]),
    ]
