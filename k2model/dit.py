"""The K2 diffusion transformer: one single-stream sequence of text tokens, then image tokens.

The state dict *is* the released file: the same names and shapes (`blocks.3.attn.wq.weight`, `txtfusion...`), so that
export is `safetensors.save_file` and the released weights load with `load_state_dict`. Architecture after the public
`krea-ai/krea-2` inference code (mmdit.py) and the Krea 2 technical report. Compile, precision and parallelism are the
caller's business.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    channels: int = 16
    patch: int = 2
    time_dim: int = 256
    rope_theta: float = 1000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.num_heads % self.num_kv_heads or self.text_dim % self.text_heads:
            raise ValueError(
                f"num_heads must divide width, num_kv_heads must divide num_heads and text_heads must divide text_dim; got {self}"
            )
        if self.head_dim % 8 or self.head_dim < 16:
            raise ValueError(f"width / num_heads is {self.head_dim}; RoPE over (t, h, w) needs a multiple of 8 of at least 16")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, key_mask: Tensor | None) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.wq, self.wk, self.wv))
        q, k = self.qknorm.qnorm(q), self.qknorm.knorm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, enable_gqa=q.shape[1] != k.shape[1])
        return self.wo(out.transpose(1, 2).flatten(2) * torch.sigmoid(self.gate(x)))


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

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.prenorm(x), None, key_mask)
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

    def forward(self, x: Tensor, time: Tensor, rope: tuple[Tensor, Tensor], key_mask: Tensor | None) -> Tensor:
        pre_scale, pre_shift, pre_gate, post_scale, post_shift, post_gate = (time + self.mod.lin).chunk(6, dim=-1)
        x = x + pre_gate * self.attn((1 + pre_scale) * self.prenorm(x) + pre_shift, rope, key_mask)
        return x + post_gate * self.mlp((1 + post_scale) * self.postnorm(x) + post_shift)


class TextFusion(nn.Module):
    """The taps of the text encoder (B, L, taps, dim) to one vector per token (B, L, dim)."""

    def __init__(self, config: Config):
        super().__init__()

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(FusionBlock(config.text_dim, config.text_heads, config.eps) for _ in range(config.num_fusion_blocks))

        self.layerwise_blocks = blocks()
        self.projector = nn.Linear(config.text_taps, 1, bias=False)
        self.refiner_blocks = blocks()

    def forward(self, text: Tensor, key_mask: Tensor | None) -> Tensor:
        x = text.flatten(0, 1)
        for block in self.layerwise_blocks:
            x = block(x)
        x = self.projector(x.transpose(1, 2)).squeeze(-1).unflatten(0, text.shape[:2])
        for block in self.refiner_blocks:
            x = block(x, key_mask)
        return x


class Last(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.modulation = Modulation(2, config.width)
        self.norm = RMSNorm(config.width, config.eps)
        self.linear = nn.Linear(config.width, config.token_dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = (time + self.modulation.lin).chunk(2, dim=1)
        return self.linear((1 + scale) * self.norm(x) + shift)


class DiT(nn.Module):
    """Velocity of the rectified flow, `noise - clean`, from noisy latents, time and text.

    Initialisation is PyTorch's default for linears and zero for norm scales and tables, as in the released code: with
    zero tables the gates start small and random (the output of `tproj`), so no layer is zero-initialised by hand.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, text_dim = config.width, config.text_dim
        gelu = nn.GELU(approximate="tanh")
        self.first = nn.Linear(config.token_dim, width)
        self.tmlp = nn.Sequential(nn.Linear(config.time_dim, width), gelu, nn.Linear(width, width))
        self.tproj = nn.Sequential(gelu, nn.Linear(width, 6 * width))
        self.txtfusion = TextFusion(config)
        self.txtmlp = nn.Sequential(RMSNorm(text_dim, config.eps), nn.Linear(text_dim, width), gelu, nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.last = Last(config)

    def forward(self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            latents: (B, channels, H, W), H and W multiples of `patch`: clean at t = 0, noise at t = 1.
            t: (B,) in [0, 1].
            text: (B, L, text_taps, text_dim) states of the text encoder; finite in padded places too.
            text_mask: (B, L) bool, True for valid tokens (at least one per sample); None when all are valid.
                Padded tokens are never read as keys, and text has no positions, so neither their number,
                their place nor their content changes the result.

        Returns:
            (B, channels, H, W) velocity.
        """
        batch, channels, height, width = latents.shape
        p = self.config.patch
        rows, columns = height // p, width // p
        image = latents.unflatten(3, (columns, p)).unflatten(2, (rows, p)).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        time = self.tmlp(time_features(t, self.config.time_dim).to(self.tmlp[0].weight.dtype))
        text_keys = keys = None
        if text_mask is not None:
            text_keys = text_mask[:, None, None, :]
            keys = F.pad(text_keys, (0, rows * columns), value=True)

        x = torch.cat([self.txtmlp(self.txtfusion(text, text_keys)), self.first(image)], dim=1)
        rope = rope_table(self.config, text.shape[1], rows, columns, x.device)
        block_time = self.tproj(time)
        for block in self.blocks:
            x = block(x, block_time, rope, keys)
        out = self.last(x[:, text.shape[1] :], time)
        return out.unflatten(2, (channels, p, p)).unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def time_features(t: Tensor, dim: int) -> Tensor:
    """(B,) in [0, 1] to (B, 1, dim) float32: cos first, then sin, of 1000 t at periods up to 1e4."""
    frequencies = torch.exp(-math.log(1e4) / (dim // 2) * torch.arange(dim // 2, dtype=torch.float32, device=t.device))
    angles = (1000 * t.float())[:, None, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(config: Config, text_tokens: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (S, head_dim / 2) float32 for text at (0, 0, 0) and image tokens at (0, row, column); angles in float64."""
    zeros = torch.zeros(text_tokens, dtype=torch.float64, device=device)
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    angles = []
    for dim, position in zip(config.rope_dims, (torch.zeros_like(row), row, column), strict=True):
        frequencies = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angles.append(torch.cat([zeros, position.flatten().double()])[:, None] * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (B, heads, S, head_dim), pairs interleaved (even, odd), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def train_flops(config: Config, text_tokens: int, image_tokens: int) -> int:
    """FLOPs of one training sample: forward and backward matrix products (3 x 2 x multiply-adds), no recomputation.

    Attention is bidirectional (12 L D S^2 in all). Count *valid* tokens only, or padding looks like work.
    A text token costs more than an image token: the layerwise fusion runs every tap as a position of its own.
    """
    d, e = config.width, config.text_dim
    sequence = text_tokens + image_tokens
    block = 3 * d * d + 2 * d * config.kv_dim + 3 * d * hidden_dim(d)
    fusion = 5 * e * e + 3 * e * hidden_dim(e)
    per_text_token = config.num_fusion_blocks * (config.text_taps + 1) * fusion + config.text_taps * e + e * d + d * d
    blocks = sequence * config.num_blocks * block + 2 * config.num_blocks * d * sequence**2
    fusion_attention = 2 * config.num_fusion_blocks * e * (text_tokens**2 + text_tokens * config.text_taps**2)
    ends = 2 * config.token_dim * d * image_tokens + d * (config.time_dim + d + 6 * d)
    return 6 * (blocks + text_tokens * per_text_token + fusion_attention + ends)
