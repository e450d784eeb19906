"""Autoencoders: what loads, what is refused, and that the small ones learn."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from curation.aligned import psnr
from curation.autoencoders import Assigned, Net, Small, load, load_small, save, to_tensor
from curation.autoencoders_train import RESTART, _restart, pyramid_loss, train_small
from tests.conftest import photographs

TAEF2 = Path("/work/shared/models/taef2-vae")
TINY = Small("nearest", "kl", channels=4)
UPSAMPLINGS = ("transposed", "nearest", "bilinear", "shuffle")
KINDS = [Small(up, bottleneck, channels=4) for up in UPSAMPLINGS for bottleneck in ("kl", "vq")]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return photographs(8)


def net_of(description: Small, seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(description).eval()


def weights(net: Net) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in net.state_dict().values()]).detach()


@pytest.mark.parametrize("description", [*KINDS, replace(TINY, factor=8)], ids=lambda d: d.name)
def test_a_small_autoencoder_halves_sides_until_its_factor_and_comes_back(description: Small):
    net = net_of(description)
    latents, loss, codes = net.encode(torch.zeros(2, 3, 32, 64))
    side = 32 // description.factor
    assert latents.shape == (2, 4, side, 2 * side) and loss.ndim == 0
    assert net.decode(latents).shape == (2, 3, 32, 64)
    assert (codes is None) == (description.bottleneck == "kl")


@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
def test_training_brings_the_images_closer(images: list[np.ndarray], bottleneck: str):
    description = Small("shuffle", bottleneck, num_codes=64)
    net, history = train_small(description, images, steps=100, side=32, batch=4)
    pixels = to_tensor(np.stack(images))

    def distance(net: Net) -> float:
        with torch.no_grad():
            return float((net.decode(net.encode(pixels)[0]) - pixels).abs().mean())

    assert distance(net) < 0.5 * distance(net_of(description))
    assert distance(net) < 0.8 * float((pixels.mean((2, 3), keepdim=True) - pixels).abs().mean()), "no better than one colour"
    assert history[-1]["step"] == 99 and np.mean([row["psnr"] for row in history[-5:]]) > history[0]["psnr"] + 3


def test_a_seed_decides_the_weights_and_the_callers_random_numbers_are_left_alone(images: list[np.ndarray]):
    torch.manual_seed(5)
    description = replace(TINY, bottleneck="vq", adversarial=True, num_codes=16)
    first, again, other = (weights(train_small(description, images, 4, seed, side=32, batch=2)[0]) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_the_adversarial_loss_joins_at_half_of_the_steps(images: list[np.ndarray]):
    _, plain = train_small(TINY, images, 6, side=32, batch=2)
    _, adversarial = train_small(replace(TINY, adversarial=True), images, 6, side=32, batch=2)
    assert [row["loss"] for row in plain[:3]] == [row["loss"] for row in adversarial[:3]]
    assert all(a["psnr"] != b["psnr"] for a, b in zip(plain[4:], adversarial[4:], strict=True))


def test_idle_codes_are_restarted_on_latents_that_were_not_yet_codes():
    net = net_of(replace(TINY, bottleneck="vq", num_codes=8))
    before = net.codebook.detach().clone()
    latents = torch.nn.functional.normalize(torch.randn(2, 4, 3, 3), dim=1)
    codes = torch.tensor([0, 1]).view(2, 1, 1).expand(2, 3, 3)
    idle = torch.tensor([RESTART, RESTART, 0, 0, 0, 0, RESTART - 1, RESTART])
    _restart(net, idle, Assigned(codes, latents), torch.Generator().manual_seed(0))
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    moved = [bool((net.codebook[i] == rows).all(1).any()) for i in range(8)]
    assert moved == [False, False, False, False, False, False, True, True]
    assert torch.equal(net.codebook[:6], before[:6]) and idle.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_quantised_latents_are_codes_of_nearest_direction():
    net = net_of(replace(TINY, bottleneck="vq", num_codes=16))
    latents, _, assigned = net.encode(torch.rand(1, 3, 16, 16))
    found = net.codebook[assigned.codes].permute(0, 3, 1, 2)
    assert torch.allclose(latents, found, atol=1e-5)
    distance = (assigned.latents[:, None] - net.codebook[None, :, :, None, None]).square().sum(2)
    assert torch.equal(distance.argmin(1), assigned.codes)


def test_the_gradient_reaches_the_encoder_through_the_codes():
    net = net_of(replace(TINY, bottleneck="vq"))
    latents, _, _ = net.encode(torch.rand(1, 3, 16, 16))
    pyramid_loss(net.decode(latents), torch.zeros(1, 3, 16, 16)).backward()
    assert net.encoder[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(64, 64), (61, 35), (3, 1)])
def test_sides_that_do_not_fit_are_padded_and_cut_back(tmp_path: Path, shape: tuple[int, int]):
    net = net_of(TINY)
    save(net, tmp_path / "net.safetensors", {})
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    reconstruction = load(tmp_path / "net.safetensors")(images)
    assert reconstruction.shape == images.shape and reconstruction.dtype == np.uint8
    assert np.array_equal(load(tmp_path / "net.safetensors")(images[1:]), reconstruction[1:]), "depends on its neighbours"
    padded = np.pad(images, ((0, 0), (0, -shape[0] % 4), (0, -shape[1] % 4), (0, 0)), mode="symmetric")
    assert np.array_equal(load(tmp_path / "net.safetensors")(padded)[:, : shape[0], : shape[1]], reconstruction)


def test_a_saved_autoencoder_is_the_same_after_loading_and_tells_what_it_was_made_from(tmp_path: Path):
    net = net_of(replace(TINY, bottleneck="vq", num_codes=16))
    save(net, tmp_path / "net.safetensors", {"steps": 7})
    loaded = load_small(tmp_path / "net.safetensors")
    assert loaded.description == net.description and torch.equal(weights(loaded), weights(net))
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert json.loads(file.metadata()["facts"]) == {"steps": 7}


def test_what_is_no_autoencoder_is_refused(tmp_path: Path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name in ("other.safetensors", "torn.safetensors"):
        with pytest.raises(ValueError, match="not a small autoencoder"):
            load(tmp_path / name)
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.safetensors"):
        with pytest.raises(ValueError, match="is no autoencoder: expected"):
            load(path)


def test_settings_without_a_meaning_are_refused(images: list[np.ndarray]):
    for wrong in ({"upsampling": "cubic"}, {"bottleneck": "none"}, {"factor": 16}, {"width": 12}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            replace(TINY, **wrong)
    with pytest.raises(ValueError, match="there is none"):
        train_small(TINY, [], 1)
    with pytest.raises(ValueError, match="smallest side is 96"):
        train_small(TINY, images, 1, side=128)


def diffusers_models() -> dict:
    """Tiny ones with random weights, of each family that encodes in its own way: (model, factor)."""
    diffusers = pytest.importorskip("diffusers")
    two = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return {
        "AutoencoderKL": lambda: diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **two),
        "VQModel": lambda: diffusers.VQModel(down_block_types=down, up_block_types=up, num_vq_embeddings=16, **two),
        "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
        ),
        "AutoencoderDC": lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        ),
        "AutoencoderKLQwenImage": lambda: diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1),
    }


FAMILIES = ["AutoencoderKL", "VQModel", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLQwenImage"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_diffusers_loads_from_a_folder(tmp_path: Path, name: str):
    torch.manual_seed(0)
    model = diffusers_models()[name]().eval()
    model.save_pretrained(tmp_path)
    image = photographs(1)[0][None, :33, :47]
    reconstruction = load(tmp_path)(image)
    assert reconstruction.shape == image.shape and reconstruction.std() > 0

    padded = np.pad(image, ((0, 0), (0, 31), (0, 17), (0, 0)), mode="symmetric")  # to 64 x 64; an independent round trip
    pixels = torch.from_numpy(padded).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        pixels = pixels.unsqueeze(2) if name == "AutoencoderKLQwenImage" else pixels
        encoded = model.encode(pixels)
        latents = encoded.latent_dist.mode() if "KL" in name else next(iter(encoded.values()))
        decoded = model.decode(latents).sample.reshape(1, 3, 64, 64)
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(load(tmp_path)(padded).astype(float) - expected).max() <= 1


def test_a_diffusers_folder_without_all_its_weights_is_refused(tmp_path: Path):
    model = diffusers_models()["AutoencoderKL"]()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.weight"):
        load(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load the AutoencoderKL"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["UNet2DModel", "NoSuchThing", None])
def test_a_config_of_something_else_is_refused(tmp_path: Path, name: str | None):
    pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"{name!r}, which is no autoencoder"):
        load(tmp_path)


def onnx_of(operation: str, block: int) -> bytes:
    """An ONNX model of one SpaceToDepth or DepthToSpace, in protobuf's wire format (the onnx package is not at hand)."""

    def number(key: int, value: int) -> bytes:
        return bytes([key << 3, value])

    def message(key: int, content: bytes | str) -> bytes:
        content = content.encode() if isinstance(content, str) else content
        assert len(content) < 16384
        size = [len(content)] if len(content) < 128 else [len(content) & 127 | 128, len(content) >> 7]
        return bytes([key << 3 | 2, *size]) + content

    def tensor(name: str) -> bytes:
        sides = b"".join(message(1, message(2, f"{name}{axis}")) for axis in range(4))
        return message(1, name) + message(2, message(1, number(1, 1) + message(2, sides)))

    attribute = message(1, "blocksize") + number(3, block) + bytes([20 << 3 & 127 | 128, 1, 2])
    node = message(1, "x") + message(2, "y") + message(4, operation) + message(5, attribute)
    graph = message(1, node) + message(2, "g") + message(11, tensor("x")) + message(12, tensor("y"))
    return number(1, 8) + message(7, graph) + message(8, number(2, 13))


def test_onnx_files_see_pixels_between_0_and_1_and_a_lossless_pair_is_lossless(tmp_path: Path):
    (tmp_path / "encoder.onnx").write_bytes(onnx_of("SpaceToDepth", 4))
    (tmp_path / "decoder.onnx").write_bytes(onnx_of("DepthToSpace", 4))
    images = np.random.default_rng(0).integers(0, 256, (2, 30, 41, 3), dtype=np.uint8)
    assert np.array_equal(load(tmp_path)(images), images)


@pytest.mark.skipif(not TAEF2.exists(), reason="the ONNX autoencoder is not here")
def test_the_flux_2_autoencoder_comes_close_to_a_photograph(images: list[np.ndarray]):
    assert psnr(np.stack(images[:2]), load(TAEF2)(np.stack(images[:2]))).min() > 22
