"""`k2 convert`: a checkpoint of K2 from one layout to another, streamed; and what it would be, without one."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from k2model import dit, export
from k2model.layouts import open_checkpoint
from k2model.tensor_files import CODES, New
from pipelines.cli import call


def convert(
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None,
    to: str | None = None,
    layout: Literal["official", "diffusers", "fp8", "comfy-fp8"] = "official",
    dtype: Literal["keep", "released", "bf16", "fp16", "fp32"] = "keep",
    shard_gb: float = 10.0,
    model: str | None = None,
    dry_run: bool = False,
) -> int:
    """Convert a K2 checkpoint. It is checked first, copied piece by piece (no tensor is held whole), and is there whole or not at all.

    Layouts: official (krea/Krea-2-Raw and -Turbo; ComfyUI reads it too), diffusers (Krea2Transformer2DModel), fp8 (official
    names, every 2-D .weight cast to float8_e4m3fn), comfy-fp8 (the same with a scale per matrix, as ComfyUI reads it).
    FP8 is read back as --dtype says.

    Args:
        source: A .safetensors file, a folder of shards, a diffusers folder, or a training checkpoint RUN/train/RECIPE/checkpoints/STEP.
        to: A new .safetensors file, or a new folder (diffusers' layout is one).
        layout: The layout to write.
        dtype: Of what does not become FP8: keep as stored, Krea's released mix of bf16 and fp32, or one for all.
        shard_gb: In a folder, the largest file, in GB.
        model: With --dry-run in place of --from: k2, k2-1b or k2-nano, in the released dtypes.
        dry_run: List every tensor, then counts and bytes, and write nothing.
    """
    if (source is None) == (model is None) or (model and not dry_run):
        raise ValueError("give --from CHECKPOINT; or --model NAME with --dry-run, to see a layout without a checkpoint")
    if not dry_run and to is None:
        raise ValueError("give --to: a new .safetensors file, or a new folder")
    if shard_gb <= 0:
        raise ValueError(f"--shard-gb {shard_gb} must be above 0")
    if to is not None:
        export.check_target(Path(to), layout)
    checkpoint = open_checkpoint(source) if source else export.on_meta(config_of(model))
    tensors = export.plan(checkpoint, layout, dtype)
    if dry_run:
        for tensor in tensors:
            row = {"name": tensor.name, "dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "bytes": tensor.num_bytes}
            print(json.dumps(row))
    else:
        total = sum(tensor.num_bytes for tensor in tensors)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"convert to {layout}", file=sys.stderr) as progress:
            counted = [tensor._replace(pieces=lambda tensor=tensor: _count(tensor, progress)) for tensor in tensors]
            export.write(counted, checkpoint.config, layout, to, int(shard_gb * 1e9))
    print(json.dumps({"from": source or model, "read_as": checkpoint.layout, "layout": layout, "to": to} | summary(tensors)))
    return 0


def summary(tensors: list[New]) -> dict[str, int | float]:
    """Counts and bytes of a plan. Scales and notes beside FP8 matrices are neither `quantized` nor `kept`."""
    beside = [tensor for tensor in tensors if tensor.name.endswith((".weight_scale", ".comfy_quant"))]
    quantized = [tensor for tensor in tensors if tensor.dtype == export.FP8]
    total = sum(tensor.num_bytes for tensor in tensors)
    return {
        "tensors": len(tensors),
        "quantized": len(quantized),
        "kept": len(tensors) - len(quantized) - len(beside),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors) - sum(math.prod(tensor.shape) for tensor in beside),
        "bytes": total,
        "GiB": round(total / 2**30, 4),
    }


def config_of(model: str) -> dit.Config:
    """The sizes of a named model.

    Raises:
        ValueError: there is none of this name.
    """
    models = {"k2": dit.K2, "k2-1b": dit.K2_1B, "k2-nano": dit.NANO}
    if model not in models:
        raise ValueError(f"--model {model!r}: choose from {', '.join(models)}")
    return models[model]


def _count(tensor: New, progress: tqdm):
    for piece in tensor.pieces():
        yield piece
        progress.update(piece.nbytes)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(convert, argv, "k2 convert")


if __name__ == "__main__":
    sys.exit(main())
