"""Names of features are proposals: a text tower's nearest phrase, or what a vision-language model sees in the top images. Never evidence.

A phrase is compared with a feature's decoder row after the mean of all phrases is taken off and, where phrases come as a pair of a defect
and its absence, along the difference (CLIP-IQA, Wang et al. 2023, arXiv:2207.12396): plain cosines only say "an image".

A vision-language model (any server that speaks OpenAI's chat completions: vLLM, SGLang, Ollama) sees images on which the feature is strong
and near misses on which it just does not fire, and names the difference. The name is then scored as Delphi scores text (Paulo et al. 2024,
arXiv:2410.13928): shown images that it has not seen, one at a time and without their values, the model says which of them show the named
thing; the balanced accuracy is the name's score.
"""

import base64
import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

PHRASES = {  # kind of damage -> (what shows it, what does not)
    "jpeg": ("a photo with blocky jpeg compression artifacts", "a photo without compression artifacts"),
    "mosquito": ("a photo with compression noise around edges", "a photo with clean edges"),
    "oversharpen": ("an oversharpened photo with halos around edges", "a photo with natural sharpness"),
    "soft_upscale": ("a small photo enlarged until it is blurry", "a photo in its native resolution"),
    "nearest_upscale": ("a pixelated low resolution photo", "a high resolution photo"),
    "posterise": ("a photo with colour banding", "a photo with smooth gradients"),
    "chroma_shift": ("a photo with colour bleeding and misaligned colours", "a photo with clean colours"),
    "moire": ("a photo of a screen with a moire pattern", "a photo without a moire pattern"),
    "sensor_noise": ("a photo with strong digital colour noise", "a photo without noise"),
    "letterbox": ("a picture with black bars at its edges", "a picture that fills the frame"),
    "watermark": ("a stock photo with a watermark text over it", "a photo without a watermark"),
    "screenshot": ("a screenshot with user interface and subtitles", "a photo without interface elements"),
    "interlace": ("an interlaced video frame with combing lines", "a progressive video frame"),
    "vhs": ("a frame of a worn VHS tape with glitches", "a clean digital frame"),
    "plastic": ("a photo with waxy skin from heavy denoising", "a photo with natural texture"),
}
TRIES, PAUSE = 4, 1.0  # of a request; seconds before the second try, doubled each time
SIDE = 336  # pixels of an image's long side, as a model sees it


def by_text(directions: np.ndarray, phrases: np.ndarray, names: Sequence[str], top: int = 3) -> list[list[tuple[str, float]]]:
    """Nearest phrases of features: (m, d) decoder rows, (P, 2, d) text vectors of pairs, their P names -> per feature (name, cosine).

    The pair's difference is compared; the mean of the differences is taken off, since what all defects share names none of them.
    """
    difference = phrases[:, 0] - phrases[:, 1]
    difference = _unit(difference - difference.mean(0))
    cosines = _unit(directions) @ difference.T
    order = np.argsort(-cosines, axis=1)[:, :top]
    return [[(names[i], round(float(row[i]), 4)) for i in best] for row, best in zip(cosines, order, strict=True)]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Endpoint:
    """A server that speaks OpenAI's chat completions.

    Args:
        url: Its base, "http://localhost:8000/v1".
        model: The name that it serves the model under.
        key: Sent as a bearer token where the server wants one.
        timeout: Seconds for one answer.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 120.0

    def ask(self, parts: Sequence[dict[str, Any]], wait: Callable[[float], None] = time.sleep) -> str:
        """The answer to one message of text and images, at temperature 0. A busy or broken server is asked again three times.

        Raises:
            ConnectionError: it did not answer, or answered something else than a completion.
        """
        body = {"model": self.model, "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": list(parts)}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        for left in reversed(range(TRIES)):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                if left == 0 or (error.code < 500 and error.code != 429):
                    raise ConnectionError(
                        f"{request.full_url} answered {error.code}: {error.read(300).decode(errors='replace')}"
                    ) from error
            except (urllib.error.URLError, TimeoutError) as error:
                if left == 0:
                    raise ConnectionError(f"{request.full_url} does not answer ({error}); is the server up?") from error
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ConnectionError(f"{request.full_url} answered no chat completion ({error!r})") from error
            wait(PAUSE * 2 ** (TRIES - 1 - left))
        raise AssertionError("unreachable")


def by_looking(endpoint: Endpoint, top: Sequence[np.ndarray], near: Sequence[np.ndarray], held_out: int = 4) -> dict[str, Any]:
    """A name from images, and how well the same model finds the named thing on images that it has not seen.

    Args:
        endpoint: The model.
        top: uint8 (H, W, 3) images on which the feature is strong; the last `held_out` are kept for the score.
        near: Images just below the threshold, likewise.
        held_out: Images of each kind for the score.

    Raises:
        ValueError: too few images.
        ConnectionError: as `Endpoint.ask`.
    """
    if min(len(top), len(near)) < held_out + 1:
        raise ValueError(f"{len(top)} top and {len(near)} near-miss images; a name and its score take {held_out + 1} of each")
    question = (
        "The first group of images shares one visual property that the second group lacks. It may be a defect, a style or a subject. "
        "Name it in at most six words. Answer with the name alone."
    )
    parts = [say(question), say("First group:"), *map(show, top[:-held_out]), say("Second group:"), *map(show, near[:-held_out])]
    name = re.sub(r"\s+", " ", endpoint.ask(parts)).strip(" .\"'")[:80]
    asked = f'Does this image show the following: "{name}"? Answer yes or no.'
    right = []
    for images, expected in ((top[-held_out:], True), (near[-held_out:], False)):
        answers = [endpoint.ask([say(asked), show(image)]).strip().lower().startswith("yes") for image in images]
        right.append(float(np.mean([answer == expected for answer in answers])))
    return {"name": name, "by": endpoint.model, "detection": round(sum(right) / 2, 4), "num": 2 * held_out}


def say(text: str) -> dict[str, Any]:
    """A text part of a message."""
    return {"type": "text", "text": text}


def show(image: np.ndarray) -> dict[str, Any]:
    """An image part of a message: a JPEG of quality 95 (the damage is what it is about) as data URL, long side at most SIDE pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()}}
