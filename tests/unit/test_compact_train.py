import numpy as np
import pytest
import torch
from PIL import Image

from curation.aligned import Codec
from curation.compact_train import Pairs, Pictures, Recipe, _by_group, _Draw, folds, from_imagenet, match_loss, train
from curation.handling import handled, region


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for i in range(8):
        rng = np.random.default_rng(i)
        small = rng.integers(0, 256, (12, 12, 3), np.uint8)
        resample = Image.Resampling.NEAREST if i % 2 else Image.Resampling.BICUBIC  # the mark of the generated ones
        Image.fromarray(small).resize((288, 288), resample).save(folder / f"{i}.png")
        paths.append(folder / f"{i}.png")
    return Pictures(paths, np.arange(8) % 2 == 1, np.array([f"{'gen' if i % 2 else 'src'} {i // 4}" for i in range(8)]))


def some_pairs(source):
    real = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
    return Pairs(real, 255 - real, np.array(source), [Codec(90, "420"), None, None, Codec(70, "444")])


def test_every_group_is_left_out_by_one_fold(pictures):
    left_out = folds(pictures, 2, seed=0)
    assert sorted(name for names in left_out for name in names) == ["gen 0", "gen 1", "src 0", "src 1"]
    assert all(len(names) == 2 and len({name[:3] for name in names}) == 2 for names in left_out)


def test_what_is_held_out_is_never_drawn(pictures):
    pairs = some_pairs(["src 0", "src 0", "src 1", "src 1"])
    draw = _Draw(pictures, pairs, Recipe(), frozenset({"gen 0", "src 0"}), np.random.default_rng(0))
    assert set(pictures.group[np.concatenate(list(draw.rows.values()))]) == {"gen 1", "src 1"}
    assert draw.pair_rows.tolist() == [2, 3]


def test_real_images_alone_need_pairs(pictures):
    real = Pictures(
        [path for path, fake in zip(pictures.paths, pictures.synthetic, strict=True) if not fake], np.zeros(4, bool), pictures.group[::2]
    )
    with pytest.raises(ValueError, match="no generated images and no aligned pairs"):
        _Draw(real, None, Recipe(), frozenset(), np.random.default_rng(0))
    crops, labels, damage = _Draw(real, some_pairs(["a"] * 4), Recipe(), frozenset(), np.random.default_rng(0)).batch()
    assert labels.mean() == 0.5 and len(crops) == len(labels) + len(damage)


def test_both_sides_of_a_pair_are_cut_and_saved_alike(pictures):
    pairs = some_pairs(["a"] * 4)
    pairs = Pairs(pairs.real, pairs.real, pairs.source, pairs.codecs)
    draw = _Draw(pictures, pairs, Recipe(), frozenset(), np.random.default_rng(0))
    for _ in range(20):
        real, fake = draw._pair()
        assert np.array_equal(real, fake)


def test_large_groups_are_drawn_by_the_square_root_of_their_size():
    share = _by_group(np.array(["a"] * 16 + ["b"] * 4))
    assert np.isclose(share[:16].sum() / share[16:].sum(), 2) and np.isclose(share.sum(), 1)


def test_the_damage_loss_is_small_where_partners_are_alike():
    label = torch.tensor([0, 0, 1, 1, 2, 2])
    alike = torch.eye(3).repeat_interleave(2, 0)
    assert match_loss(alike, label) < 0.1 < match_loss(torch.eye(6), label)


def test_training_learns_a_plain_mark_and_is_the_same_twice(pictures):
    recipe = Recipe(steps=12, crops=8, paired=0, damaged=4, dropout=0.0)
    *figures, network = train(pictures, None, recipe, frozenset(), "cpu")
    *again, second = train(pictures, None, recipe, frozenset(), "cpu")
    assert figures == again and figures[-1]["step"] == 12
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), second.state_dict().values(), strict=True))
    scores = []
    for row in range(8):
        crop = torch.tensor(pictures.pixels(row)[:128, :128]).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            scores.append(network.head(network(crop)).item())
    scores = np.array(scores)
    assert scores[pictures.synthetic].min() > scores[~pictures.synthetic].max()


def test_the_first_groups_of_blocks_keep_their_imagenet_weights(pictures):
    *_, network = train(pictures, None, Recipe(steps=2, crops=4, paired=0, damaged=4), frozenset(), "cpu")
    start = from_imagenet()
    assert torch.equal(network.blocks[1][0].conv_pw.weight, start.blocks[1][0].conv_pw.weight)
    assert not torch.equal(network.blocks[5][0].conv_pw.weight, start.blocks[5][0].conv_pw.weight)


@pytest.mark.parametrize("size", [(30, 500), (128, 128), (700, 900)])
def test_handling_gives_squares_of_one_side_whatever_the_image(size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert handled(region(image, 128, rng), 128, rng).shape == (128, 128, 3)
