"""The sparse autoencoder at inference: codes, folding, files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from curation import sae
from curation.sae import Sae


def random_sae(dim: int = 12, num_features: int = 30, seed: int = 0) -> Sae:
    g = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(num_features, dim, generator=g), dim=1)
    bias = 0.1 * torch.randn(num_features, generator=g)
    threshold = 0.2 + torch.rand(num_features, generator=g)
    return Sae(w_dec.T.contiguous() * 0.7, bias, w_dec, torch.randn(dim, generator=g), threshold, {"tower": "tower/1"})


def test_normalisation_folds_into_the_weights():
    model, rows = random_sae(), 30 + 5 * torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    mixing = torch.eye(12) + 0.2 * torch.randn(12, 12, generator=torch.Generator().manual_seed(2))
    for scale in (torch.tensor(4.0), torch.linspace(0.5, 6, 12), 4 * mixing):
        mean, matrix = rows.mean(0), scale if scale.ndim == 2 else scale.broadcast_to(12).diag()
        folded = sae.fold_normalisation(model, mean, scale)
        inside = sae.activations(model, torch.linalg.solve(matrix, rows - mean, left=False))
        torch.testing.assert_close(sae.activations(folded, rows), inside, atol=4e-5, rtol=1e-5)
        outside = (inside @ model.w_dec + model.b_dec) @ matrix + mean
        torch.testing.assert_close(inside @ folded.w_dec + folded.b_dec, outside, atol=1e-4, rtol=1e-5)


def test_rounding_the_matrices_before_the_bias_keeps_a_far_mean_out_of_the_codes():
    model, g = random_sae(dim=256, num_features=64), torch.Generator().manual_seed(1)
    mean, scale = 100 + torch.rand(256, generator=g), torch.tensor(1.0)
    rows = mean + torch.randn(200, 256, generator=g)
    expected = (rows - mean) @ model.w_enc + model.b_enc
    rounded = sae.fold_normalisation(model, mean, scale, torch.float16)
    plain = sae.fold_normalisation(model, mean, scale)
    naive = replace(plain, w_enc=plain.w_enc.half().float())
    error, naive_error = ((rows @ m.w_enc + m.b_enc - expected).abs().max() for m in (rounded, naive))
    assert error < 0.01
    assert naive_error > 5 * error


def test_codes_are_the_features_that_fire_largest_first_and_decode_gives_them_back():
    model = random_sae().to(torch.float64)
    rows = 2 * torch.randn(40, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dense = sae.activations(model, rows)
    features, values = sae.encode(model, rows, k=30)
    assert (values.diff(dim=1) <= 0).all()
    assert (values > 0).sum() == (dense > 0).sum() > 40
    torch.testing.assert_close(dense.gather(1, features), values)
    torch.testing.assert_close(sae.decode(model, features, values), dense @ model.w_dec + model.b_dec)
    torch.testing.assert_close(sae.decode(model, features, values, bias=False), dense @ model.w_dec)
    firing = dense[dense > 0]
    assert (firing > model.threshold.min()).all(), "JumpReLU never gives a value under the threshold"


def test_matrices_that_float16_would_change_are_not_saved_as_float16(tmp_path):
    with pytest.raises(ValueError, match=r"does not fit torch\.float16 exactly"):
        sae.save(random_sae(), tmp_path / "sae", torch.float16)


def test_a_file_without_thresholds_is_refused_not_read_as_zero(tmp_path):
    sae.save(random_sae(), tmp_path / "sae")
    weights = load_file(tmp_path / "sae" / sae.WEIGHTS_FILE)
    del weights["threshold"]
    save_file(weights, tmp_path / "sae" / sae.WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"without \['threshold'\]"):
        sae.load(str(tmp_path / "sae"))


def test_other_architectures_are_refused(tmp_path):
    sae.save(random_sae(), tmp_path / "sae")
    path = tmp_path / "sae" / sae.INFO_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "topk"}))
    with pytest.raises(ValueError, match="'topk'"):
        sae.load(str(tmp_path / "sae"))


def test_a_standard_sae_of_saelens_is_read_as_one_with_thresholds_of_zero(tmp_path):
    model = random_sae()
    sae.save(model, tmp_path / "sae")
    weights, path = load_file(tmp_path / "sae" / sae.WEIGHTS_FILE), tmp_path / "sae" / sae.INFO_FILE
    del weights["threshold"]
    save_file(weights, tmp_path / "sae" / sae.WEIGHTS_FILE)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "standard"}))
    rows = torch.randn(20, 12, generator=torch.Generator().manual_seed(3))
    expected = (rows @ model.w_enc + model.b_enc).relu()
    assert torch.equal(sae.activations(sae.load(str(tmp_path / "sae")), rows), expected)


def test_an_sae_that_subtracts_its_decoder_bias_first_is_read_as_the_same_function(tmp_path):
    model, rows = random_sae(), torch.randn(20, 12, generator=torch.Generator().manual_seed(3)) * 2
    sae.save(model, tmp_path / "sae")
    path = tmp_path / "sae" / sae.INFO_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"apply_b_dec_to_input": True}))
    expected = sae.activations(model, rows - model.b_dec)
    torch.testing.assert_close(sae.activations(sae.load(str(tmp_path / "sae")), rows), expected, atol=1e-5, rtol=1e-5)
