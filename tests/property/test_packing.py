"""Packing is exact: who shares a batch, and how far it is padded, changes no sample."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from k2model.attention import Tokens, by_segment, each_segment, flexible, pack, rotate, with_images
from k2model.dit import Config, DiT, rope_table

SMALL = Config(
    width=64, num_blocks=2, num_heads=4, num_kv_heads=2, text_dim=32, text_taps=3, text_heads=2, num_fusion_blocks=1, time_dim=16
)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, padding=st.integers(0, 3), rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_sample_of_a_batch_is_what_it_is_alone(lengths, padding, rows, columns, seed):
    torch.manual_seed(seed)
    model = DiT(SMALL)
    cap = max(lengths) + padding
    latents, t = torch.randn(len(lengths), 16, 2 * rows, 2 * columns), torch.rand(len(lengths))
    text = torch.randn(len(lengths), cap, 3, 32)
    mask = torch.stack([torch.randperm(cap) < length for length in lengths])  # valid tokens anywhere
    with torch.no_grad():
        together = model(latents, t, text, mask)
        for i in range(len(lengths)):
            alone = model(latents[i : i + 1], t[i : i + 1], text[i : i + 1, mask[i]])
            assert torch.allclose(together[i : i + 1], alone, atol=3e-5)


def packed(lengths: list[int], rows: int, columns: int, text_read: bool) -> Tokens:
    """The place of tokens under a mask with these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = pack(torch.zeros(*mask.shape, 1), mask, by_segment)[1]
    rope = rope_table(Config(width=64, num_heads=4, num_kv_heads=2), rows, columns, torch.device("cpu")) if rows else None
    return (with_images(tokens, rows * columns, rope) if rows else tokens)._replace(text_read=text_read)


def under_a_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Attention of every token to all, with those of other samples masked."""
    images = torch.arange(len(tokens.lengths)).repeat_interleave(tokens.image_tokens)
    owner = torch.cat([images, tokens.owner])
    if tokens.rope is not None:
        q, k = (torch.cat([rotate(tokens.split(x)[0], tokens.rope).flatten(0, 1), tokens.split(x)[1]]) for x in (q, k))
    dense = [x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    mask = owner[: len(q), None] == owner
    return F.scaled_dot_product_attention(*dense, attn_mask=mask)[0].transpose(0, 1)


@pytest.mark.parametrize("kernel", [by_segment, each_segment])
@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, rows=st.integers(0, 3), columns=st.integers(1, 3), text_read=st.booleans(), seed=st.integers(0, 99))
def test_attention_by_segment_is_attention_under_a_mask_of_segments(kernel, lengths, rows, columns, text_read, seed):
    torch.manual_seed(seed)
    tokens = packed(lengths, rows, columns, text_read or not rows)
    images, total = len(lengths) * rows * columns, len(lengths) * rows * columns + sum(lengths)
    q = torch.randn(total if tokens.text_read else images, 4, 16, requires_grad=True)
    k, v = (torch.randn(total, 2, 16, requires_grad=True) for _ in range(2))
    expected, found = under_a_mask(q, k, v, tokens), kernel(q, k, v, tokens)
    assert torch.allclose(found, expected, atol=2e-6)
    weight = torch.randn_like(found)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rows, text_read", [(0, True), (2, True), (2, False)])
def test_flex_attention_is_attention_under_a_mask_of_segments(rows, text_read):
    torch.manual_seed(0)
    tokens = packed([3, 1, 5], rows, 2, text_read)
    images, total = 6 * rows, 6 * rows + 9
    q = torch.randn(total if text_read else images, 4, 16)
    k, v = torch.randn(total, 2, 16), torch.randn(total, 2, 16)
    assert torch.allclose(flexible(q, k, v, tokens), under_a_mask(q, k, v, tokens), atol=2e-6)


@pytest.mark.parametrize("with_images", [True, False])
def test_the_operator_of_a_cpu_keeps_the_rules_of_pytorch_operators(with_images):
    tokens = packed([3, 1, 5], 2 if with_images else 0, 2, True)
    total = 9 + 12 * with_images
    q, k = torch.randn(total, 4, 16, requires_grad=True), torch.randn(total, 2, 16, requires_grad=True)
    given = (q, k, torch.randn(total, 2, 16, requires_grad=True), tokens.rope, tokens.lengths, tokens.image_tokens)
    torch.library.opcheck(torch.ops.k2.segments.default, given)
