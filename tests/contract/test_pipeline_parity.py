"""Text encoder, schedule, sampler, guidance, noise and VAE together are diffusers' Krea2Pipeline: same seeds and prompts, same pictures."""

import pytest
import small_krea
import torch

from k2model import flow
from k2model.vae import FACTOR, QwenImageVae

diffusers = pytest.importorskip("diffusers", reason="the reference implementation is in the extra [train]")

PROMPTS = ["a red fox in deep snow at dusk", "\n\nun renard 🦊"]
SEEDS = (11, 12)
HEIGHT, WIDTH = 48, 80


class Parts:
    def __init__(self, folder):
        self.words = small_krea.tokenizer()
        self.encode = small_krea.saved_qwen(folder / "qwen", self.words).load("cpu")
        self.autoencoder = small_krea.vae()
        self.autoencoder.save_pretrained(folder / "vae")
        self.codec = QwenImageVae(str(folder), dtype="float32").load("cpu")
        self.model = small_krea.dit()
        self.tokens = HEIGHT * WIDTH // (FACTOR * self.model.config.patch) ** 2

    def pipeline(self, distilled: bool):
        return small_krea.pipeline(self.model, self.words, small_krea.qwen(self.words), self.autoencoder, distilled)

    def latents(self, preset: flow.Preset, **settings) -> torch.Tensor:
        """Ours, (B, C, H, W)."""

        def velocity(captions):
            text, mask = self.encode(captions)
            return lambda x, t: self.model(x, t, text, mask)

        noise = flow.SeededNoise(SEEDS, (16, HEIGHT // FACTOR, WIDTH // FACTOR))
        mu = flow.resolution_mu(self.tokens) if preset.mu is None else preset.mu
        return flow.sample(velocity(PROMPTS), velocity([""] * len(PROMPTS)), noise(), preset.steps, mu, preset.guidance, **settings)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return Parts(tmp_path_factory.mktemp("parts"))


def theirs(parts: Parts, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, C, H, W) after the last step, and pictures in [0, 1]."""
    preset, last = flow.PRESETS[name], {}
    pictures = (
        parts.pipeline(distilled=name == "turbo")(
            PROMPTS,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=preset.steps,
            guidance_scale=preset.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="pt",
            callback_on_step_end=lambda pipe, step, t, tensors: last.update(tensors) or {},
        )
    ).images
    tokens = last["latents"].unflatten(1, (HEIGHT // 16, WIDTH // 16)).unflatten(3, (16, 2, 2))
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(len(PROMPTS), 16, HEIGHT // FACTOR, WIDTH // FACTOR), pictures


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", flow.PRESETS)
def test_a_whole_preset_gives_the_latents_and_pictures_of_diffusers(parts, name):
    ours = parts.latents(flow.PRESETS[name])
    latents, pictures = theirs(parts, name)
    assert relative(ours, latents) < 5e-6
    assert relative(parts.codec.decode(ours) / 2 + 0.5, pictures) < 5e-6


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 51},
        {"guidance": 4.5},  # the usual scale taken for K2's
        {"mu": 1.15},
        {"mu": 0.5},
    ],
)
def test_another_setting_is_another_picture(parts, change):
    """Each of these is a mistake that people have made; the parity above must see it."""
    raw = parts.latents(flow.PRESETS["raw"])
    assert relative(parts.latents(flow.PRESETS["raw"]._replace(**change)), raw) > 1e-3


@pytest.mark.parametrize(("steps", "tokens", "distilled"), [(52, 256, False), (28, 4096, False), (52, 16384, False), (8, 4096, True)])
def test_times_are_the_sigmas_of_diffusers_scheduler(steps, tokens, distilled):
    import numpy as np

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
    )
    mu = 1.15 if distilled else flow.resolution_mu(tokens)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert torch.allclose(scheduler.sigmas.double(), torch.tensor(flow.schedule_times("linear", steps, mu)).double(), atol=1e-6)
