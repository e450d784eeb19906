"""A whole training step beside the plain one: PyTorch, transformers and diffusers used as their documentation shows.

    OMP_NUM_THREADS=1 python benchmarks/bench_train.py --tokenizer DIR [--compiled]

A step is text encoding, VAE encoding, forward, loss, backward, clipping and AdamW. Both have the same weights, images, captions, noise
and times. Sizes are those of K2 scaled down: the DiT of bench_dit.py (30.8 M parameters, text 12 x 256), Qwen3-VL's language model with
36 layers of width 256, the Qwen-Image VAE a sixth as wide, random weights; captions of 40 to 200 tokens. DIR holds a Qwen tokenizer.

Forms: `ours` (pipelines.train_step), `released` (Krea2Pipeline's text of 512 tokens, its mask, AutoencoderKLQwenImage, torch.optim.AdamW)
and `trimmed` (the same, but text cut after the longest caption of the batch, as a careful user would). They take turns; compared is
the median of processor time. Then a small model is trained for 200 steps by `ours` and `released`: the losses must be the same curve.
Appends one JSON line to benchmarks/results/train.jsonl.
"""

import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from bench_dit import SMALL
from bench_text_vae import captions
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLModel

from k2model import flow
from k2model.dit import Config
from k2model.layouts import diffusers_config
from k2model.loader import Loaded
from k2model.order import Group
from k2model.parallel import World
from k2model.text import PREFIX, SUFFIX, Qwen3VLText
from k2model.vae import QwenImageVae
from pipelines.run_folder import commit, versions
from pipelines.train_recipes import Phase, TrainRecipe
from pipelines.train_step import build, train_step

TAPS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
TINY = dataclasses.replace(SMALL, width=128, num_blocks=2, num_heads=2, num_kv_heads=1)


def frozen_parts(folder: Path, tokenizer: str, width: int) -> None:
    """Random Qwen3-VL (36 layers) and Qwen-Image VAE (base 16), saved as the hub has them."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 36,
        "head_dim": 64,
        "num_attention_heads": width // 64,
    }
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
    }
    torch.manual_seed(0)
    text = sizes | {"vocab_size": len(words), "num_key_value_heads": 1, "rope_parameters": rope}
    Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval().save_pretrained(folder / "text")
    words.save_pretrained(folder / "text")
    AutoencoderKLQwenImage(base_dim=16).eval().save_pretrained(folder / "vae")


class Plain:
    """A training step from the parts of diffusers and transformers, all on one device.

    Args:
        words: Tokenizer.
        encoder: Qwen3VLModel.
        model: Krea2Transformer2DModel, or what is called like it.
        trim: Cut the text after the longest caption of the batch.
        precision: bf16 runs the model under autocast.
    """

    def __init__(
        self,
        words: Any,
        encoder: Any,
        vae: AutoencoderKLQwenImage,
        model: torch.nn.Module,
        trim: bool,
        compiled: bool,
        taps: tuple[int, ...] = TAPS,
        precision: str = "fp32",
    ):
        self.words, self.vae, self.model, self.trim, self.precision = words, vae, model, trim, precision
        self.pipeline = Krea2Pipeline(FlowMatchEulerDiscreteScheduler(), None, encoder, words, None, text_encoder_select_layers=taps)
        self.pipeline.prompt_template_encode_start_idx = len(words(PREFIX).input_ids)  # 34 and 5 with Qwen's tokenizer
        self.pipeline.prompt_template_encode_num_suffix_tokens = len(words(SUFFIX).input_ids)
        shape, self.device = (1, -1, 1, 1, 1), vae.device
        self.mean = torch.tensor(vae.config.latents_mean, device=self.device).view(shape)
        self.std = torch.tensor(vae.config.latents_std, device=self.device).view(shape)
        self.call = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def step(self, plan: TrainRecipe, phase: Phase, batches: Sequence[Loaded], number: int, lr: float) -> float:
        """One optimizer step; the loss."""
        self.optimizer.zero_grad()
        total, images = 0.0, sum(len(batch.uids) for batch in batches)
        for batch in batches:
            loss = self.loss(plan, phase, batch, number) * len(batch.uids) / images
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(total)

    def loss(self, plan: TrainRecipe, phase: Phase, batch: Loaded, number: int) -> torch.Tensor:
        """The mean over the images of a batch."""
        device = self.device
        with torch.no_grad():
            pixels = (batch.images.to(device).float() / 127.5 - 1).to(self.vae.dtype)
            clean = ((self.vae.encode(pixels.unsqueeze(2)).latent_dist.mode().float() - self.mean) / self.std).squeeze(2)
            draw = flow.draw(plan.seed, number, batch.uids, tuple(clean.shape[1:]), phase.mu)
            prompts = ["" if drop < plan.caption_dropout else own[0] for drop, own in zip(draw.drop, batch.captions, strict=True)]
            text, mask = self.pipeline.get_text_hidden_states(prompts)
            if self.trim:  # padding lies between prompt and suffix: sort the valid tokens to the front, then cut
                order = (~mask).int().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
                rows = torch.arange(len(text), device=device)[:, None]
                text, mask = text[rows, order], mask[rows, order]
        noise, times = draw.noise.to(device), draw.t.to(device)
        t = times[:, None, None, None]
        latents = (1 - t) * clean + t * noise
        height, width = (side // 2 for side in latents.shape[2:])
        tokens = latents.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        positions = torch.cat([torch.zeros(text.shape[1], 3), torch.cat([torch.zeros(len(grid), 1), grid], 1)]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            out = self.call(tokens, text, times, positions, mask, return_dict=False)[0]
        target = noise - clean
        target = target.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.mse_loss(out.float(), target)


def plain(folder: Path, weights: dict[str, torch.Tensor], config: Config, trim: bool, compiled: bool) -> Plain:
    """The plain step with these weights and the frozen parts of a folder, on a CPU in float32."""
    encoder = Qwen3VLModel.from_pretrained(folder / "text", dtype=torch.float32).eval().requires_grad_(False)
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval().requires_grad_(False)
    model = Krea2Transformer2DModel.from_config(diffusers_config(config))
    model.load_state_dict(convert_krea2_transformer_checkpoint_to_diffusers(dict(weights)))
    return Plain(AutoTokenizer.from_pretrained(folder / "text"), encoder, vae, model, trim, compiled)


class Ours:
    """The step of `k2 train`, from the same weights."""

    def __init__(self, plan: TrainRecipe, phase: Phase):
        order: Any = SimpleNamespace(sets=[SimpleNamespace(groups=[{"bucket_height": phase.resolution, "bucket_width": phase.resolution}])])
        self.parts = build(
            plan, phase, order, plan.text.load("cpu"), plan.vae.load("cpu"), World(0, 1, torch.device("cpu")), None, aligned=False
        )

    def step(self, plan: TrainRecipe, phase: Phase, batches: Sequence[Loaded], number: int, lr: float) -> float:
        """One optimizer step; the loss."""
        return train_step(self.parts, plan, phase, batches, sum(batch.num_valid for batch in batches), number, lr).loss


def recipe(folder: Path, config: Config, side: int, compiled: bool) -> tuple[TrainRecipe, Phase]:
    """No weight decay, for the plain step would decay what K2 does not."""
    phase = Phase("bench", "none", side, steps=1, lr=1e-3, warmup=1, decay=1, mu=0.5, num_samples=1)
    text = Qwen3VLText(str(folder / "text"), taps=TAPS, dim=config.text_dim, dtype="float32")
    vae = QwenImageVae(str(folder), dtype="float32")
    return TrainRecipe("bench", config, text, vae, (phase,), 100, weight_decay=0.0, compiled=compiled), phase


def batch_of(words: Any, side: int, size: int, number: int, median: int) -> Loaded:
    """Smooth made-up pictures with captions of caption-like lengths."""
    rng = np.random.default_rng(number)
    coarse = torch.from_numpy(rng.integers(0, 256, (size, 3, 8, 8)).astype(np.float32))
    images = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)
    texts = captions(words, 64, median)
    chosen = [[texts[i]] for i in rng.integers(0, len(texts), size)]
    return Loaded(images, None, chosen, [f"{number}/{i}" for i in range(size)], size, (side, side), Group(0, 0, 0), list(range(size)))


def curves(folder: Path, steps: int) -> dict[str, Any]:
    """Both forms from the same weights, the same batches: how far the losses are apart."""
    plan, phase = recipe(folder, TINY, 64, False)
    ours = Ours(plan, phase)
    released = plain(folder, ours.parts.model.state_dict(), TINY, trim=False, compiled=False)
    found: dict[str, list[float]] = {"ours": [], "released": []}
    for number in range(steps):
        batch = batch_of(released.words, 64, 2, number, 20)
        lr = 1e-3 * min(1.0, (number + 1) / 20)
        found["ours"].append(ours.step(plan, phase, [batch], number, lr))
        found["released"].append(released.step(plan, phase, [batch], number, lr))
    apart = [abs(a - b) / b for a, b in zip(*found.values(), strict=True)]
    first, last = np.mean(found["ours"][:10]), np.mean(found["ours"][-10:])
    return {
        "steps": steps,
        "largest_relative_difference": max(apart),
        "at_step": int(np.argmax(apart)) + 1,
        "first10": first,
        "last10": last,
    }


def main(
    tokenizer: str, rounds: int = 5, batch: int = 8, side: int = 256, median: int = 100, compiled: bool = False, steps: int = 200
) -> None:
    """Measure and record.

    Args:
        tokenizer: Folder of a Qwen tokenizer.
        rounds: Timed steps of each form, in turns, after two to warm up.
        batch: Images in a step.
        side: Side of the pictures in pixels.
        median: Median length of a caption in words.
        compiled: All DiTs under torch.compile: ours block by block, as `k2 train` does, diffusers' as a whole.
        steps: Of the comparison of the losses; 0 leaves it out.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        frozen_parts(folder, tokenizer, SMALL.text_dim)
        plan, phase = recipe(folder, SMALL, side, compiled)
        forms: dict[str, Any] = {"ours": Ours(plan, phase)}
        weights = {name.replace("_orig_mod.", ""): value.clone() for name, value in forms["ours"].parts.model.state_dict().items()}
        for name in ("released", "trimmed"):
            forms[name] = plain(folder, weights, SMALL, name == "trimmed", compiled)
        words = forms["trimmed"].words
        spent: dict[str, list[float]] = {name: [] for name in forms}
        losses: dict[str, list[float]] = {name: [] for name in forms}
        for number in range(rounds + 2):
            drawn = batch_of(words, side, batch, number, median)
            for name, form in forms.items():
                clock = time.process_time()
                losses[name].append(form.step(plan, phase, [drawn], number, 1e-4))
                if number >= 2:
                    spent[name].append(time.process_time() - clock)
                print(f"step {number} {name}: {time.process_time() - clock:.2f} s", file=sys.stderr, flush=True)
        seconds = {name: statistics.median(times) for name, times in spent.items()}
        del forms
        line = {
            "compiled": compiled,
            "batch": batch,
            "side": side,
            "seconds": seconds,
            "images_per_s": {name: batch / value for name, value in seconds.items()},
            "times_ours": {name: value / seconds["ours"] for name, value in seconds.items() if name != "ours"},
            "loss_apart": max(abs(a - b) / b for name in losses for a, b in zip(losses[name], losses["ours"], strict=True)),
            "curves": curves(folder, steps) if steps else None,
        }
    line |= {"threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine()}
    print(json.dumps(line, indent=1))
    with open(Path(__file__).parent / "results" / "train.jsonl", "a") as results:
        results.write(json.dumps(line | {"commit": commit(), "versions": versions()}) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
