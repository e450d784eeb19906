"""The study's pure functions: measures of variety, the arms' policies, the shares of the heap, intervals, equal FLOPs."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_study  # noqa: E402
import study_heap  # noqa: E402
import study_plots  # noqa: E402

from curation import diversity  # noqa: E402
from curation.rules import Policy, rules  # noqa: E402
from k2model.flops import train_flops  # noqa: E402

PRETRAIN = (ROOT / "pipelines" / "policies" / "pretrain_256.sql").read_text()


def gaussian(number: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, 6)) + shift


def test_the_vendi_score_counts_directions():
    eye = np.eye(5)
    assert diversity.vendi_score(eye) == pytest.approx(5)
    assert diversity.vendi_score(np.repeat(eye[:1], 9, 0)) == pytest.approx(1)
    assert diversity.vendi_score(np.concatenate([eye, eye])) == pytest.approx(5)  # copies add nothing; more rows than columns
    assert diversity.vendi_score(7 * eye) == pytest.approx(5)


def test_a_vector_without_direction_is_refused():
    with pytest.raises(ValueError, match="1 of them zero"):
        diversity.vendi_score(np.array([[1.0, 0.0], [0.0, 0.0]]))


def test_the_kernel_distance_is_unbiased_and_grows_with_a_shift():
    pairs = [diversity.kernel_distance(gaussian(30, 2 * i), gaussian(40, 2 * i + 1)) for i in range(200)]
    assert abs(np.mean(pairs)) < 3 * np.std(pairs) / np.sqrt(len(pairs))
    assert np.mean(pairs) + 5 * np.std(pairs) < diversity.kernel_distance(gaussian(30, 0), gaussian(40, 1, shift=2.0))


def test_the_kernel_distance_is_the_sum_over_pairs():
    x, y = gaussian(4, 0), gaussian(3, 1)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 6 + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(4) for j in range(4) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(3) for j in range(3) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert diversity.kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * across)


def test_a_kernel_distance_needs_two_rows_of_one_width():
    with pytest.raises(ValueError, match="two rows"):
        diversity.kernel_distance(gaussian(1, 0), gaussian(5, 1))
    with pytest.raises(ValueError, match="one width"):
        diversity.kernel_distance(gaussian(5, 0), gaussian(5, 1)[:, :3])


def test_the_frechet_distance_of_a_shift_is_its_square():
    x = gaussian(50, 0)
    assert diversity.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert diversity.frechet_distance(x, x + 2) == pytest.approx(4 * 6)
    assert diversity.frechet_distance(x - x.mean(0), 3 * (x - x.mean(0))) == pytest.approx(4 * np.trace(np.cov(x, rowvar=False)))


def test_distances_between_pictures_of_one_prompt():
    assert diversity.mean_cosine_distance(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("arm", study_heap.ARMS)
def test_the_policy_of_an_arm_is_a_policy_of_its_resolution(arm: str):
    policy = Policy("study", study_heap.arm_policy(arm, 64, 3, 100, PRETRAIN))
    assert policy.resolution == 64
    names = [rule.name for rule in rules(policy.sql)]
    assert names[-1] == "drawn"
    assert ("good_quality" in names) == arm.endswith("quality")
    assert ("not_duplicate" in names) == arm.startswith("curated")
    assert "text_height * 256" not in policy.sql


def test_seeds_order_and_numbers_cut_otherwise():
    def without_comments(seed: int, number: int) -> str:
        lines = study_heap.arm_policy("curated", 64, seed, number, PRETRAIN).splitlines()
        return "\n".join(line for line in lines if not line.startswith("--"))

    assert len({without_comments(seed, number) for seed in (0, 1) for number in (10, 20)}) == 4


def test_a_least_side_is_a_rule_of_its_own():
    sql = study_heap.arm_policy("curated", 64, 0, 10, PRETRAIN, 256)
    assert "least(width, height) >= 256" in sql
    assert "side_enough" in [rule.name for rule in rules(sql)]


def test_the_shares_of_the_heap_add_up():
    assert sum(study_heap.SHARES.values()) == pytest.approx(1)
    assert sum(study_heap.counts(1003).values()) == 1003
    assert study_heap.counts(1000)["generated"] == 100


def test_tiles_are_squares_apart_from_each_other():
    pixels = np.arange(330 * 500).reshape(330, 500, 1).repeat(3, 2)
    parts = study_heap.tiles(pixels)
    assert len(parts) == 2 * 3
    assert {part.shape for part in parts} == {(165, 165, 3)}
    assert len(np.unique(np.concatenate([part[..., 0].ravel() for part in parts]))) == 6 * 165**2


def test_the_interval_is_students():
    mean, half = study_plots.interval([1.0, 2.0, 3.0])
    assert (mean, round(half, 3)) == (2.0, 2.484)  # 4.303 / sqrt(3)
    assert study_plots.interval([1.0])[1] == float("inf")


def test_differences_are_paired_by_seed():
    arms = {"a": {0: {"vendi": 2.0}, 1: {"vendi": 5.0}, 2: {"vendi": 9.0}}, "b": {1: {"vendi": 1.0}, 0: {"vendi": 1.0}}}
    assert study_plots.paired(arms, "a", "b", "vendi") == [1.0, 4.0]


def test_the_curriculum_has_the_flops_of_the_run_from_scratch():
    steps = bench_study.curriculum_steps()
    each = {
        side: bench_study.CURRICULUM[side][1] * train_flops(bench_study.SMALL, bench_study.TEXT_TOKENS, (side // 16) ** 2) for side in steps
    }
    total = bench_study.TOP_STEPS * bench_study.TOP_BATCH * train_flops(bench_study.SMALL, bench_study.TEXT_TOKENS, 256)
    assert sum(steps[side] * each[side] for side in steps) == pytest.approx(total, rel=0.01)
