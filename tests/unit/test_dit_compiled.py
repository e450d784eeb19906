"""The packed model under torch.compile, autocast and activation checkpointing: the same numbers, one graph for all lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from k2model.attention import rotate
from k2model.dit import Config, DiT, rope_table

SMALL = Config(
    width=64, num_blocks=2, num_heads=4, num_kv_heads=2, text_dim=32, text_taps=2, text_heads=2, num_fusion_blocks=1, time_dim=16
)


def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    text = torch.randn(len(lengths), 8, 2, 32, generator=generator)
    return torch.randn(len(lengths), 16, 4, 6, generator=generator), torch.linspace(0.2, 0.9, len(lengths)), text, mask


def step(call, model: DiT, given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Output and all gradients."""
    model.zero_grad()
    out = call(*given)
    out.float().square().mean().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_a_compiled_model_is_two_graphs_for_batches_of_any_lengths():
    torch._dynamo.reset()
    net, counter = model(), CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter)
    for lengths in ([5, 3], [2, 7], [6, 6], [8, 2]):
        given = batch(lengths)
        for one, other in zip(step(compiled, net, given), step(net, net, given), strict=True):
            assert torch.allclose(one, other, atol=1e-6)
        assert counter.frame_count == 2  # before the valid tokens are counted, and after


def test_rotation_in_a_graph_is_the_product_of_complex_numbers():
    rope = rope_table(SMALL, 3, 2, torch.device("cpu"))
    x = torch.randn(2, 6, 4, 16)
    assert torch.allclose(torch.compile(rotate, backend="eager", fullgraph=True)(x, rope), rotate(x, rope), atol=1e-6)


def test_blocks_that_are_recomputed_in_the_backward_give_the_same_gradients():
    net, given = model(), batch([5, 3])
    expected = step(net, net, given)
    for block in net.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    assert all(torch.equal(one, other) for one, other in zip(step(net, net, given), expected, strict=True))


@pytest.mark.parametrize("update", [False, True], ids=["all layers alike", "float32 from an update of one layer"])
def test_autocast_attends_in_bf16_whatever_the_projections_give(update):
    net, given = model(), batch([5, 3])
    expected = step(net, net, given)[0]
    if update:
        net.blocks[0].attn.wv.register_forward_hook(lambda layer, args, out: out.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = step(net, net, given)[0]
    assert found.dtype == torch.bfloat16 and (found - expected).norm() < 0.02 * expected.norm()


def test_the_last_block_computes_no_text_and_every_block_before_it_does():
    net, seen = model(), []
    for block in net.blocks:
        block.mlp.register_forward_hook(lambda layer, args, out: seen.append(len(out)))
    net(*batch([5, 3]))
    assert seen == [2 * 6 + 8, 2 * 6]


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype, bound", [(None, 1e-6), (torch.bfloat16, 0.02)])
def test_sharded_blocks_give_the_same_numbers_in_fp32_and_close_ones_in_bf16(process_group, dtype, bound):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    latents, t, text, mask = batch([5, 3])
    given, net = (latents, t.bfloat16().float(), text, mask), model()  # FSDP rounds time too: a caller in bf16 must know
    expected = step(net, net, given)[0]
    for module in (*net.blocks, net):
        fully_shard(module, mesh=process_group, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))  # casts a block's real inputs
    out = net(*given)
    out.float().square().mean().backward()
    assert (out - expected).norm() < bound * expected.norm()
    assert all(parameter.grad.to_local().abs().max() > 0 for name, parameter in net.named_parameters() if "wo" in name)
