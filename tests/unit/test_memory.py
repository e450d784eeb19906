"""The memory plan against what PyTorch's tracker sees in a real step, and against arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from k2model import memory, optim, parallel
from k2model.dit import K2, K2_1B, NANO, DiT

SMALL = replace(NANO, width=128, num_blocks=3, num_heads=4, num_kv_heads=2, num_fusion_blocks=1)
GIB = 2**30


def tracked(images: int, side: int, text_tokens: int, precision: str, checkpointing: str) -> int:
    """Peak bytes of the second training step on a CPU."""
    model = parallel.init(parallel.shard(DiT(SMALL), parallel.start("cpu"), checkpointing=checkpointing), 0)
    optimizer = optim.adamw(model, 1e-3, 0.0)
    for parameter in model.parameters():  # the first step would make the states
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    latents, t = torch.randn(images, 16, side, side), torch.rand(images)
    text = torch.randn(images, text_tokens, SMALL.text_taps, SMALL.text_dim)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(latents, t, text).float().square().mean()
        loss.backward()
        optimizer.step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize(
    ("images", "side", "text_tokens", "precision", "checkpointing"),
    [(8, 16, 20, "fp32", "none"), (8, 16, 20, "fp32", "selective"), (8, 16, 20, "bf16", "full"), (1, 4, 4, "fp32", "none")],
)
def test_the_plan_is_within_a_tenth_of_a_real_step(images, side, text_tokens, precision, checkpointing):
    """Three are full of activations, the last is all states."""
    found = memory.plan(SMALL, images, (side // 2) ** 2, text_tokens, precision=precision, checkpointing=checkpointing)
    assert found.peak == pytest.approx(tracked(images, side, text_tokens, precision, checkpointing), rel=0.1)


def test_states_are_those_of_the_parameters_and_are_divided_by_the_ranks():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DiT(K2).parameters())
    alone, eight = (memory.plan(K2, 2, 256, 160, fsdp=ranks, checkpointing="full") for ranks in (1, 8))
    assert alone.parameters + alone.optimizer + alone.gradients == 16 * count
    assert eight.parameters == alone.parameters // 8 and eight.activations == alone.activations
    assert alone.parameters + alone.optimizer > 140 * GIB > 80 * GIB > eight.peak, "one H100 cannot, eight can"
    assert memory.plan(K2, 2, 256, 160, fsdp=8, tp=4, checkpointing="full").parameters < eight.parameters / 3


def test_activations_grow_with_the_tokens_and_shrink_with_checkpointing():
    kept = {mode: memory.activations(K2_1B, 4, 256, 160, "bf16", mode) for mode in ("none", "selective", "full")}
    tokens = 4 * (256 + 160)
    block_inputs = tokens * K2_1B.width * 2
    assert block_inputs <= kept["full"].per_block < 1.1 * block_inputs
    # By hand, per token and in widths: the input, q, k, v, the gate's and attention's output, wo; of the MLP gate, up (8/3 each), down.
    products = block_inputs * (1 + 1 + 0.25 + 0.25 + 1 + 1 + 1 + 2 * 8 / 3 + 1)
    assert kept["selective"].per_block == pytest.approx(products, rel=0.15)
    assert kept["none"].per_block > 1.5 * kept["selective"].per_block
    twice = memory.activations(K2_1B, 8, 256, 160, "bf16", "none")
    assert twice.per_block == pytest.approx(2 * kept["none"].per_block, rel=0.01)
