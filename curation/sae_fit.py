"""Fitting several SAEs on one pass over the data, with checkpoints, and what makes a file of each.

A checkpoint holds all that the next step depends on, the data's cursor included: a run that was stopped and started again ends in the
bytes of one that was not. It is one file, written whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from curation import sae_scale
from curation.sae import Sae, activations, fold_normalisation
from curation.sae_parallel import place
from curation.sae_rows import Cursor
from curation.sae_scale import Scale
from curation.sae_train import Trainee, Training
from curation.shards import fingerprint, write_bytes

Stream = Callable[[Cursor | None], Iterator[tuple[np.ndarray, Cursor]]]
BLOCK = 512  # features at once when thresholds are set


def train(
    stream: Stream,
    sample: np.ndarray,
    held_out: np.ndarray,
    settings: Sequence[Training],
    metadata: Mapping[str, Any],
    matrices: torch.dtype = torch.float32,
    device: str = "cpu",
    checkpoint: Path | None = None,
) -> list[tuple[Sae, list[dict[str, float]]]]:
    """Train one SAE for each of `settings`, all on the same batches, and return each on raw vectors with a history of figures.

    Args:
        stream: From a cursor (None: the beginning) to endless (batch of raw vectors (B, d), cursor of the next).
        sample: (S, d) rows for the mean, the scale and the start values.
        held_out: (H, d) rows that take no part in training; they set the thresholds.
        settings: They may differ in what does not concern the data: width, k, rule, learning rate, seed.
        metadata: Kept in the SAE; must name the `tower`.
        matrices: Dtype that the matrices will have on disk; they are rounded to it before the thresholds are set.
        device: Where to train.
        checkpoint: File to write 20 times in a run and to go on from; removed at the end.

    Raises:
        ValueError: the settings do not agree on the data, the checkpoint is of another run, or a gradient is not finite.
    """
    shared = {name: {getattr(one, name) for one in settings} for name in ("num_rows", "batch_size", "per_dimension", "whiten")}
    if any(len(values) > 1 for values in shared.values()):
        raise ValueError(f"SAEs that share a pass over the data differ in how they read it: {shared}")
    first = settings[0]
    scale = sae_scale.measure(sample, first.per_dimension, first.whiten)
    rows = scale.normalised(sample)
    trainees = [Trainee(one, rows, device) for one in settings]
    described = fingerprint([[asdict(one) for one in settings], metadata, hashlib.sha256(sample.tobytes()).hexdigest()])
    step, cursor, histories = 0, None, [[] for _ in trainees]
    if checkpoint is not None and checkpoint.exists():
        step, cursor, histories = _resume(checkpoint, trainees, described)
    rank, world = place()
    for _, (batch, after) in zip(range(step, first.num_steps), stream(cursor), strict=False):
        mine = scale.normalised(batch[rank::world], device)
        losses = [trainee.step(mine) for trainee in trainees]
        step += 1
        if step % max(1, first.num_steps // 20) == 0 or step == first.num_steps:
            for trainee, loss, history in zip(trainees, losses, histories, strict=True):
                dead = float(trainee.dead.float().mean())
                history.append({"rows": step * first.batch_size, "unexplained": float(loss), "dead": dead})
            if checkpoint is not None and rank == 0 and step < first.num_steps:
                _save(checkpoint, trainees, described, {"step": step, "cursor": list(after), "histories": histories})
    if checkpoint is not None and rank == 0:
        checkpoint.unlink(missing_ok=True)
    metadata = dict(metadata) | {"gamma": round(scale.gamma, 4)}
    finished = [finish(trainee, scale, held_out, metadata, matrices) for trainee in trainees]
    return list(zip(finished, histories, strict=True))


@torch.no_grad()
def finish(trainee: Trainee, scale: Scale, held_out: np.ndarray, metadata: Mapping[str, Any], matrices: torch.dtype) -> Sae:
    """Fold the normalisation, round the matrices, and set the thresholds with the weights that will be on disk."""
    encoder, bias, decoder, b_dec = (tensor.cpu() for tensor in trainee.weights)
    sae = Sae(encoder.T.contiguous(), bias - encoder @ b_dec, decoder, b_dec, torch.zeros(len(bias)), metadata)
    sae = fold_normalisation(sae, scale.mean, scale.scale, matrices)
    rows, k = torch.as_tensor(held_out).float(), trainee.settings.k
    cut = threshold(sae, rows, k)
    whole = row_thresholds(sae, rows, k, cut) if trainee.settings.per_row else cut.expand(sae.num_features).contiguous()
    return replace(sae, threshold=whole)


def threshold(sae: Sae, held_out: Tensor, k: int) -> Tensor:
    """The value that k activations per held-out row (H, d) exceed on average: BatchTopK's cut, the same for all features.

    Of the H * m values only those that can be over the cut are kept at any time.
    """
    wanted, largest = len(held_out) * k, torch.zeros(0)
    for rows in held_out.split(1024):
        largest = torch.cat([largest, activations(sae, rows).flatten()])
        largest = largest.topk(min(wanted + 1, len(largest))).values
    return largest[min(wanted, len(largest) - 1)]


def row_thresholds(sae: Sae, held_out: Tensor, k: int, cut: Tensor) -> Tensor:
    """(m,): with it a feature fires on as many held-out rows (H, d) as it is among the k largest of; `cut` where that is on none and no
    value is over it."""
    fires = torch.zeros(sae.num_features, dtype=torch.long)
    for rows in held_out.split(1024):
        values, features = activations(sae, rows).topk(k, dim=1)
        fires += torch.bincount(features[values > 0], minlength=sae.num_features)
    found = torch.empty(sae.num_features)
    for start in range(0, sae.num_features, BLOCK):
        block = slice(start, start + BLOCK)
        values = (held_out @ sae.w_enc[:, block] + sae.b_enc[block]).relu().sort(dim=0, descending=True).values
        values = torch.cat([values, torch.zeros(1, values.shape[1])])
        found[block] = values.gather(0, fires[None, block])[0]
    return torch.where(fires > 0, found, torch.maximum(found, cut))


def _save(path: Path, trainees: Sequence[Trainee], described: str, numbers: dict[str, Any]) -> None:
    """Everything as one safetensors file; its header holds the numbers."""
    tensors, own = {}, []
    for index, trainee in enumerate(trainees):
        state, small = trainee.state()
        tensors |= {f"{index}.{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
        own.append(small)
    write_bytes(to_bytes(tensors, {"run": described, "numbers": json.dumps(numbers | {"trainees": own})}), path)


def _resume(path: Path, trainees: Sequence[Trainee], described: str) -> tuple[int, Cursor, list[list[dict[str, float]]]]:
    """Put the checkpoint into the trainees; (steps done, cursor, histories)."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
        if header["run"] != described:
            raise ValueError(f"{path} is the checkpoint of a run with other settings or data; remove it, or give the arguments of that run")
        numbers, states = json.loads(header["numbers"]), [{} for _ in trainees]
        for key in file.keys():  # noqa: SIM118 - not a dict
            index, _, name = key.partition(".")
            states[int(index)][name] = file.get_tensor(key)
    for trainee, tensors, small in zip(trainees, states, numbers["trainees"], strict=True):
        trainee.restore(tensors, small)
    return numbers["step"], Cursor(*numbers["cursor"]), numbers["histories"]
