"""cluster.run: one outcome per item, whatever fails."""

import functools
import os
import sys
import time
import urllib.request

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


def asking(folder: str, ask=None):
    """A worker function that hands two messages over; without servers it says so."""
    return (lambda item: (ask(item)(), ask(item + 100)())) if ask else lambda item: "no servers"


def serving(folder: str):
    """A server: adds one; fails on 13; dies on 5 the first time, and always on 6."""

    def add(message: int) -> int:
        if message == 13:
            raise KeyError("thirteen")
        if message == 6 or (message == 5 and not os.path.exists(f"{folder}/died")):
            open(f"{folder}/died", "w").close()
            os._exit(1)
        return message + 1

    return add


def two_pools(folder, items, **more):
    make, serve = functools.partial(asking, str(folder)), functools.partial(serving, str(folder))
    return {o.item: o for o in cluster.run(make, items, "auto", 1, serve=serve, num_servers=1, **more)}


@pytest.mark.ray
def test_a_server_that_dies_costs_no_item_and_one_that_fails_costs_its_own(tmp_path, ray_cluster):
    states = []
    outcomes = two_pools(tmp_path, [1, 2, 5, 13, 3], watch=states.append)
    assert {i: o.value for i, o in outcomes.items()} == {i: (i + 1, i + 101) if i != 13 else None for i in (1, 2, 5, 13, 3)}
    assert outcomes[13].error == "KeyError: 'thirteen'" and outcomes[13].tries == cluster.TRIES
    assert (tmp_path / "died").exists()
    assert max(state.in_flight for state in states) == 1 and max(state.servers for state in states) == 1


@pytest.mark.ray
def test_a_message_that_kills_every_server_fails_its_item_and_ends(tmp_path, ray_cluster):
    outcomes = two_pools(tmp_path, [6, 1])
    assert outcomes[1].value == (2, 102) and "inference workers died" in outcomes[6].error


@pytest.mark.ray
def test_without_an_accelerator_there_is_one_pool_unless_servers_are_asked_for(ray_cluster):
    (outcome,) = cluster.run(functools.partial(asking, ""), [1], "auto", serve=functools.partial(serving, ""))
    assert outcome.value == "no servers"


@pytest.mark.ray
@pytest.mark.parametrize("workers, servers, message", [(2, 1, "1 to 1 beside 1"), (1, 5, "--infer-workers 5"), (None, 2, "1 to 0")])
def test_pools_that_can_never_be_placed_are_refused(ray_cluster, workers, servers, message):
    with pytest.raises(ValueError, match=message):
        list(cluster.run(int, [1], "auto", workers, serve=functools.partial(serving, ""), num_servers=servers))


def dying(folder: str):
    """Kills its process on a plain item, returns one that was marked."""
    return lambda item: os._exit(1) if isinstance(item, int) and item == 4 else item


@pytest.mark.ray
def test_after_a_worker_died_on_an_item_the_next_try_gets_what_after_death_makes_of_it(ray_cluster):
    outcomes = {o.item: o for o in cluster.run(functools.partial(dying, ""), [1, 4], "auto", 1, after_death=lambda item: f"suspect {item}")}
    assert (outcomes[1].value, outcomes[1].tries) == (1, 1)
    assert (outcomes[4].value, outcomes[4].tries) == ("suspect 4", 2)


def test_messages_in_flight_stay_within_their_share_of_bytes(monkeypatch):
    """The bookkeeping of one worker, on a store of three messages."""

    class Message:
        nbytes = 10

    class Ray:
        exceptions = cluster_exceptions()
        waited = 0

        @staticmethod
        def put(message):
            return message

        @classmethod
        def wait(cls, references, num_returns):
            cls.waited += 1
            return references[:1], references[1:]

        @staticmethod
        def get(reference):
            return reference

    class Server:
        class call:
            count = 0

            @classmethod
            def remote(cls, held):
                cls.count += 1
                return cls.count

    monkeypatch.setitem(sys.modules, "ray", Ray)
    service = cluster._Service(max_bytes=30)
    service.servers = [Server()]
    answers = [service.ask(Message()) for _ in range(5)]
    assert Ray.waited == 2 and len(service.open) == 3
    assert [answer() for answer in answers] == [1, 2, 3, 4, 5] and not service.open


def cluster_exceptions():
    import ray.exceptions

    return ray.exceptions


def test_without_ray_measuring_does_nothing():
    cluster.measure("k2_images_total", 3, stage="basics")


@pytest.mark.ray
def test_the_metrics_of_workers_are_on_rays_prometheus_endpoint(ray_cluster, tiny_tars, tmp_path):
    from pipelines.annotate import annotate

    assert annotate(str(tiny_tars), str(tmp_path), "basics", ray="auto", workers=1) == 0
    (node,) = (node for node in ray_cluster.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = ("k2_images_total", 'part="decode"', "k2_broken_total", "k2_shards_failed", "k2_shard_seconds")
    text, deadline = "", time.monotonic() + 60
    while not all(name in text for name in wanted) and time.monotonic() < deadline:
        time.sleep(0.5)  # Ray reports every few seconds; workers that have ended are dropped after a while
        text = urllib.request.urlopen(url).read().decode()
    assert all(name in text for name in wanted), [line for line in text.splitlines() if "k2_" in line]
