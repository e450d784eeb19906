"""Training of the sparse autoencoder: it finds true features, revives dead ones, and a stopped run ends in the same bytes."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from curation import sae, sae_fit, sae_scale, sae_search
from curation.sae import Sae
from curation.sae_rows import InMemory, shuffled
from curation.sae_train import Trainee, Training

MATRYOSHKA = (0.125, 0.5)


def sparse_rows(num: int, dim: int = 32, num_features: int = 48, active: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows far from the origin, the unit features that they are sums of)."""
    rng = np.random.default_rng(seed)
    features = np.linalg.norm(truth := rng.normal(size=(num_features, dim)), axis=1, keepdims=True) ** -1 * truth
    chosen = rng.random((num, num_features)) < active / num_features
    values = chosen * rng.uniform(0.5, 1.5, chosen.shape)
    return (20 + values @ features + 0.02 * rng.normal(size=(num, dim))).astype(np.float32), features


def training(**changes) -> Training:
    return Training(**{"num_features": 64, "num_rows": 60_000, "k": 3, "batch_size": 500} | changes)


def fit(settings: list[Training], rows: np.ndarray, matrices: torch.dtype = torch.float32, **more) -> list[tuple[Sae, list[dict]]]:
    pieces = [InMemory({"fit": part}) for part in np.array_split(rows[:-500], 4)]
    stream = more.pop("stream", lambda cursor: shuffled(pieces, settings[0].batch_size, 0, cursor, together=2))
    return sae_fit.train(stream, rows[:-500], rows[-500:], settings, {"tower": "tower/1"}, matrices, **more)


def found(model: Sae, truth: np.ndarray) -> float:
    learned = torch.nn.functional.normalize(model.w_dec, dim=1).numpy()
    return float(((truth @ learned.T).max(1) > 0.9).mean())


@pytest.mark.parametrize("changes", [{}, {"per_row": True}, {"prefixes": MATRYOSHKA}, {"whiten": 0.5}])
def test_training_explains_sparse_data_finds_its_features_and_fires_k_on_new_rows(changes):
    rows, truth = sparse_rows(9_000)
    [(model, history)] = fit([training(**changes)], rows[:8500], torch.float16)
    new = torch.from_numpy(rows[8500:])
    assert sae.explained_variance(model, new) > 0.7
    assert float((sae.activations(model, new) > 0).sum(1).float().mean()) == pytest.approx(3, abs=0.4)
    nested = "prefixes" in changes  # without a hierarchy in the data they only cost features; their loss is the mean of the prefixes'
    assert found(model, truth) > (0.4 if nested else 0.7)
    assert history[-1]["unexplained"] < (0.75 if nested else 0.5) * history[0]["unexplained"] and history[-1]["rows"] == 60_000
    centre = rows[:8000].astype(np.float64)
    gamma = np.linalg.norm(centre.mean(0)) / np.linalg.norm(centre.std(0))
    assert model.metadata["gamma"] == pytest.approx(gamma, rel=1e-3), "how far the centre is from the origin, in deviations"


def test_the_first_features_of_a_matryoshka_sae_reconstruct_by_themselves():
    rows, _ = sparse_rows(9_000)
    new, errors = torch.from_numpy(rows[8500:]), []
    for prefixes in ((), MATRYOSHKA):
        [(model, _)] = fit([training(prefixes=prefixes)], rows[:8500])
        values = sae.activations(model, new)[:, :32]
        errors.append(float((values @ model.w_dec[:32] + model.b_dec - new).square().sum()))
    assert errors[1] < 0.8 * errors[0]


def test_decoder_rows_of_an_archetypal_sae_lie_near_the_hull_of_the_data_and_seeds_agree_more():
    rows, _ = sparse_rows(6_000)
    seeds = {}
    for share in (None, 0.1):
        models = [model for model, _ in fit([training(archetypal=share, seed=seed) for seed in (0, 1)], rows)]
        first, second = (torch.nn.functional.normalize(model.w_dec, dim=1) for model in models)
        seeds[share] = float((first @ second.T).max(1).values.mean())
    assert seeds[0.1] > seeds[None]
    scale = sae_scale.measure(rows)
    trainee = Trainee(training(archetypal=0.1), scale.normalised(rows))
    for batch in itertools.islice(scale.normalised(rows).split(500), 5):
        trainee.step(batch)
    mix, free = trainee.tensors[3:]
    inside = mix.relu() / mix.relu().sum(1, keepdim=True) @ trainee.centroids
    away = (trainee.weights.decoder - inside).norm(dim=1) / inside.norm(dim=1)
    assert free.any() and 0 < float(away.max()) <= 0.1 + 1e-5


def test_one_scale_per_dimension_or_direction_lets_quiet_ones_speak():
    rows, _ = sparse_rows(4_000)
    rows[:, :16] *= 100
    quiet, new = {}, torch.from_numpy(rows)
    for name, changes in (("one", {}), ("dimension", {"per_dimension": True}), ("half", {"whiten": 0.5}), ("white", {"whiten": 1.0})):
        [(model, _)] = fit([training(num_rows=20_000, k=4, **changes)], rows)
        error = (new - sae.activations(model, new) @ model.w_dec - model.b_dec)[:, 16:].square().sum()
        quiet[name] = 1 - float(error / (new - new.mean(0))[:, 16:].square().sum())
    assert quiet["one"] + 0.1 < min(quiet["dimension"], quiet["half"], quiet["white"])


def test_whitening_in_full_makes_all_directions_equally_loud_and_no_whitening_keeps_them():
    rows, _ = sparse_rows(4_000, dim=8)
    rows *= np.linspace(1, 5, 8, dtype=np.float32)
    for whiten, spread in ((1.0, 1.0), (0.0, None)):
        scale = sae_scale.measure(rows, whiten=whiten)
        z = scale.normalised(rows)
        assert float(z.square().sum(1).mean()) == pytest.approx(1, rel=1e-3)
        variance = np.linalg.eigvalsh(np.cov(z.numpy().T))
        if spread:
            assert variance.max() / variance.min() == pytest.approx(spread, rel=1e-2)
        back = z.double() @ scale.scale.double() if scale.scale.ndim == 2 else z.double() * scale.scale
        np.testing.assert_allclose(back + scale.mean, rows, atol=1e-3)


def test_several_saes_on_one_pass_are_the_ones_of_their_own_runs():
    rows, _ = sparse_rows(3_000)
    settings = [training(num_rows=10_000, seed=0), training(num_rows=10_000, seed=1), training(num_rows=10_000, num_features=32)]
    together = fit(settings, rows)
    for one, (model, history) in zip(settings, together, strict=True):
        [(alone, same)] = fit([one], rows)
        assert history == same and all(torch.equal(getattr(model, name), getattr(alone, name)) for name in sae.TENSORS)
    assert not torch.equal(together[0][0].w_dec, together[1][0].w_dec)
    with pytest.raises(ValueError, match="share a pass over the data differ"):
        fit([settings[0], replace(settings[1], batch_size=250)], rows)


@pytest.mark.parametrize("changes", [{}, {"archetypal": 0.1}, {"per_row": True}])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path, changes):
    rows, _ = sparse_rows(3_000)
    settings = [training(num_rows=20_000, dead_rows=1_000, seed=seed, **changes) for seed in (0, 1)]
    whole = fit(settings, rows)
    checkpoint, pieces = tmp_path / "training", [InMemory({"fit": part}) for part in np.array_split(rows[:-500], 4)]

    def dying(cursor):
        for number, item in enumerate(shuffled(pieces, 500, 0, cursor, together=2)):
            if number == 23:  # three steps after a checkpoint
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        fit(settings, rows, stream=dying, checkpoint=checkpoint)
    assert checkpoint.exists()
    with pytest.raises(ValueError, match="other settings or data"):
        fit([replace(one, learning_rate=1e-4) for one in settings], rows, checkpoint=checkpoint)
    for (model, history), (expected, same) in zip(fit(settings, rows, checkpoint=checkpoint), whole, strict=True):
        assert history == same
        assert all(torch.equal(getattr(model, name), getattr(expected, name)) for name in sae.TENSORS)
    assert not checkpoint.exists()


def test_what_is_on_disk_gives_the_codes_that_training_saw(tmp_path):
    rows, _ = sparse_rows(9_000)
    held_out = rows[-500:]
    for changes in ({}, {"per_row": True}, {"whiten": 0.5}):
        settings, scale = training(num_rows=20_000, **changes), sae_scale.measure(rows[:-500], whiten=changes.get("whiten", 0.0))
        trainee = Trainee(settings, scale.normalised(rows[:-500]))
        for batch in scale.normalised(rows[:-500]).split(500):
            trainee.step(batch)
        sae.save(sae_fit.finish(trainee, scale, held_out, {"tower": "tower/1"}, torch.float32), tmp_path / "sae")
        model, weights = sae.load(str(tmp_path / "sae")), trainee.weights
        find = sae_search.topk if settings.per_row else sae_search.batch_topk
        codes, _ = find(scale.normalised(held_out) - weights.b_dec, weights.encoder, weights.bias, 3, None)
        saw, reads = sae_search.csr(codes, 64).to_dense(), sae.activations(model, torch.from_numpy(held_out))
        both = (saw > 0) & (reads > 0)
        torch.testing.assert_close(reads[both], saw[both], atol=1e-3, rtol=1e-3)
        if settings.per_row:  # a threshold cannot choose per row; every feature fires as often
            fires = (saw > 0).sum(0)
            assert ((reads > 0).sum(0) - fires)[fires > 0].abs().max() <= 1
        else:
            assert ((saw > 0) != (reads > 0)).sum() <= 2, "but for ties at the cut, the same features fire"


@pytest.mark.parametrize("aux_weight", [0.0, 1 / 32])
def test_dead_features_are_counted_in_rows_and_the_auxiliary_loss_brings_them_back(aux_weight):
    rows, _ = sparse_rows(4_000)
    z, counts = sae_scale.measure(rows).normalised(rows), []
    trainee = Trainee(training(dead_rows=2_000, aux_weight=aux_weight), z)
    trainee.tensors[0][:20] *= 1e-4
    for epoch in range(15):
        for batch in z[torch.randperm(len(z), generator=torch.Generator().manual_seed(epoch))].split(500):
            counts.append(int(trainee.dead.sum()))
            trainee.step(batch)
    assert counts[:5] == [0] * 5, "nothing is dead before 2,000 rows have passed"
    assert max(counts) >= 15
    assert counts[-1] >= 18 if aux_weight == 0 else counts[-1] <= 14  # 64 features for 48 true ones: some have no work


def test_a_gradient_that_is_not_finite_stops_before_anything_changes():
    rows, _ = sparse_rows(1_000)
    trainee = Trainee(training(), sae_scale.measure(rows).normalised(rows))
    before = [tensor.clone() for tensor in trainee.tensors]
    batch = sae_scale.measure(rows).normalised(rows[:500])
    batch[7, 3] = 1e30
    with pytest.raises(ValueError, match=r"gradient is (nan|inf) at step 0 of 120; lower the learning rate"):
        trainee.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.tensors, strict=True))


def of_one_process(rank: int, world: int, address: str, rows: np.ndarray, path: str) -> None:
    """Train as `rank` of `world` processes; the first writes the weights to `path`."""
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    settings = [training(num_rows=5_000, dead_rows=400), training(num_rows=5_000, per_row=True, prefixes=MATRYOSHKA)]
    fitted = fit(settings, rows)
    if rank == 0:
        assert fitted[0][1][-1]["dead"] > 0, "AuxK took part"
        torch.save([(model.w_enc, model.w_dec, model.threshold, history) for model, history in fitted], path)
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_train_what_one_does(tmp_path):
    rows, _ = sparse_rows(3_000)
    paths = [str(tmp_path / f"{world}.pt") for world in (1, 2)]
    of_one_process(0, 1, "", rows, paths[0])
    torch.multiprocessing.spawn(of_one_process, (2, f"file://{tmp_path}/meet", rows, paths[1]), nprocs=2)
    for one, two in zip(*(torch.load(path, weights_only=True) for path in paths), strict=True):
        for mine, theirs in zip(one[:3], two[:3], strict=True):
            torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-3)
        assert all(math.isclose(a["unexplained"], b["unexplained"], rel_tol=1e-5) for a, b in zip(one[3], two[3], strict=True))


def test_the_learning_rate_rises_holds_and_falls_to_almost_nothing():
    from curation.sae_train import schedule

    settings = Training(num_features=4, num_rows=1000, k=1, batch_size=10, warmup=0.1, decay=0.2)
    factors = [schedule(step, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:81] == [1.0] * 72 and factors[-1] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"k": 65}, "k 65 of 64"),
        ({"num_rows": 10}, "10 rows are less than one batch"),
        ({"whiten": 1.5}, "whiten is 1.5"),
        ({"whiten": 0.5, "per_dimension": True}, "not with per_dimension"),
        ({"prefixes": (0.5, 0.25)}, "growing shares"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        training(**changes)


def test_equal_vectors_are_refused():
    with pytest.raises(ValueError, match="all 5 vectors are the same"):
        sae_scale.measure(np.ones((5, 3), np.float32))
