"""The loader reads what the order says, whatever the threads, the world size and the step that it starts at."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_world import landscapes, make_packed

from k2model.data import Packed
from k2model.loader import Loader
from k2model.order import Order

SIZES = [(32, 32), (32, 48), (48, 32)]
SEED = 3


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[Packed]:
    place = tmp_path_factory.mktemp("packed")
    few = [(f"few/{uid}", caption, pixels) for uid, caption, pixels in landscapes(7, SIZES, seed=1)]
    many, few = (
        [(uid, [caption, *further(uid)], pixels) for uid, caption, pixels in pictures] for pictures in (landscapes(23, SIZES), few)
    )
    return [Packed(make_packed(place / "many", many, 32, 4)), Packed(make_packed(place / "few", few, 32, 3))]


def further(uid: str) -> list[str]:
    """0, 1 or 2 more captions of an image."""
    return [f"{uid} again", f"{uid} once more"][: int(uid[-1]) % 3]


def loaded(order: Order, rank: int, world: int, start: int, count: int, **how) -> list:
    """`count` global batches of a rank, as they come."""
    with Loader(order, rank, world, start, **how) as loader:
        found = list(islice(loader, count))
    assert [i for _, i in found] == list(range(start, start + count))
    return [parts for parts, _ in found]


def valid(parts: list) -> list[tuple]:
    """(uid, captions, source, bytes of the pixels) of every row that counts."""
    return [
        (part.uids[row], tuple(part.captions[row]), part.group.source, part.images[row].numpy().tobytes())
        for part in parts
        for row in range(part.num_valid)
    ]


how = {"ahead": st.integers(1, 4), "threads": st.integers(1, 4), "max_rows": st.sampled_from([None, 1, 2])}


@given(num_groups=st.integers(1, 6), start=st.integers(0, 400), count=st.integers(1, 3), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_ranks_together_read_the_same_images_at_any_world_size(sets, num_groups, start, count, data):
    order = Order(sets, [2, 1], num_groups, SEED)
    expected = []
    for i in range(start, start + count):  # read one after the other, with nothing ahead
        batches = [(group.source, order.sets[group.source].read(order.describe(group))) for group in order.batch(i)]
        rows = [
            (uid, (caption, *further(uid)), source, pixels.numpy().tobytes())
            for source, batch in batches
            for pixels, caption, uid in zip(*batch, strict=True)
        ]
        expected.append(Counter(rows))
    for world in (n for n in range(1, 9) if num_groups % n == 0 or n % num_groups == 0):
        options = {name: data.draw(one) for name, one in how.items()}
        ranks = [loaded(order, rank, world, start, count, **options) for rank in range(world)]
        for step in range(count):
            assert Counter(row for rank in ranks for row in valid(rank[step])) == expected[step]
            shapes = [[tuple(part.images.shape[:1]) for part in rank[step]] for rank in ranks]
            assert len({len(shape) for shape in shapes}) == 1, "all ranks have as many parts"


@given(start=st.integers(0, 40), skip=st.integers(0, 6), world=st.sampled_from([1, 2, 4]), options=st.fixed_dictionaries(how))
@settings(max_examples=25, deadline=None)
def test_resuming_at_any_global_batch_equals_going_on(sets, start, skip, world, options):
    order = Order(sets, [2, 1], 2, SEED)
    max_rows = options.pop("max_rows")
    whole = loaded(order, world - 1, world, start, skip + 2, max_rows=max_rows)[skip:]
    resumed = loaded(order, world - 1, world, start + skip, 2, max_rows=max_rows, **options)
    for before, after in zip(whole, resumed, strict=True):
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one.images, other.images) and one._replace(images=None) == other._replace(images=None)


@given(world=st.sampled_from([1, 2, 3]), seed=st.integers(0, 2**32), options=st.fixed_dictionaries(how))
@settings(max_examples=15, deadline=None)
def test_an_epoch_shows_every_image_once_at_any_world_size(sets, world, seed, options):
    order = Order(sets[:1], [1], 1, seed)
    seen = Counter(
        row[0] for rank in range(world) for parts in loaded(order, rank, world, 0, len(sets[0]), **options) for row in valid(parts)
    )
    assert seen == Counter(f"s{i % 2}/{i:03d}" for i in range(23))


def test_rows_that_do_not_count_repeat_others_so_that_ranks_have_equal_shapes(sets):
    order = Order(sets, [2, 1], 1, SEED)
    repeats = 0
    for i in range(12):
        ranks = [loaded(order, rank, 4, i, 1)[0] for rank in range(4)]
        assert len({part.images.shape for (part,) in ranks}) == 1
        whole = {uid: pixels for (part,) in ranks for uid, pixels in zip(part.uids[: part.num_valid], part.images, strict=False)}
        for (part,) in ranks:
            for row in range(part.num_valid, len(part.uids)):
                repeats += 1
                assert np.array_equal(part.images[row], whole[part.uids[row]])
    assert repeats > 0
