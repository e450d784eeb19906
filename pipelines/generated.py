"""Generated pictures as PNG files that say what they are: how they were made, and that a model made them; and their contact sheet."""

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from curation.shards import write_bytes

KEYWORD = "k2"  # of the text chunk with the parameters
CELL, MARGIN, FONT_SIZE, COLUMNS, MOST = 320, 12, 14, 6, 102

# IPTC Photo Metadata Standard 2025.1: the picture is what a trained model made of a prompt. Our own stage `provenance` reads it.
XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<xmp:CreatorTool>k2 sample</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia</Iptc4xmpExt:DigitalSourceType>
<Iptc4xmpExt:AISystemUsed>{system}</Iptc4xmpExt:AISystemUsed>
<Iptc4xmpExt:AIPromptInformation>{prompt}</Iptc4xmpExt:AIPromptInformation>
</rdf:Description></rdf:RDF></x:xmpmeta>"""


def write_picture(pixels: np.ndarray, parameters: Mapping[str, Any], path: Path) -> None:
    """A PNG, whole or not at all.

    Args:
        pixels: uint8 (H, W, 3).
        parameters: JSON values, `prompt` and `model` among them; kept as JSON in the text chunk `k2`.
        path: the file.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt(KEYWORD, json.dumps(parameters, ensure_ascii=False, sort_keys=True))
    packet = XMP.format(system=_xml(f"K2 ({parameters['model']['name']})"), prompt=_xml(parameters["prompt"]))
    text.add_itxt("XML:com.adobe.xmp", packet)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=text)
    write_bytes(buffer.getvalue(), path)


def parameters_of(path: Path) -> dict[str, Any]:
    """What `write_picture` kept.

    Raises:
        ValueError: another program made the file.
    """
    try:
        with Image.open(path) as image:
            return json.loads(image.text[KEYWORD])
    except (OSError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is there, but `k2 sample` did not make it. Choose another --out, or move it away.") from error


def _xml(text: str) -> str:
    """Text for an XML element: no control characters, which XML cannot hold."""
    return escape("".join(c for c in text if c in "\t\n\r" or c >= " "))


def contact_sheet(paths: Sequence[Path], per_prompt: int, title: str, path: Path) -> None:
    """The first pictures side by side with prompt and seed under each; larger ones smaller.

    Args:
        paths: files of `write_picture`, those of a prompt together.
        per_prompt: how many a prompt has; they stand in one row if it is wide enough.
        title: one line above.
        path: the PNG file.
    """
    font, line = _font(), FONT_SIZE + 4
    shown = [(Image.open(place).convert("RGB"), parameters_of(place)) for place in paths[:MOST]]
    scale = min(1.0, CELL / max(max(image.size) for image, _ in shown))
    sizes = [(max(1, round(image.width * scale)), max(1, round(image.height * scale))) for image, _ in shown]
    width, height = max(120, *(w for w, _ in sizes)), max(h for _, h in sizes)
    letters = max(8, int(width / (FONT_SIZE * 0.55)))
    captions = [
        [*(textwrap.wrap(said["prompt"], letters, max_lines=3, placeholder=" ...") or ["(empty)"]), f"seed {said['seed']}"]
        for _, said in shown
    ]
    columns = min(len(shown), per_prompt * max(1, COLUMNS // per_prompt) if per_prompt <= COLUMNS else COLUMNS)
    cell_h = height + max(map(len, captions)) * line + MARGIN
    canvas_w = MARGIN + columns * (width + MARGIN)
    if len(paths) > MOST:
        title = f"{title} (first {MOST} of {len(paths)})"
    heading = textwrap.wrap(title, max(20, int((canvas_w - 2 * MARGIN) / (FONT_SIZE * 0.55))))
    top = MARGIN + len(heading) * line
    canvas = Image.new("RGB", (canvas_w, top + -(-len(shown) // columns) * cell_h + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    pen.multiline_text((MARGIN, MARGIN // 2), "\n".join(heading), "black", font)
    for i, ((image, _), size, caption) in enumerate(zip(shown, sizes, captions, strict=True)):
        x, y = MARGIN + i % columns * (width + MARGIN), top + i // columns * cell_h
        canvas.paste(image.resize(size, Image.Resampling.LANCZOS) if scale < 1 else image, (x, y))
        pen.multiline_text((x, y + height + 2), "\n".join(caption[:-1]), "black", font)
        pen.text((x, y + height + 2 + (len(caption) - 1) * line), caption[-1], "dimgray", font)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    write_bytes(buffer.getvalue(), path)


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: Pillow's own font has no letters beyond Latin."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), FONT_SIZE)
