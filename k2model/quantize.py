"""FP8 weights: which tensors, and the arithmetic, piece by piece.

The public rule: every 2-D `.weight` becomes float8_e4m3fn, everything else keeps its stored dtype. In the released
model these are 264 of 430 tensors; `last.modulation.lin` is 2-D too, but a table and not a weight.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the public rule makes this tensor FP8; `name` and `shape` are the official ones."""
    return name.endswith(".weight") and len(shape) == 2


def scale_of(pieces: Iterable[Tensor]) -> Tensor:
    """The scale of a matrix, float32 (): its largest magnitude is stored as 448. 1 where all is zero.

    Raises:
        ValueError: the matrix holds NaN or infinity.
    """
    largest = max((float(piece.float().abs().max()) for piece in pieces), default=0.0, key=lambda value: (value != value, value))
    if not largest < float("inf"):
        raise ValueError(f"it holds {largest}, which no FP8 scale can carry. Do not quantize a model whose training diverged.")
    return torch.tensor(largest / LARGEST if largest else 1.0, dtype=torch.float32)


def quantized(pieces: Iterable[Tensor], scale: Tensor | None = None) -> Iterator[Tensor]:
    """Values / `scale`, rounded to the nearest float8_e4m3fn. PyTorch's cast makes NaN above 448; here 448 is the end."""
    for piece in pieces:
        values = piece.float() if scale is None else piece.float() / scale
        yield values.clamp(-LARGEST, LARGEST).to(FP8)


def cast(pieces: Iterable[Tensor], dtype: torch.dtype, scale: Tensor | None = None) -> Iterator[Tensor]:
    """Values x `scale` in `dtype`, multiplied in float32."""
    for piece in pieces:
        yield piece.to(dtype) if scale is None else (piece.float() * scale).to(dtype)
