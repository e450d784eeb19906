"""Our SigLIP-2 tower against open_clip's own model and preprocessing, with random weights in open_clip's format.

The published weights cannot be had offline; what is checked is everything but them: names, shapes, loading, pixels, pooling.
"""

import socket
import tempfile
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from curation import towers
from curation.towers import Siglip, available

MODEL = "ViT-B-32-SigLIP2-256"  # the smallest


@pytest.fixture(scope="module")
def hub():
    """A Hugging Face cache with one model in it, and open_clip's own (model, preprocess) made from that."""
    config = open_clip.get_model_config(MODEL)
    small_text = config["text_cfg"] | {"vocab_size": 64, "layers": 1}  # the text tower has no part in this
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / f"models--timm--{MODEL}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        model = open_clip.create_model(MODEL, text_cfg=small_text).eval()
        save_file(model.state_dict(), snapshot / "open_clip_model.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            _, _, preprocess = open_clip.create_model_and_transforms(MODEL, "webli", cache_dir=folder, text_cfg=small_text)
        yield Path(folder), model, preprocess


@pytest.fixture
def in_cache(hub, monkeypatch):
    """The Hugging Face cache of this process is that of `hub`, and the network is off."""

    def refuse(*args):
        raise AssertionError("a tower went to the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub[0]))
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((411, 300), Image.Resampling.BICUBIC))
    return [smooth, np.ascontiguousarray(smooth[::-1, :123]), np.full((1, 1, 3), 200, np.uint8)]


def test_vectors_and_tokens_equal_those_of_open_clip(hub, in_cache, images):
    _, model, preprocess = hub
    pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        expected = model.encode_image(pixels, normalize=False).numpy()
        tokens = model.visual.trunk.forward_features(pixels).numpy()
    found = Siglip(MODEL).load("cpu")(images)
    assert found.pooled.dtype == np.float32 and found.pooled.shape == (3, Siglip(MODEL).dim)
    np.testing.assert_allclose(found.pooled, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(found.tokens, tokens, rtol=0, atol=1e-4 * np.abs(tokens).max())
    assert np.abs(expected[0] - expected[1]).max() > 1e-2 * np.abs(expected).max()  # the images do differ


def test_a_local_file_gives_the_same_vectors_and_is_named_by_its_hash(hub, in_cache, images, tmp_path):
    _, model, _ = hub
    state = {f"module.{key}": value for key, value in model.state_dict().items() if not key.startswith("text.")}
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": state}, path)
    local = Siglip(MODEL, str(path))
    assert np.array_equal(local.load("cpu")(images[:1]).pooled, Siglip(MODEL).load("cpu")(images[:1]).pooled)
    moved = path.rename(tmp_path / "other.pt")
    assert Siglip(MODEL, str(moved)).identity.removeprefix(f"siglip/{MODEL}/").isalnum()
    assert Siglip(MODEL, str(moved)).describe() != Siglip(MODEL).describe()
    assert not available(local) and available(Siglip(MODEL, str(moved)))
    moved.unlink()  # pytest keeps its folders, and this is 400 MB


def test_weights_of_another_model_are_refused(hub, in_cache, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"visual.trunk.pos_embed": torch.zeros(1, 64, 768)}, path)
    with pytest.raises(ValueError, match="does not hold the vision tower of ViT-B-16-SigLIP2-256"):
        Siglip("ViT-B-16-SigLIP2-256", str(path)).load("cpu")


def test_missing_weights_say_how_to_get_them_and_are_not_fetched(hub, in_cache):
    assert available(Siglip(MODEL))
    absent = Siglip("ViT-L-16-SigLIP2-256")
    assert not available(absent)
    with pytest.raises(ValueError, match=r"hf download timm/ViT-L-16-SigLIP2-256"):
        absent.load("cpu")
    with pytest.raises(ValueError, match=r"give one of webli"):
        Siglip(MODEL, "laion").load("cpu")
    with pytest.raises(ValueError, match=r"no weights file at /nowhere/weights\.pt"):
        Siglip(MODEL, "/nowhere/weights.pt").load("cpu")


def test_every_siglip_2_of_open_clip_is_accepted_and_has_the_promised_width():
    names = [name for name in open_clip.list_models() if "SigLIP2" in name]
    assert len(names) >= 15
    for name in names:
        tower = towers.vision_tower(name)
        assert tower(torch.zeros(1, 3, *tower.image_size, device="meta")).shape == (1, Siglip(name).dim)


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'ViT-B-16-SigLIP2-384'"):
        Siglip("ViT-B-16-SigLIP2-348")
    with pytest.raises(ValueError, match="no SigLIP-2 named 'ViT-B-32'"):
        Siglip("ViT-B-32")
