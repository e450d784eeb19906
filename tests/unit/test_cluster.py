"""cluster.run: one outcome per item, whatever fails."""

import functools
import os

import pytest

from pipelines import cluster


def doubling(folder: str):
    """A worker function: doubles; fails on 13; fails on its first try at 7; kills its process on its first try at 5."""

    def double(item: int) -> int:
        first = not os.path.exists(f"{folder}/{item}")
        open(f"{folder}/{item}", "w").close()
        if item == 13 or (item == 7 and first):
            raise RuntimeError(f"unlucky {item}")
        if item == 5 and first:
            os._exit(1)
        return 2 * item

    return double


def refusing():
    raise OSError("no weights here")


def test_off_runs_in_this_process_and_tries_a_failed_item_again_at_the_end(tmp_path):
    outcomes = list(cluster.run(functools.partial(doubling, str(tmp_path)), [7, 1, 13, 2], "off"))
    assert [(o.item, o.value) for o in outcomes] == [(1, 2), (2, 4), (7, 14), (13, None)]
    assert outcomes[-1].error == "RuntimeError: unlucky 13"


@pytest.mark.ray
def test_a_killed_worker_and_a_failing_item_cost_no_other_item(tmp_path, ray_cluster):
    outcomes = {o.item: o for o in cluster.run(functools.partial(doubling, str(tmp_path)), range(15), "auto", 2)}
    assert {i: o.value for i, o in outcomes.items()} == {i: 2 * i if i != 13 else None for i in range(15)}
    assert "unlucky 13" in outcomes[13].error


@pytest.mark.ray
def test_a_worker_that_cannot_start_ends_the_job_with_its_cause(ray_cluster):
    with pytest.raises(RuntimeError, match="no weights here"):
        list(cluster.run(refusing, [1, 2], "auto", 1))


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_room_for_is_refused_and_does_not_hang(ray_cluster):
    with pytest.raises(ValueError, match="room for 1 to 2"):
        list(cluster.run(functools.partial(int), [1], "auto", 64))


def test_no_items_start_nothing():
    assert list(cluster.run(refusing, [], "auto")) == []
