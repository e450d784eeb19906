"""An SAE that was saved and loaded gives equal codes, for any shape and either dtype of its matrices."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import exact, sae
from curation.sae import Sae


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(0, 2**31))
def test_saved_and_loaded_codes_are_equal(dim, num_features, k, half, seed):
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float16 if half else torch.float32
    model = Sae(
        torch.randn(dim, num_features, generator=g),
        torch.randn(num_features, generator=g),
        torch.randn(num_features, dim, generator=g),
        torch.randn(dim, generator=g),
        torch.rand(num_features, generator=g),
        {"tower": "tower/1"},
    )
    model = sae.fold_normalisation(model, torch.randn(dim, generator=g), 0.5 + torch.rand(dim, generator=g), dtype)
    with tempfile.TemporaryDirectory() as folder:
        sae.save(model, Path(folder) / "sae", dtype)
        loaded = sae.load(f"{folder}/sae")
    vectors = np.random.default_rng(seed).normal(size=(5, dim)).astype(np.float32)
    before, after = (exact.codes(exact.columns(m), vectors, k).to_pylist() for m in (model, loaded))
    assert before == after
    for row in after:
        values = [code["value"] for code in row]
        assert values == sorted(values, reverse=True) and len(row) <= k
        assert all(code["value"] > model.threshold[code["feature"]] for code in row)
