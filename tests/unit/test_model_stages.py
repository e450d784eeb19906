"""The stages `synthetic` and `artifacts`, with the models that ship and with models of another tower."""

import io
import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from curation import detector, firing, fitted, reviews, sae, towers
from curation.annotate import stage_fingerprint
from curation.decode import ImageBatch, decode
from curation.faults import encode
from curation.stages.artifacts import Artifacts
from curation.stages.embedding import Embedding
from curation.stages.synthetic import Synthetic
from curation.towers import Compact, EffNet, Siglip

STAGES = [Synthetic("synthetic"), Artifacts("sae-compact")]


def batch(num: int = 4) -> ImageBatch:
    rng = np.random.default_rng(0)
    pictures = [np.kron(rng.integers(0, 256, (9, 12, 3)), np.ones((16, 16, 1))).astype(np.uint8) for _ in range(num)]
    encoded = [encode(picture) for picture in pictures]
    images, headers = zip(*(decode(data) for data in encoded), strict=True)
    return ImageBatch([f"a/{i}" for i in range(num)], encoded, list(images), list(headers))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.model)
def test_a_stage_gives_one_value_per_image_in_the_columns_of_its_schema(stage):
    columns = stage.load("cpu")(batch())
    assert ["uid", *columns, "error"] == stage.schema.names
    if stage.name == "synthetic":
        for name in ("p_synthetic", "p_pixels", "p_semantics", "real_share"):
            assert columns[name].dtype == np.float32 and columns[name].shape == (4,)
            assert (columns[name] > 0).all() and (columns[name] <= 1).all()
        assert columns["declared"] == [None] * 4
        assert set(columns["kind"].tolist()) <= set(detector.load(stage.model).info["kinds"])
    else:
        num_features = sae.load(stage.model).num_features
        assert len(columns["codes"]) == 4
        for codes in columns["codes"].to_pylist():
            found = [code["value"] for code in codes]
            assert 0 < len(found) <= 32 and found == sorted(found, reverse=True) and found[-1] > 0
            assert all(0 <= code["feature"] < num_features for code in codes)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.model)
def test_an_image_gets_the_same_bits_alone_and_in_a_batch(stage):
    compute, whole = stage.load("cpu"), batch()
    alone = [compute(ImageBatch([whole.uids[i]], [whole.encoded[i]], [whole.images[i]], [whole.headers[i]])) for i in range(4)]
    for column, values in compute(whole).items():
        assert list(values) == [one[column][0] for one in alone]


def test_the_tagged_features_alone_have_the_values_that_they_have_among_all(tmp_path):
    folder = tmp_path / "sae-here"
    shutil.copytree(fitted.WEIGHTS_DIR / "sae-compact", folder)
    images = batch()
    everything = Artifacts(str(folder), k=512).load("cpu")(images)["codes"].to_pylist()
    chosen = {codes[0]["feature"] for codes in everything} | {3}
    row = {"model": "sae-here", "tag": "x", "verdict": "unknown", "threshold": 0.1, "reviewers": "", "tower": "", "weights": ""}
    reviews.write_rows([row | {"feature": feature} for feature in chosen], folder)
    tagged = Artifacts(str(folder), only_tags=True)
    assert tagged.load("cpu")(images)["codes"].to_pylist() == [
        [code for code in codes if code["feature"] in chosen] for codes in everything
    ]
    assert tagged.describe()["features"] == sorted(chosen) and pickle.loads(pickle.dumps(tagged)) == tagged
    assert stage_fingerprint(tagged) != stage_fingerprint(Artifacts(str(folder)))
    reviews.write_rows([row | {"feature": feature, "verdict": "artifact", "reviewers": "Ada"} for feature in chosen], folder)
    assert stage_fingerprint(Artifacts(str(folder), only_tags=True)) == stage_fingerprint(tagged), "a verdict is a choice and no fact"
    reviews.write_rows([], folder)
    with pytest.raises(ValueError, match="names no feature; find some with `k2 sae tag"):
        Artifacts(str(folder), only_tags=True)


def test_evidence_of_a_tower_that_is_left_out_is_null_and_the_file_still_speaks():
    text = PngInfo()
    text.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd15")
    images = batch(2)
    stream = io.BytesIO()
    Image.fromarray(images.images[1]).save(stream, "PNG", pnginfo=text)
    images.encoded[1] = stream.getvalue()
    columns = Synthetic(towers=(Compact(),)).load("cpu")(images)
    assert columns["p_semantics"] == columns["kind"] == [None, None]
    assert columns["declared"] == [None, "plain"]
    assert columns["p_synthetic"][0] == pytest.approx(columns["p_pixels"][0], abs=1e-6)
    assert columns["p_synthetic"][1] > columns["p_pixels"][1]


def test_stages_of_one_tower_share_its_forward_pass(monkeypatch):
    passes, pooled = [], towers.Encoder.pooled
    monkeypatch.setattr(towers.Encoder, "pooled", lambda encoder, inputs: (passes.append(len(inputs)), pooled(encoder, inputs))[1])
    images, deep = batch(), EffNet(depths=True)
    images.cache[deep, "inputs"] = deep.prepare(images.views or images.images)  # as `annotate` does where a stage asks for it
    for stage in (Embedding(EffNet()), Synthetic(), Artifacts("sae-compact"), Embedding(Compact())):
        stage.load("cpu")(images)
    assert passes == [4, 4], "one per tower"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.model)
def test_the_fingerprint_follows_the_weights_and_not_the_place(stage, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(fitted.WEIGHTS_DIR / stage.model, folder)
    moved = type(stage)(str(folder))
    assert stage_fingerprint(moved) == stage_fingerprint(stage) == stage_fingerprint(pickle.loads(pickle.dumps(stage)))
    module = detector if stage.name == "synthetic" else sae
    path = folder / module.WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert stage_fingerprint(moved) != stage_fingerprint(stage)


@pytest.mark.parametrize(
    "stage, model, verb", [(Synthetic, "synthetic", "synthetic fit --towers"), (Artifacts, "sae-compact", "sae fit --tower")]
)
def test_a_model_refuses_another_tower_and_says_how_to_fit_one(stage, model, verb):
    tower = Siglip()
    with pytest.raises(ValueError) as error:
        stage(model, (tower,) if stage is Synthetic else tower)
    text = str(error.value)
    assert (
        (EffNet(depths=True) if stage is Synthetic else Compact()).identity in text
        and tower.identity in text
        and f"k2 {verb} siglip:ViT-B-16-SigLIP2-256" in text
    )


def test_a_detector_takes_one_tower_of_a_branch_and_at_least_one():
    for wrong in ((), (EffNet(depths=True), EffNet(depths=True))):
        with pytest.raises(ValueError, match="takes one tower for pixels and one for semantics"):
            Synthetic(towers=wrong)


def test_weights_of_the_same_tower_in_another_version_are_refused(tmp_path):
    folder = tmp_path / "probe"
    shutil.copytree(fitted.WEIGHTS_DIR / "synthetic", folder)
    info = json.loads((folder / detector.INFO_FILE).read_text())
    info["towers"]["semantics"] = "effnet/efficientnet_lite2/000000000000"
    (folder / detector.INFO_FILE).write_text(json.dumps(info))
    with pytest.raises(ValueError, match="000000000000"):
        Synthetic(str(folder))


@pytest.mark.parametrize("stage, names", [(Synthetic, "are synthetic"), (Artifacts, "are sae-compact")])
def test_an_unknown_model_is_refused_with_the_packaged_names(stage, names):
    with pytest.raises(ValueError, match=f"no fitted model 'nonsense'.*{names}"):
        stage("nonsense")


def test_a_foreign_sae_needs_a_tower_by_hand(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(fitted.WEIGHTS_DIR / "sae-compact", folder)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {"sae_lens_version": "6.54.12"}}))
    with pytest.raises(ValueError, match="names no tower"):
        Artifacts(str(folder))


def test_an_sae_of_patch_tokens_judges_no_whole_images(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(fitted.WEIGHTS_DIR / "sae-compact", folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["vectors"] = "tokens"
    (folder / "cfg.json").write_text(json.dumps(config))
    for judge in (Artifacts, firing.read_fitted):
        with pytest.raises(ValueError, match="was fitted on tokens of its tower"):
            judge(str(folder))


@pytest.mark.parametrize(
    "tower",
    [
        EffNet(),
        EffNet(depths=True),
        Compact(),
        Compact("net/c:1.safetensors"),
        Siglip(),
        Siglip("ViT-SO400M-16-SigLIP2-384", "/data/a.safetensors"),
    ],
)
def test_a_tower_comes_back_from_its_spec(tower):
    assert fitted.parse_tower(fitted.tower_spec(tower)) == tower


@pytest.mark.parametrize("spec", ["clip", "effnet:b0", ""])
def test_unknown_towers_are_refused(spec):
    with pytest.raises(ValueError, match=r"choose effnet\[:depths\], compact\[:WEIGHTS\] or siglip"):
        fitted.parse_tower(spec)
