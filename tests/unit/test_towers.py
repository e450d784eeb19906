"""The offline towers and what all towers share. SigLIP-2 is in tests/contract/test_towers_siglip.py."""

import pickle

import numpy as np
import pytest
import skimage.data
import torch

from curation import compact
from curation.decode import ImageBatch
from curation.effnet import effnet_classifier, effnet_square
from curation.schema import embedding_schema
from curation.shards import describe, fingerprint
from curation.stages.embedding import Embedding, to_bytes
from curation.towers import Compact, EffNet, Embeddings, Siglip, available, embed, loaded

OFFLINE = [EffNet(), EffNet(depths=True), Compact()]
photographs = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.astronaut()]
odd = [
    np.zeros((1, 1, 3), np.uint8),
    np.full((2, 700, 3), 255, np.uint8),
    np.random.default_rng(0).integers(0, 256, (700, 3, 3), dtype=np.uint8),
]


def effnet_pixels(image):
    return (torch.from_numpy(np.array(effnet_square(image))).float().permute(2, 0, 1) - 127) / 128


def batch_of(images):
    return ImageBatch([f"s/{i}" for i in range(len(images))], [b""] * len(images), images, [None] * len(images))


def test_effnet_names_what_photographs_show_as_the_reference_implementation_does():
    """Logits of the package efficientnet_lite_pytorch 0.1.0, which the weights were published for, on the same pixels."""
    net = effnet_classifier()
    with torch.inference_mode():
        cat, cup = net(torch.stack([effnet_pixels(image) for image in photographs[:2]])).topk(3)[0]
        names = net(torch.stack([effnet_pixels(image) for image in photographs[:2]])).topk(3)[1].tolist()
    np.testing.assert_allclose(cat, [8.435, 6.923, 6.718], atol=5e-3)
    np.testing.assert_allclose(cup, [9.485, 5.189, 4.908], atol=5e-3)
    assert names == [[285, 282, 281], [967, 968, 925]]  # Egyptian cat, tiger cat, tabby; espresso, cup, consomme


def test_the_effnet_tower_is_the_classifier_without_its_head():
    net = effnet_classifier()
    found = loaded(EffNet(), "cpu")(photographs)
    assert found.pooled.shape == (3, 1280) and found.tokens.shape == (3, 81, 1280) and found.pooled.dtype == np.float32
    with torch.inference_mode():
        logits = net.get_classifier()(torch.from_numpy(found.pooled))
        expected = net(torch.stack([effnet_pixels(image) for image in photographs]))
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_effnet_sees_the_centre_square_and_nothing_else():
    image = photographs[0]
    height, width = image.shape[:2]
    edges = image.copy()
    edges[:, : (width - height) // 2] = 0
    edges[:, -((width - height) // 2) :] = 255
    inner = edges.copy()
    inner[height // 2 - 20 : height // 2 + 20, width // 2 - 20 : width // 2 + 20] = 0
    assert torch.equal(effnet_pixels(image), effnet_pixels(edges))
    assert not torch.equal(effnet_pixels(image), effnet_pixels(inner))


@pytest.mark.parametrize("tower", OFFLINE, ids=lambda tower: tower.name)
def test_a_vector_does_not_depend_on_the_batch_or_on_the_number_of_threads(tower):
    encode = tower.load("cpu")
    images = [np.ascontiguousarray(image[top:, top:]) for image in photographs for top in (0, 40, 88)][:8]
    together = encode(images).pooled
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    alone = np.concatenate([encode([image]).pooled for image in images])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert np.array_equal(together, alone)
    assert len(np.unique(together.round(3), axis=0)) == 8


@pytest.mark.parametrize("tower", OFFLINE, ids=lambda tower: tower.name)
def test_images_of_any_size_give_finite_float16_vectors(tower):
    found = loaded(tower, "cpu")(odd)
    assert found.pooled.shape == (3, tower.dim) and found.pooled.dtype == np.float32
    assert np.isfinite(found.pooled.astype(np.float16)).all()
    assert loaded(tower, "cpu")([]).pooled.shape == (0, tower.dim)


def test_one_forward_pass_serves_every_stage_of_a_batch(monkeypatch):
    batch = batch_of(photographs[:1])
    first = embed(batch, EffNet(), "cpu")
    assert embed(batch, EffNet(), "cpu") is first
    assert embed(batch, Compact(), "cpu").pooled.shape != first.pooled.shape
    assert embed(batch_of(photographs[1:2]), EffNet(), "cpu") is not first


@pytest.mark.parametrize("tower", OFFLINE, ids=lambda tower: tower.name)
def test_the_embedding_stage_writes_the_towers_vector(tower):
    stage = Embedding(tower)
    assert stage.name == tower.name and stage.schema == embedding_schema(tower.dim)
    batch = batch_of(photographs[:2])
    columns = stage.load("cpu")(batch)
    assert set(columns) == set(stage.schema.names) - {"uid", "error"}
    read = np.frombuffer(b"".join(columns["vector"]), np.float16).reshape(-1, tower.dim)
    np.testing.assert_allclose(read, embed(batch, tower, "cpu").pooled, rtol=1e-3, atol=1e-3)


def test_a_vector_too_large_for_float16_is_our_bug():
    with pytest.raises(AssertionError, match="do not fit"):
        to_bytes(np.array([[1e6]], np.float32))


def test_descriptions_are_cheap_picklable_and_named_by_their_weights():
    towers = [*OFFLINE, Siglip(), Siglip("ViT-B-16-SigLIP2-384")]
    assert len({tower.identity for tower in towers}) == len({fingerprint(Embedding(tower)) for tower in towers}) == 5
    assert all(pickle.loads(pickle.dumps(tower)) == tower for tower in towers)
    assert describe(Embedding(EffNet()))["tower"]["identity"] == "effnet/efficientnet_lite2/9656183eaeaf"
    assert all(available(tower) for tower in OFFLINE)


def test_the_tokens_of_compact_are_its_crops_and_their_mean_is_its_vector():
    found = loaded(Compact(), "cpu")(photographs[:1])
    assert isinstance(found, Embeddings) and found.tokens.shape == (1, compact.NUM_CROPS, compact.DIM)
    np.testing.assert_allclose(found.tokens.mean(1), found.pooled, atol=1e-5)


def test_the_vector_of_all_depths_starts_with_the_plain_one_bit_for_bit():
    plain, deep = (loaded(EffNet(depths=depths), "cpu")(photographs).pooled for depths in (False, True))
    assert np.array_equal(deep[:, :1280], plain) and (deep[:, 1280:].std(0) > 0).mean() > 0.99


def test_the_plain_vector_comes_out_of_the_deep_pass_where_there_is_one(monkeypatch):
    alone = embed(batch_of(photographs), EffNet(), "cpu").pooled
    batch, deep = batch_of(photographs), EffNet(depths=True)
    batch.cache[deep, "inputs"] = deep.prepare(photographs)
    batch.images.clear()  # nothing to prepare a second pass from
    assert np.array_equal(embed(batch, EffNet(), "cpu").pooled, alone)
    assert embed(batch, EffNet(), "cpu") is embed(batch, EffNet(), "cpu")
