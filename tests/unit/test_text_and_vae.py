"""Text encoders and image codecs: the offline ones, and the real ones on small random weights."""

from pathlib import Path

import pytest
import torch

from k2model.text import PREFIX, SUFFIX, HashText, Qwen3VLText
from k2model.vae import Pca, QwenImageCodec, QwenImageVae, fit_pca, load_pca

GOLDEN = [1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0]  # the word "red"
TOKENIZER = Path("/work/shared/models/tokenizers/qwen25")


def test_hashed_text_has_a_stack_of_layers_per_token_and_one_token_for_no_caption():
    states, mask = HashText().load("cpu")(["a red fox", "", "a red fox in the snow"])
    assert states.shape == (3, 7, 4, 64) and mask.sum(1).tolist() == [4, 1, 7]
    assert torch.equal(states[0, :3], states[2, :3]), "a token looks only backwards"
    assert (states[~mask] == 0).all()


def test_hashed_text_is_the_same_in_every_process_and_tells_captions_apart():
    encode = HashText().load("cpu")
    states, _ = encode(["a red fox"])
    assert states[0, 1, 1, :12].tolist() == GOLDEN
    other, _ = encode(["a red cat"])
    assert torch.equal(states[0, :2], other[0, :2]) and not torch.equal(states[0, 2], other[0, 2])


def test_a_linear_codec_gives_unit_variance_and_comes_back(tmp_path):
    from safetensors.torch import save_file
    from skimage import data

    pixels = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None] / 127.5 - 1
    codec = fit_pca([pixels])
    latents = codec.encode(pixels)
    assert latents.shape == (1, 16, 64, 64)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(16), atol=0.02)
    error = (codec.decode(latents) - pixels).square().mean()
    assert 10 * torch.log10(4 / error) > 24, "PSNR of 16 of 192 directions on a photograph"
    save_file(codec.tensors(), tmp_path / "vae.safetensors")
    assert torch.equal(load_pca(tmp_path / "vae.safetensors").encode(pixels), latents)


def test_a_codec_of_flat_pictures_is_refused():
    with pytest.raises(ValueError, match="more images"):
        fit_pca([torch.zeros(2, 3, 64, 64)])
    assert Pca().num_batches == 8


def test_the_real_vae_path_normalises_per_channel(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    mean, std = [0.1 * i for i in range(16)], [1 + 0.1 * i for i in range(16)]
    model = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=mean, latents_std=std
    )
    model.save_pretrained(tmp_path / "vae")
    codec = QwenImageVae(str(tmp_path), dtype="float32").load("cpu")
    assert isinstance(codec, QwenImageCodec)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        raw = model.eval().encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2)
    latents = codec.encode(images)
    assert latents.shape == (2, 16, 4, 6)
    assert torch.allclose(latents * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1), raw, atol=1e-5)
    assert codec.decode(latents).shape == images.shape


def test_missing_weights_say_so():
    with pytest.raises(ValueError, match="Give a folder with its weights"):
        QwenImageVae("/nowhere").load("cpu")
    with pytest.raises(ValueError, match="Give a folder with its weights"):
        Qwen3VLText("/nowhere").load("cpu")


@pytest.mark.skipif(not TOKENIZER.exists(), reason="the Qwen tokenizer's files are not on this machine")
def test_the_real_text_path_equals_the_released_layout_with_padding_inside(tmp_path):
    """K2 pads between prompt and suffix and counts only real tokens; we put the padding at the end: the same states."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    torch.manual_seed(0)
    model = transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = Qwen3VLText(str(tmp_path), taps=(1, 3), dim=32, dtype="float32")
    captions = ["a fox", "a red fox in deep snow at dusk", ""]
    states, mask = encoder.load("cpu")(captions)

    prefix, suffix = tokenizer(PREFIX).input_ids, tokenizer(SUFFIX).input_ids
    for row, valid, caption in zip(states, mask, captions, strict=True):
        prompt = tokenizer(PREFIX + caption).input_ids
        padding = 6
        ids = torch.tensor([prompt + [suffix[0]] * padding + suffix])
        keep = torch.tensor([[True] * len(prompt) + [False] * padding + [True] * len(suffix)])
        positions = (keep.cumsum(1) - 1).expand(3, 1, -1)
        with torch.no_grad():
            out = model.language_model(input_ids=ids, attention_mask=keep, position_ids=positions, output_hidden_states=True)
        expected = torch.stack([out.hidden_states[tap] for tap in (1, 3)], 2)[0][keep[0]][len(prefix) :]
        assert valid.sum() == len(expected)
        assert torch.allclose(row[valid], expected, atol=1e-5), caption
