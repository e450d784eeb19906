"""Whatever the sizes and dtypes: official -> diffusers -> official and one file <-> shards give the same bytes."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from k2model import export, quantize, tensor_files
from k2model.dit import Config
from k2model.layouts import expected_shapes, open_checkpoint

CONFIGS = st.builds(
    Config,
    width=st.sampled_from([32, 64]),
    num_blocks=st.sampled_from([1, 2, 11]),  # two digits: names do not sort as numbers
    num_heads=st.just(2),
    num_kv_heads=st.sampled_from([1, 2]),
    text_dim=st.sampled_from([32, 64]),
    text_taps=st.integers(1, 4),
    text_heads=st.sampled_from([1, 2]),
    num_fusion_blocks=st.integers(1, 2),
    channels=st.sampled_from([1, 16]),
    time_dim=st.sampled_from([16, 32]),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bits at all, NaN and infinity too."""
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype).squeeze(-1)


@settings(max_examples=8, deadline=None)
@given(CONFIGS, st.lists(DTYPES, min_size=1, max_size=7), st.integers(20_000, 200_000), st.integers(0, 2**31))
def test_conversion_round_trips_are_bit_exact(config, dtypes, shard_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: random_bits(shape, dtypes[i % len(dtypes)], generator) for i, (name, shape) in enumerate(expected_shapes(config).items())
    }
    with tempfile.TemporaryDirectory() as place, patch.object(tensor_files, "PIECE", 999):
        folder = Path(place)
        save_file(state, folder / "a.safetensors")
        steps = [
            ("one.safetensors", "official"),
            ("d", "diffusers"),
            ("e", "official"),
            ("f", "diffusers"),
            ("two.safetensors", "official"),
        ]
        source = folder / "a.safetensors"
        for name, layout in steps:
            found = open_checkpoint(source)
            assert found.config == config
            export.write(export.plan(found, layout), config, layout, folder / name, shard_bytes)
            source = folder / name
        assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()
        back = load_file(folder / "two.safetensors")
        assert back.keys() == state.keys()
        for name, tensor in state.items():
            assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
            assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
        largest = max(tensor.nbytes for tensor in state.values())
        for shard in (folder / "e").glob("*-of-*.safetensors"):
            assert sum(tensor.nbytes for tensor in load_file(shard).values()) <= max(shard_bytes, largest)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3 * 7), st.floats(1e-6, 1e6), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_scaled_fp8_is_within_half_a_step_of_the_weight_and_never_nan(count, size, dtype, seed):
    weight = (size * torch.randn(count, generator=torch.Generator().manual_seed(seed))).to(dtype)
    pieces = list(weight.split(4))
    scale = quantize.scale_of(pieces)
    back = torch.cat(list(quantize.cast(quantize.quantized(pieces, scale), torch.float32, scale)))
    # 3 bits of mantissa: half a step is 1/16 of the value; below the smallest normal, 2^-6, half of 2^-9 of the scale
    bound = torch.maximum(weight.float().abs() / 16, scale * 2**-10) * (1 + 1e-5)
    assert ((back - weight.float()).abs() <= bound).all()
    assert float(back.abs().max()) <= float(weight.float().abs().max()) * (1 + 1e-6)
