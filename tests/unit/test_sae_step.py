"""The sparse step: it finds the features that a dense search finds, and its losses and gradients are those of the dense formula."""

import numpy as np
import pytest
import torch

from curation import sae_search
from curation.sae_search import Codes, csr
from curation.sae_step import Weights, auxiliary, reconstruction

DIM, WIDTH, ROWS = 24, 90, 200


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Weights, torch.Tensor]:
    """Random weights and rows, whose ranges and lengths differ a lot."""
    g = generator(seed)
    tensors = [torch.randn(shape, generator=g, dtype=dtype) for shape in ((WIDTH, DIM), (WIDTH,), (WIDTH, DIM), (DIM,))]
    tensors[0] *= torch.logspace(-2, 1, WIDTH, dtype=dtype)[:, None]
    return Weights(*tensors), torch.randn(ROWS, DIM, generator=g, dtype=dtype) * torch.rand(ROWS, 1, generator=g, dtype=dtype) * 3


def dense_codes(codes: Codes) -> torch.Tensor:
    return csr(codes, WIDTH).to_dense()


def kept_of_batch(pre: torch.Tensor, k: int) -> torch.Tensor:
    """BatchTopK by its definition."""
    positive = pre.relu()
    least = positive.flatten().topk(len(pre) * k).values[-1]
    return torch.where((positive >= least) & (positive > 0), positive, 0.0)


def kept_of_rows(pre: torch.Tensor, k: int) -> torch.Tensor:
    """TopK by its definition."""
    top = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())


@pytest.mark.parametrize("screened", [True, False])
@pytest.mark.parametrize("floor", [None, 0.0, 1e-3, 5.0, 1e6])
def test_the_search_finds_what_a_dense_one_finds_from_any_floor(monkeypatch, screened, floor):
    monkeypatch.setattr(sae_search, "int8_dot", lambda: screened)
    monkeypatch.setattr(sae_search, "TILE", 3000)  # several tiles, the last one short
    weights, rows = problem()
    pre = torch.addmm(weights.bias, rows, weights.encoder.T)
    for k in (1, 7, 60):  # with 60 of 90, fewer than N * k are positive
        for find, expected in ((sae_search.batch_topk, kept_of_batch(pre, k)), (sae_search.topk, kept_of_rows(pre, k))):
            codes, _ = find(rows, weights.encoder, weights.bias, k, floor)
            torch.testing.assert_close(dense_codes(codes), expected, atol=1e-5, rtol=1e-5)
            assert (codes.values > 0).all()


def test_the_int8_product_leaves_out_nothing_that_is_over_the_floor_and_most_of_what_is_under(monkeypatch):
    monkeypatch.setattr(sae_search, "TILE", 2000)
    computed = []
    at = sae_search.at
    monkeypatch.setattr(sae_search, "at", lambda codes, *rest: computed.append(len(codes.features)) or at(codes, *rest))
    for seed in range(20):
        weights, rows = problem(seed=seed)
        rows[3], rows[5, 2] = 0.0, 400.0  # nothing in a row; one entry that spoils its tile's step
        pre = rows.double() @ weights.encoder.double().T + weights.bias.double()
        floor = float(pre.flatten().kthvalue(int(0.95 * pre.numel())).values)
        found = dense_codes(sae_search._screened(rows, weights.encoder, weights.bias, floor)) > 0
        assert found[pre > floor * (1 + 1e-5)].all()
        assert not found[pre < floor * (1 - 1e-5)].any()
    assert np.mean(computed) < 0.5 * pre.numel()


def dense_loss(weights: Weights, rows: torch.Tensor, kept: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """The formula at the head of sae_step, with every prefix."""
    values = torch.where(kept, (rows - weights.b_dec) @ weights.encoder.T + weights.bias, 0.0)
    errors = [values[:, :end] @ weights.decoder[:end] + weights.b_dec - rows for end in ends]
    return sum(error.square().sum(1).mean() for error in errors) / len(ends)


@pytest.mark.parametrize("ends", [(WIDTH,), (10, 33, WIDTH)])
@pytest.mark.parametrize("find", [sae_search.batch_topk, sae_search.topk])
def test_loss_and_gradient_are_those_of_the_dense_formula(ends, find):
    weights, rows = problem(torch.float64)
    codes, _ = find(rows - weights.b_dec, weights.encoder, weights.bias, 5, None)
    step = reconstruction(weights, rows, codes, ends, ROWS)
    leaves = Weights(*(tensor.clone().requires_grad_() for tensor in weights))
    kept = dense_codes(codes) > 0
    loss = dense_loss(leaves, rows, kept, ends)
    torch.testing.assert_close(step.loss, loss.detach())
    for name, ours, theirs in zip(Weights._fields, step.gradients, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(step.error, dense_codes(codes) @ weights.decoder + weights.b_dec - rows)


@pytest.mark.parametrize("num_dead", [4, 40])  # fewer than d / 2: all take part; more: the d / 2 largest of a row
def test_the_auxiliary_loss_and_its_gradient_are_those_of_the_dense_formula(num_dead):
    weights, rows = problem(torch.float64)
    g = generator(1)
    dead, residual = torch.randperm(WIDTH, generator=g)[:num_dead], torch.randn(ROWS, DIM, generator=g, dtype=torch.float64)
    step = auxiliary(weights, rows, residual, dead, residual.square().sum())
    leaves = Weights(*(tensor.clone().requires_grad_() for tensor in weights))
    pre = ((rows - leaves.b_dec) @ leaves.encoder.T + leaves.bias)[:, dead]
    kept = kept_of_rows(pre.detach(), min(num_dead, DIM // 2)) > 0
    revived = torch.where(kept, pre, 0.0) @ leaves.decoder[dead]
    loss = (residual - revived).square().sum() / residual.square().sum()
    torch.testing.assert_close(step.loss, loss.detach())
    gradients = torch.autograd.grad(loss, leaves)
    for ours, theirs in zip(step.gradients[:3], gradients[:3], strict=True):
        torch.testing.assert_close(ours, theirs[dead])
        assert ours.any()
    torch.testing.assert_close(step.gradients.b_dec, gradients[3])
    others = torch.ones(WIDTH, dtype=torch.bool)
    others[dead] = False
    assert not any(gradient[others].any() for gradient in gradients[:3]), "a live feature is pulled"
