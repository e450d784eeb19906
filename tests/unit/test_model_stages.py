"""The stages `synthetic` and `artifacts`, with the models that ship and with models of another tower."""

import json
import pickle
import shutil

import numpy as np
import pytest

from curation import detector, fitted, sae, towers
from curation.annotate import stage_fingerprint
from curation.decode import ImageBatch, decode
from curation.faults import encode
from curation.stages.artifacts import Artifacts
from curation.stages.embedding import Embedding
from curation.stages.synthetic import Synthetic
from curation.towers import Compact, EffNet, Siglip

STAGES = [Synthetic("synthetic-effnet"), Synthetic("synthetic-compact"), Artifacts("sae-effnet")]


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
        assert columns["p_synthetic"].dtype == np.float32 and columns["p_synthetic"].shape == (4,)
        assert (columns["p_synthetic"] > 0).all() and (columns["p_synthetic"] < 1).all()
    else:
        num_features = sae.load(stage.model).num_features
        assert len(columns["codes"]) == 4
        for codes in columns["codes"]:
            found = [code["value"] for code in codes]
            assert 0 < len(found) <= 32 and found == sorted(found, reverse=True) and found[-1] > 0
            assert all(0 <= code["feature"] < num_features for code in codes)


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[2]], ids=lambda stage: stage.model)
def test_an_image_gets_the_same_bits_alone_and_in_a_batch(stage):
    compute, whole = stage.load("cpu"), batch()
    (column,) = (name for name in stage.schema.names if name not in ("uid", "error"))
    alone = [compute(ImageBatch([whole.uids[i]], [whole.encoded[i]], [whole.images[i]], [whole.headers[i]]))[column][0] for i in range(4)]
    assert list(compute(whole)[column]) == alone


def test_stages_of_one_tower_share_its_forward_pass(monkeypatch):
    passes, pooled = [], towers.Encoder.pooled
    monkeypatch.setattr(towers.Encoder, "pooled", lambda encoder, inputs: (passes.append(len(inputs)), pooled(encoder, inputs))[1])
    images = batch()
    for stage in (Embedding(EffNet()), Synthetic("synthetic-effnet"), Artifacts("sae-effnet")):
        stage.load("cpu")(images)
    assert passes == [4]


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


@pytest.mark.parametrize("stage, model, verb", [(Synthetic, "synthetic-effnet", "synthetic"), (Artifacts, "sae-effnet", "sae")])
@pytest.mark.parametrize("tower, spec", [(Siglip(), "siglip:ViT-B-16-SigLIP2-256"), (Compact(), "compact")])
def test_a_model_refuses_another_tower_and_says_how_to_fit_one(stage, model, verb, tower, spec):
    with pytest.raises(ValueError) as error:
        stage(model, tower)
    text = str(error.value)
    assert EffNet().identity in text and tower.identity in text and f"k2 {verb} fit --tower {spec}" in text


def test_weights_of_the_same_tower_in_another_version_are_refused(tmp_path):
    folder = tmp_path / "probe"
    shutil.copytree(fitted.WEIGHTS_DIR / "synthetic-effnet", folder)
    info = json.loads((folder / "probe.json").read_text())
    (folder / "probe.json").write_text(json.dumps(info | {"tower": "effnet/efficientnet_lite2/000000000000"}))
    with pytest.raises(ValueError, match="000000000000"):
        Synthetic(str(folder))


@pytest.mark.parametrize("stage, names", [(Synthetic, "are synthetic-compact, synthetic-effnet"), (Artifacts, "are sae-effnet")])
def test_an_unknown_model_is_refused_with_the_packaged_names(stage, names):
    with pytest.raises(ValueError, match=f"no fitted model 'nonsense'.*{names}"):
        stage("nonsense")


def test_a_foreign_sae_needs_a_tower_by_hand(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(fitted.WEIGHTS_DIR / "sae-effnet", folder)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {"sae_lens_version": "6.54.12"}}))
    with pytest.raises(ValueError, match="names no tower"):
        Artifacts(str(folder))


@pytest.mark.parametrize("tower", [EffNet(), Compact(), Siglip(), Siglip("ViT-SO400M-16-SigLIP2-384", "/data/a.safetensors")])
def test_a_tower_comes_back_from_its_spec(tower):
    assert fitted.parse_tower(fitted.tower_spec(tower)) == tower


@pytest.mark.parametrize("spec", ["clip", "effnet:b0", ""])
def test_unknown_towers_are_refused(spec):
    with pytest.raises(ValueError, match="choose effnet, compact or siglip"):
        fitted.parse_tower(spec)
