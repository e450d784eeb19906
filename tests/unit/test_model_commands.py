"""`k2 synthetic` and `k2 sae` on a small folder of pictures, through the command line."""

import contextlib
import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from curation import canonical, detector, labelled, sae, tags
from curation.schema import embedding_schema
from curation.shards import describe, file_hash, write_json, write_table
from curation.stages.artifacts import Artifacts
from curation.stages.embedding import Embedding
from curation.towers import Compact
from pipelines import sae as sae_command
from pipelines import synthetic as synthetic_command

NUM_GROUPS, PER_GROUP = 4, 9


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Real pictures are soft noise; synthetic ones carry a grid of period 4. One file is broken."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    lines = ["path\tlabel\tgenerator_or_source\tkind\tlicense"]
    for index in range(2 * NUM_GROUPS * PER_GROUP):
        synthetic, group = index % 2, index // 2 % NUM_GROUPS
        coarse = rng.integers(40, 200, (6, 6, 3)).astype(np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((64 + 4 * group, 64), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = pixels + rng.integers(-8, 9, pixels.shape)
        if synthetic:
            pixels[::4, ::4] += 30
        name = f"{'fake' if synthetic else 'real'}{group}/{index:03}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name)
        lines.append(f"{name}\t{'synthetic' if synthetic else 'real'}\t{name.split('/')[0]}\tphoto\tours")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    lines += ["broken.png\treal\treal0\tphoto\tours", "real0/000.png\tmixed\tnobody\tphoto\tours"]
    (folder / "MANIFEST.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def small_crops():
    """The pictures have 64 pixels a side, so that crops of 48 stand for those of 256."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canonical, "SIDE", 48)
        yield


@pytest.fixture(scope="module")
def detector_here(pictures, small_crops, tmp_path_factory):
    """(folder of a detector fitted on the pictures, what was printed)."""
    out, printed = str(tmp_path_factory.mktemp("models") / "here"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert synthetic_command.main(["fit", *where(pictures), "--towers", "compact", "--out", out]) == 0
    return out, printed.getvalue()


def where(pictures):
    return ["--images", str(pictures), "--manifest", str(pictures / "MANIFEST.tsv")]


def test_a_detector_is_fitted_and_judged_and_the_broken_image_is_counted(detector_here):
    out, printed = detector_here
    info = detector.load(out).info
    half = NUM_GROUPS * PER_GROUP
    counts = {"real": half, "synthetic": half, "with_crop": 2 * half, "unreadable": 1, "sources": NUM_GROUPS, "generators": NUM_GROUPS}
    assert {name: info["data"][name] for name in counts} == counts
    assert info["evaluation"]["views"]["crop"]["mean"]["auroc"] > 0.9
    assert "image area alone" in printed and "real against real" in printed and json.loads(printed.splitlines()[-1])["out"] == out
    assert info["command"].startswith("k2 synthetic fit --images") and info["tower_specs"] == {"pixels": "compact"}


def test_images_of_the_fit_are_recognised_and_new_ones_judged_without_a_manifest(pictures, detector_here, tmp_path, capsys):
    out, _ = detector_here
    assert synthetic_command.main(["eval", "--model", out, *where(pictures)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["fitted_on_these"] and "What the fit kept" in printed
    assert result["views"] == detector.load(out).info["evaluation"]["views"]

    for name in ("real0", "real1", "fake2"):
        label = "synthetic" if name.startswith("fake") else "real"
        shutil.copytree(pictures / name, tmp_path / "new" / label / name)
    figures = tmp_path / "figures"
    assert synthetic_command.main(["eval", "--model", out, "--images", str(tmp_path / "new"), "--out", str(figures)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not result["fitted_on_these"] and result["num"]["real"] == 2 * PER_GROUP
    assert [entry["generator"] for entry in result["views"]["crop"]["generators"]] == ["fake2"]
    assert {entry["name"] for entry in result["losses"]["whole"]["sources"]} == {"real0", "real1"}
    assert sorted(path.name for path in figures.iterdir()) == ["generators.png", "recall.png", "reliability.png"]
    assert all(Image.open(path).size[0] > 300 for path in figures.iterdir())


def test_one_image_is_scored_with_its_evidence_and_a_heat_map(pictures, detector_here, tmp_path, capsys):
    out, _ = detector_here
    declared = tmp_path / "declared.png"
    text = PngInfo()
    text.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd15")
    Image.open(pictures / "real0" / "000.png").resize((700, 300)).save(declared, pnginfo=text)
    paths = [str(pictures / "fake0" / "001.png"), str(pictures / "real0" / "000.png"), str(declared), str(pictures / "broken.png")]
    assert synthetic_command.main(["score", *paths, "--model", out, "--out", str(tmp_path / "maps")]) == 1
    fake, real, said, broken = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert fake["p_synthetic"] > 0.5 > real["p_synthetic"] and fake["real_share"] < real["real_share"]
    assert fake["p_pixels"] == pytest.approx(fake["p_synthetic"]) and fake["p_semantics"] is None and fake["kind"] is None
    assert said["declared"] == "plain" and said["provenance"]["generator"] == "a1111" and said["log_odds"]["declared"] > 5
    assert broken.keys() == {"path", "error"}
    assert len(fake["crops"]) == 1 and len(said["crops"]) == 6
    covered = np.zeros((300, 700), bool)
    for crop in said["crops"]:
        top, left, height, width = crop["box"]
        covered[top : top + height, left : left + width] = True
    assert covered.all()
    assert Image.open(said["heat_map"]).size[0] > 500


def test_scores_of_a_networks_own_folds_are_read_by_path(pictures, small_crops, tmp_path, capsys):
    entries = [entry for entry in labelled.entries(str(pictures), str(pictures / "MANIFEST.tsv")) if entry.path != "broken.png"]
    rng = np.random.default_rng(0)
    order = rng.permutation(len(entries))
    scores = np.array([2.0 if entries[i].synthetic else -2.0 for i in order])[:, None] + rng.normal(size=(len(entries), 2))
    arrays = {"path": np.array([entries[i].path for i in order]), "views": np.array(["whole", "crop"]), "pixels": scores}
    arrays |= {"weight": np.ones(Compact.dim, np.float32), "bias": np.float64(0.5)}
    np.savez(tmp_path / "s.npz", **arrays)
    fit = ["fit", *where(pictures), "--towers", "compact", "--scores", str(tmp_path / "s.npz"), "--out", str(tmp_path / "d")]
    assert synthetic_command.main(fit) == 0
    found = detector.load(str(tmp_path / "d"))
    assert (found.heads["pixels"].weight == 1).all() and found.heads["pixels"].bias == 0.5
    assert 1.5 < found.calibration.platt["pixels"][0] < 6  # log odds of normals of deviation 1 at -2 and 2 are 4 x
    assert found.info["evaluation"]["views"]["jpeg 75"] == {"generators": []}, "views without given scores have no figures"
    capsys.readouterr()
    np.savez(tmp_path / "s.npz", **{name: array for name, array in arrays.items() if name != "weight"})
    assert synthetic_command.main(fit) == 2 and "lacks the arrays weight" in capsys.readouterr().err
    np.savez(tmp_path / "s.npz", **arrays | {"path": np.char.add("elsewhere/", arrays["path"])})
    assert synthetic_command.main(fit) == 2 and "for 0 of 72 images" in capsys.readouterr().err


def test_two_towers_of_one_branch_are_refused(pictures, tmp_path, capsys):
    assert synthetic_command.main(["fit", *where(pictures), "--towers", "effnet", "siglip", "--out", str(tmp_path / "x")]) == 2
    assert "one for semantics" in capsys.readouterr().err


def test_a_folder_without_labels_is_refused(tmp_path, capsys):
    assert synthetic_command.main(["fit", "--images", str(tmp_path), "--towers", "compact", "--out", str(tmp_path / "x")]) == 2
    assert "real/<source>/" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda tsv: tsv.replace("generator_or_source", "source"), "lacks the columns generator_or_source"),
        (lambda tsv: tsv.replace("real\t", "camera\t").replace("synthetic\t", "ai\t"), "no row with the label real or synthetic"),
        (lambda tsv: tsv.replace("real", "nowhere/real").replace("fake", "nowhere/fake").replace("broken", "gone"), "could be read under"),
    ],
)
def test_a_manifest_that_cannot_work_is_refused(pictures, tmp_path, capsys, change, text):
    manifest = tmp_path / "MANIFEST.tsv"
    original = (pictures / "MANIFEST.tsv").read_text()
    changed = change(original)
    if "nowhere" in changed:
        changed = changed.replace("nowhere/real\t", "real\t").replace("\tnowhere/", "\t")
    manifest.write_text(changed)
    arguments = ["fit", "--images", str(pictures), "--manifest", str(manifest), "--towers", "compact", "--out", str(tmp_path / "p")]
    assert synthetic_command.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_an_sae_is_fitted_measured_and_tagged(pictures, tmp_path, capsys):
    out = str(tmp_path / "sae-here")
    fit = ["fit", "--tower", "compact", "--images", str(pictures), "--out", out, "--views", "6", "--features", "32", "--k", "4"]
    assert sae_command.main([*fit, "--epochs", "20"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["features"] == 32 and result["explained_variance"] > 0.3
    model = sae.load(out)
    assert model.metadata["tower_spec"] == "compact" and model.metadata["evaluation"]["l0"] == result["l0"]
    assert (tmp_path / "sae-here" / sae.WEIGHTS_FILE).stat().st_size < Compact.dim * 32 * 4 * 2, "the matrices are stored as float16"
    assert Artifacts(out).tower.name == "compact"

    assert sae_command.main(["eval", "--model", out, "--images", str(pictures)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"model", "fit", "estimate", "report"}

    where = ["--images", str(pictures), "--manifest", str(pictures / "MANIFEST.tsv"), "--kept", str(tmp_path / "kept")]
    assert sae_command.main(["tag", "--model", out, *where, "--others", out]) == 0
    told, said = json.loads((tmp_path / "sae-here" / "tags.json").read_text()), capsys.readouterr()
    assert sum(told["pictures"].values()) == NUM_GROUPS * PER_GROUP, "only the real images of the manifest"
    assert "prove a budget of" in said.err and "0.50%" in said.err, "so few pictures prove less than was asked"
    rows = tags.read_csv(tmp_path / "sae-here.tags.csv")
    assert len(rows) == len(told["features"]) == json.loads(said.out.splitlines()[-1])["num_tags"]
    assert not any(row.signed for row in rows), "a proposal is nobody's word"
    assert {(row.tower, row.weights) for row in rows} <= {(Compact().identity, file_hash(tmp_path / "sae-here" / sae.WEIGHTS_FILE))}
    assert all(feature["stability"] == pytest.approx(1) for feature in told["features"].values()), "it is its own match"
    before = (tmp_path / "sae-here" / "tags.json").read_bytes()
    assert sae_command.main(["tag", "--model", out, *where, "--others", out]) == 0
    assert (tmp_path / "sae-here" / "tags.json").read_bytes() == before


def test_an_sae_is_fitted_on_the_vectors_of_a_run_and_not_on_another_towers(tmp_path, capsys):
    tower, rng = Compact(), np.random.default_rng(0)
    vectors = (rng.random((400, 5)) @ rng.normal(size=(5, tower.dim))).astype(np.float16)
    columns = {"vector": [vector.tobytes() for vector in vectors[:-1]] + [None], "error": [None] * 399 + ["broken"]}
    table = pa.table({"uid": [f"a/{i}" for i in range(400)], **columns}, embedding_schema(tower.dim))
    write_table(table, tmp_path / "run" / "annotations" / "compact" / "a.parquet", "x")
    described = {"description": {"stages": {"compact": {"description": describe(Embedding(tower))}}}}
    write_json(described, tmp_path / "run" / "run.json")
    fit = ["fit", "--tower", "compact", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "sae"), "--features", "32", "--k", "5"]
    assert sae_command.main([*fit, "--epochs", "60"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["explained_variance"] > 0.8
    assert sum(sae.load(str(tmp_path / "sae")).metadata["data"].values()) == 399

    described["description"]["stages"]["compact"]["description"]["tower"]["identity"] = "compact/forensics/0"
    write_json(described, tmp_path / "run" / "run.json")
    assert sae_command.main(fit) == 2
    assert "fitted on compact/forensics/0" in capsys.readouterr().err


def test_an_sae_needs_images_or_a_run_and_not_both(tmp_path, capsys):
    assert sae_command.main(["fit", "--tower", "compact", "--out", str(tmp_path / "x")]) == 2
    assert "--images (a source) or --run" in capsys.readouterr().err
    assert sae_command.main(["fit", "--tower", "compact", "--out", str(tmp_path / "x"), "--run", str(tmp_path)]) == 2
    assert "no annotations/compact" in capsys.readouterr().err
