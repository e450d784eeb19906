"""Matrix products of a training sample: what plans, metrics and benchmarks divide by."""

import torch

from k2model.dit import Config, hidden_dim

# Dense bf16 products, FLOP/s, of the makers' data sheets: what MFU is a share of, whatever the precision of a phase.
PEAK = {"B200": 2.25e15, "H200": 9.89e14, "H100 PCIe": 7.56e14, "H100": 9.89e14, "A100": 3.12e14, "L40S": 3.62e14, "4090": 1.65e14}


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of a GPU by its data sheet; None where we do not know it, as for CPUs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in PEAK.items() if part in name), None)


def train_flops(config: Config, text_tokens: int, image_tokens: int) -> int:
    """FLOPs of one training sample: forward and backward matrix products (3 x 2 x multiply-adds), no recomputation.

    Attention is bidirectional (12 L D S^2 in all). Count *valid* tokens only, or padding looks like work.
    A text token costs more than an image token: the layerwise fusion runs every tap as a position of its own.
    """
    d, e, narrow = config.width, config.fusion_dim, config.fusion_width or 0
    sequence = text_tokens + image_tokens
    block = 3 * d * d + 2 * d * config.kv_dim + 3 * d * hidden_dim(d)
    fusion = 5 * e * e + 3 * e * hidden_dim(e)
    per_text_token = (
        config.num_fusion_blocks * (config.text_taps + 1) * fusion + config.text_taps * (e + narrow * config.text_dim) + e * d + d * d
    )
    blocks = sequence * config.num_blocks * block + 2 * config.num_blocks * d * sequence**2
    fusion_attention = 2 * config.num_fusion_blocks * e * (text_tokens**2 + text_tokens * config.text_taps**2)
    ends = 2 * config.token_dim * d * image_tokens + d * (config.time_dim + d + 6 * d)
    return 6 * (blocks + text_tokens * per_text_token + fusion_attention + ends)
