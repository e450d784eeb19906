"""Latents beside a packed set: row for row what the codec makes of the packed pixels."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from packed_world import landscapes, make_packed
from safetensors.torch import save_file

from k2model.data import Packed, to_pixels
from k2model.vae import QwenImageVae, fit_pca, load_pca
from pipelines.latents import describe_codec, write_latents

SIZES = [(32, 32), (32, 48)]


@pytest.fixture
def place(tmp_path) -> Path:
    return make_packed(tmp_path / "p", landscapes(11, SIZES), 32, 3)


@pytest.fixture
def pca(place, tmp_path) -> str:
    packed = Packed(place)
    save_file(fit_pca(to_pixels(packed.read(group).images) for group in packed.groups).tensors(), tmp_path / "vae.safetensors")
    return str(tmp_path / "vae.safetensors")


def test_latents_are_what_the_codec_makes_of_the_packed_pixels(place, pca):
    assert write_latents(place, pca, "off", None) == []
    packed = Packed(place)
    codec = load_pca(pca)
    for group in packed.groups:
        latents = packed.latents(group)
        expected = codec.encode(to_pixels(packed.read(group).images))
        assert latents.dtype == torch.float16 and torch.allclose(latents.float(), expected, atol=2e-2, rtol=1e-3)
        assert latents.shape == (group["num_rows"], 16, group["bucket_height"] // 8, group["bucket_width"] // 8)
    files = sorted(path.name for path in place.glob("*.parquet"))
    assert sorted(path.name for path in (place / "latents").glob("*")) == files
    for name in files:
        assert pq.read_table(place / "latents" / name)["uid"].equals(pq.read_table(place / name)["uid"])


def test_the_released_autoencoder_writes_latents_the_same_way(place, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    small = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    diffusers.AutoencoderKLQwenImage(**small).save_pretrained(tmp_path / "qwen" / "vae")
    assert write_latents(place, str(tmp_path / "qwen"), "off", None) == []
    packed = Packed(place)
    group = packed.groups[0]
    expected = QwenImageVae(str(tmp_path / "qwen")).load("cpu").encode(to_pixels(packed.read(group).images))
    assert torch.allclose(packed.latents(group).float(), expected, atol=2e-2)


def test_what_is_missing_is_made_again_with_the_same_bytes_and_another_codec_is_refused(place, pca, tmp_path):
    write_latents(place, pca, "off", None)
    before = {path.name: path.read_bytes() for path in (place / "latents").glob("*")}
    (place / "latents" / "00001.parquet").unlink()
    write_latents(place, pca, "off", None)
    assert {path.name: path.read_bytes() for path in (place / "latents").glob("*")} == before
    save_file(fit_pca([torch.rand(4, 3, 64, 64) * 2 - 1]).tensors(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="made by another description"):
        write_latents(place, str(tmp_path / "other.safetensors"), "off", None)


def test_missing_latents_and_a_missing_codec_say_what_to_do(place, tmp_path):
    packed = Packed(place)
    with pytest.raises(ValueError, match="k2 pack --latents"):
        packed.latents(packed.groups[0])
    with pytest.raises(ValueError, match=r"no \.safetensors there"):
        describe_codec(str(tmp_path / "nothing.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.safetensors there"):
        describe_codec(str(tmp_path / "empty"))
