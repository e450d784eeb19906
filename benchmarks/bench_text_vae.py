"""Text encoder and VAE of K2 beside diffusers': the same outputs, for how many FLOPs and how much processor time.

    OMP_NUM_THREADS=1 python benchmarks/bench_text_vae.py --tokenizer DIR

DIR holds a Qwen tokenizer. The text encoder is Qwen3-VL-4B's language model at an eighth of its width (36 layers, random weights), so
FLOP ratios are near those of the whole, and times are those of this machine's small products. Captions are made-up words whose
lengths in tokens are lognormal (median MEDIAN, sigma 0.5). The VAE has the released sizes with random weights. Runs of all forms take
turns; compared is the median of processor time. Appends one JSON line per part to benchmarks/results/text_vae.jsonl.
"""

import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLModel

from k2model.text import PREFIX, SUFFIX, Qwen3VLText
from k2model.vae import QwenImageCodec, still
from pipelines.run_folder import commit, versions

WIDTH = 320


def measure(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """FLOPs of one call and the median processor time of `repeats`, in turns, after one call to warm up."""
    found = {}
    for name, form in forms.items():
        with FlopCounterMode(display=False) as counter:
            form()
        found[name] = {"tflop": counter.get_total_flops() / 1e12, "seconds": []}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.process_time()
            form()
            found[name]["seconds"].append(time.process_time() - start)
    return {name: row | {"seconds": statistics.median(row["seconds"])} for name, row in found.items()}


def captions(tokenizer, count: int, median: int) -> list[str]:
    """Made-up captions of caption-like lengths."""
    rng = np.random.default_rng(0)
    words = ["a", "red", "fox", "in", "deep", "snow", "at", "dusk", "film", "grain", "soft", "light", "behind", "the", "trees", ",", "and"]
    lengths = np.minimum(np.exp(rng.normal(np.log(median), 0.5, count)), 507).astype(int)
    return [" ".join(rng.choice(words, length)) for length in lengths]


def text(folder: str, batch: int, median: int, repeats: int) -> dict:
    """The four forms of the text encoder on a batch of captions."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 1216, "num_hidden_layers": 36, "head_dim": 128, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": WIDTH}
    torch.manual_seed(0)
    model = Qwen3VLModel(
        Qwen3VLConfig(
            text_config=sizes | {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "rope_parameters": rope},
            vision_config=vision | {"deepstack_visual_indexes": [0]},
        )
    ).eval()
    prompts = captions(tokenizer, batch, median)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        described = Qwen3VLText(place, dim=WIDTH, dtype="float32")
        fast, released = described.load("cpu"), described.load_as_released("cpu")
    pipeline = Krea2Pipeline(FlowMatchEulerDiscreteScheduler(), None, model, tokenizer, None)

    @torch.no_grad()
    def padded_at_the_end() -> torch.Tensor:
        """To the longest of the batch, prefix and all layers run: what a plain use of transformers does."""
        rows = tokenizer([PREFIX + prompt + SUFFIX for prompt in prompts], padding=True, return_tensors="pt")
        return model.language_model(**rows, output_hidden_states=True, use_cache=False).hidden_states[35]

    with torch.no_grad():
        theirs, valid = pipeline.get_text_hidden_states(prompts)
        states, mask = fast(prompts)
    forms = {
        "diffusers": torch.no_grad()(lambda: pipeline.get_text_hidden_states(prompts)),
        "as_released": lambda: released(prompts),
        "padded_at_the_end": padded_at_the_end,
        "fast": lambda: fast(prompts),
    }
    tokens = mask.sum(1).tolist()
    return {
        "part": "text",
        "batch": batch,
        "tokens": {"mean": statistics.mean(tokens), "max": max(tokens)},
        "error": ((states[mask] - theirs[valid]).norm() / theirs[valid].norm()).item(),
        "forms": measure(forms, repeats),
    }


@torch.no_grad()
def vae(pixels: int, batch: int, repeats: int) -> dict:
    """Encode and decode at the released sizes."""
    torch.manual_seed(0)
    video = AutoencoderKLQwenImage().eval()
    codec = QwenImageCodec(still(copy.deepcopy(video)))
    images, latents = torch.rand(batch, 3, pixels, pixels) * 2 - 1, torch.randn(batch, 16, pixels // 8, pixels // 8)
    raw = (latents * codec.std + codec.mean).unsqueeze(2)
    moments = video.encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2)
    encoded, decoded = (moments - codec.mean) / codec.std, video.decode(raw).sample.squeeze(2)
    forms = {
        "diffusers_encode": torch.no_grad()(lambda: video.encode(images.unsqueeze(2)).latent_dist.mode()),
        "encode": lambda: codec.encode(images),
        "diffusers_decode": torch.no_grad()(lambda: video.decode(raw).sample),
        "decode": lambda: codec.decode(latents),
    }
    return {
        "part": "vae",
        "pixels": pixels,
        "batch": batch,
        "parameters": {name: sum(p.numel() for p in m.parameters()) for name, m in (("diffusers", video), ("still", codec.model))},
        "error": {
            "encode": ((codec.encode(images) - encoded).norm() / encoded.norm()).item(),
            "decode": ((codec.decode(latents) - decoded).norm() / decoded.norm()).item(),
        },
        "forms": measure(forms, repeats),
    }


def main(tokenizer: str, batch: int = 8, median: int = 150, pixels: int = 256, repeats: int = 3) -> None:
    """Measure and record.

    Args:
        tokenizer: Folder of a Qwen tokenizer.
        batch: Captions at a time.
        median: Median length of a caption in tokens.
        pixels: Side of the pictures for the VAE.
        repeats: Timed runs of each form.
    """
    for row in (text(tokenizer, batch, median, repeats), text(tokenizer, 1, median, repeats), vae(pixels, 1, repeats)):
        forms = row["forms"]
        for name, form in forms.items():
            peer = forms["diffusers" if row["part"] == "text" else f"diffusers_{name.removeprefix('diffusers_')}"]
            form |= {f"peer_{key}_over_ours": round(peer[key] / form[key], 3) for key in ("tflop", "seconds")}
            print(f"{row['part']:5} {name:18} {form['tflop']:8.3f} TFLOP {form['seconds']:8.3f} s", end="")
            print(f"   diffusers / this: {form['peer_tflop_over_ours']:.2f} FLOPs, {form['peer_seconds_over_ours']:.2f} time")
        line = row | {"threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine()}
        with open(Path(__file__).parent / "results" / "text_vae.jsonl", "a") as results:
            results.write(json.dumps(line | {"commit": commit(), "versions": versions()}) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
