"""Every table of a run folder as a pyarrow schema, with a comment on each column.

This module is all that `k2model` shares with `curation`: the two packages meet only in a Parquet file.
`docs/tables.md` is made from it (`python -m curation.schema > docs/tables.md`).
"""

import pyarrow as pa

PHASH_BYTES = 18  # 12 x 12 bits (K2 report: 12x12 phash, because the default 8x8 has too many false positives)
COLORHASH_BYTES = 6  # 14 bins x 3 bits = 42 bits, padded to whole bytes


def column(name: str, kind: pa.DataType, comment: str, nullable: bool = True) -> pa.Field:
    """A field that carries its own documentation."""
    return pa.field(name, kind, nullable=nullable, metadata={"comment": comment})


UID = column("uid", pa.string(), 'sample id, "<shard>/<key>"; unique in a run', nullable=False)
OTHER_CAPTIONS = pa.list_(pa.string())
ERROR = column("error", pa.string(), "why the sample has no values here; null when it has")

SAMPLES = pa.schema(
    [
        UID,
        column("shard", pa.string(), "shard that the sample came from", nullable=False),
        column(
            "key",
            pa.string(),
            "key inside the shard (tar: WebDataset key; folder: relative path; Parquet, Arrow: row number); controls and bytes that are "
            "no UTF-8 as \\x00; ~2 for a key that comes again; ~lost: what a damaged shard no longer gives",
            nullable=False,
        ),
        column("image", pa.binary(), "encoded image bytes, exactly as in the source; null when the sample has none"),
        column("caption", pa.string(), "caption of the source; the file's folder and name in words when it has none"),
        column("caption_source", pa.string(), "txt, json, column, metadata, or name (made from the file name, not written by anyone)"),
        column("other_captions", OTHER_CAPTIONS, "further captions of the source in its order, up to 63: short_caption, caption_long ..."),
        ERROR,
    ]
)  # in memory only: image bytes stay in the source until `k2 pack`

SHARDS = pa.schema(
    [
        column("name", pa.string(), "shard; a safe file name, kept when the source grows", nullable=False),
        column("kind", pa.string(), "tar, parquet, arrow or folder", nullable=False),
        column("path", pa.string(), "local path or URL of the file or folder; odd bytes as \\x00", nullable=False),
        column("root", pa.string(), "folder that paths inside a Parquet file may not leave", nullable=False),
        column("size", pa.int64(), "bytes of the file, or of the slice's images", nullable=False),
        column("stamp", pa.string(), "size and version (ETag, generation, time of change) of the file when it was listed", nullable=False),
        column("row_groups", pa.list_(pa.int32()), "first row group and one past the last, of a slice of a large Parquet file"),
        column("members", pa.list_(pa.string()), "of a folder: images relative to path", nullable=False),
        column("stamps", pa.list_(pa.string()), "one per member, its caption files included", nullable=False),
        column("texts", pa.list_(pa.list_(pa.string())), "suffixes of the caption files beside each member", nullable=False),
        column(
            "captions",
            pa.list_(pa.list_(pa.string())),
            "those of each member, from metadata.csv, .jsonl or .parquet of its folder",
            nullable=False,
        ),
    ]
)

BASICS = pa.schema(
    [
        UID,
        column("shard", pa.string(), "shard that the sample came from", nullable=False),
        column("key", pa.string(), "key inside the shard", nullable=False),
        column("caption", pa.string(), "caption, as in samples"),
        column("caption_source", pa.string(), "txt, json, column, metadata or name"),
        column("other_captions", OTHER_CAPTIONS, "further captions, as in samples"),
        column("bytes", pa.int64(), "size of the encoded image; known for broken images too"),
        column("md5", pa.string(), "md5 of the encoded bytes, 32 hex digits; known for broken images too"),
        column("width", pa.int32(), "pixels, after EXIF orientation"),
        column("height", pa.int32(), "pixels, after EXIF orientation"),
        column("format", pa.string(), "container as Pillow names it: JPEG, PNG, WEBP, AVIF, TIFF, BMP, GIF ..."),
        column("mode", pa.string(), "Pillow mode before conversion to RGB: RGB, L, CMYK, P, RGBA, I;16 ..."),
        column("num_frames", pa.int32(), "frames in the file, counted up to 1000; the first one is used"),
        column("has_alpha", pa.bool_(), "some pixel is not opaque; it was composited on white"),
        column("icc", pa.string(), "colour profile: none, srgb (changes nothing), converted to sRGB, or broken (ignored)"),
        column("decode_warning", pa.string(), "what libjpeg complained about in a JPEG that still decodes; null when nothing"),
        column("phash", pa.binary(PHASH_BYTES), "imagehash.phash(hash_size=12) of the view, 144 bits, big-endian"),
        column("phash_mirror", pa.binary(PHASH_BYTES), "the same of the mirrored image"),
        column(
            "colorhash",
            pa.binary(COLORHASH_BYTES),
            "imagehash.colorhash(binbits=3) on a grid of pixels, short side <= 128; 42 bits, 42 bits, big-endian, zero padded",
        ),
        column("rgb_entropy", pa.float32(), "mean Shannon entropy of the R, G, B histograms, bits, 0 to 8; on the same grid"),
        column("laplacian_var", pa.float32(), "variance of the 4-neighbour Laplacian of luma (0-255), at short side <= 512"),
        column("white_ratio", pa.float32(), "share of pixels with R, G, B all >= 250, on that grid"),
        column("black_ratio", pa.float32(), "share of pixels with R, G, B all <= 5, on that grid"),
        column("border_top", pa.float32(), "share of the height that is one flat colour, counted from the top edge"),
        column("border_bottom", pa.float32(), "the same from the bottom edge"),
        column("border_left", pa.float32(), "share of the width that is one flat colour, counted from the left edge"),
        column("border_right", pa.float32(), "the same from the right edge"),
        column("complexity", pa.float32(), "bytes per pixel of a JPEG quality-75 re-encode at short side <= 512"),
        column("jpeg_quality", pa.int16(), "IJG quality (1-100) estimated from the luma quantisation table; null when not JPEG"),
        ERROR,
    ]
)


PROVENANCE = pa.schema(
    [
        UID,
        column(
            "declared_ai", pa.bool_(), "something in the file says that a model made the picture or a part of it; false: nothing says so"
        ),
        column(
            "declared_by",
            pa.string(),
            "what says so, comma-separated: c2pa, source_type (XMP), ai_system (XMP), parameters (prompt and settings of a generator), "
            "aigc (China's label 1), credit, software, signature (Grok's)",
        ),
        column(
            "declared_source_type",
            pa.string(),
            "IPTC digital source type, C2PA before XMP: trainedAlgorithmicMedia, compositeWithTrainedAlgorithmicMedia (edited with a "
            "model) and compositeSynthetic are declared_ai; digitalCapture, digitalCreation, algorithmicMedia ... are not",
        ),
        column("generator", pa.string(), "the tool that the evidence names: a1111, comfyui, midjourney, Adobe Firefly ..."),
        column("evidence", pa.string(), "where generator evidence lies, comma-separated: png:parameters, exif:comment, xmp:credit ..."),
        column(
            "c2pa",
            pa.string(),
            "null: no manifest; valid: signature and hashes hold, by a signer that no trust list was asked about; invalid: they do not; "
            "unreadable: not a manifest that can be parsed; remote: only an URL, which is never fetched. Most C2PA files are not AI",
        ),
        column(
            "c2pa_problems",
            pa.string(),
            "C2PA failure codes, comma-separated (cawg.* ones concern a named person and leave the state alone); why it is unreadable",
        ),
        column("c2pa_claim_generator", pa.string(), "software that wrote the active manifest"),
        column("c2pa_issuer", pa.string(), "organisation in the signing certificate; anyone can make one, no trust list was asked"),
        column("c2pa_source_types", pa.string(), "digital source types of the active manifest and its ingredients, comma-separated"),
        column("c2pa_ai_tools", pa.string(), "software agents of the actions with an AI source type, comma-separated"),
        column("c2pa_remote", pa.string(), "URL of a manifest outside of the file; never fetched"),
        column("xmp_source_type", pa.string(), "Iptc4xmpExt:DigitalSourceType, its last part"),
        column("xmp_creator_tool", pa.string(), "xmp:CreatorTool"),
        column("xmp_ai_system", pa.string(), "Iptc4xmpExt:AISystemUsed (IPTC 2025.1)"),
        column("credit", pa.string(), "photoshop:Credit, else IPTC IIM 2:110"),
        column("iptc_program", pa.string(), "IPTC IIM 2:65, originating program"),
        column("aigc_label", pa.string(), "China's AIGC label (GB 45438-2025): 1 generated, 2 may be (its user says), 3 suspected"),
        column("aigc_producer", pa.string(), "ContentProducer of that label"),
        column("text_keys", pa.string(), "keywords of a PNG's text chunks, comma-separated"),
        column("exif_software", pa.string(), "EXIF Software"),
        column("exif_make", pa.string(), "EXIF Make; weak evidence of a camera; null where a generator wrote its workflow into it"),
        column("exif_model", pa.string(), "EXIF Model; as exif_make"),
        column("exif_lens", pa.string(), "EXIF LensModel"),
        column("exif_taken", pa.string(), "EXIF DateTimeOriginal, as written"),
        column("exif_exposure", pa.float32(), "EXIF ExposureTime, seconds"),
        column("exif_f_number", pa.float32(), "EXIF FNumber"),
        column("exif_iso", pa.float32(), "EXIF PhotographicSensitivity"),
        column("exif_focal", pa.float32(), "EXIF FocalLength, millimetres"),
        column("exif_maker_note", pa.bool_(), "true when the camera's own block is there"),
        ERROR,
    ]
)


def embedding_schema(dim: int) -> pa.Schema:
    """Annotation of a tower with `dim` features: one float16 vector per image as fixed-size binary.

    Fixed-size binary writes about 6 times faster than a list column (benchmarks/results/embedding_write.jsonl). Read it back with
    `np.frombuffer(b"".join(column), np.float16).reshape(-1, dim)`.
    """
    return pa.schema([UID, column("vector", pa.binary(2 * dim), f"pooled embedding, {dim} little-endian float16"), ERROR])


DEFECTS = pa.schema(
    [
        UID,
        column("luma_mean", pa.float32(), "mean luma (BT.601), 0 to 255"),
        column("luma_low", pa.int16(), "1st percentile of luma, 0 to 255"),
        column("luma_high", pa.int16(), "99th percentile of luma, 0 to 255"),
        column("clipped_low", pa.float32(), "share of pixels with luma <= 2"),
        column("clipped_high", pa.float32(), "share of pixels with a channel >= 254"),
        column("clipped_partly", pa.float32(), "share of pixels with a channel >= 254 and another between 9 and 249: hue lost to light"),
        column("clipped_both", pa.float32(), "share of pixels with a channel >= 254 and another <= 1: colour beyond the gamut"),
        column("saturation", pa.float32(), "mean HSV saturation, 0 to 1"),
        column("colorfulness", pa.float32(), "Hasler and Suesstrunk 2003; 0 for grey, over 109 extremely colourful"),
        column("level_gaps", pa.float32(), "share of grey levels from luma_low to luma_high that no pixel has; 0 under 16,384 pixels"),
        column("bits_per_pixel", pa.float32(), "bits of the file per pixel (24 divided by it is Z-Image's raw size / file size)"),
        column("relative_bytes", pa.float32(), "bytes of the file over bytes of its pixels as JPEG of quality 75 (4:2:0), any container"),
        column("blockiness", pa.float32(), "log2 of the jump at the strongest of 8 places over the median place; 0 under 64 pixels"),
        column("grid_x", pa.int8(), "column modulo 8 where blocks start; chance where blockiness is low; null under 64 pixels"),
        column("grid_y", pa.int8(), "row modulo 8 where blocks start, as grid_x"),
        column("resampling", pa.float32(), "periodic trace of enlargement (Gallagher 2005), 0 to about 1; 0 under 64 pixels"),
        column("rolloff", pa.float32(), "part of Nyquist's frequency with 99 % of the gradient's energy, sharper axis; low is also style"),
        column("banding", pa.float32(), "share of places with a false contour: a step of 3 to 24 levels between two plateaus"),
        column("combing", pa.float32(), "share of places where odd and even rows differ as interlaced fields do, less that of columns"),
        column("inset_y", pa.float32(), "share of the height in equal bars above and below a picture set into another, 0 to 0.72"),
        column("inset_x", pa.float32(), "the same of the width, left and right"),
        ERROR,
    ]
)

TEXT_BOX = pa.struct(
    [pa.field(name, pa.float32(), nullable=False) for name in ("x", "y", "width", "height", "text_height", "area", "score")]
)  # x, width: parts of the image's width; y, height: of its height; text_height: of its short side; area: of its area
TEXT_DENSITY = pa.schema(
    [
        UID,
        column("num_boxes", pa.int32(), "text lines or words found"),
        column("text_area", pa.float32(), "share of the image inside text boxes, overlaps counted once, 0 to 1"),
        column("largest_box", pa.float32(), "share of the image inside the largest box, 0 to 1"),
        column("text_height_min", pa.float32(), "height of the smallest text, as a part of the short side; 1 without text"),
        column("text_height_median", pa.float32(), "median text height, as a part of the short side; 1 without text"),
        column(
            "boxes",
            pa.list_(TEXT_BOX),
            "one struct per box: x, y, width, height of the upright box (parts of width and height), text_height (part of the short "
            "side; times a resolution it is in pixels), area (part of the image's, of the slanted box), score (0 to 1)",
        ),
        ERROR,
    ]
)

SYNTHETIC = pa.schema(
    [
        UID,
        column("p_synthetic", pa.float32(), "calibrated P(AI-generated) of all evidence at a prior of one half, 0 to 1"),
        column("p_pixels", pa.float32(), "the same of the pixels alone (compact tower); null when the detector does not look at them"),
        column("p_semantics", pa.float32(), "the same of what is shown alone (frozen tower); null when the detector does not look at it"),
        column(
            "declared",
            pa.string(),
            "what the file says: signed (AI, in a C2PA manifest that holds), plain (AI, in metadata), camera (weak evidence), or null",
        ),
        column("kind", pa.string(), "kind of content as real images have it (photo, illustration ...), guessed; null without semantics"),
        column(
            "real_share",
            pa.float32(),
            "share of real images of this kind that score as high, 0 to 1: removing what has <= 0.05 loses 5 % of real images",
        ),
        ERROR,
    ]
)

CODE = pa.struct([pa.field("feature", pa.int32()), pa.field("value", pa.float32())])
ARTIFACTS = pa.schema([UID, column("codes", pa.list_(CODE), "the SAE features that fire, largest value first"), ERROR])

FAILED_SHARDS = pa.schema(
    [
        column("shard", pa.string(), "shard whose annotations are still missing", nullable=False),
        column("tries", pa.int32(), "how often it was tried, over all runs", nullable=False),
        column("error", pa.string(), "why the last try failed", nullable=False),
    ]
)

DUPLICATES = pa.schema(
    [
        UID,
        column("group", pa.int64(), "duplicate group; null when the image has no duplicate"),
        column("group_size", pa.int32(), "images in the group; 1 without duplicates"),
        column("kind", pa.string(), "unique, exact (equal md5 in the group's representative) or perceptual"),
        column("representative", pa.bool_(), "true for the one image of the group to keep, and for unique images"),
        column("distance", pa.int16(), "Hamming distance of the phash (or mirrored phash) to the representative, bits of 144"),
        column("mirrored", pa.bool_(), "true when the mirrored phash is the closer one"),
        ERROR,
    ]
)

SEMANTIC = pa.schema(
    [
        UID,
        column("tower", pa.string(), "tower whose vectors were compared"),
        column("group", pa.int64(), "group of images with nearly the same content, duplicates among them; null when there is no other"),
        column("group_size", pa.int32(), "images in the group; 1 without others"),
        column("representative", pa.bool_(), "true for the one image of the group to keep, and for images of no group"),
        column("cosine", pa.float32(), "cosine to the group's representative, corpus mean taken off; null for it and its own duplicates"),
        column("nearest", pa.float32(), "largest cosine to another image that was looked at; null when it is a duplicate, or was alone"),
        ERROR,
    ]
)

CONCEPTS = pa.schema(
    [
        UID,
        column("tower", pa.string(), "tower whose vectors were clustered"),
        column("leaf", pa.int32(), "cluster of the finest level"),
        column("path", pa.list_(pa.int32()), "its clusters, the coarsest level first, the leaf last"),
        column("sizes", pa.list_(pa.int32()), "images in each of them, only those that `k2 dedup` keeps counted"),
        column("weight", pa.float32(), "balanced sampling weight: the tree shared evenly from the top; mean 1 over counted images"),
        column("draw", pa.float64(), "a number in 0 to 1 made from the uid: `draw < target * weight` takes a balanced subset"),
        ERROR,
    ]
)

TAGS = pa.schema(
    [
        column("model", pa.string(), "name of the SAE that the feature belongs to", nullable=False),
        column("feature", pa.int32(), "SAE feature", nullable=False),
        column("tag", pa.string(), "what the feature shows; kinds of damage are joined by +", nullable=False),
        column("verdict", pa.string(), "artifact, style, content, mixed or unknown; only artifact may remove", nullable=False),
        column("threshold", pa.float32(), "value above which the tag holds", nullable=False),
        column("reviewers", pa.string(), "who signed it, joined by ;  an empty one is a proposal and removes nothing", nullable=False),
        column("tower", pa.string(), "identity of the encoder whose vectors the SAE reads", nullable=False),
        column("weights", pa.string(), "hash of the SAE's weights, 12 hex digits", nullable=False),
    ]
)  # curation/weights/*.tags.csv; a policy also sees `active`: signed, and of the encoder and SAE of the run's annotation artifacts

SELECTION = pa.schema(
    [
        UID,
        column("shard", pa.string(), "shard that the sample came from", nullable=False),
        column("key", pa.string(), "key inside the shard", nullable=False),
        column("bucket_height", pa.int32(), "height of the image in training, pixels", nullable=False),
        column("bucket_width", pa.int32(), "width of the image in training, pixels", nullable=False),
        column("crop_top", pa.int32(), "crop in pixels of the upright source image", nullable=False),
        column("crop_left", pa.int32(), "crop in pixels of the upright source image", nullable=False),
        column("crop_height", pa.int32(), "crop in pixels of the upright source image", nullable=False),
        column("crop_width", pa.int32(), "crop in pixels of the upright source image", nullable=False),
    ]
)

PACKED = pa.schema(
    [
        UID,
        column("image", pa.binary(), "JPEG of exactly the bucket's size: quality 95, 4:4:4, or the source's own bytes", nullable=False),
        column("caption", pa.string(), "caption of the source", nullable=False),
        column("caption_source", pa.string(), "txt, json, column, metadata or name", nullable=False),
        column("other_captions", OTHER_CAPTIONS, "further captions of the source; a training step draws one of all", nullable=False),
        column("bucket_height", pa.int32(), "height of the image, the same in the whole row group", nullable=False),
        column("bucket_width", pa.int32(), "width of the image, the same in the whole row group", nullable=False),
        column("source_height", pa.int32(), "height of the upright source image", nullable=False),
        column("source_width", pa.int32(), "width of the upright source image", nullable=False),
        column("crop_top", pa.int32(), "crop in pixels of the upright source image", nullable=False),
        column("crop_left", pa.int32(), "crop in pixels of the upright source image", nullable=False),
        column("crop_height", pa.int32(), "crop in pixels of the upright source image", nullable=False),
        column("crop_width", pa.int32(), "crop in pixels of the upright source image", nullable=False),
        column("shard", pa.string(), "shard that the sample came from", nullable=False),
        column("key", pa.string(), "key inside the shard", nullable=False),
        column("padding", pa.bool_(), "true for a repeated row that fills up the last batch of a bucket", nullable=False),
    ]
)  # a row group is one training batch of one bucket; dataset.json lists them in order

LATENTS = pa.schema(
    [
        UID,
        column("latent", pa.binary(), "float16 little-endian (16, bucket_height / 8, bucket_width / 8), unit variance", nullable=False),
    ]
)  # the rows and row groups of the packed shard of the same name

TABLES = {
    "samples": (SAMPLES, "in memory, from curation.sources"),
    "shards": (SHARDS, "shards.parquet, the source as it was listed by k2 annotate"),
    "basics": (BASICS, "annotations/basics/<shard>.parquet"),
    "defects": (DEFECTS, "annotations/defects/<shard>.parquet"),
    "text_density": (TEXT_DENSITY, "annotations/text_density/<shard>.parquet"),
    "provenance": (PROVENANCE, "annotations/provenance/<shard>.parquet"),
    "siglip, effnet, compact": (embedding_schema(1), "annotations/<tower>/<shard>.parquet (shown for dim 1)"),
    "synthetic": (SYNTHETIC, "annotations/synthetic/<shard>.parquet"),
    "artifacts": (ARTIFACTS, "annotations/artifacts/<shard>.parquet"),
    "failed shards": (FAILED_SHARDS, "failed_shards.parquet, from `k2 annotate`: tried again by the next run"),
    "duplicates": (DUPLICATES, "annotations/duplicates/all.parquet, from `k2 dedup`"),
    "semantic": (SEMANTIC, "annotations/semantic/all.parquet, from `k2 dedup`"),
    "concepts": (CONCEPTS, "annotations/concepts/all.parquet, from `k2 dedup`"),
    "tags": (TAGS, "curation/weights/*.tags.csv"),
    "selection": (SELECTION, "selection/<policy>.parquet, from `k2 filter`"),
    "packed": (PACKED, "packed/<policy>/<n>.parquet, from `k2 pack`"),
    "latents": (LATENTS, "packed/<policy>/latents/<n>.parquet, from `k2 pack --latents`"),
}


def tables_markdown() -> str:
    """docs/tables.md."""
    lines = ["# Tables", "", "Made from `curation/schema.py` by `python -m curation.schema > docs/tables.md`.", ""]
    for name, (schema, place) in TABLES.items():
        lines += [f"## {name}", "", f"`{place}`", "", "| column | type | meaning |", "|---|---|---|"]
        for field in schema:
            comment = (field.metadata or {}).get(b"comment", b"").decode()
            lines.append(f"| {field.name} | {field.type} | {comment} |")
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(tables_markdown())
