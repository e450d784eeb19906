"""What `k2 sample` starts from: a transformer with its text encoder and image codec, from the paths of a command line."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from curation.shards import file_hash
from k2model import checkpoint
from k2model.dit import Config, DiT
from k2model.layouts import load_model
from k2model.text import HashText, Qwen3VLText
from k2model.vae import Pca, QwenImageVae, load_pca


class Opened(NamedTuple):
    """A transformer, and what its folder says of the rest."""

    model: DiT
    identity: dict[str, Any]  # name and hash of the weights, the step of a training run
    text: HashText | Qwen3VLText | None  # None: the folder has none
    vae: Path | QwenImageVae | None
    resolution: int  # of the last phase of a training run; 1024 otherwise


def open_model(path: str, device: torch.device, dtype: torch.dtype) -> Opened:
    """A training run or one of its checkpoints; otherwise a file or folder in a layout of `k2model.layouts`.

    Raises:
        ValueError: nothing of that kind is there.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"--model {path!r} is not there. Give a .safetensors file, a diffusers folder, or a folder of `k2 train`.")
    if place.name == "model.safetensors" and (place.parent / "state.json").exists():
        place = place.parent
    if (place / "state.json").exists() or (place / "checkpoints").is_dir():
        return _trained(place, device, dtype)

    # In bf16 the stored mix is kept (float32 norms and tables) and autocast does the rest.
    model = load_model(str(place), device, None if dtype == torch.bfloat16 else dtype)
    text = vae = None
    if (place / "model_index.json").exists():
        text = qwen(path, model.config, dtype)
        vae = QwenImageVae(path, "vae", _name(dtype))
    return Opened(model.eval().requires_grad_(False), identity(place), text, vae, 1024)


def identity(place: Path) -> dict[str, Any]:
    """Name and hashes of the weights in a file or folder."""
    inside = place / "transformer" if (place / "transformer").is_dir() else place
    files = sorted(inside.glob("*.safetensors")) if place.is_dir() else [place]
    return {"name": place.name, "hash": [file_hash(file) for file in files]}


def _trained(place: Path, device: torch.device, dtype: torch.dtype) -> Opened:
    """The last whole checkpoint of a training run, or the one that was named."""
    if (place / "state.json").exists():
        state = json.loads((place / "state.json").read_text())
        found = checkpoint.Checkpoint(state["step"], state, place)
    else:
        found = checkpoint.latest(place / "checkpoints")
    if found is None:
        raise ValueError(f"{place / 'checkpoints'} has no whole checkpoint yet. Run `k2 train` again, or give another --model.")
    if not (found.directory / "model.safetensors").exists():
        raise ValueError(f"{found.directory} holds a LoRA and no model: give its base as --model, and the run's LoRA file as --lora")
    recipe = found.state["config"]["description"]["recipe"]
    with torch.device("meta"):
        model = DiT(Config(**_fields(recipe["model"])))
    model.load_state_dict(found.tensors("model"), assign=True)
    text = {"HashText": HashText, "Qwen3VLText": Qwen3VLText}[recipe["text"]["class"]](**_fields(recipe["text"]))
    vae = found.directory / "vae.safetensors" if recipe["vae"]["class"] == Pca.__name__ else QwenImageVae(**_fields(recipe["vae"]))
    phase = next(phase for phase in recipe["phases"] if phase["name"] == found.state["phase"])
    made_by = {"name": recipe["name"], "step": found.step, "hash": [file_hash(found.directory / "model.safetensors")]}
    return Opened(model.eval().requires_grad_(False).to(device), made_by, text, vae, phase["resolution"])


def find_text(path: str | None, opened: Opened, dtype: torch.dtype) -> HashText | Qwen3VLText:
    """The text encoder: `hash`, or a folder or hub name of Qwen3-VL; None: that of the model, or the released one.

    Raises:
        ValueError: it is of another size than the model was trained with.
    """
    config = opened.model.config
    if path == "hash":
        text = HashText(dim=config.text_dim)
    elif path or opened.text is None:
        text = qwen(path or Qwen3VLText.path, config, dtype)
    else:
        text = opened.text
    if (text.num_taps, text.dim) != (config.text_taps, config.text_dim):
        raise ValueError(
            f"the model reads {config.text_taps} text states of width {config.text_dim} per token, but this text encoder gives "
            f"{text.num_taps} of width {text.dim}: {text}. Give the one that it was trained with as --text."
        )
    return text


def qwen(path: str, config: Config, dtype: torch.dtype) -> Qwen3VLText:
    """Qwen3-VL at a path for a model; the layers are the released ones, or those that a diffusers folder names."""
    index, taps = Path(path) / "model_index.json", Qwen3VLText.taps
    if index.exists():
        taps = tuple(json.loads(index.read_text()).get("text_encoder_select_layers") or taps)
    return Qwen3VLText(path, taps, config.text_dim, dtype=_name(dtype))


def find_codec(path: str | None, opened: Opened, dtype: torch.dtype) -> Path | QwenImageVae:
    """The image codec: `vae.safetensors` of a training run, or a folder or hub name of the Qwen-Image VAE; None: that of the model,
    or the released one.

    Raises:
        ValueError: there is no such file.
    """
    if path is None and opened.vae is not None:
        return opened.vae
    if path and Path(path).suffix == ".safetensors":
        if not Path(path).is_file():
            raise ValueError(f"--vae {path!r} is not there; give the vae.safetensors of a training run, or a folder of the Qwen-Image VAE")
        return Path(path)
    path = path or QwenImageVae.path
    return QwenImageVae(path, None if (Path(path) / "config.json").exists() else "vae", _name(dtype))


def load_codec(found: Path | QwenImageVae, device: torch.device) -> Any:
    """What `find_codec` found, ready to decode.

    Raises:
        ValueError: the weights are not at hand, or no codec.
    """
    return load_pca(found).to(device) if isinstance(found, Path) else found.load(device)


def _fields(description: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a dataclass from its description as JSON."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in description.items() if name != "class"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
