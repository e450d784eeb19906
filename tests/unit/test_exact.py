"""Feature values that are the same bits in any batch, of any subset of features, on any number of threads."""

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from curation import exact, sae
from curation.schema import ARTIFACTS


def random_sae(dim: int = 96, num: int = 40, seed: int = 0) -> sae.Sae:
    rng = np.random.default_rng(seed)
    w_enc = torch.from_numpy((rng.normal(size=(dim, num)) * np.exp(rng.normal(size=(1, num)) * 3)).astype(np.float32))
    b_enc, threshold = (torch.from_numpy(rng.random(num).astype(np.float32)) for _ in range(2))
    return sae.Sae(w_enc, b_enc, w_enc.T.contiguous(), torch.zeros(dim), threshold, {})


def vectors(num: int, dim: int = 96) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (rng.normal(size=(num, dim)) * np.exp(rng.normal(size=(num, 1)) * 4)).astype(np.float32)


def test_values_are_those_of_the_sae_but_for_the_rounding_of_its_inputs():
    model, rows = random_sae(), vectors(200)
    found, plain = exact.values(exact.columns(model), rows), sae.activations(model.to(torch.float64), torch.from_numpy(rows).double())
    size = np.abs(rows).max(1)[:, None] * np.abs(model.w_enc.numpy()).max(0) * np.sqrt(model.dim)
    assert (np.abs(found - plain.numpy()) <= 2e-6 * size + 1e-7 * plain.numpy()).all()
    assert (found > 0).mean() > 0.3


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_batch_and_the_subset_of_features_move_no_bit(size):
    model, rows = random_sae(), vectors(64)
    whole = exact.values(exact.columns(model), rows)
    chosen = [39, 0, 17]
    parts = [exact.values(exact.columns(model, chosen), rows[start : start + size]) for start in range(0, 64, size)]
    assert (np.concatenate(parts) == whole[:, chosen]).all()


def test_threads_and_the_order_of_the_dimensions_move_no_bit():
    model, rows = random_sae(dim=1280, num=64), vectors(256, 1280)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(exact.values(exact.columns(model), rows))
    turned = sae.Sae(model.w_enc.flip(0), model.b_enc, model.w_dec.flip(1), model.b_dec, model.threshold, {})
    found.append(exact.values(exact.columns(turned), np.ascontiguousarray(rows[:, ::-1])))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_codes_are_the_largest_values_first_and_rows_without_any_are_empty():
    model, rows = random_sae(), vectors(50)
    rows[7] = 0
    prepared = exact.columns(model)
    prepared.bias[:] = 0
    found, listed = exact.values(prepared, rows), exact.codes(prepared, rows, 5)
    assert listed.type == ARTIFACTS.field("codes").type and listed[7].as_py() == []
    for row, codes in zip(found, listed.to_pylist(), strict=True):
        amounts = [code["value"] for code in codes]
        assert amounts == sorted(row[row > 0].tolist(), reverse=True)[:5]
        assert all(row[code["feature"]] == code["value"] for code in codes)


def test_codes_of_some_features_carry_their_numbers_and_all_that_fire():
    model, rows = random_sae(), vectors(50)
    chosen = [3, 30, 11]
    whole = exact.codes(exact.columns(model), rows).to_pylist()
    some = exact.codes(exact.columns(model, chosen), rows).to_pylist()
    assert some == [[code for code in codes if code["feature"] in chosen] for codes in whole]
    assert exact.codes(exact.columns(model, chosen), rows[:0]).to_pylist() == []
