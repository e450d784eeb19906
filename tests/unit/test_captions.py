"""Which caption a step sees: by the mix of lengths, a function of (seed, step, uid), and never one of another image."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2model.captions import MEDIUM_BYTES, SHORT_BYTES, choose, length_of

LONG, LONG_2, MEDIUM, SHORT = "l" * 600, "k" * 2000, "m" * 300, "s"
MIX = (0.7, 0.2, 0.1)


def shares(captions, mix=MIX, draws=4000) -> dict[str, float]:
    found = Counter(choose(captions, mix, 3, step, f"s/{step % 7}") for step in range(draws))
    return {caption: count / draws for caption, count in found.items()}


def test_captions_of_all_lengths_come_in_the_shares_of_the_mix():
    assert shares([SHORT, LONG, MEDIUM]) == pytest.approx({LONG: 0.7, MEDIUM: 0.2, SHORT: 0.1}, abs=0.03)
    assert shares([SHORT, LONG, MEDIUM], (0, 1, 3)) == pytest.approx({MEDIUM: 0.25, SHORT: 0.75}, abs=0.03)


def test_two_captions_of_a_length_share_its_share():
    assert shares([LONG, LONG_2, SHORT]) == pytest.approx({LONG: 0.4375, LONG_2: 0.4375, SHORT: 0.125}, abs=0.03)


def test_a_length_without_a_caption_gives_its_share_to_the_others_in_proportion():
    assert shares([MEDIUM, SHORT]) == pytest.approx({MEDIUM: 2 / 3, SHORT: 1 / 3}, abs=0.03)
    assert shares([SHORT], (1, 0, 0)) == {SHORT: 1.0}, "an image is not left without a caption"
    assert shares([SHORT, "t"], (1, 0, 0)) == pytest.approx({SHORT: 0.5, "t": 0.5}, abs=0.03)


def test_lengths_are_counted_in_bytes_so_that_a_language_without_spaces_has_the_same_classes():
    assert [length_of("x" * size) for size in (0, SHORT_BYTES, SHORT_BYTES + 1, MEDIUM_BYTES, MEDIUM_BYTES + 1)] == [2, 2, 1, 1, 0]
    assert length_of("狐" * (SHORT_BYTES // 3)) == 2 and length_of("狐" * (SHORT_BYTES // 3 + 1)) == 1


@given(st.lists(st.text(), min_size=1), st.tuples(*[st.floats(0, 10)] * 3), st.integers(0), st.integers(0), st.text())
def test_the_choice_is_a_caption_of_the_image_and_the_same_every_time(captions, mix, seed, step, uid):
    found = choose(captions, mix, seed, step, uid)
    assert found in captions and found == choose(captions, mix, seed, step, uid)
    allowed = [caption for caption in captions if mix[length_of(caption)]]
    assert not allowed or found in allowed, "a length of share 0 does not come while there is another"


def test_another_seed_step_or_image_is_another_draw():
    def row(seed=0, uid="a"):
        return [choose([LONG, LONG_2], MIX, seed, step, uid) for step in range(64)]

    assert len({tuple(row()), tuple(row(seed=1)), tuple(row(uid="b"))}) == 3 and len(set(row())) == 2
