"""Validation asks the same of every model and any split of the rows; the ledger's means are those of the images."""

import numpy as np
import pytest
import torch
from small_k2 import SMALL, small_model

from k2model import flow
from k2model.validation import Held, Ledger, fixed_noise, fixed_times, losses, validation_sums


def held(first, count, fill=0):
    """Rows first to first + count of a fixed set, and `fill` repeats of the last one."""
    rows = [*range(first, first + count), *[first + count - 1] * fill]
    generators = [torch.Generator().manual_seed(row) for row in rows]
    clean = torch.stack([torch.randn(SMALL.channels, 4, 6, generator=generator) for generator in generators])
    text = torch.stack([torch.randn(3, SMALL.text_taps, SMALL.text_dim, generator=generator) for generator in generators])
    return Held(clean, text, torch.ones(len(rows), 3, dtype=torch.bool), [f"s/{row}" for row in rows], count)


def test_the_loss_at_each_time_is_that_of_fixed_noise():
    model = small_model()
    found = losses(validation_sums(model, [held(0, 3)], 4, seed=7))
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
    whole = validation_sums(model, [held(0, 6)], 3, seed=0)
    ranks = [validation_sums(model, [held(0, 1), held(4, 2)], 3, seed=0), validation_sums(model, [held(1, 3, fill=2)], 3, seed=0)]
    assert torch.equal(sum(ranks)[1], whole[1]) and torch.allclose(sum(ranks), whole, rtol=1e-5)
    assert losses(sum(ranks))["by_t"] == pytest.approx(losses(whole)["by_t"], rel=1e-5)


def test_noise_is_of_the_seed_the_image_and_the_time():
    noise = fixed_noise(0, ["a/1", "a/2"], 3, (16, 4, 6))
    assert torch.equal(noise[1], fixed_noise(0, ["a/2"], 3, (16, 4, 6))[0])
    others = [fixed_noise(1, ["a/1"], 3, (16, 4, 6)), fixed_noise(0, ["a/1"], 2, (16, 4, 6)), noise[1:]]
    assert not any(torch.equal(noise[:1], other) for other in others)


def test_validation_keeps_no_graph_and_needs_an_image():
    model = small_model()
    assert not validation_sums(model, [held(0, 2)], 2, seed=0).requires_grad
    with pytest.raises(ValueError, match="no image to validate on"):
        losses(validation_sums(model, [], 2, seed=0))


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
