"""Which texts in a file say that a model made the picture, and which generator wrote them. Only written formats are known here."""

import re
from typing import Any, NamedTuple

from curation.metadata import Blocks


class Mark(NamedTuple):
    """One piece of evidence."""

    kind: str  # parameters, software, credit, aigc or signature: as in the column declared_by
    generator: str | None
    place: str  # png:<keyword>, exif:<field>, xmp:<field> or iptc:<field>


# A name counts where software signs (never in free text): EXIF Software and Make, XMP CreatorTool, PNG Software and Source.
# Names that mean other things too (imagen, flux, krea, gemini, recraft, Leonardo) are left out on purpose.
_NAMES = {
    "midjourney": "midjourney",
    "dall·e": "openai",
    "dall-e": "openai",
    "chatgpt": "openai",
    "gpt-image": "openai",
    "openai": "openai",
    "adobe firefly": "firefly",
    "novelai": "novelai",
    "invokeai": "invokeai",
    "comfyui": "comfyui",
    "automatic1111": "a1111",
    "stable diffusion": "stable diffusion",
    "stablediffusion": "stable diffusion",
    "fooocus": "fooocus",
    "swarmui": "swarmui",
    "draw things": "draw things",  # XMP CreatorTool of the app
    "ideogram ai": "ideogram",  # EXIF Make
    "bing image creator": "bing",
    "leonardo.ai": "leonardo",
    "nightcafe": "nightcafe",
    "dreamstudio": "dreamstudio",
}
_NAME = re.compile("(?<![a-z])(" + "|".join(map(re.escape, _NAMES)) + ")(?![a-z])", re.IGNORECASE)

# Google writes it into IPTC Credit (IIM 2:110) and photoshop:Credit; "Edited" for Magic Editor and its like.
_GOOGLE = re.compile(r"\b(made|edited) with google ai\b(?! studio)", re.IGNORECASE)

_A1111 = re.compile(r"\bSteps: \d+")  # AUTOMATIC1111 modules/processing.py create_infotext; Forge, SD.Next and sd.cpp write the same
_A1111_MORE = re.compile(r"\b(Sampler|CFG scale|Seed|Model hash): ")
# Keys of the JSON that others write. All keys of one group have to be there; plain searches, because a hostile text may be a megabyte.
_KEYS = {
    "swarmui": (("sui_image_params",),),  # SwarmUI, docs/Image Metadata Format.md
    "fooocus": (("metadata_scheme", "base_model"), ("base_model", "performance", "full_prompt")),  # Fooocus modules/meta_parser.py
    "comfyui": (("class_type", "inputs"), ("nodes", "links", "widgets_values")),  # ComfyUI nodes.py SaveImage: prompt, workflow
    "novelai": (("uc", "sampler", "steps"), ("noise_schedule", "sampler", "steps")),  # PNG Comment, NovelAI/novelai-image-metadata
}
_INVOKEAI = ("invokeai_metadata", "invokeai_graph", "invokeai_workflow", "sd-metadata", "Dream")  # PNG keywords, newest first
_JOB = re.compile(r"\bJob ID: [0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}\b")  # Midjourney: PNG Description, XMP dc:description
# Grok: ImageDescription "Signature: <base64>" and a UUID as Artist (wiltodelta/remove-ai-watermarks, metadata.py, seen on real files)
_SIGNATURE = re.compile(r"^Signature: [A-Za-z0-9+/=]{20,}$")
_UUID = re.compile(r"^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$", re.IGNORECASE)

# GB 45438-2025, appendix E: JSON in XMP TC260:AIGC (TC260-PG-20258A) or in a PNG text AIGC. Label 1: generated; 2: its user says
# that it may be; 3: a platform suspects it.
_LABEL = re.compile(r'"Label"\s*:\s*"?([123])"?\s*[,}]')
_PRODUCER = re.compile(r'"ContentProducer"\s*:\s*"([^"]{1,200})"')


def name_of(text: str | None) -> str | None:
    """The generator whose name stands in a short text that software signed with."""
    found = _NAME.search(text[:1000]) if text else None
    return _NAMES[found.group().lower()] if found else "google" if text and _GOOGLE.search(text[:1000]) else None


def parameters_of(text: str) -> str | None:
    """The generator whose way of writing down prompt and settings this text follows."""
    if '":' in text or '" :' in text:
        for generator, groups in _KEYS.items():
            if any(all(f'"{key}"' in text for key in group) for group in groups):
                return generator
    if _A1111.search(text) and _A1111_MORE.search(text):
        return "fooocus" if "Version: Fooocus" in text else "a1111"
    return "midjourney" if _JOB.search(text) else None


def label_of(text: str) -> tuple[str | None, str | None]:
    """(label 1 to 3, producer) of China's AIGC label; (None, None) where the text is none."""
    label, producer = _LABEL.search(text), _PRODUCER.search(text)
    return (label.group(1), producer.group(1) if producer else None) if label and '"ContentProducer"' in text else (None, None)


def marks_of(blocks: Blocks, exif: dict[str, Any], xmp: dict[str, str], iptc: dict[str, str]) -> list[Mark]:
    """All evidence but C2PA and the two XMP fields that say it in words of their own, the surest first."""
    texts = [(f"png:{keyword}", text) for keyword, text in blocks.text]
    texts += [(f"exif:{name}", exif[name]) for name in ("comment", "description", "make", "model", "software") if name in exif]
    texts += [(f"xmp:{name}", xmp[name]) for name in ("description", "comment") if name in xmp]
    found = [Mark("parameters", made_by, place) for place, text in texts if (made_by := parameters_of(text))]
    for keyword, text in blocks.text:
        if keyword in _INVOKEAI and text:
            found.append(Mark("parameters", "invokeai", f"png:{keyword}"))
        elif keyword == "fooocus_scheme":
            found.append(Mark("parameters", "fooocus", f"png:{keyword}"))
    labelled = [(place, text) for place, text in texts if '"ContentProducer"' in text] + [("xmp:aigc", xmp.get("aigc", ""))]
    for place, text in labelled:
        label, producer = label_of(text)
        if label == "1":
            found.append(Mark("aigc", producer, place))
    signed = [(f"png:{keyword}", text) for keyword, text in blocks.text if keyword in ("Software", "Source")]
    signed += [(f"exif:{name}", exif[name]) for name in ("software", "make") if name in exif]
    signed += [("xmp:creator_tool", xmp.get("creator_tool"))]
    found += [Mark("software", made_by, place) for place, text in signed if (made_by := name_of(text))]
    for place, text in (("xmp:credit", xmp.get("credit")), ("iptc:credit", iptc.get("credit"))):
        made_by = name_of(text)
        if made_by and (text or "").strip().lower() != "openai":  # a firm hands out photographs too
            found.append(Mark("credit", made_by, place))
    if _SIGNATURE.match(exif.get("description", "")) and _UUID.match(exif.get("artist", "")):
        found.append(Mark("signature", "grok", "exif:description"))
    return found
