"""Validation asks the same of every model and any split of the rows; the ledger's means are those of the images."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_k2 import SMALL, small_model

from k2model import flow
from k2model.validation import Held, Ledger, fixed_noise, fixed_times, summary, validation_losses


def held(first, count, fill=0):
    """Rows first to first + count of a fixed set, and `fill` repeats of the last one."""
    rows = [*range(first, first + count), *[first + count - 1] * fill]
    generators = [torch.Generator().manual_seed(row) for row in rows]
    clean = torch.stack([torch.randn(SMALL.channels, 4, 6, generator=generator) for generator in generators])
    text = torch.stack([torch.randn(3, SMALL.text_taps, SMALL.text_dim, generator=generator) for generator in generators])
    return Held(clean, text, torch.ones(len(rows), 3, dtype=torch.bool), [f"s/{row}" for row in rows], range(first, first + count))


def test_the_loss_at_each_time_is_that_of_fixed_noise():
    model = small_model()
    found = summary(validation_losses(model, [held(0, 3)], 3, 4, seed=7))
    assert fixed_times(4) == [0.125, 0.375, 0.625, 0.875]
    by_t = []
    with torch.no_grad():
        for i, time in enumerate(fixed_times(4)):
            rows = held(0, 3)
            noise = torch.stack(
                [torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(flow.number(7, "validation", uid, i))) for uid in rows.uids]
            )
            x = (1 - time) * rows.clean + time * noise
            by_t.append(flow.loss(model(x, torch.full((3,), time), rows.text, rows.mask), rows.clean, noise).mean().item())
    assert found["by_t"] == pytest.approx(by_t, rel=1e-5) and found["loss"] == pytest.approx(np.mean(by_t), rel=1e-5)
    assert len(set(map(str, found["by_t"]))) == 4


def test_it_does_not_matter_how_rows_lie_in_batches_and_ranks():
    model = small_model()
    whole = validation_losses(model, [held(0, 6)], 6, 3, seed=0)
    batches = [held(0, 1), held(4, 2)], [held(1, 3, fill=2), held(0, 1)._replace(places=())]  # one has nothing left, and goes along
    ranks = [validation_losses(model, mine, 6, 3, seed=0) for mine in batches]
    assert whole.dtype == torch.float64 and whole.min() > 0 and torch.allclose(sum(ranks), whole, rtol=1e-5)
    found, expected = summary(sum(ranks)), summary(whole)
    assert found["images"] == expected["images"] == 6
    for key in ("loss", "by_t", "standard_error", "standard_error_by_t"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5), key


tables = arrays(np.float64, st.tuples(st.integers(1, 40), st.integers(1, 9)), elements=st.floats(0, 50))


@given(tables)
def test_a_standard_error_is_that_of_the_mean_over_images(each):
    found = summary(torch.from_numpy(each))
    assert found["images"] == len(each)
    assert found["loss"] == pytest.approx(each.mean()) and found["by_t"] == pytest.approx(each.mean(0))
    if len(each) == 1:
        assert found["standard_error"] is None and found["standard_error_by_t"] is None
        return
    by_image = np.array([np.mean(line) for line in each])
    assert found["standard_error"] == pytest.approx(
        np.sqrt(np.sum((by_image - by_image.mean()) ** 2) / (len(each) - 1) / len(each)), abs=1e-9
    )
    assert found["standard_error_by_t"] == pytest.approx(scipy.stats.sem(each, axis=0), abs=1e-9)


def test_the_standard_error_is_how_far_means_of_other_images_lie_apart():
    rng = np.random.default_rng(0)
    world = rng.gamma(2, 1, (2000, 1)) + rng.gamma(1, 0.5, (2000, 8))  # images that are hard at all times, and noise of their own
    draws = [summary(torch.from_numpy(world[rng.integers(0, 2000, 50)])) for _ in range(400)]
    spread = np.std([found["loss"] for found in draws])
    assert np.mean([found["standard_error"] for found in draws]) == pytest.approx(spread, rel=0.1)
    spread_by_t = np.std([found["by_t"] for found in draws], axis=0)
    assert np.mean([found["standard_error_by_t"] for found in draws], axis=0) == pytest.approx(spread_by_t, rel=0.15)


def test_noise_is_of_the_seed_the_image_and_the_time():
    noise = fixed_noise(0, ["a/1", "a/2"], 3, (16, 4, 6))
    assert torch.equal(noise[1], fixed_noise(0, ["a/2"], 3, (16, 4, 6))[0])
    others = [fixed_noise(1, ["a/1"], 3, (16, 4, 6)), fixed_noise(0, ["a/1"], 2, (16, 4, 6)), noise[1:]]
    assert not any(torch.equal(noise[:1], other) for other in others)


def test_validation_keeps_no_graph_and_needs_an_image():
    model = small_model()
    assert not validation_losses(model, [held(0, 2)], 2, 2, seed=0).requires_grad
    with pytest.raises(ValueError, match="no image to validate on"):
        summary(validation_losses(model, [], 0, 2, seed=0))


def fed(ledgers):
    """Random images to ledgers in turn; every image as (loss, t, bucket, source)."""
    rng, images = np.random.default_rng(0), []
    for i in range(40):
        size = int(rng.integers(1, 5))
        values, t = rng.gamma(2, 1, size).astype(np.float32), rng.random(size).astype(np.float32)
        if i == 0:
            t[0] = 1.0  # belongs to the last bin
        bucket, source = rng.choice(["256x256", "320x208"]), rng.choice(["a", "b"])
        ledgers[i % len(ledgers)].add(torch.from_numpy(values).requires_grad_(), torch.from_numpy(t), bucket, source)
        images += [(value, time, bucket, source) for value, time in zip(values, t, strict=True)]
    return images


def test_the_ledger_has_the_means_and_counts_of_all_ranks_images():
    names = ["256x256", "320x208", "208x320", "256x256"], ["a", "b", "c"]
    ranks = [Ledger(*names), Ledger(*names), Ledger(*names)]
    images = fed(ranks)
    total = Ledger(*names)
    total.sums += sum(ledger.sums for ledger in ranks)  # what an all-reduce does
    row = total.read()
    for i in range(10):
        mine = [loss for loss, t, *_ in images if min(int(t * np.float32(10)), 9) == i]
        assert row["num_by_t"][i] == len(mine) and row["loss_by_t"][i] == pytest.approx(np.mean(mine))
    for kind, place, known in (("bucket", 2, {"256x256", "320x208"}), ("source", 3, {"a", "b"})):
        assert row[f"loss_by_{kind}"].keys() == known == row[f"num_by_{kind}"].keys(), "what had no image is left out"
        for name in known:
            mine = [image[0] for image in images if image[place] == name]
            assert row[f"num_by_{kind}"][name] == len(mine) and row[f"loss_by_{kind}"][name] == pytest.approx(np.mean(mine))
    assert total.read()["loss_by_t"] == [None] * 10, "a read starts it again"


def test_a_ledger_goes_on_from_its_sums():
    straight, first, second = (Ledger(["256x256", "320x208"], ["a", "b"]) for _ in range(3))
    fed([straight, first])
    second.sums = first.sums.clone()
    assert second.read() == first.read() and second.sums.sum() == 0


def test_what_a_ledger_was_not_made_for_is_refused():
    ledger = Ledger(["256x256"], ["a"])
    with pytest.raises(ValueError, match="no bucket '512x512'"):
        ledger.add(torch.ones(1), torch.ones(1), "512x512", "a")
    with pytest.raises(ValueError, match="no source 'b'"):
        ledger.add(torch.ones(1), torch.ones(1), "256x256", "b")
    ledger.add(torch.ones(0), torch.ones(0), "256x256", "a")
    assert ledger.sums.sum() == 0
