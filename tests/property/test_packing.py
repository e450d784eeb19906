"""Packing is exact: who shares a batch, and how far it is padded, changes no sample."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from k2model.dit import Config, DiT, Tokens, by_segment

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


@settings(max_examples=25, deadline=None)
@given(sizes=LENGTHS, seed=st.integers(0, 99))
def test_attention_by_segment_is_attention_under_a_mask_of_segments(sizes, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(sum(sizes), 4, 16), torch.randn(sum(sizes), 2, 16), torch.randn(sum(sizes), 2, 16)
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    dense = [x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    expected = F.scaled_dot_product_attention(*dense, attn_mask=owner[:, None] == owner)[0].transpose(0, 1)
    assert torch.allclose(by_segment(q, k, v, sizes), expected, atol=2e-6)


@given(lengths=LENGTHS, image_tokens=st.integers(0, 5))
def test_tokens_go_to_their_samples_and_come_back(lengths, image_tokens):
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens = Tokens(image_tokens, lengths, owner, None, by_segment)
    x = torch.arange(len(lengths) * image_tokens + sum(lengths), dtype=torch.float32)[:, None]
    by_sample = tokens.by_sample(*tokens.split(x))
    assert torch.equal(tokens.by_part(by_sample), x)
    of_image = torch.arange(len(lengths)).repeat_interleave(image_tokens)
    sample = torch.cat([of_image, owner])[by_sample[:, 0].long()]
    assert torch.equal(sample, sample.sort().values)
