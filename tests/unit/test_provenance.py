"""The stage `provenance`: every kind of evidence is found in every container that carries it, and nothing else is."""

import io
from functools import cache

import pillow_heif
import pyarrow.parquet as pq
import pytest
from conftest import encode, photographs
from PIL import Image, PngImagePlugin
from signing import TYPES, signed

from curation.decode import ImageBatch
from curation.generators import name_of, parameters_of
from curation.manifest import Reader
from curation.schema import PROVENANCE
from curation.stages.provenance import Provenance, facts
from pipelines.annotate import annotate

PHOTO = photographs(1)[0]
A1111 = "a red barn\nNegative prompt: people\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: x"
COMFY = '{"3": {"class_type": "KSampler", "inputs": {"seed": 5}}}'
WORKFLOW = '{"last_node_id": 9, "nodes": [{"id": 3, "widgets_values": [1]}], "links": []}'
RDF = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
    'xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" xmlns:dcterms="http://purl.org/dc/terms/" '
    'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:TC260="http://www.tc260.org.cn/ns/AIGC/1.0/" {attributes}>{inner}'
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)
EMPTY = {"declared_ai": False, "declared_by": None, "declared_source_type": None, "generator": None}


@cache
def reader() -> Reader:
    return Reader()


def found(encoded: bytes) -> dict:
    return facts(encoded, reader())


def xmp(attributes: str = "", inner: str = "") -> bytes:
    return RDF.format(attributes=attributes, inner=inner).encode()


def source_type(name: str) -> bytes:
    return xmp(f'Iptc4xmpExt:DigitalSourceType="{TYPES}{name}"')


def png(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword.replace("__", "-"), text, zip=len(text) > 500)
    return encode(PHOTO, "PNG", pnginfo=info)


def exif(order: str = "<", comment: bytes = b"", **tags: str) -> bytes:
    """An EXIF block as Pillow writes it; `comment` becomes UserComment."""
    block = Image.Exif()
    block.endian = order
    names = {"make": 0x010F, "model": 0x0110, "software": 0x0131, "description": 0x010E, "artist": 0x013B}
    for name, text in tags.items():
        block[names[name]] = text
    if comment:
        block.get_ifd(0x8769)[0x9286] = comment
    return block.tobytes()


def with_xmp(container: str, packet: bytes) -> bytes:
    if container == "HEIF":
        out = io.BytesIO()
        pillow_heif.from_pillow(Image.fromarray(PHOTO)).save(out, xmp=packet)
        return out.getvalue()
    if container == "PNG":
        return png(**{"XML:com.adobe.xmp": packet.decode()})
    options = {"tiffinfo": {700: packet}} if container == "TIFF" else {"xmp": packet}
    return encode(PHOTO, container, **options)


@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF"])
def test_the_source_type_is_read_from_xmp_in_every_container(container):
    row = found(with_xmp(container, source_type("trainedAlgorithmicMedia")))
    assert row["declared_ai"] and row["declared_by"] == "source_type" and row["declared_source_type"] == "trainedAlgorithmicMedia"
    assert (
        found(with_xmp(container, source_type("digitalCapture"))).items()
        >= (EMPTY | {"declared_source_type": "digitalCapture", "xmp_source_type": "digitalCapture"}).items()
    )


@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "GIF", "BMP"])
def test_a_file_without_metadata_declares_nothing(container):
    if container == "HEIF":
        out = io.BytesIO()
        pillow_heif.from_pillow(Image.fromarray(PHOTO)).save(out)
        row = found(out.getvalue())
    else:
        row = found(encode(PHOTO, container))
    assert row.items() >= EMPTY.items() and not any(row.values())


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("trainedAlgorithmicMedia", True),
        ("compositeWithTrainedAlgorithmicMedia", True),
        ("compositeSynthetic", True),
        ("algorithmicMedia", False),  # a formula, not a model
        ("algorithmicallyEnhanced", False),
        ("digitalCreation", False),
        ("computationalCapture", False),
    ],
)
def test_edited_with_a_model_counts_and_drawn_or_computed_does_not(name, declared):
    assert found(encode(PHOTO, xmp=source_type(name)))["declared_ai"] is declared


@pytest.mark.parametrize(
    "inner",
    [
        f"<Iptc4xmpExt:DigitalSourceType>{TYPES}trainedAlgorithmicMedia</Iptc4xmpExt:DigitalSourceType>",
        f'<Iptc4xmpExt:DigitalSourceType rdf:resource="{TYPES}trainedAlgorithmicMedia"/>',
        f"<Iptc4xmpExt:DigitalSourceType><rdf:Bag><rdf:li>{TYPES}trainedAlgorithmicMedia/</rdf:li></rdf:Bag></Iptc4xmpExt:DigitalSourceType>",
    ],
)
def test_the_source_type_may_be_written_in_every_way_that_rdf_allows(inner):
    assert found(encode(PHOTO, xmp=xmp(inner=inner)))["xmp_source_type"] == "trainedAlgorithmicMedia"


def test_what_an_editor_kept_of_an_ingredient_is_not_said_of_the_picture():
    part = f'<rdf:Description Iptc4xmpExt:DigitalSourceType="{TYPES}trainedAlgorithmicMedia"/>'
    pantry = f'<p:Pantry xmlns:p="http://ns.adobe.com/xap/1.0/mm/"><rdf:Bag><rdf:li>{part}</rdf:li></rdf:Bag></p:Pantry>'
    assert not found(encode(PHOTO, xmp=xmp(inner=pantry)))["declared_ai"]


@pytest.mark.parametrize(
    ("texts", "generator", "evidence"),
    [
        ({"parameters": A1111}, "a1111", "png:parameters"),
        ({"parameters": A1111 + ", Version: Fooocus v2.1.862"}, "fooocus", "png:parameters"),
        ({"prompt": COMFY, "workflow": WORKFLOW}, "comfyui", "png:prompt,png:workflow"),
        ({"invokeai_metadata": '{"app_version": "4.2"}'}, "invokeai", "png:invokeai_metadata"),
        ({"sd__metadata": '{"model": "stable diffusion"}'}, "invokeai", "png:sd-metadata"),
        ({"Dream": '"a barn" -s 50 -S 123 -W 512 -H 512 -C 7.5 -A k_lms'}, "invokeai", "png:Dream"),
        ({"Software": "NovelAI", "Comment": '{"steps": 28, "sampler": "k_euler", "uc": "lowres"}'}, "novelai", "png:Comment,png:Software"),
        ({"parameters": '{"sui_image_params": {"prompt": "x", "steps": 20}}'}, "swarmui", "png:parameters"),
        ({"parameters": '{"base_model": "x", "performance": "Speed", "full_prompt": []}', "fooocus_scheme": "fooocus"}, "fooocus", None),
        ({"Description": "a barn --ar 16:9 Job ID: 0a1b2c3d-0000-4000-8000-0123456789ab"}, "midjourney", "png:Description"),
        ({"AIGC": '{"Label":"1","ContentProducer":"a producer","ProduceID":"7"}'}, "a producer", "png:AIGC"),
    ],
)
def test_png_text_of_generators_is_evidence_with_its_place(texts, generator, evidence):
    row = found(png(**texts))
    assert row["declared_ai"] and row["generator"] == generator and evidence in (row["evidence"], None)


def test_text_after_the_pixels_is_read_too():
    whole, extra = encode(PHOTO, "PNG"), png(parameters=A1111)
    start = extra.index(b"tEXt") - 4
    text = extra[start : start + 12 + int.from_bytes(extra[start : start + 4], "big")]
    assert found(whole[:-12] + text + whole[-12:])["generator"] == "a1111"


@pytest.mark.parametrize(
    "texts",
    [
        {"parameters": "gamma 2.2"},
        {"Comment": "Created with GIMP", "Software": "Adobe ImageReady"},
        {"Description": "Steps: 20 of the old stair, Berlin"},
        {"workflow": '{"steps": ["scan", "crop"]}', "prompt": "say cheese"},
        {"Title": "The Ideogram: signs of old Egypt", "Source": "imagen digital"},
        {"Title": "How Stable Diffusion works", "Software": "Made with Google AI Studio"},
        {"AIGC": '{"Label":"2","ContentProducer":"a platform"}'},  # somebody's guess: aigc_label has it, a policy may use it
    ],
)
def test_other_texts_declare_nothing(texts):
    assert found(png(**texts))["declared_ai"] is False


UNICODE_BE = b"UNICODE\0" + A1111.encode("utf-16-be")
UNICODE_LE = b"UNICODE\0" + A1111.encode("utf-16-le")


@pytest.mark.parametrize("container", ["JPEG", "WEBP", "AVIF", "PNG"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("comment", [UNICODE_BE, UNICODE_LE, b"ASCII\0\0\0" + A1111.encode(), bytes(8) + A1111.encode(), A1111.encode()])
def test_parameters_in_the_exif_comment_are_found_in_every_encoding(container, order, comment):
    row = found(encode(PHOTO, container, exif=exif(order, comment)))
    assert (row["declared_by"], row["generator"], row["evidence"]) == ("parameters", "a1111", "exif:comment")


def test_a_workflow_in_make_and_model_is_evidence_and_no_camera():
    long = "workflow:" + WORKFLOW[:-1] + ', "x": "' + "y" * 50_000 + '"}'
    row = found(encode(PHOTO, "WEBP", exif=exif(make=long, model="prompt:" + COMFY)))
    assert (row["generator"], row["evidence"], row["exif_make"], row["exif_model"]) == ("comfyui", "exif:make,exif:model", None, None)
    camera = found(encode(PHOTO, exif=exif(make="NIKON", model="N" * 50_000, software="Picasa 3.0")))
    assert (camera["exif_make"], len(camera["exif_model"]), camera["exif_software"]) == ("NIKON", 64, "Picasa 3.0")
    assert camera["declared_ai"] is False


def test_credit_system_label_signature_and_software_each_decide_by_name():
    label = '{"Label":"1","ContentProducer":"Doubao"}'.replace('"', "&quot;")
    cases = {
        "credit": encode(PHOTO, xmp=xmp('photoshop:Credit="Made with Google AI"')),
        "ai_system": encode(PHOTO, xmp=xmp('Iptc4xmpExt:AISystemUsed="A model"')),
        "aigc": encode(PHOTO, xmp=xmp(inner=f"<TC260:AIGC>{label}</TC260:AIGC>")),
        "signature": encode(PHOTO, exif=exif(description="Signature: " + "Ab3+" * 20, artist="0a1b2c3d-0000-4000-8000-0123456789ab")),
        "software": encode(PHOTO, xmp=xmp('xmp:CreatorTool="Draw Things"')),
    }
    rows = {kind: found(encoded) for kind, encoded in cases.items()}
    assert {kind: row["declared_by"] for kind, row in rows.items()} == {kind: kind for kind in cases}
    assert {kind: row["generator"] for kind, row in rows.items()} == {
        "credit": "google",
        "ai_system": "A model",
        "aigc": "Doubao",
        "signature": "grok",
        "software": "draw things",
    }
    assert (rows["aigc"]["aigc_label"], rows["aigc"]["aigc_producer"]) == ("1", "Doubao")


def test_the_credit_of_iptc_iim_is_read_from_photoshop_resources():
    credit = b"Edited with Google AI"
    iim = b"\x1c\x02\x50\x00\x02ab" + b"\x1c\x02\x6e" + len(credit).to_bytes(2, "big") + credit
    block = b"8BIM\x04\x04\0\0" + len(iim).to_bytes(4, "big") + iim
    segment = b"Photoshop 3.0\0" + block
    image = encode(PHOTO)
    row = found(image[:2] + b"\xff\xed" + (len(segment) + 2).to_bytes(2, "big") + segment + image[2:])
    assert (row["credit"], row["declared_by"], row["evidence"]) == (credit.decode(), "credit", "iptc:credit")
    assert not found(encode(PHOTO, xmp=xmp('photoshop:Credit="OpenAI"')))["declared_ai"]


MIMES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "AVIF": "image/avif", "TIFF": "image/tiff", "GIF": "image/gif"}


@pytest.mark.parametrize("container", MIMES)
def test_c2pa_is_not_ai_unless_it_says_so_and_tampering_shows(container):
    image = encode(PHOTO[..., 0] if container == "GIF" else PHOTO, container)
    camera = found(signed(image, MIMES[container], "digitalCapture"))
    assert (camera["c2pa"], camera["declared_ai"], camera["declared_source_type"]) == ("valid", False, "digitalCapture")
    made = signed(image, MIMES[container], "trainedAlgorithmicMedia", "Some model")
    row = found(made)
    assert (row["c2pa"], row["declared_by"], row["generator"], row["c2pa_issuer"]) == ("valid", "c2pa", "Some model", "Test signer")
    changed = bytearray(made)
    changed[-30] ^= 1
    row = found(bytes(changed))
    assert row["c2pa"] == "invalid" and "ismatch" in row["c2pa_problems"] and row["declared_ai"]


@pytest.mark.parametrize(
    ("relationship", "declared"),
    [
        ("parentOf", "trainedAlgorithmicMedia"),  # opened and saved again: still what it was
        ("componentOf", "compositeWithTrainedAlgorithmicMedia"),  # a part of it was made by a model
        ("inputTo", "digitalCapture"),  # was looked at; is not in the picture
    ],
)
def test_an_ai_ingredient_counts_by_what_became_of_it(relationship, declared):
    part = signed(encode(PHOTO), source_type="trainedAlgorithmicMedia", agent="Some model")
    row = found(signed(encode(PHOTO), ingredient=(part, relationship)))
    assert (row["c2pa"], row["declared_source_type"], row["declared_ai"]) == ("valid", declared, relationship != "inputTo")


def test_a_manifest_elsewhere_is_named_and_never_fetched(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("no network"))
    row = found(encode(PHOTO, xmp=xmp('dcterms:provenance="http://127.0.0.1:9/manifest.c2pa"')))
    assert (row["c2pa"], row["c2pa_remote"], row["declared_ai"]) == ("remote", "http://127.0.0.1:9/manifest.c2pa", False)


def test_the_stage_gives_every_column_for_every_image_and_needs_no_pixels():
    batch = ImageBatch(["a", "b", "c"], [encode(PHOTO), b"", png(parameters=A1111)], [], [])
    columns = Provenance().load("cpu")(batch)
    assert sorted(columns) == sorted(set(PROVENANCE.names) - {"uid", "error"})
    assert columns["declared_ai"] == [False, False, True] and Provenance.reads == "bytes"


def test_names_count_as_words_and_only_known_ones():
    assert name_of("Adobe Firefly 3") == "firefly" and name_of("NovelAI Diffusion V4.5") == "novelai" and name_of("DALL·E 3") == "openai"
    assert all(name_of(text) is None for text in ("Fireflyers Inc.", "imagen.exe", "Adobe Photoshop 25", "midjourneyman", None, ""))
    assert parameters_of("Steps: up, Sampler: none") is None


def test_files_that_do_not_decode_still_say_what_they_declare(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    whole = png(parameters=A1111)
    for name, content in {"a": whole, "b": whole[: len(whole) // 2], "c": b"<html>404</html>", "d": b""}.items():
        (folder / f"{name}.png").write_bytes(content)
    assert annotate(str(folder), str(tmp_path / "run"), "basics", ray="off", max_bad=1.0) == 0
    table = pq.read_table(next((tmp_path / "run/annotations/provenance").glob("*.parquet")))
    assert table["declared_ai"].to_pylist()[:3] == [True, True, False]
    basics = pq.read_table(next((tmp_path / "run/annotations/basics").glob("*.parquet")))
    assert [error is None for error in basics["error"].to_pylist()] == [True, False, False, False]
