"""`k2 synthetic` and `k2 sae` on a small folder of pictures, through the command line."""

import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation import detector, sae, tags
from curation.schema import embedding_schema
from curation.shards import describe, write_json, write_table
from curation.stages.artifacts import Artifacts
from curation.stages.embedding import Embedding
from curation.stages.synthetic import Synthetic
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


def test_a_probe_is_fitted_judged_and_used_and_the_broken_image_is_counted(pictures, tmp_path, capsys):
    out, where = str(tmp_path / "probe"), ["--images", str(pictures), "--manifest", str(pictures / "MANIFEST.tsv")]
    assert synthetic_command.main(["fit", *where, "--tower", "compact", "--out", out]) == 0
    printed = capsys.readouterr().out
    info = json.loads((tmp_path / "probe" / detector.INFO_FILE).read_text())
    half = NUM_GROUPS * PER_GROUP
    assert info["data"] | {"manifest": ""} == {
        "manifest": "",
        "num_real": half,
        "num_synthetic": half,
        "num_undecodable": 1,
        "sources": NUM_GROUPS,
        "generators": NUM_GROUPS,
    }
    assert info["evaluation"]["disjoint"]["mean"]["auroc"] > 0.95
    assert "image area alone" in printed and json.loads(printed.splitlines()[-1])["out"] == out
    assert info["command"].startswith("k2 synthetic fit --images")
    assert Synthetic(out).load("cpu") is not None

    assert synthetic_command.main(["eval", "--model", out, *where]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["fitted_on_these"] and "the figures above flatter it" in printed
    assert result["disjoint"] == info["evaluation"]["disjoint"]["mean"]
    assert {entry["name"] for entry in result["sources"]} == {f"real{group}" for group in range(NUM_GROUPS)}


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
    arguments = ["fit", "--images", str(pictures), "--manifest", str(manifest), "--tower", "compact", "--out", str(tmp_path / "p")]
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
    assert (tmp_path / "sae-here" / sae.WEIGHTS_FILE).stat().st_size < 254 * 32 * 4 * 2, "the matrices are stored as float16"
    assert Artifacts(out).tower.name == "compact"

    assert sae_command.main(["eval", "--model", out, "--images", str(pictures)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"model", "fit", "estimate", "report"}

    where = ["--images", str(pictures), "--manifest", str(pictures / "MANIFEST.tsv")]
    assert sae_command.main(["tag", "--model", out, *where]) == 2
    assert "cannot show a share of 4.0%; it takes 74" in capsys.readouterr().err
    assert sae_command.main(["tag", "--model", out, *where, "--budget", "0.6"]) == 0
    evidence = json.loads((tmp_path / "sae-here" / "tags.json").read_text())
    assert sum(evidence["pictures"].values()) == NUM_GROUPS * PER_GROUP, "only the real images of the manifest"
    rows = tags.read_csv(tmp_path / "sae-here.tags.csv")
    assert len(rows) == len(evidence["tags"]) == json.loads(capsys.readouterr().out.splitlines()[-1])["num_tags"]


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
