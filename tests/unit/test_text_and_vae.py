"""Text encoders and image codecs: the offline ones, and the real ones on small random weights."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import small_krea
import torch

from k2model.text import PREFIX, SUFFIX, HashText, Qwen3VLText
from k2model.vae import Pca, QwenImageCodec, QwenImageVae, StillConv, fit_pca, load_pca, still

GOLDEN = [1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0]  # the word "red"


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


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("size", [(32, 48), (40, 24), (8, 8)])
def test_the_real_vae_is_diffusers_video_vae_on_one_frame_normalised_per_channel(tmp_path, size):
    pytest.importorskip("diffusers")
    model = small_krea.vae()
    model.save_pretrained(tmp_path / "vae")
    codec = QwenImageVae(str(tmp_path), dtype="float32").load("cpu")
    mean, std = (torch.tensor(values).view(1, 16, 1, 1) for values in (model.config.latents_mean, model.config.latents_std))
    images = torch.rand(3, 3, *size) * 2 - 1
    latents = torch.randn(3, 16, size[0] // 8, size[1] // 8)
    with torch.no_grad():
        moments = model.encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2)
        pictures = model.decode((latents * std + mean).unsqueeze(2)).sample.squeeze(2)
    assert relative(codec.encode(images), (moments - mean) / std) < 5e-7
    # Random weights magnify small differences on the way up (the order of sums in a convolution); the pictures span 1.
    assert relative(codec.decode(latents), pictures) < 5e-6


def test_still_convolutions_keep_the_last_time_slice_exactly():
    diffusers = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_qwenimage")
    conv = diffusers.QwenImageCausalConv3d(5, 7, 3, padding=1)
    x = torch.randn(2, 5, 1, 9, 8)
    with torch.no_grad():
        assert relative(StillConv(conv)(x), conv(x)) < 5e-7
        first = conv.weight.clone()
        conv.weight[:, :, :2] += 100  # slices that meet only zeros
        assert relative(StillConv(conv)(x), conv(x)) < 5e-7 and not torch.equal(first, conv.weight)


def test_the_still_vae_needs_about_a_third_of_the_flops():
    """Measured on the released sizes, on meta: only shapes are run."""
    diffusers = pytest.importorskip("diffusers")
    from torch.utils.flop_counter import FlopCounterMode

    def count(function, x):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(x)
        return counter.get_total_flops()

    with torch.device("meta"):
        video = diffusers.AutoencoderKLQwenImage()
        codec = QwenImageCodec(still(diffusers.AutoencoderKLQwenImage()))
        images, latents = torch.empty(1, 3, 256, 256), torch.empty(1, 16, 32, 32)
        encode = count(lambda x: video.encode(x.unsqueeze(2)), images) / count(codec.encode, images)
        decode = count(lambda x: video.decode(x.unsqueeze(2)), latents) / count(codec.decode, latents)
    assert sum(parameter.numel() for parameter in video.parameters()) == 126_892_531
    # The convolutions alone are 2.87 and 2.63; attention over the 32 x 32 middle is the same in both.
    assert encode == pytest.approx(2.842, abs=0.005) and decode == pytest.approx(2.613, abs=0.005)


def test_the_still_vae_in_bfloat16_stays_near_the_video_vae_in_bfloat16(tmp_path):
    pytest.importorskip("diffusers")
    model = small_krea.vae()
    exact = QwenImageCodec(still(copy.deepcopy(model)))
    model = model.bfloat16()
    codec = QwenImageCodec(still(copy.deepcopy(model)))
    images = torch.rand(2, 3, 40, 56) * 2 - 1
    with torch.no_grad():
        video = model.encode(images.bfloat16().unsqueeze(2)).latent_dist.mode().squeeze(2).float()
    video = (video - codec.mean) / codec.std
    assert relative(codec.encode(images), exact.encode(images)) < 2 * max(relative(video, exact.encode(images)), 2e-3)
    latents = torch.randn(2, 16, 5, 7)
    assert relative(codec.decode(latents), exact.decode(latents)) < 3e-2


def test_missing_weights_say_so():
    with pytest.raises(ValueError, match="Give a folder with its weights"):
        QwenImageVae("/nowhere").load("cpu")
    with pytest.raises(ValueError, match="Give a folder with its weights"):
        Qwen3VLText("/nowhere").load("cpu")


CAPTIONS = [
    "a fox",
    "",
    "a red fox in deep snow at dusk",
    "\n\nfirst line\nsecond",  # its newlines merge with the last token of the prefix
    "ünïcödé 狐狸 🦊 \u0301",
    " <|im_end|> marks of the template itself",
    "a caption that never ends, " * 100,
]


@pytest.fixture(scope="module", params=["small", "real"])
def words(request):
    transformers = pytest.importorskip("transformers")
    if request.param == "small":
        return small_krea.tokenizer()
    if not small_krea.SHARED_TOKENIZER.exists():
        pytest.skip("the Qwen tokenizer's files are not on this machine")
    return transformers.AutoTokenizer.from_pretrained(small_krea.SHARED_TOKENIZER)


@pytest.fixture(scope="module")
def qwen(words, tmp_path_factory):
    return small_krea.saved_qwen(tmp_path_factory.mktemp("qwen"), words)


@pytest.fixture(scope="module")
def encoders(qwen):
    return qwen.load("cpu"), qwen.load_as_released("cpu")


def test_the_released_layout_is_padded_inside_the_template(encoders, words):
    _, released = encoders
    states, mask = released(CAPTIONS)
    assert states.shape == (len(CAPTIONS), 512, 2, 32) and mask[:, -5:].all()
    prompts = [len(words(PREFIX + caption).input_ids) - len(words(PREFIX).input_ids) for caption in CAPTIONS]
    assert mask.sum(1).tolist() == [min(prompt, 507) + 5 for prompt in prompts] and prompts[-1] > 507 and prompts[1] == 0


def test_the_fast_text_encoder_gives_the_states_of_the_released_layout(encoders):
    fast, released = encoders
    (states, mask), (expected, valid) = fast(CAPTIONS), released(CAPTIONS)
    assert torch.equal(mask.sum(1), valid.sum(1)) and states.shape[1] == mask.sum(1).max()
    assert (states[~mask] == 0).all()
    for i, caption in enumerate(CAPTIONS):
        assert relative(states[i][mask[i]], expected[i][valid[i]]) < 1e-6, caption


def test_a_caption_has_the_same_states_alone_and_in_a_batch(encoders):
    fast, _ = encoders
    states, mask = fast(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone, whole = fast([caption])
        assert whole.all() and relative(states[i][mask[i]], alone[0]) < 1e-6, caption


def test_the_prefix_is_run_once_and_never_again(encoders, monkeypatch):
    fast, _ = encoders
    tokens = []
    monkeypatch.setattr(fast.model.embed_tokens, "forward", lambda ids: tokens.append(ids) or torch.zeros(*ids.shape, 32))
    _, mask = fast(["a fox", ""])
    assert [ids.numel() for ids in tokens] == [int(mask.sum())] and len(fast.model.layers) == 3


def test_the_released_layout_is_that_of_diffusers_bit_for_bit(encoders, words):
    pytest.importorskip("diffusers")
    pipeline = small_krea.pipeline(small_krea.dit(), words, small_krea.qwen(words), small_krea.vae(), distilled=False)
    with torch.no_grad():
        states, mask = pipeline.get_text_hidden_states(CAPTIONS)
    found, valid = encoders[1](CAPTIONS)
    assert torch.equal(found, states) and torch.equal(valid, mask)


def test_counting_padding_in_the_positions_would_be_seen(encoders, words):
    """The trap of transformers >= 5: without positions it numbers the suffix behind the padding."""
    model = small_krea.qwen(words).language_model
    prompt, suffix = words(PREFIX + "a fox").input_ids, words(SUFFIX).input_ids
    mask = torch.tensor([[True] * len(prompt) + [False] * 400 + [True] * len(suffix)])
    with torch.no_grad():
        ids = torch.tensor([prompt + [words.pad_token_id] * 400 + suffix])
        shifted = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    states, _ = encoders[0](["a fox"])
    expected = torch.stack([shifted[tap] for tap in small_krea.TAPS], 2)[0][mask[0]][len(words(PREFIX).input_ids) :]
    assert relative(states[0, :-5], expected[:-5]) < 1e-6 and relative(states[0, -5:], expected[-5:]) > 1e-2


def test_the_fast_text_encoder_in_bfloat16_is_as_near_the_truth_as_the_released_layout(qwen, encoders):
    exact, mask = encoders[0](CAPTIONS)
    half = replace(qwen, dtype="bfloat16")
    states, _ = half.load("cpu")(CAPTIONS)
    released, valid = half.load_as_released("cpu")(CAPTIONS)
    assert states.dtype == torch.bfloat16
    assert relative(states[mask], exact[mask]) < 1.3 * relative(released[valid], exact[mask])


def test_weights_as_the_hub_has_them_with_a_language_model_head_load(words, qwen, tmp_path, encoders):
    transformers = pytest.importorskip("transformers")
    base = small_krea.qwen(words)
    whole = transformers.Qwen3VLForConditionalGeneration(base.config)
    whole.model.load_state_dict(base.state_dict())
    whole.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    states, _ = replace(qwen, path=str(tmp_path)).load("cpu")(["a fox"])
    assert torch.equal(states, encoders[0](["a fox"])[0])


def test_a_text_encoder_of_other_sizes_is_refused(qwen):
    with pytest.raises(ValueError, match=r"4 layers of width 32, but the recipe taps \(1, 4\) at width 32"):
        replace(qwen, taps=(1, 4)).load("cpu")
    with pytest.raises(ValueError, match="at width 64"):
        replace(qwen, dim=64).load("cpu")


def test_a_diffusers_pipeline_folder_serves_as_text_encoder(qwen, tmp_path, encoders):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    for path in Path(qwen.path).iterdir():
        shutil.copy(path, tmp_path / ("tokenizer" if path.name.startswith("token") else "text_encoder"))
    states, _ = replace(qwen, path=str(tmp_path)).load("cpu")(["a fox"])
    assert torch.equal(states, encoders[0](["a fox"])[0])
