"""The vectors of a contrast set: who gets what, what is kept, and that a changed picture can be made again."""

import io
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from curation import contrast_set
from curation.contrast import CONTROLS, DAMAGE, STYLES
from curation.contrast_set import CLEAN, FAMILIES, Family, changed, generator, planned, read, sources_of
from curation.tags import PARTS


@dataclass(frozen=True)
class Means:
    """A tower whose vector is the mean colour and the spread of an image; it counts what it embeds."""

    name: str = "means"
    identity: str = "means/1"
    dim: int = 4
    seen = []  # noqa: RUF012 - of all instances

    def prepare(self, images):
        return np.stack([[*image.reshape(-1, 3).mean(0), image.std()] for image in images]).astype(np.float32)

    def load(self, device):
        return SimpleNamespace(pooled=lambda rows: (self.seen.append(len(rows)), rows)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, lines = tmp_path_factory.mktemp("images"), ["path\tlabel\tgenerator_or_source\tkind"]
    for index in range(18):
        pixels = np.random.default_rng(index).integers(0, 256, (30, 40, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (place / f"{index:02}.png").write_bytes(buffer.getvalue())
        lines.append(f"{index:02}.png\treal\tsource{index % 2}\t{'art' if index % 3 == 0 else 'photo'}")
    (place / "broken.png").write_bytes(b"\x89PNG")
    lines += ["broken.png\treal\tsource0\tphoto"]
    (place / "MANIFEST.tsv").write_text("\n".join(lines) + "\n")
    return place


def test_every_picture_is_damaged_and_only_those_that_set_thresholds_are_restyled():
    for where in PARTS:
        plans = [planned(f"s/{i}", where, 0) for i in range(200)]
        severities = [f.severity for plan in plans for f in plan if f.role == "damage"]
        assert all(plan[0] == CLEAN and len({f.name for f in plan}) == len(plan) for plan in plans), "one severity of a kind"
        assert np.bincount(severities, minlength=6)[1:].min() > 0.15 * len(severities)
        names = {f.name for plan in plans for f in plan}
        assert set(DAMAGE) <= names and (set(STYLES | CONTROLS) <= names) == (where != "fit")
    assert len(planned("s/1", "fit", 0)) == 1 + round(2 / 3 * len(DAMAGE))
    assert planned("s/1", "fit", 0) == planned("s/1", "fit", 0) != planned("s/1", "fit", 1)


def test_vectors_stay_where_they_are_kept_and_only_the_missing_are_made(folder, tmp_path, capsys):
    only = sources_of(str(folder / "MANIFEST.tsv"))
    Means.seen.clear()
    some = read(str(folder), Means(), {key: only[key] for key in sorted(only)[:17]}, kept=str(tmp_path))
    made = len(Means.seen)
    whole = read(str(folder), Means(), only, kept=str(tmp_path))
    assert made == 17 and len(Means.seen) == 18, "one new picture"
    fresh = read(str(folder), Means(), only)
    np.testing.assert_array_equal(whole.vectors, fresh.vectors)
    np.testing.assert_array_equal(some.vectors, whole.vectors[: len(some.uids)])
    assert "broken.png: a PNG whose header cannot be read" in capsys.readouterr().err and len(whole.uids) == 18
    assert whole.tower == "means/1" and sorted(set(whole.groups)) == ["source0", "source1"]


def test_real_art_is_a_style_family_of_clean_pictures(folder):
    contrast = read(str(folder), Means(), sources_of(str(folder / "MANIFEST.tsv")))
    art = FAMILIES.index(Family("art", "style", 0))
    has = ~np.isnan(contrast.vectors[:, art, 0])
    assert has.sum() == 6
    np.testing.assert_array_equal(contrast.vectors[has, art], contrast.vectors[has, 0])


def test_a_changed_picture_can_be_made_again(folder):
    contrast = read(str(folder), Means())
    picture = next(p for p in contrast_set.pictures(str(folder)) if p.uid == contrast.uids[0])
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded)))
    for number in np.flatnonzero(~np.isnan(contrast.vectors[0, :, 0])):
        family = contrast.families[number]
        again = changed(pixels, family, generator(picture.uid, family, contrast.seed))
        np.testing.assert_allclose(Means().prepare([again])[0], contrast.vectors[0, number])


def test_a_part_without_pictures_is_refused(folder):
    with pytest.raises(ValueError, match="every part needs some"):
        read(str(folder), Means(), {"00.png"})
