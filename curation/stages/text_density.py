"""The stage `text_density`: where text stands, how much of the image it takes, and how tall it is.

K2 leaves out images whose text "cannot be meaningfully represented at low resolution", by text density from OCR; the report
names no detector. Here it is PP-OCRv6's small text detector (differentiable binarisation, Liao et al. 2020, arXiv 1911.08947)
with the weights, the preparation and the box finder of the `rapidocr` package; nothing is downloaded. Text is found, not read.

Letters are found from about 10 pixels of height on, whatever their size in the file. A view may have a short side of 512 pixels, on
which the letters that are unreadable at 512 are not found either, so the stage starts from all pixels and makes its own view of 736
(rapidocr's own side): measured in bench_defects.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from curation.decode import ImageBatch
from curation.schema import TEXT_DENSITY

WEIGHTS = "PP-OCRv6_det_small.onnx"  # in rapidocr/models
MULTIPLE = 32  # of pixels that the network's sides are rounded to
TALLEST = 0.5  # part of the short side; what is taller is hardly text: a cup seen from above is a fine letter O
LONGEST = 4  # long sides beyond this many short ones are squeezed: a strip must not cost more than a few images


@dataclass(frozen=True)
class TextDensity:
    """Text boxes of an image that is reduced to a short side of `side` pixels; smaller images are looked at as they are.

    thresh, box_thresh and unclip_ratio are rapidocr's own defaults: the level of a text pixel, the least mean level of a box, and
    how far a found core grows to the box.
    """

    side: int = 736
    thresh: float = 0.3
    box_thresh: float = 0.5
    unclip_ratio: float = 1.6
    weights: str = WEIGHTS
    version: int = 1
    name: ClassVar[str] = "text_density"
    reads: ClassVar[str] = "pixels"
    schema: ClassVar[pa.Schema] = TEXT_DENSITY

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, Any]]:
        """On "cuda" the network runs there if onnxruntime can; on the CPU in one thread, so that the bytes never differ."""
        from rapidocr.ch_ppocr_det.utils import DBPostProcess, DetPreProcess

        prepare = DetPreProcess(MULTIPLE, "min", [0.5] * 3, [0.5] * 3)
        find_boxes = DBPostProcess(self.thresh, self.box_thresh, 1000, self.unclip_ratio, "fast", use_dilation=True)
        session = _session(self.weights, device)

        def measure(image: np.ndarray) -> dict[str, Any]:
            small = reduced(image, self.side)
            (levels,) = session.run(None, {"x": prepare(np.ascontiguousarray(small[..., ::-1]))})
            return density(*find_boxes(levels, small.shape[:2]), *small.shape[:2])

        def compute(batch: ImageBatch) -> dict[str, Any]:
            rows = [measure(image) for image in batch.images]
            return {name: [row[name] for row in rows] for name in rows[0]}

        return compute


@cache
def _session(weights: str, device: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.enable_cpu_mem_arena = False  # every image has another shape, and the arena keeps the largest of all
    options.log_severity_level = 3
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    providers = [name for name in (*wanted, "CPUExecutionProvider") if name in onnxruntime.get_available_providers()]
    return onnxruntime.InferenceSession((files("rapidocr") / "models" / weights).read_bytes(), options, providers=providers)


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) -> the same with a short side of at most `side` and a long one of at most LONGEST * side, none under 16."""
    height, width = image.shape[:2]
    scale = min(1.0, side / min(height, width))
    size = [int(np.clip(round(length * scale), MULTIPLE // 2 + 1, LONGEST * side)) for length in (width, height)]
    return image if size == [width, height] else cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def density(corners: np.ndarray, scores: list[float], height: int, width: int) -> dict[str, Any]:
    """Columns of TEXT_DENSITY from int (N, 4, 2) corners (x, y) of boxes in an image of (height, width) pixels, and N scores.

    An image without text has no boxes, an area of 0, and text heights of 1: the tallest text is the most readable. Boxes with text
    taller than TALLEST are left out.
    """
    raster = np.zeros((height, width), np.uint8)
    boxes = []
    for points, score in zip(np.asarray(corners, np.int32).reshape(-1, 4, 2), scores, strict=True):
        sides = np.linalg.norm(points[1] - points[0]) + 1, np.linalg.norm(points[3] - points[0]) + 1
        text_height = min(sides) / min(height, width)
        if text_height > TALLEST:
            continue
        cv2.fillConvexPoly(raster, points, 1)
        left, top = points.min(0)
        right, bottom = points.max(0) + 1
        box = {
            "x": left / width,
            "y": top / height,
            "width": (right - left) / width,
            "height": (bottom - top) / height,
            "text_height": text_height,
            "area": min(sides[0] * sides[1] / (height * width), 1.0),
            "score": score,
        }
        boxes.append({name: float(value) for name, value in box.items()})
    tall = [box["text_height"] for box in boxes] or [1.0]
    return {
        "num_boxes": len(boxes),
        "text_area": float(raster.mean()),
        "largest_box": max((box["area"] for box in boxes), default=0.0),
        "text_height_min": min(tall),
        "text_height_median": float(np.median(tall)),
        "boxes": boxes,
    }
