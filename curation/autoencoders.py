"""Image autoencoders whose reconstructions stand for generated images: anyone's, and small ones of our own training.

    reconstruct = load("models/qwen-image/vae")     # a folder of diffusers, a folder of ONNX files, or a file that `save` wrote
    reconstruct(images)                             # uint8 (N, H, W, 3) -> uint8 (N, H, W, 3)

A detector that has seen one decoder learns that decoder; what holds for unknown generators is what all decoders share. The small
autoencoders widen the set where few real ones are at hand: they differ in what leaves traces, which is how a decoder upsamples,
what its bottleneck loses, and whether an adversarial loss made it invent texture.

* KL bottleneck: Rombach et al. 2022 (arXiv:2112.10752).
* Vector quantisation, straight-through: van den Oord et al. 2017 (arXiv:1711.00937), on the unit sphere as in Yu et al. 2022
  (arXiv:2110.04627), section 3.2.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from curation.shards import write_bytes

Reconstruct = Callable[[np.ndarray], np.ndarray]  # uint8 (N, H, W, 3) -> its reconstruction, uint8 (N, H, W, 3)
Upsampling = Literal["transposed", "nearest", "bilinear", "shuffle"]
Bottleneck = Literal["kl", "vq"]

PROBE = 128  # pixels; sides that every autoencoder takes
COMMITMENT = 0.25  # weight of the encoder's part of the loss of quantisation
KL_WEIGHT = 1e-6


@dataclass(frozen=True)
class Small:
    """A small autoencoder: 0.2 to 1 million parameters, trained in minutes on one core."""

    upsampling: Upsampling
    bottleneck: Bottleneck
    adversarial: bool = False
    factor: int = 4  # pixels per latent, each way: 4 or 8
    width: int = 8  # channels at full resolution; four times that at half, eight times at a quarter and below
    channels: int = 8  # of the latent
    num_codes: int = 512  # of a VQ bottleneck

    def __post_init__(self):
        if self.upsampling not in get_args(Upsampling) or self.bottleneck not in get_args(Bottleneck) or self.factor not in (4, 8):
            raise ValueError(
                f"{self}: upsampling is one of {get_args(Upsampling)}, bottleneck one of {get_args(Bottleneck)}, factor 4 or 8"
            )
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width {self.width}; take a multiple of 8, the size of a group of the normalisation")

    @property
    def name(self) -> str:
        """E.g. "shuffle-vq-f8-gan"."""
        return f"{self.upsampling}-{self.bottleneck}-f{self.factor}" + ("-gan" if self.adversarial else "")


MIX = (  # what generalises is what all decoders share: every upsampling, both bottlenecks, with and without an adversary
    Small("nearest", "kl", True, 8, channels=16),
    Small("transposed", "vq", False, 4),
    Small("shuffle", "kl", False, 8, channels=16),
    Small("bilinear", "vq", True, 4),
    Small("transposed", "kl", True, 8, channels=16),
    Small("nearest", "vq", False, 4),
)


def load(spec: str | Path, device: str = "cpu") -> Reconstruct:
    """An autoencoder from disk; never from the network. Sides that it cannot take are mirrored at the right and below, and cut again.

    Args:
        spec: A folder of a diffusers autoencoder (config.json and weights); a folder with encoder.onnx and decoder.onnx, for images
            in [0, 1]; or a .safetensors file that `save` wrote.
        device: Where to run. ONNX runs on the CPU whatever it says.

    Raises:
        ValueError: there is no autoencoder, or it lacks weights.
    """
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        net = load_small(path).to(device)
        return _reconstruct(lambda pixels: net.decode(net.encode(pixels)[0]), net.description.factor, device)
    if all((path / f"{part}.onnx").is_file() for part in ("encoder", "decoder")):
        return _from_onnx(path)
    if (path / "config.json").is_file():
        return _from_diffusers(path, device)
    raise ValueError(
        f"{path} is no autoencoder: expected config.json of diffusers (of a pipeline, name its vae folder), encoder.onnx and decoder.onnx, "
        "or a .safetensors file of curation.autoencoders.save"
    )


def _from_onnx(folder: Path) -> Reconstruct:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    encoder, decoder = (
        onnxruntime.InferenceSession(str(folder / f"{part}.onnx"), options, providers=["CPUExecutionProvider"])
        for part in ("encoder", "decoder")
    )

    def run(session: onnxruntime.InferenceSession, array: np.ndarray) -> np.ndarray:
        return session.run(None, {session.get_inputs()[0].name: array})[0]

    def forward(pixels: Tensor) -> Tensor:
        return torch.from_numpy(run(decoder, run(encoder, (pixels.numpy() + 1) / 2))) * 2 - 1

    factor = PROBE // run(encoder, np.zeros((1, 3, PROBE, PROBE), np.float32)).shape[-1]
    return _reconstruct(forward, factor, "cpu")


def _from_diffusers(folder: Path, device: str) -> Reconstruct:
    import diffusers

    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise ValueError(f"{folder}/config.json names the class {name!r}, which is no autoencoder of diffusers {diffusers.__version__}")
    try:
        model, info = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load the {name} of {folder} ({error}). Give a folder with config.json and its weights.") from error
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks {len(info['missing_keys'])} tensors of {name}, e.g. {sorted(info['missing_keys'])[0]}")
    model = model.eval().requires_grad_(False).to(device, torch.float32)
    frames = next(p for p in model.parameters() if p.ndim >= 4).ndim == 5  # of a video: an image is one frame

    def encode(pixels: Tensor) -> Tensor:
        encoded = model.encode(pixels.unsqueeze(2) if frames else pixels)
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]

    def forward(pixels: Tensor) -> Tensor:
        decoded = model.decode(encode(pixels)).sample
        return decoded[:, :, 0] if frames else decoded

    with torch.inference_mode():
        factor = PROBE // encode(torch.zeros(1, 3, PROBE, PROBE, device=device)).shape[-1]
    return _reconstruct(forward, factor, device)


def _reconstruct(forward: Callable[[Tensor], Tensor], factor: int, device: str) -> Reconstruct:
    """From a function of (1, 3, H, W) in [-1, 1], sides multiples of `factor`. One image at a time: kernels that are chosen by batch size
    would let an image's reconstruction depend on its neighbours."""

    @torch.inference_mode()
    def reconstruct(images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3, f"{images.dtype} {images.shape}"
        height, width = images.shape[1:3]
        out = np.empty_like(images)
        for i, image in enumerate(images):
            padded = np.pad(image, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="symmetric")
            pixels = forward(to_tensor(padded[None]).to(device))[0].clamp(-1, 1)
            out[i] = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()[:height, :width]
        return out

    return reconstruct


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


class Block(nn.Module):
    """A residual block of two 3x3 convolutions. Groups are of 8 channels: smaller ones would normalise an image's brightness away."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(width // 8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.second = nn.Sequential(nn.GroupNorm(width // 8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


def _up(kind: Upsampling, inputs: int, outputs: int) -> nn.Module:
    """Twice the sides."""
    if kind == "transposed":
        return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
    if kind == "shuffle":
        return nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 3, padding=1), nn.PixelShuffle(2))
    return nn.Sequential(nn.Upsample(scale_factor=2, mode=kind), nn.Conv2d(inputs, outputs, 3, padding=1))


class Assigned(NamedTuple):
    """What a VQ bottleneck did."""

    codes: Tensor  # int64 (N, h, w)
    latents: Tensor  # (N, channels, h, w), of unit length, before they became codes


class Net(nn.Module):
    """The network of a `Small`: images (N, 3, H, W) in [-1, 1] to latents (N, channels, H / factor, W / factor), and back."""

    def __init__(self, description: Small):
        super().__init__()
        self.description = description
        vq, channels, factor = description.bottleneck == "vq", description.channels, description.factor
        levels = factor.bit_length() - 1
        widths = [description.width * min(4**i, 8) for i in range(levels + 1)]
        down = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[1], 3, padding=1), Block(widths[1])]
        for inputs, outputs in itertools.pairwise(widths[1:]):
            down += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), Block(outputs)]
        outputs = channels if vq else 2 * channels
        self.encoder = nn.Sequential(*down, nn.Conv2d(widths[-1], outputs, 3, padding=1))
        # Patches seen linearly beside the deep path: that learns faster (150 steps: 21.5 dB against 18.8 at
        # factor 8), and the decoder, which leaves the traces, stays as it is.
        self.linear = nn.Sequential(nn.PixelUnshuffle(factor), nn.Conv2d(3 * factor**2, outputs, 1))
        up: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1), Block(widths[-1])]
        for inputs, outputs in itertools.pairwise(widths[::-1]):
            up += [_up(description.upsampling, inputs, outputs), Block(outputs)]
        self.decode = nn.Sequential(*up, nn.SiLU(), nn.Conv2d(widths[0], 3, 3, padding=1))
        if not vq:
            nn.init.constant_(self.encoder[-1].bias[channels:], -6)  # little noise at the start: the means are still small
        for block in (module for module in self.modules() if isinstance(module, Block)):
            nn.init.zeros_(block.second[-1].weight)  # starts as the identity
        if vq:
            self.codebook = nn.Parameter(F.normalize(torch.randn(description.num_codes, channels), dim=1))

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Assigned | None]:
        """(latents, loss of the bottleneck (), what a VQ assigned); a generator draws from the KL posterior, without one it is its mode."""
        encoded = self.encoder(pixels) + self.linear(pixels)
        if self.description.bottleneck == "vq":
            return self._quantize(encoded)
        mean, log_variance = encoded.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        loss = 0.5 * KL_WEIGHT * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        if generator is None:
            return mean, loss, None
        return mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean.device), loss, None

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Assigned]:
        """Every latent vector becomes the code of nearest direction; the gradient goes straight through."""
        latents, codebook = F.normalize(latents, dim=1), F.normalize(self.codebook, dim=1)
        codes = torch.einsum("nchw,kc->nhwk", latents, codebook).argmax(-1)
        quantized = codebook[codes].permute(0, 3, 1, 2)
        loss = (quantized - latents.detach()).square().sum(1).mean() + COMMITMENT * (quantized.detach() - latents).square().sum(1).mean()
        return latents + (quantized - latents).detach(), loss, Assigned(codes, latents.detach())


def save(net: Net, path: str | Path, facts: Mapping[str, Any]) -> None:
    """Write a .safetensors file that `load` reads: the weights, the description, and `facts` (JSON: data, steps, seed ...)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    write_bytes(to_bytes(tensors, {"small": json.dumps(asdict(net.description)), "facts": json.dumps(dict(facts))}), path)


def load_small(path: str | Path) -> Net:
    """
    Raises:
        ValueError: the file is not one of `save`.
    """
    try:
        with safe_open(str(path), "pt") as file:
            net = Net(Small(**json.loads((file.metadata() or {})["small"])))
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 not a dict
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a small autoencoder of curation.autoencoders.save ({error!r})") from error
    return net.eval().requires_grad_(False)
