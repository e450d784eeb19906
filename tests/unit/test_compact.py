import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from curation import compact
from curation.compact import DIM, NUM_CROPS, SIDE, Network


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (40, 300), (128, 128), (200, 131), (1000, 700)])
def test_crops_of_any_image_are_as_many_and_inside_it(size):
    image = picture(*size)
    places, whole = compact.boxes(image), compact.padded(image)
    assert places.shape == (NUM_CROPS, 4)
    assert (places[:, :2] >= 0).all() and (places[:, 2] <= whole.shape[0]).all() and (places[:, 3] <= whole.shape[1]).all()
    assert (places[:, :2] % 8 == 0).all() and (places[:, 2:] - places[:, :2] == SIDE).all()
    assert compact.strip(image).shape == (NUM_CROPS * SIDE, SIDE, 3)


def test_crops_go_from_the_calmest_place_to_the_busiest():
    image = np.full((512, 512, 3), 90, np.uint8)
    image[384:, 384:] = picture(128, 128)
    places = compact.boxes(image)
    assert tuple(places[-1]) == (384, 384, 512, 512)
    assert not (image[places[0, 0] : places[0, 2], places[0, 1] : places[0, 3]] != 90).any()


def test_a_strip_falls_apart_into_the_crops_that_made_it():
    image = picture(300, 420)
    cut = compact.crops_of(torch.from_numpy(np.stack([compact.strip(image)] * 2)).permute(0, 3, 1, 2).float())
    top, left, bottom, right = compact.boxes(image)[1]
    assert cut.shape == (2 * NUM_CROPS, 3, SIDE, SIDE)
    assert np.array_equal(cut[NUM_CROPS + 1].permute(1, 2, 0).numpy(), image[top:bottom, left:right])


def test_a_linear_function_of_the_mean_is_the_mean_of_the_crops():
    network = compact.load()
    features = network(
        torch.from_numpy(picture(SIDE, SIDE)).permute(2, 0, 1)[None].float().repeat(3, 1, 1, 1)
        * torch.tensor([1, 0.5, 0.2])[:, None, None, None]
    )
    assert features.shape == (3, DIM)
    assert torch.allclose(network.head(features.mean(0)), network.head(features).mean(0), atol=1e-4)


def test_weights_of_something_else_are_refused(tmp_path):
    state = Network().state_dict()
    state.pop("head.bias")
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors does not hold the compact network.*head.bias.*k2 synthetic train"):
        compact.load(tmp_path / "x.safetensors")


def test_the_packaged_weights_are_small_and_know_where_they_come_from():
    assert compact.WEIGHTS.stat().st_size < 10e6
    card = compact.WEIGHTS.with_suffix(".json").read_text()
    assert all(word in card for word in ("command", "num_real", "num_synthetic", "num_pairs", "seed"))
