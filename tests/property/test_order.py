"""The order of training: every image once an epoch, mixed by weight, the same at any world size."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2model.order import CYCLE, Order


class Listed:
    """What `Order` knows of a packed set: its row groups."""

    def __init__(self, num_rows, batch_size=None):
        self.groups = [{"num_rows": n, "bucket_height": 32, "bucket_width": 32} for n in num_rows]
        self.description = {"batch_size": batch_size or max(num_rows)}
        self.directory = "packed/listed"

    def __len__(self):
        return len(self.groups)


packed_sets = st.lists(st.integers(1, 5), min_size=1, max_size=12).map(lambda rows: Listed(rows, 5))


@given(sets=st.lists(packed_sets, min_size=1, max_size=3), seed=st.integers(0, 2**32), num_groups=st.integers(1, 6), data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_world_size_and_accumulation_reads_the_same_global_batch(sets, seed, num_groups, data):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sets), max_size=len(sets)))
    order, i = Order(sets, weights, num_groups, seed), data.draw(st.integers(0, 3000))
    world = data.draw(st.sampled_from([n for n in range(1, 13) if num_groups % n == 0 or n % num_groups == 0]))
    max_rows = data.draw(st.sampled_from([None, 1, 2, 3]))
    shares = [order.share(i, rank, world, max_rows) for rank in range(world)]
    read = Counter((part.group, row) for share in shares for part in share for row in part.rows[: part.num_valid])
    expected = Counter((group, row) for group in order.batch(i) for row in range(order.describe(group)["num_rows"]))
    assert read == expected and sum(read.values()) == order.num_images(i)
    firsts = {group: sum(order.describe(other)["num_rows"] for other in order.batch(i)[:j]) for j, group in enumerate(order.batch(i))}
    places = [place for share in shares for part in share for place in part.places]
    assert places == [firsts[part.group] + row for share in shares for part in share for row in part.rows[: part.num_valid]]
    assert sorted(places) == list(range(order.num_images(i))), "each image has one place, and repeats have none"
    assert len({len(share) for share in shares}) == 1, "a rank that has fewer parts would leave the others waiting"
    for part in (part for share in shares for part in share):
        assert 1 <= len(part.rows) <= (max_rows or 5) and 0 <= part.num_valid <= len(part.rows)
        assert all(0 <= row < order.describe(part.group)["num_rows"] for row in part.rows)


@given(packed=packed_sets, seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_an_epoch_reads_every_row_group_once_and_its_order_is_its_own(packed, seed, epoch):
    order = Order([packed], [1.0], 1, seed)
    found = [order.group(j) for j in range(epoch * len(packed), (epoch + 1) * len(packed))]
    assert sorted(group.number for group in found) == list(range(len(packed))) and {group.epoch for group in found} == {epoch}


@given(weights=st.lists(st.floats(0.001, 100), min_size=2, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_mixture_has_its_shares_in_every_cycle_and_reads_each_set_without_a_gap(weights, seed):
    sets = [Listed([1] * (3 + k)) for k in range(len(weights))]
    order = Order(sets, weights, 1, seed)
    groups = [order.group(j) for j in range(CYCLE)]
    counts = Counter(group.source for group in groups)
    for k, weight in enumerate(weights):
        assert abs(counts[k] / CYCLE - weight / sum(weights)) <= max(1 / CYCLE, len(weights) / CYCLE)
        mine = [group for group in groups if group.source == k]
        first = mine[: len(sets[k]) * (len(mine) // len(sets[k]))]
        assert Counter(group.number for group in first) == dict.fromkeys(range(len(sets[k])), len(first) // len(sets[k])) or not first


@given(size=st.integers(10, 60), hold_out=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_what_is_held_out_is_never_trained_on(size, hold_out, seed):
    order = Order([Listed([2] * size)], [1], 1, seed, hold_out)
    held = {group.number for group in order.held_out}
    trained = {order.group(j).number for j in range(2 * size)}
    assert len(held) == min(hold_out, size // 10) and held | trained == set(range(size)) and not held & trained


def test_seeds_epochs_and_cycles_change_the_order():
    packed = Listed([1] * 40)
    numbers = {
        (seed, epoch): tuple(Order([packed], [1], 1, seed).group(40 * epoch + j).number for j in range(40))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(numbers.values())) == 4
    mixed = Order([packed, packed], [1, 1], 1, 0)
    cycles = [tuple(mixed.group(cycle * CYCLE + j).source for j in range(50)) for cycle in (0, 1)]
    assert cycles[0] != cycles[1]


def test_the_order_of_today_is_the_order_of_tomorrow():
    order = Order([Listed([2] * 7), Listed([2] * 5)], [3, 1], 2, seed=5)
    assert [tuple(group) for i in (0, 700) for group in order.batch(i)] == [(0, 0, 2), (0, 0, 4), (0, 150, 0), (0, 150, 3)]


def test_a_world_that_does_not_fit_and_weights_that_are_none_are_refused():
    with pytest.raises(ValueError, match="Use 1, 2, 3, 6 or a multiple of 6 ranks"):
        Order([Listed([1])], [1], 6, 0).share(0, 0, 4)
    with pytest.raises(ValueError, match="positive weight"):
        Order([Listed([1])], [0], 1, 0)
    with pytest.raises(ValueError, match="is empty"):
        Order([Listed([1]), Listed([], 1)], [1, 1], 1, 0)
