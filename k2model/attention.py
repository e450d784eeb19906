"""Attention of a batch without padding: tokens of samples of unequal length, each sample for itself.

`pack` says where the tokens are, a `Kernel` attends: `by_segment` anywhere, `variable_length` on CUDA in half precision,
`flexible` in a model that is compiled for CUDA.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import register_flop_formula

from k2model.transfer import send

# torch 2.11 takes fewer heads of keys and values without a word, later ones must be told.
ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


class Together(NamedTuple):
    """A batch with the tokens of each sample next to each other."""

    order: Tensor | None  # (T,) the token that each place takes; None where they lie so already
    inverse: Tensor | None  # (T,) the place of each token
    ends: Tensor  # (B + 1,) int32: where the samples end, from 0


class Tokens(NamedTuple):
    """Where the tokens of a batch are: B * M of the images, then N of all captions; T in all."""

    image_tokens: int  # M, of every sample; 0 where text is alone
    lengths: Tensor  # (B,) valid text tokens of each sample, on the CPU
    owner: Tensor  # (N,) the sample of each text token
    rope: Tensor | None  # of the image tokens, as `rope_table` gives it
    kernel: "Kernel"
    cap: int  # no sample has more text tokens
    together: Together  # the same for all blocks, so it is found once
    text_read: bool = True  # whether text is read after the block; after the last it is not

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, ...) or (B * M, ...) -> image tokens (B, M, ...) and text tokens (N or 0, ...), as views."""
        batch = len(self.lengths)
        images = batch * self.image_tokens
        image, text = x.split([images, x.shape[0] - images])  # its backward is one cat; that of two slices fills and adds
        return image.unflatten(0, (batch, self.image_tokens)), text


# Attention of q (T or, where text is not read, B * M, heads, head_dim) to k and v (T, kv_heads, head_dim), each sample for itself,
# with RoPE on the image tokens of q and k; as q. Each head of k serves heads / kv_heads of q.
Kernel = Callable[[Tensor, Tensor, Tensor, Tokens], Tensor]


@torch.compiler.disable  # the one thing whose shape is known only from values: what follows is compiled for any number of tokens
def pack(text: Tensor, mask: Tensor | None, kernel: Kernel) -> tuple[Tensor, Tokens]:
    """(B, L, ...) to the valid tokens of all samples (N, ...), and where they are. Waits for the GPU only if the mask is there."""
    batch, cap = text.shape[:2]
    mask = torch.ones(batch, cap, dtype=torch.bool) if mask is None else mask.cpu()
    lengths, rows = mask.sum(1), mask.flatten().nonzero()[:, 0]
    owner = send(torch.arange(batch).repeat_interleave(lengths), text.device)
    text = text.flatten(0, 1)
    if len(rows) < len(text):
        text = text[send(rows, text.device)]
    for x in (text, owner):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return text, Tokens(0, lengths, owner, None, kernel, cap, Together(None, None, ends_of(lengths, 0, text.device)))


@torch.compiler.disable
def with_images(alone: Tokens, image_tokens: int, rope: Tensor) -> Tokens:
    """The tokens of `pack` behind those of images."""
    tokens = alone._replace(image_tokens=image_tokens, rope=rope)
    order = owners(tokens).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    for x in (order, inverse):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return tokens._replace(together=Together(order, inverse, ends_of(alone.lengths, image_tokens, order.device)))


def ends_of(lengths: Tensor, image_tokens: int, device: torch.device) -> Tensor:
    """(B + 1,) int32: where samples that follow each other end."""
    return send(F.pad((lengths + image_tokens).cumsum(0), (1, 0)).int(), device)


def by_segment(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
    """A `Kernel` for every device: PyTorch's fused attention, sample by sample. Needs no mask."""
    if q.device.type == "cpu":
        if torch.is_autocast_enabled("cpu"):  # as PyTorch's attention does; an update of LoRA leaves float32 behind
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        return segments(q, k, v, tokens.rope, tokens.lengths, tokens.image_tokens)[0]
    return each_segment(q, k, v, tokens)


def variable_length(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
    """A `Kernel` in one call of `torch.nn.attention.varlen`, for CUDA in half precision.

    Not run on a GPU where it was written: tests run it with the operator of a GPU exchanged for one of a CPU.
    """
    if torch.is_autocast_enabled(q.device.type):  # as PyTorch's attention does; an update of LoRA leaves float32 behind
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    q, k, v = by_sample(q, k, v, tokens)
    ends, longest = tokens.together.ends, tokens.image_tokens + tokens.cap
    grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if ASKS_FOR_GROUPS else {}
    if tokens.text_read:
        return by_token(varlen_attn(q, k, v, ends, ends, longest, longest, **grouped), tokens)
    of_images = torch.arange(len(ends), device=q.device, dtype=torch.int32) * tokens.image_tokens
    return varlen_attn(q, k, v, of_images, ends, tokens.image_tokens, longest, **grouped)


def flexible(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
    """A `Kernel` in FlexAttention: each token sees those of its own sample. To be compiled with the model, on CUDA in any precision.

    Without compilation it makes the whole (heads, T, T) matrix, and it has no backward on a CPU.
    Not run on a GPU where it was written.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    owner = owners(tokens)
    q, k = rotated(q, k, tokens)
    mask = create_block_mask(lambda b, h, i, j: owner[i] == owner[j], None, None, len(q), len(k), device=q.device)  # a graph makes it once
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


@torch.compiler.disable  # lengths change with every batch: a graph of its own for each would never stop compiling
def each_segment(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
    """`by_segment` of differentiable operators."""
    q, k, v = by_sample(q, k, v, tokens)
    sizes = (tokens.lengths + tokens.image_tokens).tolist()
    asked = sizes if tokens.text_read else [tokens.image_tokens] * len(sizes)
    samples = zip(*(x.transpose(0, 1).split(n, 1) for x, n in ((q, asked), (k, sizes), (v, sizes))), strict=True)
    grouped = q.shape[1] != k.shape[1]
    out = torch.cat([F.scaled_dot_product_attention(*(x[None] for x in one), enable_gqa=grouped)[0].transpose(0, 1) for one in samples])
    return by_token(out, tokens) if tokens.text_read else out


def owners(tokens: Tokens) -> Tensor:
    """(T,): the sample of each token."""
    images = torch.arange(len(tokens.lengths), device=tokens.owner.device).repeat_interleave(tokens.image_tokens)
    return torch.cat([images, tokens.owner])


def rotated(q: Tensor, k: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """RoPE on their image tokens."""
    if tokens.rope is None:
        return q, k
    parts = [tokens.split(x) for x in (q, k)]
    return tuple(torch.cat([rotate(image, tokens.rope).flatten(0, 1), text]) for image, text in parts)


def by_sample(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """q and k rotated, and all three with each sample's tokens together."""
    q, k = rotated(q, k, tokens)
    order, inverse, _ = tokens.together
    if order is None:
        return q, k, v
    return Moved.apply(q, order, inverse) if tokens.text_read else q, Moved.apply(k, order, inverse), Moved.apply(v, order, inverse)


def by_token(x: Tensor, tokens: Tokens) -> Tensor:
    """Back from `by_sample`."""
    order, inverse, _ = tokens.together
    return x if order is None else Moved.apply(x, inverse, order)


class Moved(torch.autograd.Function):
    """x[order] (T, ...), with `inverse` to undo it. PyTorch's own backward does not know that no row is read twice: it sorts, and adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE in float32 on (..., M, heads, head_dim): pairs (even, odd) are complex numbers, `rope` (M, 1, head_dim / 2) their factors."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which knows no complex numbers, but makes one loop of this
        (real, imaginary), (cos, sin) = pairs.unbind(-1), torch.view_as_real(rope).unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    else:  # one product takes a seventh of the time of four
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rope)
    return turned.flatten(-2).to(x.dtype)


@torch.library.custom_op("k2::segments", mutates_args=(), device_types="cpu")
def segments(q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None, lengths: Tensor, image_tokens: int) -> tuple[Tensor, Tensor]:
    """`by_segment` on a CPU as one operator, so that a compiled model is one graph for all lengths.

    Also gives the log-sum-exp of the scores (rows of q, heads). A sample at a time is gathered, rotated and attended
    in cache; nothing of the batch's size is moved but the result.
    """
    out, normalizer = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    for place in places(lengths, image_tokens):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(take(q, place, rope), take(k, place, rope), take(v, place))
        put(found[0], out, place)
        put(found[1][..., None], normalizer[..., None], place)
    return out, normalizer


@torch.library.custom_op("k2::segments_backward", mutates_args=(), device_types="cpu")
def segments_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    normalizer: Tensor,
    rope: Tensor | None,
    lengths: Tensor,
    image_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    to_q, to_k, to_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    back = None if rope is None else rope.conj()  # the inverse rotation
    for place in places(lengths, image_tokens):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            take(grad, place),
            take(q, place, rope),
            take(k, place, rope),
            take(v, place),
            take(out, place),
            take(normalizer[..., None], place)[..., 0],
            0.0,
            False,
        )
        put(found[0], to_q, place, back)
        put(found[1], to_k, place, back)
        put(found[2], to_v, place)
    return to_q, to_k, to_v


def places(lengths: Tensor, image_tokens: int) -> list[tuple[slice, slice]]:
    """Of each sample, the rows of its image and of its text."""
    ends = (len(lengths) * image_tokens + lengths.cumsum(0)).tolist()
    return [
        (slice(i * image_tokens, (i + 1) * image_tokens), slice(end - length, end))
        for i, (end, length) in enumerate(zip(ends, lengths.tolist(), strict=True))
    ]


def take(x: Tensor, place: tuple[slice, slice], rope: Tensor | None = None) -> Tensor:
    """Rows of one sample, (1, heads, rows, head_dim); those of the image rotated."""
    image, text = (x[rows] for rows in place)
    return torch.cat([image if rope is None else rotate(image, rope), text]).transpose(0, 1)[None]


def put(x: Tensor, out: Tensor, place: tuple[slice, slice], rope: Tensor | None = None) -> None:
    """Write them to their rows of `out`."""
    image, text = (out[rows] for rows in place)
    first, second = x[0].transpose(0, 1).split([len(image), len(text)])
    image.copy_(first if rope is None else rotate(first, rope))
    text.copy_(second)


@segments.register_fake
def _(q, k, v, rope, lengths, image_tokens):
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@segments_backward.register_fake
def _(grad, q, k, v, out, normalizer, rope, lengths, image_tokens):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep(ctx, inputs, output) -> None:
    q, k, v, rope, lengths, ctx.image_tokens = inputs
    ctx.save_for_backward(q, k, v, *output, rope, lengths)
    ctx.set_materialize_grads(False)


def backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *segments_backward(grad, *ctx.saved_tensors, ctx.image_tokens), None, None, None


segments.register_autograd(backward, setup_context=keep)


def products(q: Tensor, k: Tensor, lengths: Tensor, image_tokens: int) -> int:
    """FLOPs of one product of queries and keys."""
    sizes = lengths + image_tokens
    asked = sizes if len(q) == len(k) else image_tokens
    return 2 * int((asked * sizes).sum()) * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.k2.segments, get_raw=True)
def _(q, k, v, rope, lengths, image_tokens, out_val=None) -> int:
    return 2 * products(q, k, lengths, image_tokens)


@register_flop_formula(torch.ops.k2.segments_backward, get_raw=True)
def _(grad, q, k, v, out, normalizer, rope, lengths, image_tokens, out_val=None) -> int:
    return 5 * products(q, k, lengths, image_tokens)  # the scores once more
