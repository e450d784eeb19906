"""Cards of features: which images they show, what they count, and the files of a page."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import encode, photographs
from PIL import Image
from test_sae_eval import contrasts

from curation import atlas, compact, firing, reviews, sae, sprites
from curation.fitted import tower_spec
from curation.shards import file_hash, write_json
from curation.towers import Compact, EffNet
from pipelines import sae as command
from pipelines.atlas_page import cover

FEATURES = 12


def test_strips_cover_the_range_of_a_feature_and_both_sides_of_its_threshold():
    values = np.linspace(-1, 1, 401)[np.random.default_rng(0).permutation(401)]
    found = atlas.strips(values, threshold=0.5, fires=0.0, below=True)
    shown = {name: values[rows] for name, rows in found.items()}
    assert shown["strongest"] == pytest.approx(np.linspace(1, 1 - 11 * 0.005, 12))
    assert shown["above"].min() == pytest.approx(0.505) and shown["below"].max() == pytest.approx(0.5) and len(shown["below"]) == 8
    for name, middle in (("upper", 0.75), ("middle", 0.5), ("lower", 0.25)):
        assert abs(shown[name].mean() - middle) < 0.01 and len(shown[name]) == 8
    assert all((np.diff(rows) < 0).all() for rows in shown.values())


def test_a_feature_that_fires_on_few_images_shows_each_once_and_a_silent_one_none():
    values = np.array([0.0, 0.9, 0.0, 0.7, 0.2, 0.0])
    few = atlas.strips(values, threshold=0.5, fires=0.1, below=False)
    assert few["strongest"].tolist() == [1, 3, 4] and few["above"].tolist() == [1, 3] and few["below"].tolist() == [4]
    assert not any(len(few[name]) for name in atlas.QUANTILES)
    silent = atlas.strips(np.zeros(6), threshold=0.5, fires=0.1, below=False)
    assert not any(len(rows) for rows in silent.values())
    assert len(atlas.strips(np.zeros(6), 0.5, 0.1, below=True)["below"]) == 6


def test_families_are_counted_on_pictures_that_took_no_part_in_any_choice():
    whole = contrasts()
    values = whole.vectors[:, :, 0]
    values[whole.part != "report"] = 1e6
    found = {(one["name"], one["severity"]): one for one in atlas.families(whole, values, threshold=2.0)}
    assert found["seen", 5]["auroc"] > 0.97 > found["seen", 1]["auroc"] > 0.6 and 0.3 < found["unseen", 3]["auroc"] < 0.7
    assert found["seen", 5]["share"] > 0.9 and found["clean", 0]["auroc"] is None
    num = int((whole.part == "report").sum())
    assert found["mist", 0]["num"] == num > found["seen", 1]["num"] > 0, "pictures without the family do not count"
    assert found["mist", 0]["share"] < found["mist", 0]["upper"] < 0.3
    assert found["mist", 0]["role"] == "style" and found["mirror", 0]["role"] == "control"


def test_the_damaged_pictures_to_show_are_the_strongest_each_once():
    whole = contrasts()
    found = atlas.made(whole, whole.vectors[:, :, 0])
    assert len({picture for picture, *_ in found}) == len(found) == atlas.STRIP
    assert {whole.families[family] for _, family, _ in found} == {("seen", "damage", 5)}
    values = [value for *_, value in found]
    assert values == sorted(values, reverse=True) and values[0] == pytest.approx(float(whole.vectors[:, 2, 0].max()))


def test_the_upper_bound_is_that_of_clopper_and_pearson():
    whole = contrasts()
    values = np.zeros(whole.vectors.shape[:2])
    (one,) = [one for one in atlas.families(whole, values, 1.0) if one["name"] == "mist"]
    assert one["upper"] == pytest.approx(1 - 0.05 ** (1 / one["num"]))


def test_places_of_the_tokens_tile_what_the_tower_looks_at():
    image = np.zeros((400, 600, 3), np.uint8)
    boxes = sprites.places(EffNet(), image)
    side = 400 * 260 / 292
    assert len(boxes) == 81 and (boxes[:, 2] > boxes[:, 0]).all()
    assert boxes[0, :2].tolist() == [round(200 - side / 2), round(300 - side / 2)]
    assert boxes[-1, 2:].tolist() == [round(200 + side / 2), round(300 + side / 2)]
    assert (sprites.places(Compact(), image) == compact.boxes(image)).all()


def test_a_heat_map_colours_the_strong_place_and_dims_where_nobody_looked():
    image = np.full((128, 128, 3), 100, np.uint8)
    boxes = np.array([[0, 0, 64, 64], [0, 64, 64, 128]])
    heat = sprites.overlay(image, boxes, np.array([2.0, 0.0]), top=2.0).astype(int)
    assert heat.shape == (128, 128, 3)
    assert heat[20, 20, 0] > 150 > heat[20, 100, 0] > heat[100, 100, 0], "strong, silent, not looked at"


def test_a_sprite_holds_every_picture_where_it_says():
    rng = np.random.default_rng(0)
    pictures = [np.full((int(h), int(w), 3), 20 * i, np.uint8) for i, (h, w) in enumerate(rng.integers(40, 129, (12, 2)))]
    encoded, boxes = sprites.sprite(pictures, 95)
    sheet = np.asarray(Image.open(io.BytesIO(encoded)))
    assert sheet.shape[1] <= sprites.WIDTH
    for picture, (left, top, width, height) in zip(pictures, boxes, strict=True):
        inside = sheet[top + 4 : top + height - 4, left + 4 : left + width - 4].astype(int)
        assert (height, width) == picture.shape[:2] and abs(inside - int(picture[0, 0, 0])).max() < 12


@pytest.mark.parametrize("num, right", [(1, 0), (2, 1), (5, 1), (6, 2), (9, 2)])
def test_a_cover_is_filled_by_one_two_or_six_pictures(num, right):
    pictures = [np.full((90, 128, 3), 25 * i, np.uint8) for i in range(num)]
    sheet = np.asarray(Image.open(io.BytesIO(cover(pictures)))).astype(int)
    assert sheet.shape == (184, 276, 3) and abs(sheet[5, 5, 0]) < 8 and abs(sheet[5, -5, 0] - 25 * right) < 8


def test_pixels_at_native_scale_are_not_resized():
    image = np.random.default_rng(0).integers(0, 256, (500, 700, 3)).astype(np.uint8)
    found = sprites.native(image, np.array([0, 0, 40, 40]))
    assert (found == image[:192, :192]).all()
    assert (sprites.native(image, None) == image[154:346, 254:446]).all()
    assert sprites.native(image[:50, :60], None).shape == (50, 60, 3)


# --- the commands ---


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """14 pictures, one of them broken, and an SAE of the compact tower whose features fire on about a third of them."""
    folder, tower = tmp_path_factory.mktemp("cards"), Compact()
    (folder / "pictures").mkdir()
    for i, pixels in enumerate(photographs(14, side=140)):
        (folder / "pictures" / f"<b>{i:02}.png").write_bytes(encode(pixels, "PNG"))
    (folder / "pictures" / "broken.png").write_bytes(b"\x89PNG")
    for name, seed in (("sae-here", 0), ("sae-other", 1)):
        w = np.random.default_rng(seed).normal(size=(FEATURES, tower.dim)).astype(np.float32) / 10
        w = torch.from_numpy(w)
        metadata = {"tower": tower.identity, "tower_spec": tower_spec(tower), "training": {"k": 4}}
        model = sae.Sae(w.T.contiguous(), torch.zeros(FEATURES), w, torch.zeros(tower.dim), torch.full((FEATURES,), 0.5), metadata)
        sae.save(model, folder / name)
    model = firing.read_fitted(str(folder / "sae-here"))
    row = {"model": "sae-here", "tag": "halo", "verdict": "artifact", "threshold": 0.9, "reviewers": ""}
    row |= {"tower": model.tower.identity, "weights": model.weights}
    reviews.write_rows([row | {"feature": 2}], folder / "sae-here")
    evidence = {"threshold": 0.9, "names": ["halo", {"name": "bright edge", "score": 0.8}], "auroc": {"oversharpen": 0.91}, "p": 1e-9}
    write_json({"features": {"2": evidence | {"tag": "halo"}, "4": {"threshold": 0.7}}}, folder / "sae-here" / "tags.json")
    return folder


@pytest.fixture(scope="module")
def page(world):
    out = world / "atlas"
    where = ["--images", str(world / "pictures"), "--out", str(out), "--other", str(world / "sae-other")]
    assert command.main(["atlas", "--model", str(world / "sae-here"), *where]) == 0
    return out


def card_of(page, feature):
    text = (page / "features" / f"{feature}.js").read_text()
    assert text.startswith(f"feature({feature}, ") and text.endswith(");\n")
    return json.loads(text[len(f"feature({feature}, ") : -3])


def test_an_atlas_holds_a_line_and_a_card_of_every_feature(page):
    data = json.loads((page / "data.js").read_text().removeprefix("window.ATLAS = ").removesuffix(";\n"))
    columns = data["columns"]
    assert columns["feature"] == list(range(FEATURES)) and {len(column) for column in columns.values()} == {FEATURES}
    assert (columns["tag"][2], columns["name"][2], columns["verdict"][2], columns["kind"][2]) == ("halo", "halo", "artifact", "oversharpen")
    assert columns["threshold"][2] == 0.9 and columns["threshold"][4] == 0.7 and columns["threshold"][5] == 0.5
    assert all(-1 <= match <= 1 for match in columns["match"]) and data["other"] == "sae-other"
    for feature in range(FEATURES):
        card = card_of(page, feature)
        assert card["num"] == 14 and card["rate"] == columns["rate"][feature]
        assert (page / "features" / f"{feature}-cover.jpg").exists() == bool(columns["cover"][feature]) == (card["rate"] > 0)


def test_a_card_points_into_its_sprites(page):
    card = card_of(page, 2)
    sheet = Image.open(page / "features" / "2.jpg")
    assert list(sheet.size) == card["sprite"]
    for name, above in (("strongest", None), ("above", True), ("below", False)):
        for _, value, box in card["strips"][name]:
            assert box[0] + box[2] <= sheet.width and box[1] + box[3] <= sheet.height
            assert above is None or (value > 0.9) == above
    details = Image.open(page / "features" / "2-detail.jpg")
    assert list(details.size) == card["detail_sprite"] and card["details"]
    assert all(heat[2] <= 128 and crop[2:] == [140, 140] for _, heat, crop in card["details"])


def test_values_of_a_card_are_those_of_the_stage(world, page):
    looked = firing.of_images(firing.read_fitted(str(world / "sae-here")), str(world / "pictures"))
    column = looked.columns([2])[:, 0]
    expected = sae.activations(looked.fitted.sae, torch.from_numpy(looked.vectors))[:, 2].numpy()
    assert np.where(column > 0.5, column, 0) == pytest.approx(expected, abs=1e-5)
    (first, value, _), *_ = card_of(page, 2)["strips"]["strongest"]
    assert looked.uids[column.argmax()] == first and value == pytest.approx(column.max(), rel=1e-3)


def test_the_same_command_writes_the_same_bytes_and_another_folder_is_left_alone(world, page, capsys):
    before = {path.name: path.read_bytes() for path in page.rglob("*") if path.is_file()}
    where = ["--model", str(world / "sae-here"), "--images", str(world / "pictures"), "--other", str(world / "sae-other")]
    assert command.main(["atlas", *where, "--out", str(page)]) == 0
    assert {path.name: path.read_bytes() for path in page.rglob("*") if path.is_file()} == before
    assert command.main(["atlas", *where, "--out", str(world / "pictures")]) == 2
    assert "which is no part of an atlas; give a new folder" in capsys.readouterr().err


def test_choices_of_the_page_become_rows_of_the_tag_table(world, tmp_path, capsys):
    folder = tmp_path / "sae-here"
    shutil.copytree(world / "sae-here", folder)
    shutil.copy(world / "sae-here.tags.csv", tmp_path)
    weights, tower = file_hash(folder / sae.WEIGHTS_FILE), Compact().identity
    made = {"kind": "k2 sae choices", "model": "sae-here", "tower": tower, "weights": weights}
    ada = made | {
        "reviewer": "Ada",
        "choices": {"2": {"verdict": "artifact", "tag": "halo", "threshold": 0.9}, "7": {"verdict": "style", "tag": "x"}},
    }
    bo = made | {"reviewer": "Bo", "choices": {"2": {"verdict": "artifact"}, "7": {"verdict": "content", "tag": "y"}}}
    paths = [tmp_path / "ada.json", tmp_path / "bo.json"]
    for path, content in zip(paths, (ada, bo), strict=True):
        path.write_text(json.dumps(content))
    assert command.main(["review", "--model", str(folder), "--choices", *map(str, paths)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) | {"out": ""} == {"out": "", "reviewed": 2, "tags": 2, "may_remove": 1}
    rows = {row["feature"]: row for row in reviews.read_rows(folder)}
    assert (rows[2]["verdict"], rows[2]["reviewers"], rows[7]["verdict"]) == ("artifact", "Ada;Bo", "mixed")

    paths[0].write_text(json.dumps(ada | {"weights": "000000000000"}))
    assert command.main(["review", "--model", str(folder), "--choices", str(paths[0])]) == 2
    assert "was made with weights 000000000000" in capsys.readouterr().err
    paths[0].write_text(json.dumps(ada | {"tower": "effnet/x/1"}))
    assert command.main(["review", "--model", str(folder), "--choices", str(paths[0])]) == 2
    assert "was made with tower effnet/x/1" in capsys.readouterr().err


def test_a_notebook_signs_with_a_plain_call(world, tmp_path):
    folder = tmp_path / "sae-here"
    shutil.copytree(world / "sae-here", folder)
    row = atlas.decide(str(folder), 3, "style", reviewer="Ada", tag="mist")
    assert (row["tag"], row["verdict"], row["reviewers"], row["threshold"]) == ("mist", "style", "Ada", pytest.approx(0.5))
    assert [one["feature"] for one in reviews.read_rows(folder)] == [3]


def test_an_atlas_needs_images_or_a_run_and_the_same_tower(world, tmp_path, capsys):
    model = ["--model", str(world / "sae-here"), "--out", str(tmp_path / "x")]
    assert command.main(["atlas", *model]) == 2
    assert "--run (an annotated run folder) or --images" in capsys.readouterr().err
    other = shutil.copytree(world / "sae-here", tmp_path / "other")
    config = json.loads((other / "cfg.json").read_text())
    config["metadata"] |= {"tower": EffNet().identity, "tower_spec": "effnet"}
    (other / "cfg.json").write_text(json.dumps(config))
    assert command.main(["atlas", *model, "--images", str(world / "pictures"), "--other", str(other)]) == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert command.main(["atlas", *model, "--run", str(tmp_path), "--contrast", "kept"]) == 2
    assert "--contrast goes with --images" in capsys.readouterr().err


def test_eval_prints_what_is_kept_and_what_comes_back(world, capsys):
    where = ["--images", str(world / "pictures")]
    assert command.main(["eval", "--model", str(world / "sae-here"), *where, "--other", str(world / "sae-here")]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    assert "about the mean of these images" in printed and "100.0% of the features come back" in printed
    assert figures["stability"][str(world / "sae-here")]["matched"] == 1
    some = figures["fit"]
    assert some["num_rows"] > 1 and {"monosemanticity", "neighbours_kept", "dense"} <= set(some)
    assert command.main(["eval", "--model", str(world / "sae-here"), *where, "--texts", "classes.txt"]) == 2
    assert "a SigLIP-2; " in capsys.readouterr().err
