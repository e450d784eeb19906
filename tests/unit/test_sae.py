"""The sparse autoencoder: what is on disk does what training saw, and every loss has the gradient that it should have."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from curation import sae, sae_train
from curation.sae import Sae
from curation.sae_train import Training, Weights


def random_sae(dim: int = 12, num_features: int = 30, seed: int = 0) -> Sae:
    g = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(num_features, dim, generator=g), dim=1)
    bias = 0.1 * torch.randn(num_features, generator=g)
    threshold = 0.2 + torch.rand(num_features, generator=g)
    return Sae(w_dec.T.contiguous() * 0.7, bias, w_dec, torch.randn(dim, generator=g), threshold, {"tower": "tower/1"})


def sparse_rows(num: int, dim: int = 32, num_features: int = 48, active: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows far from the origin, the unit features that they are sums of)."""
    rng = np.random.default_rng(seed)
    features = np.linalg.norm(truth := rng.normal(size=(num_features, dim)), axis=1, keepdims=True) ** -1 * truth
    chosen = rng.random((num, num_features)) < active / num_features
    values = chosen * rng.uniform(0.5, 1.5, chosen.shape)
    return (20 + values @ features + 0.02 * rng.normal(size=(num, dim))).astype(np.float32), features


def fitted(seed: int = 0, **changes) -> tuple[Sae, list[dict], np.ndarray]:
    rows, features = sparse_rows(9_000)
    settings = Training(num_features=64, num_rows=60_000, k=3, batch_size=500, seed=seed, **changes)
    batches = sae_train.shuffled(rows[:8000], 500, np.random.default_rng(seed))
    model, history = sae_train.train(batches, rows[:8000], rows[8000:8500], settings, {"tower": "tower/1"}, torch.float16)
    return model, history, features


def test_normalisation_folds_into_the_weights():
    model, rows = random_sae(), 30 + 5 * torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    for scale in (torch.tensor(4.0), torch.linspace(0.5, 6, 12)):
        mean = rows.mean(0)
        folded = sae.fold_normalisation(model, mean, scale)
        inside = sae.activations(model, (rows - mean) / scale)
        torch.testing.assert_close(sae.activations(folded, rows), inside, atol=2e-5, rtol=1e-5)
        outside = (inside @ model.w_dec + model.b_dec) * scale + mean
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
    listed = sae.codes(model, rows.numpy(), "tower/1", k=3)
    assert [len(codes) for codes in listed] == (dense > 0).sum(1).clamp(max=3).tolist()


def test_vectors_of_another_tower_are_refused():
    with pytest.raises(ValueError, match=r"tower/1.*compact/forensics/1.*k2 sae fit --tower compact"):
        sae.codes(random_sae(), np.zeros((1, 12), np.float32), "compact/forensics/1")


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


def test_an_sae_that_subtracts_its_decoder_bias_first_is_read_as_the_same_function(tmp_path):
    model, rows = random_sae(), torch.randn(20, 12, generator=torch.Generator().manual_seed(3)) * 2
    sae.save(model, tmp_path / "sae")
    path = tmp_path / "sae" / sae.INFO_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"apply_b_dec_to_input": True}))
    expected = sae.activations(model, rows - model.b_dec)
    torch.testing.assert_close(sae.activations(sae.load(str(tmp_path / "sae")), rows), expected, atol=1e-5, rtol=1e-5)


def test_batch_topk_keeps_the_largest_of_the_whole_batch():
    pre = torch.tensor([[5.0, 4.0, -1.0], [3.0, -9.0, 0.5]])
    assert sae_train.batch_topk(pre, 1).tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert sae_train.batch_topk(pre, 3).tolist() == [[5.0, 4.0, 0.0], [3.0, 0.0, 0.5]]  # never a negative one


def weights_and_rows(num_features: int = 10, dim: int = 6) -> tuple[Weights, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    shapes = ((dim, num_features), (num_features,), (num_features, dim), (dim,))
    return Weights(*(torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes)), torch.randn(
        7, dim, generator=g, dtype=torch.float64
    )


def test_the_gradient_of_the_reconstruction_matches_finite_differences():
    weights, rows = weights_and_rows()
    nothing_dead = torch.zeros(10, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda *tensors: sae_train.losses(Weights(*tensors), rows, 3, nothing_dead)[0], weights.tensors())


def test_the_auxiliary_loss_revives_dead_features_and_pulls_on_nothing_else():
    weights, rows = weights_and_rows()
    dead = torch.arange(10) >= 6
    with torch.no_grad():  # too weak to be among the largest of the batch
        weights.w_enc[:, dead] *= 0.01
        weights.b_enc[dead] *= 0.01
    values = sae_train.batch_topk(rows @ weights.w_enc + weights.b_enc, 2)
    assert not values[:, dead].any() and values.any()

    _, auxiliary, fired = sae_train.losses(weights, rows, 2, dead)
    auxiliary.backward()
    assert not fired[dead].any()
    for gradient in (weights.w_enc.grad.T, weights.b_enc.grad, weights.w_dec.grad):
        assert not gradient[~dead].any(), "a live feature is pulled"
        assert (gradient[dead].abs().reshape(4, -1).sum(1) > 0).any(), "no dead feature gets a gradient"
    assert not (weights.b_dec.grad if weights.b_dec.grad is not None else torch.zeros(1)).any(), "the bias is counted twice"

    def of_the_dead(encoder, bias, decoder):
        tensors = [tensor.detach().clone() for tensor in weights.tensors()]
        tensors[0][:, dead], tensors[1][dead], tensors[2][dead] = encoder, bias, decoder
        return sae_train.losses(Weights(*tensors), rows, 2, dead)[1]

    parts = (weights.w_enc[:, dead], weights.b_enc[dead], weights.w_dec[dead])
    assert torch.autograd.gradcheck(of_the_dead, [part.detach().clone().requires_grad_() for part in parts])


def test_the_auxiliary_loss_is_the_share_of_the_residual_that_dead_features_leave():
    weights, rows = weights_and_rows()
    dead = torch.arange(10) >= 8  # 2 dead features, fewer than half the dimensions: all of them take part
    with torch.no_grad():
        pre = rows @ weights.w_enc + weights.b_enc
        residual = rows - sae_train.batch_topk(pre, 3) @ weights.w_dec - weights.b_dec
        revived = torch.where(dead, pre.relu(), 0.0) @ weights.w_dec
        expected = (residual - revived).square().sum() / residual.square().sum()
        torch.testing.assert_close(sae_train.losses(weights, rows, 3, dead)[1], expected)
        assert sae_train.losses(weights, rows, 3, torch.zeros(10, dtype=torch.bool))[1] == 0


def test_training_explains_sparse_data_finds_its_features_and_fires_k_on_new_rows():
    model, history, truth = fitted()
    rows, _ = sparse_rows(9_000)
    new = torch.from_numpy(rows[8500:])
    assert sae.explained_variance(model, new) > 0.75
    assert float((sae.activations(model, new) > 0).sum(1).float().mean()) == pytest.approx(3, abs=0.4)
    learned = torch.nn.functional.normalize(model.w_dec, dim=1).numpy()
    assert ((truth @ learned.T).max(1) > 0.9).mean() > 0.7
    assert history[-1]["unexplained"] < 0.5 * history[0]["unexplained"]
    assert history[-1]["rows"] == 60_000


def test_one_scale_per_dimension_lets_quiet_dimensions_speak():
    rows, _ = sparse_rows(4_000)
    rows[:, :16] *= 100
    quiet = {}
    for per_dimension in (False, True):
        settings = Training(num_features=64, num_rows=20_000, k=4, batch_size=500, per_dimension=per_dimension)
        batches = sae_train.shuffled(rows, 500, np.random.default_rng(0))
        model, _ = sae_train.train(batches, rows, rows[:500], settings, {})
        new = torch.from_numpy(rows)
        error = (new - sae.activations(model, new) @ model.w_dec - model.b_dec)[:, 16:].square().sum()
        quiet[per_dimension] = 1 - float(error / (new - new.mean(0))[:, 16:].square().sum())
    assert quiet[True] > quiet[False] + 0.1


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_sae():
    first, again, other = (fitted(seed)[0] for seed in (0, 0, 1))
    for name in sae.TENSORS:
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.w_dec, other.w_dec)


def test_what_is_on_disk_gives_the_codes_that_training_saw(tmp_path):
    model, _, _ = fitted()
    sae.save(model, tmp_path / "sae", torch.float16)
    rows = torch.from_numpy(sparse_rows(200, seed=5)[0])
    assert torch.equal(sae.activations(sae.load(str(tmp_path / "sae")), rows), sae.activations(model, rows))


def test_dead_features_are_counted_in_rows_and_the_auxiliary_loss_brings_them_back(monkeypatch):
    rows, _ = sparse_rows(4_000)
    start, losses, counts = sae_train.start, sae_train.losses, []

    def crippled(*arguments):
        weights = start(*arguments)
        with torch.no_grad():
            weights.w_enc[:, :20] *= 1e-4
        return weights

    def counted(weights, batch, k, dead):
        counts.append(int(dead.sum()))
        return losses(weights, batch, k, dead)

    monkeypatch.setattr(sae_train, "start", crippled)
    monkeypatch.setattr(sae_train, "losses", counted)
    for weight in (0.0, 1 / 32):
        settings = Training(num_features=64, num_rows=60_000, k=3, batch_size=500, dead_rows=2_000, aux_weight=weight)
        sae_train.train(sae_train.shuffled(rows, 500, np.random.default_rng(0)), rows, rows[:500], settings, {})
    without, revived = counts[:120], counts[120:]
    assert without[:5] == revived[:5] == [0] * 5, "nothing is dead before 2,000 rows have passed"
    assert max(without) >= 15 and max(revived) >= 15
    assert without[-1] >= 18 and revived[-1] <= without[-1] / 2  # 64 features for 48 true ones: some have no work


def test_the_learning_rate_rises_holds_and_falls_to_almost_nothing():
    settings = Training(num_features=4, num_rows=1000, k=1, batch_size=10, warmup=0.1, decay=0.2)
    factors = [sae_train.schedule(step, 100, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:81] == [1.0] * 72 and factors[-1] == pytest.approx(0.05)


def test_every_row_is_seen_once_in_an_epoch_whatever_the_batch():
    batches = sae_train.shuffled(np.arange(10)[:, None], 4, np.random.default_rng(0))
    seen = np.concatenate([next(batches) for _ in range(5)])[:, 0]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


@pytest.mark.parametrize("changes, text", [({"k": 65}, "k 65 of 64"), ({"num_rows": 10}, "10 rows are less than one batch")])
def test_settings_that_cannot_work_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        Training(**{"num_features": 64, "num_rows": 60_000} | changes)


def test_equal_vectors_are_refused():
    with pytest.raises(ValueError, match="all 5 vectors are the same"):
        sae_train.normalisation(np.ones((5, 3), np.float32), False)
