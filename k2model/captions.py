"""Which of an image's captions a step sees.

Krea trains predominantly on long captions, with short and medium ones present throughout (K2 report, "Captioning"), so the choice is
made anew at every step and not when the data are packed. It is a function of (seed, step, uid), as all randomness of training is.
"""

from collections import Counter
from collections.abc import Sequence

from k2model.flow import number

# A caption's length is counted in bytes of UTF-8, which needs no tokenizer and no spaces: an English word has about 6 with its
# space, a Chinese one about 5. So short is up to about 20 words, medium up to about 80.
SHORT_BYTES, MEDIUM_BYTES = 120, 480


def length_of(caption: str) -> int:
    """0 for a long caption, 1 for a medium, 2 for a short one: the place of its length in a mix."""
    size = len(caption.encode())
    return 2 if size <= SHORT_BYTES else 1 if size <= MEDIUM_BYTES else 0


def choose(captions: Sequence[str], mix: tuple[float, float, float], seed: int, step: int, uid: str) -> str:
    """One of an image's captions at a step.

    A length that the image has no caption of gives its share to the others, in proportion; captions of one length are equally likely. An
    image all of whose captions have lengths of share 0 is not left out: they are equally likely.

    Args:
        captions: of the image, one or more.
        mix: shares of long, medium and short captions.
        step: of the run, from 0.
    """
    lengths = [length_of(caption) for caption in captions]
    counts = Counter(lengths)
    weights = [mix[length] / counts[length] for length in lengths]
    weights = weights if sum(weights) else [1.0] * len(weights)
    left = sum(weights) * number(seed, "caption", step, uid) / 2**63
    for caption, weight in zip(captions, weights, strict=True):
        left -= weight
        if left < 0:
            return caption
    return captions[max(i for i, weight in enumerate(weights) if weight)]  # rounding
