"""Latents of a packed set, computed once: RUN/packed/<policy>/latents/<n>.parquet, row for row as the packed files.

A pass of its own over packed shards: what is packed stays as it is, and another autoencoder is another pass.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from curation.schema import LATENTS
from curation.shards import file_hash, fingerprint, is_done, write_row_groups
from k2model.data import Packed, to_pixels
from k2model.vae import CHANNELS, FACTOR, QwenImageVae, load_pca
from pipelines import cluster


def write_latents(place: Path, codec: str, ray: str, workers: int | None) -> list[str]:
    """Encode every packed shard that has no latents yet; returns the names of those that failed, with the errors.

    Where the cluster has GPUs, the codec stands on them, and CPU workers read and decode for it.

    `codec` is the folder of the Qwen-Image VAE's weights (or its name in the hub cache), or the `vae.safetensors` of a training run.

    Raises:
        ValueError: the codec is not at hand, or the latents that are there were made by another one.
    """
    files: dict[str, list[dict]] = {}
    packed = Packed(place)
    for group in packed.groups:
        files.setdefault(group["file"], []).append(group)
    made_by = identity(packed, codec)
    todo = [name for name in files if not is_done(place / "latents" / name, made_by)]
    failed = []
    make = partial(encoder, place, codec, {name: files[name] for name in todo}, made_by)
    with tqdm(total=len(files), initial=len(files) - len(todo), unit="file", desc="latents", file=sys.stderr) as progress:
        for outcome in cluster.run(make, todo, ray, workers, serve=partial(codec_server, codec)):
            if outcome.error:
                failed.append(f"{outcome.item} ({outcome.error})")
            progress.update(not outcome.error)
    return failed


def identity(packed: Packed, codec: str) -> str:
    """The fingerprint that the latents of a packed set and a codec have."""
    return fingerprint({"packed": packed.fingerprint, "codec": describe_codec(codec), "dtype": "float16"})


def check_latents(packed: Packed, codec: str) -> None:
    """All latents of a packed set are there and made by this codec.

    Raises:
        ValueError: they are not.
    """
    made_by = identity(packed, codec)
    for name in dict.fromkeys(group["file"] for group in packed.groups):
        path = Path(packed.directory, "latents", name)
        if not is_done(path, made_by):
            raise ValueError(f"{path} is missing, and the recipe trains on latents. Run k2 pack --latents {codec}")


def describe_codec(codec: str) -> dict[str, Any]:
    """What decides the values: the hashes of the weights, or the hub's name for them."""
    path = Path(codec)
    weights = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not weights and (path.exists() or path.suffix):
        raise ValueError(f"--latents {codec!r}: no .safetensors there; give the folder of the Qwen-Image VAE or a vae.safetensors")
    return {"weights": [file_hash(file) for file in weights]} if weights else {"name": codec}


def load_codec(codec: str, device: str) -> Any:
    """The codec on a device: `encode` takes (B, 3, H, W) in [-1, 1] to (B, 16, H/8, W/8) of about unit variance."""
    path = Path(codec)
    if path.suffix == ".safetensors":
        return load_pca(path).to(device)
    inside = None if (path / "config.json").exists() else "vae"
    return QwenImageVae(codec, inside).load(device)


def codec_server(codec: str) -> Callable[[np.ndarray], np.ndarray]:
    """Load the codec once, on the accelerator; returns the function uint8 (B, 3, H, W) -> float16 (B, 16, H/8, W/8)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_codec(codec, device)

    def encode(images: np.ndarray) -> np.ndarray:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # as everywhere: sums must not depend on where they are made
        try:
            pixels = to_pixels(torch.from_numpy(np.array(images)).to(device))
            return loaded.encode(pixels).to("cpu", torch.float16).numpy()
        finally:
            torch.set_num_threads(before)

    return encode


def encoder(place: Path, codec: str, files: dict[str, list[dict]], made_by: str, ask: Callable | None = None) -> Callable[[str], int]:
    """The function of one packed shard that a worker runs. Without servers to `ask`, the codec is loaded in the worker."""
    packed, here = Packed(place), codec_server(codec) if ask is None else None

    def asked(images: np.ndarray) -> np.ndarray:
        return here(images) if here else ask(images)()

    def tables(name: str) -> Iterator[pa.Table]:
        for group in files[name]:
            batch = packed.read(group, padding=True)
            latents = asked(batch.images.numpy())
            shape = (CHANNELS, group["bucket_height"] // FACTOR, group["bucket_width"] // FACTOR)
            assert latents.shape[1:] == shape, (latents.shape, group)
            values = [np.ascontiguousarray(latent, "<f2").tobytes() for latent in latents]
            yield pa.table([pa.array(batch.uids), pa.array(values, pa.binary())], schema=LATENTS)

    def encode(name: str) -> int:
        # zstd takes 8 % off values of a normal distribution, and reading then takes several times as long (bench_loader.py).
        write_row_groups(tables(name), place / "latents" / name, LATENTS, made_by, plain=True)
        return len(files[name])

    return encode
