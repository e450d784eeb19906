"""The kernel of a GPU, its one operator exchanged for the same arithmetic on a CPU: what is around it is ours, and runs here."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from k2model import parallel
from k2model.attention import by_segment, variable_length
from k2model.dit import Config, DiT

SMALL = Config(
    width=64, num_blocks=3, num_heads=4, num_kv_heads=2, text_dim=32, text_taps=2, text_heads=2, num_fusion_blocks=1, time_dim=16
)
LENGTHS = [5, 3, 8]


def segments(ends_q, ends_k, *tensors):
    """Of each sample (heads, tokens, head_dim) of queries (first and last of `tensors`) and keys, in float32; these for all heads."""
    heads = tensors[0].shape[1]
    for i in range(len(ends_q) - 1):
        found = []
        for x, ends in zip(tensors, (ends_q, ends_k, ends_k, ends_q), strict=False):
            part = x[ends[i] : ends[i + 1]].float().transpose(0, 1)
            found.append(part.repeat_interleave(heads // len(part), 0))
        yield found


def attend(q, k, v, ends_q, ends_k, *_, **__):
    out = [F.scaled_dot_product_attention(*one).transpose(0, 1) for one in segments(ends_q, ends_k, q, k, v)]
    return torch.cat(out).to(q.dtype), torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def attend_backward(grad, q, k, v, out, lse, ends_q, ends_k, *_, **__):
    parts, scale = [], q.shape[-1] ** -0.5
    for one, keys, values, back in segments(ends_q, ends_k, q, k, v, grad):
        weights = (one @ keys.mT * scale).softmax(-1)
        inside = back @ values.mT
        inside = weights * (inside - (inside * weights).sum(-1, keepdim=True)) * scale
        found = inside @ keys, inside.mT @ one, weights.mT @ back
        parts.append(
            [x.unflatten(0, (heads, -1)).sum(1).transpose(0, 1) for x, heads in zip(found, (len(one), *[k.shape[1]] * 2), strict=True)]
        )
    return tuple(torch.cat(part).to(q.dtype).contiguous() for part in zip(*parts, strict=True))


@pytest.fixture(scope="module", autouse=True)
def operator_of_a_cpu():
    """`torch_attn::_varlen_attn` has only kernels of a GPU, so nothing else in this process asks it."""
    varlen._varlen_attn.register_kernel("cpu")(attend)
    varlen._varlen_attn_backward.register_kernel("cpu")(attend_backward)


def batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
    text = torch.randn(len(LENGTHS), 8, 2, 32, generator=generator)
    return torch.randn(len(LENGTHS), 16, 4, 6, generator=generator), torch.tensor([0.2, 0.5, 0.9]), text, mask


def step(kernel, precision: str, **how) -> list[torch.Tensor]:
    """Output and all gradients of a model as `k2 train` has it."""
    model = parallel.init(parallel.shard(DiT(SMALL), parallel.start("cpu"), **how), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = model(*batch(), kernel)
    out.float().square().mean().backward()
    return [out.detach().float(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("how", [{}, {"checkpointing": "selective"}, {"checkpointing": "full"}])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_the_kernel_of_a_gpu_gives_the_outputs_and_gradients_of_that_of_a_cpu(precision, tolerance, how):
    for one, other in zip(step(variable_length, precision, **how), step(by_segment, precision, **how), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_a_compiled_block_with_it_is_one_graph(monkeypatch):
    """Recomputed selectively, as the recipes for a GPU do."""
    expected = step(by_segment, "fp32")
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", graph(self._call_impl)))
    for one, other in zip(step(variable_length, "fp32", checkpointing="selective", compiled=True), expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def graph(call):
    """Compiled without code for the machine, and an error where it would be more than one graph."""
    return torch.compile(call, backend="aot_eager_decomp_partition", fullgraph=True)
