"""Losses of the sparse autoencoder and their gradients, written out: only the features that fire are decoded and given gradients.

    pre = (x - b_dec) @ encoder.T + bias,   codes = the largest of pre,   x' = codes @ decoder + b_dec,   loss = mean |x' - x|^2

A dense step multiplies (N, d) by (d, m) six times; here that is done once (or less, see `sae_search`), and the rest costs as many
products as features fire. The gradient of the encoder's d-sized input bias is summed over the rows before it meets the matrix.
With prefixes (Matryoshka: Bussmann et al. 2025, arXiv:2503.17547) every prefix of the features has to reconstruct by itself; the loss
is the mean over the prefixes, and the gradient of a feature that of the summed errors of all prefixes that hold it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from curation.sae_search import Codes, at, csr


class Weights(NamedTuple):
    """The trained tensors, on normalised inputs; gradients have the same shapes."""

    encoder: Tensor  # (m, d)
    bias: Tensor  # (m,)
    decoder: Tensor  # (m, d)
    b_dec: Tensor  # (d,)


class Step(NamedTuple):
    """What one loss says of one batch."""

    loss: Tensor  # scalar
    gradients: Weights
    error: Tensor  # (N, d): x' - x


def reconstruction(weights: Weights, rows: Tensor, codes: Codes, ends: tuple[int, ...], num_rows: int) -> Step:
    """Mean squared error of rows (N, d) over their codes, the mean of the prefixes that end at `ends` (the last is m).

    `num_rows` divides the sums. It is more than N where a batch is spread over processes, whose losses and gradients are then added.
    """
    begins, shifted, errors = (0, *ends[:-1]), rows - weights.b_dec, []
    groups = [_between(codes, begin, end, len(weights.bias)) for begin, end in zip(begins, ends, strict=True)]
    for group, begin, end in zip(groups, begins, ends, strict=True):
        error = csr(group, end - begin) @ weights.decoder[begin:end]
        errors.append(error.add_(errors[-1] if errors else shifted, alpha=1 if errors else -1))
    share = 1 / (num_rows * len(ends))
    loss = sum(torch.dot(e.flatten(), e.flatten()) for e in errors) * share
    pull, parts = None, []
    for group, begin, end, of_prefix in reversed(list(zip(groups, begins, ends, errors, strict=True))):
        pull = of_prefix if pull is None else pull + of_prefix
        order, turned = _turned(group, end - begin)
        by_values = at(group, pull, weights.decoder[begin:end]).mul_(2 * share)[order]
        bias = weights.bias.new_zeros(end - begin).index_add_(0, group.features[order], by_values)
        decoder = csr(turned, len(rows), turned.values * (2 * share)) @ pull
        parts.append((csr(turned, len(rows), by_values) @ shifted, bias, decoder))
    encoder, bias, decoder = (_joined(tensors) for tensors in zip(*reversed(parts), strict=True))
    return Step(loss, Weights(encoder, bias, decoder, 2 * share * pull.sum(0) - bias @ weights.encoder), errors[-1])


def auxiliary(weights: Weights, rows: Tensor, residual: Tensor, dead: Tensor, power: Tensor) -> Step:
    """AuxK (Gao et al. 2024, arXiv:2406.04093): the share of the residual x - x' (N, d) that the features `dead` (indices) leave when they
    reconstruct it, the d / 2 largest of every row. `power` is the residual's squared length, summed over the whole batch.

    The residual is a constant and already without the decoder's bias: reviving a dead feature pulls on no live one, and on b_dec only
    through the encoder's input. Gradients of encoder, bias and decoder are those of the rows `dead`. `error` is that of the residual.
    """
    shifted, encoder, decoder = rows - weights.b_dec, weights.encoder[dead], weights.decoder[dead]
    values = torch.addmm(weights.bias[dead], shifted, encoder.T).relu_()
    most = rows.shape[1] // 2
    if len(dead) > most:
        top = values.topk(most, dim=1)
        values = torch.zeros_like(values).scatter_(1, top.indices, top.values)
    error = torch.addmm(residual, values, decoder, beta=-1)
    factor = 2 / power
    by_values = (error @ decoder.T).mul_(values > 0).mul_(factor)
    bias = by_values.sum(0)
    gradients = Weights(by_values.T @ shifted, bias, values.T @ (error * factor), -bias @ encoder)
    return Step(error.square().sum() / power, gradients, error)


def _between(codes: Codes, begin: int, end: int, num_features: int) -> Codes:
    """The codes of the features begin to end, counted from begin."""
    if (begin, end) == (0, num_features):
        return codes
    part = codes.take((codes.features >= begin) & (codes.features < end))
    return part._replace(features=part.features - begin)


def _turned(codes: Codes, num_features: int) -> tuple[Tensor, Codes]:
    """(order, the codes as rows of features): entry i of the turned codes is entry order[i] of the codes."""
    keys = codes.features.short() if num_features < 2**15 else codes.features  # shorter keys sort faster
    order = keys.argsort(stable=True)
    rows = torch.repeat_interleave(torch.arange(len(codes.starts) - 1, dtype=torch.int32, device=order.device), codes.counts())
    counts = torch.bincount(codes.features, minlength=num_features)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return order, Codes(starts, rows[order], codes.values[order])


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
