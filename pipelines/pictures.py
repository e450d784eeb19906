"""The sample grid of a training run, as a PNG file."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from curation.shards import write_bytes

MARGIN = 12
MAX_CELL = 320  # pixels of a picture in the grid: 1024 px samples are shown smaller
FONT_SIZE = 14


def sample_grid(rows: Mapping[str, np.ndarray], captions: Sequence[str], title: str, path: Path) -> None:
    """Rows of pictures with their names on the left edge, and a caption under each column.

    Args:
        rows: name to uint8 (N, H, W, 3), all of one shape.
        captions: N texts.
    """
    font = ImageFont.load_default(FONT_SIZE)
    height, width = next(iter(rows.values())).shape[1:3]
    scale = min(1.0, MAX_CELL / max(height, width))
    cell_h, cell_w = round(height * scale), round(width * scale)
    letters = max(8, int(cell_w / (FONT_SIZE * 0.52)))
    texts = ["\n".join(textwrap.wrap(caption, letters, max_lines=4, placeholder=" ...")) or "(empty)" for caption in captions]
    line = FONT_SIZE + 4
    row_h = line + cell_h + MARGIN
    caption_h = (max(text.count("\n") for text in texts) + 1) * line
    columns = MARGIN + len(captions) * (cell_w + MARGIN)
    canvas = Image.new("RGB", (max(columns, 420), line + MARGIN + len(rows) * row_h + caption_h + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN // 2), title, "black", font)
    for r, (name, pictures) in enumerate(rows.items()):
        top = line + MARGIN + r * row_h
        pen.text((MARGIN, top), name, "dimgray", font)
        for c, picture in enumerate(pictures):
            image = Image.fromarray(picture)
            if scale < 1:
                image = image.resize((cell_w, cell_h), Image.Resampling.LANCZOS)
            canvas.paste(image, (MARGIN + c * (cell_w + MARGIN), top + line))
    for c, text in enumerate(texts):
        pen.multiline_text((MARGIN + c * (cell_w + MARGIN), line + MARGIN + len(rows) * row_h), text, "black", font)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    write_bytes(buffer.getvalue(), path)
