"""The arithmetic of `k2 plan`: what must hold whatever the figures are."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cost import Cluster, Rates, cost

seconds = st.floats(1e-6, 10)
names = st.sampled_from(["read", "decode", "basics", "siglip", "write"])
rates = st.builds(
    Rates,
    core_seconds=st.dictionaries(names, seconds, min_size=1),
    gpu_seconds=st.dictionaries(st.sampled_from(["tower a", "tower b"]), seconds),
    table_bytes=st.dictionaries(names, st.floats(0, 1e5)),
    packed_bytes=st.just({"256 px": 2e4}),
    kept=st.builds(lambda share: {"256 px": share}, st.floats(0, 1)),
    source_bytes=st.floats(1, 1e7),
)
clusters = st.builds(
    Cluster,
    nodes=st.integers(1, 1000),
    cpus=st.integers(1, 256),
    gpus=st.integers(1, 16),
    read_mb_per_s=st.floats(1, 1e5),
    cpu_hour_price=st.floats(0, 10),
    gpu_hour_price=st.floats(0, 100),
)
images = st.integers(1, 10**12)


def numbers(found: dict) -> dict[str, float]:
    """Every figure that grows with the number of images, by its path."""
    flat = {
        f"{part} {name}": value for part in ("core_hours", "gpu_hours", "table_bytes", "hours_of") for name, value in found[part].items()
    }
    flat |= {f"packed {name}": value["bytes"] for name, value in found["packed"].items()}
    return flat | {name: found[name] for name in ("source_bytes", "wall_hours", "money")}


@given(images, rates, clusters)
def test_twice_the_images_cost_twice_as_much_of_everything_at_the_same_pace(count, rate, cluster):
    once, twice = cost(count, rate, cluster), cost(2 * count, rate, cluster)
    assert numbers(twice) == pytest.approx({name: 2 * value for name, value in numbers(once).items()})
    assert (twice["bottleneck"], twice["read_mb_per_s"]) == (once["bottleneck"], pytest.approx(once["read_mb_per_s"]))


@given(images, rates, clusters)
def test_twice_the_nodes_take_half_the_time_and_as_many_hours_of_work_and_as_much_money(count, rate, cluster):
    once, more = cost(count, rate, cluster), cost(count, rate, dataclasses.replace(cluster, nodes=2 * cluster.nodes))
    assert more["wall_hours"] == pytest.approx(once["wall_hours"] / 2) and more["core_hours"] == once["core_hours"]
    assert more["bottleneck"] == once["bottleneck"] and more["money"] == pytest.approx(once["money"])


@given(images, rates, clusters)
def test_more_of_what_is_not_the_bottleneck_changes_no_time(count, rate, cluster):
    found = cost(count, rate, cluster)
    more = {"cpu": {"cpus": 2 * cluster.cpus}, "gpu": {"gpus": 2 * cluster.gpus}, "read": {"read_mb_per_s": 2 * cluster.read_mb_per_s}}
    for name, change in more.items():
        wall = cost(count, rate, dataclasses.replace(cluster, **change))["wall_hours"]
        assert wall <= found["wall_hours"] and (name == found["bottleneck"] or wall == found["wall_hours"])


@given(images, rates, clusters)
def test_the_time_is_that_of_the_bottleneck_and_totals_are_sums(count, rate, cluster):
    found = cost(count, rate, cluster)
    assert found["wall_hours"] == found["hours_of"][found["bottleneck"]] == max(found["hours_of"].values())
    for part in ("core_hours", "gpu_hours", "table_bytes"):
        assert found[part]["total"] == pytest.approx(sum(value for name, value in found[part].items() if name != "total"))
    # What the cluster reads in that time is the source.
    assert found["read_mb_per_s"] * 1e6 * 3600 * found["wall_hours"] == pytest.approx(found["source_bytes"])
    assert found["read_mb_per_s"] <= cluster.nodes * cluster.read_mb_per_s * (1 + 1e-9)


@given(images, rates, clusters)
def test_what_is_not_known_makes_unknown_what_needs_it_and_nothing_else(count, rate, cluster):
    slow = dataclasses.replace(rate, gpu_seconds={"tower": None})
    found = cost(count, slow, cluster)
    assert (found["gpu_hours"], found["wall_hours"], found["bottleneck"], found["money"]) == (
        {"tower": None, "total": None},
        None,
        None,
        None,
    )
    assert found["core_hours"]["total"] > 0 and found["missing"] == ["--gpu-rate tower=IMAGES_PER_S_OF_ONE_GPU"]
    found = cost(count, dataclasses.replace(rate, source_bytes=None, kept={}), cluster)
    assert found["source_bytes"] is found["wall_hours"] is found["packed"]["256 px"]["bytes"] is None


@given(images, rates)
def test_without_a_cluster_there_is_no_time_and_the_work_is_what_is_paid(count, rate):
    found = cost(count, rate, Cluster(cpu_hour_price=2.0, gpu_hour_price=3.0))
    assert found["wall_hours"] is None and found["hours_of"] == {}
    assert found["money"] == pytest.approx(2 * found["core_hours"]["total"] + 3 * found["gpu_hours"]["total"])
