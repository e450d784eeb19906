"""The K2 diffusion transformer: one single stream of text and image tokens, packed without padding.

Text has no positions in the model, and a padded token is never read, so leaving padding out is exact: of the released layout, which
pads text to 512 tokens, half of the work at 256 px is padding. A batch is a rectangle of image tokens (B, M) and the N valid text tokens
of all samples one after the other; every matrix product runs on the B * M + N tokens at once, attention on each sample's own.
After the last block nothing reads the text, so that block computes none: the same numbers, 1 to 3 % less work.

The state dict *is* the released file: the same names and shapes (`blocks.3.attn.wq.weight`, `txtfusion...`), so that
export is `safetensors.save_file` and the released weights load with `load_state_dict`. Architecture after the public
`krea-ai/krea-2` inference code (mmdit.py) and the Krea 2 technical report. Compile, precision and parallelism are the
caller's business.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from k2model.attention import Kernel, Tokens, by_segment, pack, with_images


@dataclass(frozen=True)
class Config:
    """Sizes of a K2 transformer; the defaults are the released 12.8B model."""

    width: int = 6144
    num_blocks: int = 28
    num_heads: int = 48
    num_kv_heads: int = 12
    text_dim: int = 2560
    text_taps: int = 12
    text_heads: int = 20
    num_fusion_blocks: int = 2  # this many across the taps of a token, and again this many across tokens
    fusion_width: int | None = None  # taps are narrowed to this before the fusion; None, as released: not
    channels: int = 16
    patch: int = 2
    time_dim: int = 256
    rope_theta: float = 1000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.num_heads % self.num_kv_heads or self.fusion_dim % self.text_heads:
            raise ValueError(
                f"num_heads must divide width, num_kv_heads must divide num_heads and text_heads must divide the fusion's width; got {self}"
            )
        if self.head_dim % 8 or self.head_dim < 16:
            raise ValueError(f"width / num_heads is {self.head_dim}; RoPE over (t, h, w) needs a multiple of 8 of at least 16")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def fusion_dim(self) -> int:
        """Width of the text fusion."""
        return self.fusion_width or self.text_dim

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.num_kv_heads

    @property
    def token_dim(self) -> int:
        """Latent values per image token."""
        return self.channels * self.patch**2

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """How the head dimension is split over the axes (t, h, w); (32, 48, 48) for heads of 128."""
        share = 6 * (self.head_dim // 16)
        return self.head_dim - 2 * share, share, share


def hidden_dim(width: int) -> int:
    """Hidden width of a SwiGLU MLP: 4 x two thirds of the width, rounded up to a multiple of 128 (16384 for 6144)."""
    return 128 * math.ceil(int(2 * width / 3) * 4 / 128)


K2 = Config()
# The released width of the text fusion would be 46 % of the FLOPs of a 256 px step of so small a model; narrowed it is 16 %.
K2_1B = Config(width=2048, num_blocks=26, num_heads=16, num_kv_heads=4, fusion_width=1024, text_heads=8)
NANO = Config(
    width=128, num_blocks=4, num_heads=2, num_kv_heads=1, text_dim=64, text_taps=4, text_heads=2, num_fusion_blocks=1, time_dim=64
)


class RMSNorm(nn.Module):
    """RMS norm in float32 with a zero-centred scale: the multiplier is 1 + scale, so weight decay pulls it to 1."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.scale.shape, 1 + self.scale.float(), self.eps).to(x.dtype)


class QKNorm(nn.Module):
    """One norm over the head dimension for queries, one for keys."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.qnorm = RMSNorm(head_dim, eps)
        self.knorm = RMSNorm(head_dim, eps)


class Attention(nn.Module):
    """Grouped-query self-attention with QK norm, RoPE and an elementwise sigmoid gate made from the block's input."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, eps: float):
        super().__init__()
        self.head_dim = width // num_heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, self.head_dim * num_kv_heads, bias=False)
        self.wv = nn.Linear(width, self.head_dim * num_kv_heads, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.qknorm = QKNorm(self.head_dim, eps)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, tokens: Tokens | None) -> Tensor:
        """(T, width) to as many rows as are read, attending within each sample; with None (n, t, width), within each of the n."""
        asked = x if tokens is None or tokens.text_read else tokens.split(x)[0].flatten(0, 1)
        q, k, v = (linear(y).unflatten(-1, (-1, self.head_dim)) for linear, y in ((self.wq, asked), (self.wk, x), (self.wv, x)))
        q, k = self.qknorm.qnorm(q), self.qknorm.knorm(k)
        if tokens is None:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            # A token's taps are few: on a CPU the backward of the fused kernel takes as long as products in fp32, ten times that in bf16.
            with sdpa_kernel(SDPBackend.MATH) if x.device.type == "cpu" else nullcontext():
                out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
        else:
            out = tokens.kernel(q, k, v, tokens)
        return self.wo(out.flatten(-2) * torch.sigmoid(self.gate(asked)))


class SwiGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden_dim(width), bias=False)
        self.up = nn.Linear(width, hidden_dim(width), bias=False)
        self.down = nn.Linear(hidden_dim(width), width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Modulation(nn.Module):
    """A learned table that is added to the shared time vector; zero at the start."""

    def __init__(self, *shape: int):
        super().__init__()
        self.lin = nn.Parameter(torch.zeros(*shape))


class FusionBlock(nn.Module):
    """Pre-norm block of the text fusion: no RoPE, no time modulation."""

    def __init__(self, width: int, num_heads: int, eps: float):
        super().__init__()
        self.prenorm = RMSNorm(width, eps)
        self.postnorm = RMSNorm(width, eps)
        self.attn = Attention(width, num_heads, num_heads, eps)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, tokens: Tokens | None) -> Tensor:
        x = x + self.attn(self.prenorm(x), tokens)
        return x + self.mlp(self.postnorm(x))


class Block(nn.Module):
    """Attention then MLP, both scaled, shifted and gated by the time vector plus the block's own table."""

    def __init__(self, config: Config):
        super().__init__()
        self.mod = Modulation(6 * config.width)
        self.prenorm = RMSNorm(config.width, config.eps)
        self.postnorm = RMSNorm(config.width, config.eps)
        self.attn = Attention(config.width, config.num_heads, config.num_kv_heads, config.eps)
        self.mlp = SwiGLU(config.width)

    def forward(self, image: Tensor, text: Tensor, time: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Image tokens (B, M, width), text tokens (N, width; none come out where they are not read), time (B, 6 * width)."""
        pre_scale, pre_shift, pre_gate, post_scale, post_shift, post_gate = (time + self.mod.lin).chunk(6, dim=-1)
        out = self.attn(modulated(image, text, self.prenorm, pre_scale, pre_shift, tokens.owner), tokens)
        owner = tokens.owner if tokens.text_read else tokens.owner[:0]
        image, text = gated(image, text[: len(owner)], pre_gate, tokens.split(out), owner)
        out = self.mlp(modulated(image, text, self.postnorm, post_scale, post_shift, owner))
        return gated(image, text, post_gate, tokens.split(out), owner)


def modulated(image: Tensor, text: Tensor, norm: RMSNorm, scale: Tensor, shift: Tensor, owner: Tensor) -> Tensor:
    """(1 + scale) * norm(x) + shift as one sequence (T, width); scale and shift (B, width) are each sample's own.

    The norm's multiplier and the sample's are one factor, so that each token is read and written once.
    """
    factor, shift, dtype = (1 + norm.scale.float()) * (1 + scale.float()), shift.float(), image.dtype
    image, text = (F.rms_norm(x.float(), norm.scale.shape, eps=norm.eps) for x in (image, text))
    image = torch.addcmul(shift[:, None], image, factor[:, None]).flatten(0, 1)
    text = torch.addcmul(shift[owner], text, factor[owner])
    return torch.cat([image, text]).to(dtype)


def gated(image: Tensor, text: Tensor, gate: Tensor, out: tuple[Tensor, Tensor], owner: Tensor) -> tuple[Tensor, Tensor]:
    """x + gate * out, with each sample's own gate (B, width)."""
    return image + gate[:, None] * out[0], text + gate[owner] * out[1]


class TextFusion(nn.Module):
    """The taps of the text encoder (N, taps, dim) to one vector per token (N, fusion dim)."""

    def __init__(self, config: Config):
        super().__init__()

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(FusionBlock(config.fusion_dim, config.text_heads, config.eps) for _ in range(config.num_fusion_blocks))

        if config.fusion_width:
            self.narrow = nn.Linear(config.text_dim, config.fusion_width, bias=False)  # ours; the released model has none
        self.layerwise_blocks = blocks()
        self.projector = nn.Linear(config.text_taps, 1, bias=False)
        self.refiner_blocks = blocks()

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        if hasattr(self, "narrow"):
            x = self.narrow(x)
        for block in self.layerwise_blocks:
            x = block(x, None)
        x = self.projector(x.transpose(1, 2)).squeeze(-1)
        for block in self.refiner_blocks:
            x = block(x, tokens)
        return x


class Last(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.modulation = Modulation(2, config.width)
        self.norm = RMSNorm(config.width, config.eps)
        self.linear = nn.Linear(config.width, config.token_dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = (time[:, None] + self.modulation.lin).chunk(2, dim=1)
        return self.linear((1 + scale) * self.norm(x) + shift)


class DiT(nn.Module):
    """Velocity of the rectified flow, `noise - clean`, from noisy latents, time and text.

    Initialisation is PyTorch's default for linears and zero for norm scales and tables, as in the released code: with
    zero tables the gates start small and random (the output of `tproj`), so no layer is zero-initialised by hand.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, text_dim = config.width, config.fusion_dim
        gelu = nn.GELU(approximate="tanh")
        self.first = nn.Linear(config.token_dim, width)
        self.tmlp = nn.Sequential(nn.Linear(config.time_dim, width), gelu, nn.Linear(width, width))
        self.tproj = nn.Sequential(gelu, nn.Linear(width, 6 * width))
        self.txtfusion = TextFusion(config)
        self.txtmlp = nn.Sequential(RMSNorm(text_dim, config.eps), nn.Linear(text_dim, width), gelu, nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.last = Last(config)

    def forward(self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None, kernel: Kernel = by_segment) -> Tensor:
        """
        Args:
            latents: (B, channels, H, W), H and W multiples of `patch`: clean at t = 0, noise at t = 1.
            t: (B,) in [0, 1].
            text: (B, L, text_taps, text_dim) states of the text encoder.
            text_mask: (B, L) bool, True for valid tokens (at least one per sample); None when all are valid. What is not valid
                is left out before anything is computed, and text has no positions, so neither number, place nor content of
                padding changes the result.
            kernel: Attention: `by_segment` anywhere; on CUDA also `variable_length` in half precision, `flexible` in a compiled model.

        Returns:
            (B, channels, H, W) velocity.
        """
        batch, channels, height, width = latents.shape
        p = self.config.patch
        rows, columns = height // p, width // p
        patches = latents.unflatten(3, (columns, p)).unflatten(2, (rows, p)).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        time = self.tmlp(time_features(t, self.config.time_dim).to(self.tmlp[0].weight.dtype))
        rope = rope_table(self.config, rows, columns, latents.device)
        text, alone = pack(text, text_mask, kernel)
        tokens = with_images(alone, rows * columns, rope)
        words, image, block_time = self.txtmlp(self.txtfusion(text, alone)), self.first(patches), self.tproj(time)
        for i, block in enumerate(self.blocks, start=1):
            image, words = block(image, words, block_time, tokens._replace(text_read=i < len(self.blocks)))
        out = self.last(image, time)
        return out.unflatten(2, (channels, p, p)).unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def time_features(t: Tensor, dim: int) -> Tensor:
    """(B,) in [0, 1] to (B, dim) float32: cos first, then sin, of 1000 t at periods up to 1e4."""
    frequencies = torch.exp(-math.log(1e4) / (dim // 2) * torch.arange(dim // 2, dtype=torch.float32, device=t.device))
    angles = (1000 * t.float())[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@torch.compiler.disable  # no compiler makes complex numbers; beside `pack`, it breaks no other graph
def rope_table(config: Config, rows: int, columns: int, device: torch.device) -> Tensor:
    """Rotations exp(i angle) of image tokens at (0, row, column): (M, 1, head_dim / 2) complex64, angles in float64.

    Text lies at (0, 0, 0), where nothing is rotated. FSDP, which casts real inputs of a block to bf16, leaves complex ones alone.
    """
    return _rotations(config.rope_dims, config.rope_theta, rows, columns, device)


@lru_cache(maxsize=64)  # buckets; 2 MiB at 1024 px, made on the CPU
def _rotations(dims: tuple[int, ...], theta: float, rows: int, columns: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept for calls that train
        row, column = torch.meshgrid(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"), indexing="ij")
        angles = []
        for dim, position in zip(dims, (torch.zeros_like(row), row, column), strict=True):
            frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
            angles.append(position.flatten().double()[:, None] * frequencies)
        angle = torch.cat(angles, dim=1)[:, None]
        return torch.complex(angle.cos().float(), angle.sin().float()).to(device)
