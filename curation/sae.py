"""The sparse autoencoder at inference: encode a vector to few features, decode them, save and load.

    pre   = x @ W_enc + b_enc
    value = pre where pre > threshold, else 0          (JumpReLU, Rajamanoharan et al. 2024, arXiv:2407.14435)
    x'    = value @ W_dec + b_dec

The files are SAELens' (`cfg.json`, `sae_weights.safetensors`, architecture "jumprelu"): `SAE.load_from_disk` reads ours, and
`load` reads its JumpReLU and standard (ReLU) SAEs. A feature's value depends on no other feature, so that a tag needs one column only.
Normalisation of the input is folded into the weights: what is on disk takes the tower's vectors as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from curation.fitted import find, read_json
from curation.shards import write_bytes, write_json

WEIGHTS_FILE, INFO_FILE = "sae_weights.safetensors", "cfg.json"


@dataclass(frozen=True, eq=False)
class Sae:
    """A fitted SAE of m features on d-dimensional vectors. `metadata` names the tower, the data, the command, the evaluation."""

    w_enc: Tensor  # (d, m)
    b_enc: Tensor  # (m,)
    w_dec: Tensor  # (m, d)
    b_dec: Tensor  # (d,)
    threshold: Tensor  # (m,), not negative
    metadata: Mapping[str, Any]

    @property
    def dim(self) -> int:
        return self.w_enc.shape[0]

    @property
    def num_features(self) -> int:
        return self.w_enc.shape[1]

    def to(self, *args: Any) -> "Sae":
        """The same SAE on another device or in another dtype."""
        return replace(self, **{name: getattr(self, name).to(*args) for name in TENSORS})


TENSORS = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}  # ours: SAELens'


def activations(sae: Sae, vectors: Tensor) -> Tensor:
    """(N, d) -> (N, m) feature values, 0 where a feature does not fire."""
    pre = vectors @ sae.w_enc + sae.b_enc
    return torch.where(pre > sae.threshold, pre, torch.zeros_like(pre))


def encode(sae: Sae, vectors: Tensor, k: int = 32) -> tuple[Tensor, Tensor]:
    """(N, d) -> (features, values), both (N, k): the largest values first; a value of 0 means that fewer than k fire."""
    values, features = activations(sae, vectors).topk(min(k, sae.num_features), dim=1)
    return features, values


def decode(sae: Sae, features: Tensor, values: Tensor, bias: bool = True) -> Tensor:
    """(features, values) of `encode` -> (N, d). Without the bias: what the features add to it."""
    summed = torch.einsum("nk,nkd->nd", values, sae.w_dec[features])
    return summed + sae.b_dec if bias else summed


def fold_normalisation(sae: Sae, mean: Tensor, scale: Tensor, matrices: torch.dtype = torch.float32) -> Sae:
    """An SAE on z, where x = mean + z @ scale, as the same SAE on x, computed in float64; `scale` is a number, one per dimension (d,), or
    an invertible matrix (d, d).

    The matrices are rounded to the dtype that will hold them on disk *before* the bias is computed: a tower's mean is far
    longer than its deviations, and rounding errors times the mean would shift every feature.
    """
    big, mean, scale = sae.to(torch.float64), mean.double(), scale.double()
    if scale.ndim < 2:
        scale = scale.broadcast_to(mean.shape)
        w_enc, w_dec, b_dec = big.w_enc / scale[:, None], big.w_dec * scale, big.b_dec * scale
    else:
        w_enc, w_dec, b_dec = torch.linalg.solve(scale, big.w_enc), big.w_dec @ scale, big.b_dec @ scale
    w_enc, w_dec = (matrix.to(matrices).double() for matrix in (w_enc, w_dec))
    return replace(big, w_enc=w_enc, b_enc=big.b_enc - mean @ w_enc, w_dec=w_dec, b_dec=b_dec + mean).to(sae.w_enc.dtype)


def explained_variance(sae: Sae, vectors: Tensor, k: int | None = None) -> float:
    """1 - squared error / squared distance to the mean of these vectors (N, d); with `k`, of the k largest values only."""
    values = activations(sae, vectors)
    if k is not None and k < sae.num_features:
        top = values.topk(k, dim=1)
        values = torch.zeros_like(values).scatter_(1, top.indices, top.values)
    error = (vectors - values @ sae.w_dec - sae.b_dec).double().square().sum()
    return float(1 - error / (vectors - vectors.mean(0)).double().square().sum())


def save(sae: Sae, folder: Path, matrices: torch.dtype = torch.float32) -> None:
    """Write sae_weights.safetensors and cfg.json, each whole or not at all, with the two matrices in `matrices`.

    Raises:
        ValueError: the matrices do not fit that dtype exactly, so that what is on disk would not be what was measured.
    """
    tensors = {theirs: getattr(sae, ours).cpu().contiguous() for ours, theirs in TENSORS.items()}
    for name in ("W_enc", "W_dec"):
        exact, tensors[name] = tensors[name], tensors[name].to(matrices)
        if not torch.equal(tensors[name].to(exact.dtype), exact):
            raise ValueError(f"{name} does not fit {matrices} exactly; round it with fold_normalisation(..., matrices={matrices}) first")
    write_bytes(to_bytes(tensors), folder / WEIGHTS_FILE)
    config = {
        "architecture": "jumprelu",
        "d_in": sae.dim,
        "d_sae": sae.num_features,
        "dtype": "float32",  # what readers compute in, whatever the file holds
        "device": "cpu",
        "apply_b_dec_to_input": False,  # b_enc already holds it
        "normalize_activations": "none",  # folded into the weights
        "reshape_activations": "none",
        "metadata": dict(sae.metadata),
    }
    write_json(config, folder / INFO_FILE)


def load(model: str) -> Sae:
    """An SAE by packaged name or folder, in float32 on the CPU.

    Raises:
        ValueError: there is none, it is not a JumpReLU SAE on plain vectors, or its files do not belong together.
    """
    folder = find(model, INFO_FILE)
    config, weights = read_json(folder / INFO_FILE), load_file(folder / WEIGHTS_FILE)
    architecture, normalised = config.get("architecture"), config.get("normalize_activations", "none")
    if architecture not in ("jumprelu", "standard") or normalised != "none":
        raise ValueError(
            f"{folder}/{INFO_FILE}: architecture {architecture!r} with normalize_activations {normalised!r}; only jumprelu and standard "
            "with none are read here. Fold it with SAELens and save it again; of a TopK SAE a feature's value depends on the others, so "
            "that it first needs thresholds (SAELens saves a BatchTopK SAE as jumprelu)."
        )
    if architecture == "standard":  # ReLU
        weights.setdefault("threshold", torch.zeros_like(weights["b_enc"]))
    missing = set(TENSORS.values()) - set(weights)
    if missing:  # a threshold that silently becomes 0 would let every feature fire
        raise ValueError(f"{folder}/{WEIGHTS_FILE} holds {sorted(weights)}, without {sorted(missing)}")
    if weights["W_enc"].shape != (config["d_in"], config["d_sae"]):
        raise ValueError(f"{folder}: W_enc is {tuple(weights['W_enc'].shape)}, {INFO_FILE} says {config['d_in']} x {config['d_sae']}")
    sae = Sae(**{ours: weights[theirs].float() for ours, theirs in TENSORS.items()}, metadata=config.get("metadata", {}))
    if config.get("apply_b_dec_to_input"):
        sae = replace(sae, b_enc=sae.b_enc - sae.b_dec @ sae.w_enc)
    return replace(sae, threshold=sae.threshold.relu())  # as SAELens: a feature never fires below zero
