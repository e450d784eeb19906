"""Fitted models on disk: a folder, found by its packaged name or its path, that names the tower whose vectors it was fitted on."""

import json
from pathlib import Path
from typing import Any

from curation.towers import Compact, EffNet, Siglip, Tower

WEIGHTS_DIR = Path(__file__).parent / "weights"


def find(model: str, file: str) -> Path:
    """The folder of a fitted model that holds `file`: `model` is a folder's path, or the name of one in curation/weights.

    Raises:
        ValueError: there is none; the text lists the packaged ones of this kind.
    """
    for folder in (Path(model), WEIGHTS_DIR / model):
        if (folder / file).is_file():
            return folder
    names = sorted(path.parent.name for path in WEIGHTS_DIR.glob(f"*/{file}"))
    raise ValueError(f"no fitted model {model!r}: no {file} in that folder, and the packaged ones are {', '.join(names) or 'none'}")


def out_dir(out: str) -> Path:
    """Where a fitted model goes: a bare name means curation/weights (to ship it), anything with a separator is a path."""
    return WEIGHTS_DIR / out if out == Path(out).name else Path(out)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); fit the model again") from error


def parse_tower(spec: str) -> Tower:
    """ "effnet[:depths]", "compact[:WEIGHTS]" or "siglip[:MODEL[:PRETRAINED]]" as a tower.

    Raises:
        ValueError: no such tower.
    """
    name, *rest = spec.split(":", 2)
    if name == "siglip":
        return Siglip(**dict(zip(("model", "pretrained"), rest, strict=False)))
    if name == "compact":
        return Compact(spec.partition(":")[2] or None)
    if spec not in ("effnet", "effnet:depths"):
        raise ValueError(f"no tower {spec!r}; choose effnet[:depths], compact[:WEIGHTS] or siglip[:MODEL[:PRETRAINED]]")
    return EffNet(depths=bool(rest))


def check_pooled(model: str, metadata: dict[str, Any]) -> None:
    """Refuse an SAE of patch tokens where whole images are judged: its thresholds are those of a place, not of a mean over places.

    Raises:
        ValueError: it was fitted on tokens.
    """
    if metadata.get("vectors", "pooled") != "pooled":
        raise ValueError(
            f"{model} was fitted on {metadata['vectors']} of its tower; images are judged by the pooled vector: fit an SAE on those"
        )


def tower_spec(tower: Tower) -> str:
    """The text from which `parse_tower` makes this tower."""
    if isinstance(tower, Siglip):
        return f"siglip:{tower.model}:{tower.pretrained}"
    if isinstance(tower, EffNet):
        return "effnet:depths" if tower.depths else "effnet"
    return f"compact:{tower.weights}" if tower.weights else tower.name


def check_identity(model: str, fitted_on: str, identity: str, verb: str) -> None:
    """Refuse vectors of another tower than the model was fitted on; `verb` ("synthetic" or "sae") names the command that fits one.

    Raises:
        ValueError: the two differ.
    """
    if fitted_on != identity:
        name, variant = identity.split("/")[0], identity.split("/")[1]
        spec = f"siglip:{variant}" if name == "siglip" else "effnet:depths" if "/depths/" in identity else name
        raise ValueError(
            f"{model} was fitted on {fitted_on}, got vectors of {identity}: they have nothing in common. "
            f"Fit one with `k2 {verb} fit --tower{'s' if verb == 'synthetic' else ''} {spec} ...`, or use the tower that it was fitted on."
        )
