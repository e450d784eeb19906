"""`k2 sample`: pictures from a checkpoint, one PNG per prompt and seed, and a contact sheet."""

import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from curation.shards import describe, file_hash
from k2model import flow
from k2model.data import to_images
from k2model.lora import merge
from k2model.text import Encode
from k2model.vae import FACTOR
from pipelines import weights
from pipelines.cli import call
from pipelines.generated import contact_sheet, parameters_of, write_picture

log = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """How every picture of a call is made."""

    height: int
    width: int
    steps: int
    guidance: float
    mu: float
    sampler: str
    schedule: str


def sample(
    model: str,
    prompt: tuple[str, ...] = (),
    prompts: str | None = None,
    out: str = "samples",
    preset: str = "raw",
    steps: int | None = None,
    guidance: float | None = None,
    mu: float | None = None,
    sampler: str = "euler",
    schedule: str = "linear",
    size: str | None = None,
    num: int = 1,
    seed: int = 0,
    batch_size: int = 4,
    lora: tuple[str, ...] = (),
    text: str | None = None,
    vae: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    dry_run: bool = False,
) -> int:
    """Make pictures of prompts. The same command again makes only what is missing.

    Writes OUT/<prompt number>-<seed>.png, with all parameters in the file and the declaration that a model made it, and
    OUT/contact_sheet.png. A picture is a function of model, prompt, settings and seed, whatever shares its batch (but for
    the last bits of matrix products on some devices).

    Args:
        model: A .safetensors file (official, diffusers or scaled FP8 layout), a diffusers folder, or a folder of `k2 train`.
        prompt: Prompts; an empty one is allowed.
        prompts: A text file with a prompt per line, after those of --prompt; blank lines are passed over.
        out: Folder of the pictures.
        preset: raw (52 steps, guidance 3.5, shift of the resolution) or turbo (8 steps, guidance 0, mu 1.15).
        steps: Instead of the preset's.
        guidance: Instead of the preset's; K2's convention, one less than the usual scale; 0 turns it off.
        mu: Instead of the preset's: log of the time shift. ComfyUI uses 1.15 for every model and size.
        sampler: euler or er_sde.
        schedule: linear (K2's), simple or beta (ComfyUI's).
        size: WIDTHxHEIGHT in pixels, rounded up to multiples of 16; default: that of training, or 1024x1024.
        num: Pictures per prompt, with seeds SEED, SEED + 1, ...
        seed: The first seed.
        batch_size: Pictures at a time.
        lora: PATH or PATH:WEIGHT of LoRA files, diffusers, peft or ComfyUI keys; they add up.
        text: Folder or hub name of Qwen3-VL, or `hash` for the offline encoder; default: that of the model.
        vae: Folder or hub name of the Qwen-Image VAE, or vae.safetensors of a training run; default: that of the model.
        device: auto, cpu, cuda or mps.
        precision: auto (bf16 on cuda, fp32 elsewhere), bf16 or fp32.
        dry_run: Print what would be made, with the times of the steps, and stop before text encoder and codec are loaded.
    """
    chosen = all_prompts(prompt, prompts)
    if num < 1 or batch_size < 1:
        raise ValueError(f"--num {num} and --batch-size {batch_size} must be at least 1")
    start = known("preset", preset, flow.PRESETS)
    known("sampler", sampler, flow.SAMPLERS)
    flow.schedule_times(schedule, start.steps if steps is None else steps, 1.0)  # refuses unknown names before weights are loaded
    loras = [lora_weight(text) for text in lora]
    wanted = parse_size(size) if size else None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    place, dtype = torch.device(device), known("precision", precision, DTYPES)

    opened = weights.open_model(model, place, dtype)
    width, height = wanted or (opened.resolution, opened.resolution)
    tokens = width * height // (FACTOR * opened.model.config.patch) ** 2
    shift = next(value for value in (mu, start.mu, flow.resolution_mu(tokens)) if value is not None)
    settings = Settings(
        height,
        width,
        start.steps if steps is None else steps,
        start.guidance if guidance is None else guidance,
        shift,
        sampler,
        schedule,
    )
    text_encoder, codec = weights.find_text(text, opened, dtype), weights.find_codec(vae, opened, dtype)
    made_by = {
        "model": opened.identity,
        "loras": [weights.identity(Path(path)) | {"weight": weight} for path, weight in loras],
        "text": describe(text_encoder),
        "vae": {"hash": file_hash(codec)} if isinstance(codec, Path) else describe(codec),
        "precision": precision,
        **vars(settings),
    }
    everything = [(number, words, seed + i) for number, words in enumerate(chosen) for i in range(num)]
    files = {picture: Path(out) / f"{picture[0]:04d}-{picture[2]}.png" for picture in everything}
    todo = [picture for picture, path in files.items() if not is_made(path, made_by | {"prompt": picture[1], "seed": picture[2]})]
    if dry_run:
        times = [round(t, 6) for t in flow.schedule_times(schedule, settings.steps, shift)]
        print(json.dumps({"pictures": len(files), "missing": len(todo), "image_tokens": tokens, "times": times, **made_by}))
        return 0
    clock = time.perf_counter()
    if todo:
        encode, decode = text_encoder.load(place), weights.load_codec(codec, place).decode
        merge(opened.model, loras)
    with tqdm(total=len(files), initial=len(files) - len(todo), unit="picture", file=sys.stderr) as progress:
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            latents = pictures(opened.model, encode, [words for _, words, _ in batch], [number for *_, number in batch], settings, dtype)
            if not latents.isfinite().all():
                raise ValueError(
                    f"the model gave values that are not finite for {batch[0][1]!r}. Try --precision fp32, or a lower guidance."
                )
            for picture, pixels in zip(batch, to_images(decode(latents)), strict=True):
                write_picture(pixels, made_by | {"prompt": picture[1], "seed": picture[2]}, files[picture])
            progress.update(len(batch))
    seconds = time.perf_counter() - clock
    loaded = "".join(f" + {Path(path).name} x {weight:g}" for path, weight in loras)
    title = (
        f"{opened.identity['name']}{loaded}, {settings.steps} {sampler} steps, {schedule}, guidance {settings.guidance:g}, mu {shift:.3f}"
    )
    contact_sheet([*files.values()], num, title, Path(out) / "contact_sheet.png")
    print(json.dumps({"out": out, "pictures": len(files), "pictures_now": len(todo), "seconds": round(seconds, 2)}))
    return 0


def pictures(
    model: torch.nn.Module, encode: Encode, prompts: list[str], seeds: list[int], settings: Settings, dtype: torch.dtype
) -> torch.Tensor:
    """Latents (B, C, H/8, W/8) of a batch."""
    device = next(model.parameters()).device

    def velocity(captions: list[str]) -> flow.Velocity:
        text, mask = encode(captions)
        return lambda x, t: model(x, t, text, mask)

    conditional = velocity(prompts)
    unconditional = velocity([""] * len(prompts)) if settings.guidance > 0 else conditional
    noise = flow.SeededNoise(seeds, (model.config.channels, settings.height // FACTOR, settings.width // FACTOR), device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        s = settings
        return flow.sample(conditional, unconditional, noise(), s.steps, s.mu, s.guidance, s.sampler, s.schedule, noise)


def is_made(path: Path, parameters: dict[str, Any]) -> bool:
    """Whether this picture is there.

    Raises:
        ValueError: the file is there, made with other parameters.
    """
    if not path.exists():
        return False
    before, now = parameters_of(path), json.loads(json.dumps(parameters))
    differing = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in sorted({*before, *now}) if before.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(f"{path} was made with other parameters ({'; '.join(differing)}). Choose another --out, or delete it.")
    return True


def all_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """Prompts of the command line, then those of the file.

    Raises:
        ValueError: there is none.
    """
    if file is not None and not Path(file).is_file():
        raise ValueError(f"--prompts {file!r} is not a file; it must hold one prompt per line")
    lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    found = [*given, *(line.strip() for line in lines if line.strip())]
    if not found:
        raise ValueError("there is no prompt: give --prompt TEXT (several are allowed) or --prompts FILE")
    return found


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of `WIDTHxHEIGHT`, rounded up to multiples of 16 as the released pipeline does."""
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if not found or min(width := int(found[1]), height := int(found[2])) < 16:
        raise ValueError(f"--size {text!r} must be WIDTHxHEIGHT in pixels, each at least 16, for example 1024x768")
    rounded = tuple(-(-side // 16) * 16 for side in (width, height))
    if rounded != (width, height):
        log.info("k2 sample: size %dx%d is rounded up to %dx%d, multiples of 16", width, height, *rounded)
    return rounded


def lora_weight(text: str) -> tuple[str, float]:
    """(path, weight) of `PATH` or `PATH:WEIGHT`."""
    path, _, tail = text.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        path, weight = text, 1.0
    if not Path(path).exists():
        raise ValueError(f"--lora {text!r}: there is no file {path!r}; give PATH or PATH:WEIGHT")
    return path, weight


def known(what: str, name: str, choices: Any) -> Any:
    """`choices[name]`, or the name itself of a tuple.

    Raises:
        ValueError: it is not one of them.
    """
    if name not in choices:
        raise ValueError(f"there is no {what} {name!r}; choose from {', '.join(choices)}")
    return choices[name] if isinstance(choices, dict) else name


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(sample, argv, "k2 sample")


if __name__ == "__main__":
    sys.exit(main())
