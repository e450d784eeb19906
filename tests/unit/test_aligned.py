"""Aligned pairs: nothing but the decoder may differ between a real crop and its reconstruction."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from skimage import data

from curation import aligned
from curation.aligned import Codec, aligned_pair, crops, mix, psnr, random_codec, reencode, write_pairs
from curation.decode import DecodeError
from tests.conftest import encode


def identity(images: np.ndarray) -> np.ndarray:
    return images


def smooth(images: np.ndarray) -> np.ndarray:
    return np.stack([cv2.blur(image, (3, 3)) for image in images])


def jpeg(quality: int = 75, subsampling: str = "420") -> bytes:
    return simplejpeg.encode_jpeg(data.astronaut(), quality, "RGB", subsampling)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned, "SCALED", 0.0)


def test_native_crops_are_cut_along_the_blocks_of_the_images_own_jpeg(native: None):
    pixels = simplejpeg.decode_jpeg(jpeg())
    places = [(top, left) for top in range(0, 257, 16) for left in range(0, 257, 16)]
    for crop in crops(jpeg(75, "422"), 5, np.random.default_rng(0)):
        assert crop.codec == Codec(75, "422")
    for crop in crops(jpeg(), 5, np.random.default_rng(0)):
        assert any(np.array_equal(crop.pixels, pixels[top : top + 256, left : left + 256]) for top, left in places)


def test_a_scaled_crop_has_no_jpeg_of_its_own_and_shows_up_to_twice_the_scene(monkeypatch: pytest.MonkeyPatch):
    ramp = np.broadcast_to((np.arange(512) // 2).astype(np.uint8)[None, :, None], (512, 512, 3))
    image = simplejpeg.encode_jpeg(np.ascontiguousarray(ramp), 98, "RGB", "444")
    shown = {}
    for share in (0.0, 1.0):
        monkeypatch.setattr(aligned, "SCALED", share)
        found = crops(image, 40, np.random.default_rng(0), side=128)
        assert all((crop.codec is None) == bool(share) and crop.pixels.shape == (128, 128, 3) for crop in found)
        shown[share] = [int(crop.pixels.max()) - int(crop.pixels.min()) for crop in found]
    assert set(shown[0.0]) <= {63, 64, 65, 66}
    assert min(shown[1.0]) >= 62 and max(shown[1.0]) <= 130 and np.std(shown[1.0]) > 5


def test_an_image_of_just_the_side_gives_its_one_crop_and_a_smaller_one_none():
    exact = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for seed in range(10):
        assert np.array_equal(crops(encode(exact, "PNG"), 1, np.random.default_rng(seed))[0].pixels, exact)
    assert crops(encode(exact[1:], "PNG"), 1, np.random.default_rng(0)) == []
    assert aligned_pair(encode(exact[1:], "PNG"), identity, np.random.default_rng(0)) is None


@pytest.mark.parametrize("image", [jpeg(60), jpeg(95, "444"), jpeg(80, "Gray"), encode(data.astronaut(), "PNG")])
def test_a_perfect_autoencoder_leaves_no_difference_at_all(image: bytes):
    for seed in range(12):
        real, reconstruction = aligned_pair(image, identity, np.random.default_rng(seed))
        assert real.shape == reconstruction.shape == (256, 256, 3) and real.dtype == np.uint8
        assert np.array_equal(real, reconstruction)


def test_re_encoding_at_its_own_quality_leaves_the_real_image_nearly_as_it_was(native: None):
    for seed in range(5):
        crop = crops(jpeg(75), 1, np.random.default_rng(seed))[0]
        own, foreign = (psnr(crop.pixels[None], reencode(crop.pixels, Codec(quality, "420"))[None])[0] for quality in (75, 85))
        assert own > foreign + 3


def test_the_reconstruction_gets_the_quality_of_the_real_image(native: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(aligned, "MIXED", 0.0)
    rng = np.random.default_rng(0)
    _, reconstruction = aligned_pair(jpeg(40), smooth, rng)
    crop = crops(jpeg(40), 1, np.random.default_rng(0))[0]
    assert np.array_equal(reconstruction, reencode(smooth(crop.pixels[None])[0], Codec(40, "420")))


def test_a_grey_jpeg_stays_grey_on_both_sides(native: None):
    def tinted(images: np.ndarray) -> np.ndarray:
        return np.clip(images.astype(int) + [9, 0, -9], 0, 255).astype(np.uint8)

    for side in aligned_pair(jpeg(90, "Gray"), tinted, np.random.default_rng(0)):
        assert np.array_equal(side[..., 0], side[..., 2])


def test_mixing_moves_the_reconstruction_towards_the_real_pixels():
    real, other = np.full((2, 2, 3), 200, np.uint8), np.full((2, 2, 3), 100, np.uint8)
    assert [int(mix(real, other, share)[0, 0, 0]) for share in (0.0, 0.25, 1.0)] == [100, 125, 200]


def test_images_that_were_never_jpeg_meet_every_kind_of_file():
    drawn = [random_codec(np.random.default_rng(seed)) for seed in range(400)]
    share = sum(codec is None for codec in drawn) / len(drawn)
    assert abs(share - aligned.LOSSLESS) < 0.1
    assert {codec.quality for codec in drawn if codec} == set(range(80, 99))
    assert {codec.subsampling for codec in drawn if codec} == {"420", "444"}


def test_a_broken_image_is_an_error_of_its_own():
    with pytest.raises(DecodeError):
        aligned_pair(jpeg()[:500], identity, np.random.default_rng(0))


def test_psnr_of_a_known_error():
    real = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(real, real + np.array([0, 10], np.uint8)[:, None, None, None]) == pytest.approx([99, 28.1308], abs=1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> list[tuple[str, str]]:
    """Three good images of two sources, one that is too small, one that is broken."""
    files = {"a.jpg": jpeg(70), "b.png": encode(data.astronaut(), "PNG"), "c.jpg": jpeg(90, "444")}
    files |= {"small.png": encode(data.astronaut()[:100], "PNG"), "broken.jpg": b"\xff\xd8no"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return [(str(tmp_path / name), f"source of {name[0]}") for name in files]


def rows(out: Path, name: str) -> dict[str, np.ndarray]:
    """path -> (real, reconstruction) of all files of one autoencoder, sorted."""
    found = {}
    for path in sorted(out.glob(f"{name}-*.npz")):
        table = np.load(path, allow_pickle=False)
        assert len({len(table[key]) for key in table.files}) == 1
        for i in range(len(table["path"])):
            found[str(table["path"][i]), i] = {key: table[key][i] for key in table.files}
    return found


def test_a_pool_holds_raw_pairs_with_their_source_and_their_own_jpeg(folder: list[tuple[str, str]], tmp_path: Path):
    written = list(write_pairs(folder, {"blur": smooth}, tmp_path / "out", per_image=2, side=128, shard=100))
    assert [(path.name, count) for path, count, _ in written] == [("blur-000.npz", 6)] and 15 < written[0][2] < 60
    found = rows(tmp_path / "out", "blur")
    assert {Path(path).name for path, _ in found} == {"a.jpg", "b.png", "c.jpg"}
    for row in found.values():
        assert np.array_equal(smooth(row["real"][None])[0], row["reconstruction"])
        assert row["autoencoder"] == "blur" and row["source"] == f"source of {Path(str(row['path'])).name[0]}"
        own = {"a.jpg": (70, "420"), "b.png": (0, ""), "c.jpg": (90, "444")}[Path(str(row["path"])).name]
        assert (row["quality"], row["subsampling"]) in (own, (0, ""))


def test_a_stopped_pool_goes_on_and_ends_in_the_same_pairs(folder: list[tuple[str, str]], tmp_path: Path):
    autoencoders = {"blur": smooth, "same": identity}
    whole = [path.name for path, *_ in write_pairs(folder, autoencoders, tmp_path / "whole", 1, 128, shard=2)]
    assert whole == ["blur-000.npz", "blur-001.npz", "blur-002.npz", "same-000.npz", "same-001.npz", "same-002.npz"]
    run = write_pairs(folder, autoencoders, tmp_path / "stopped", 1, 128, shard=2)
    next(run), run.close()
    rest = [path.name for path, *_ in write_pairs(folder, autoencoders, tmp_path / "stopped", 1, 128, shard=2)]
    assert rest == whole[1:]
    for name in whole:
        first, second = (np.load(tmp_path / place / name) for place in ("whole", "stopped"))
        assert all(np.array_equal(first[key], second[key]) for key in first.files), name


def test_each_autoencoder_gets_crops_of_its_own(folder: list[tuple[str, str]], tmp_path: Path):
    list(write_pairs(folder, {"one": identity, "two": identity}, tmp_path / "out", 1, 128, shard=100))
    one, two = (np.load(tmp_path / "out" / f"{name}-000.npz") for name in ("one", "two"))
    assert np.array_equal(one["path"], two["path"]) and not np.array_equal(one["real"], two["real"])
