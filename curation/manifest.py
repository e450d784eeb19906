"""C2PA manifests, read by c2pa-python without network and without a trust list.

Who signed is not checked here: every camera, editor and generator has a certificate of its own, and trust lists change while facts
must not. What is checked: the signature, and that picture and assertions are the ones that were signed.
"""

import io
import json
from typing import Any, NamedTuple

import c2pa

# Kept out of the state, because they depend on the day or on a trust list rather than on the bytes.
_OF_THE_DAY = ("signingCredential.untrusted", "signingCredential.expired", "timeStamp.untrusted", "cawg.x509.credential.untrusted")
_NAMED = "cawg."  # who a person says to be (CAWG identity assertions) is a matter beside the manifest's own signature
_SETTINGS = {
    "verify": {"verify_after_reading": True, "verify_trust": False, "ocsp_fetch": False, "remote_manifest_fetch": False},
    "core": {"allowed_network_hosts": [], "max_decompressed_manifest_size_in_mb": 16},
}
AI_TYPES = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "compositeSynthetic")
_ITEMS = 64  # manifests, actions and names that are looked at


class Manifest(NamedTuple):
    """What a manifest store says. Texts are as found: the caller bounds them."""

    state: str  # valid, invalid, unreadable
    problems: tuple[str, ...] = ()
    claim_generator: str = ""
    issuer: str = ""
    source_types: tuple[str, ...] = ()  # last part of the URI, the active manifest's first
    ai_tools: tuple[str, ...] = ()


class Reader:
    """Reads manifests of one process: the settings are parsed once."""

    def __init__(self) -> None:
        self._context = c2pa.Context.from_dict(_SETTINGS)

    def __call__(self, encoded: bytes) -> Manifest | None:
        """The manifest store of a file; None when there is none. A hostile store is `unreadable`, never an exception."""
        try:
            with c2pa.Reader(io.BytesIO(encoded), context=self._context) as reader:
                store = json.loads(reader.json())
        except c2pa.C2paError.ManifestNotFound:
            return None
        except (c2pa.C2paError, ValueError, RecursionError) as error:
            return Manifest("unreadable", (str(error),))
        try:
            return _summary(store)
        except (AttributeError, TypeError, KeyError, IndexError) as error:  # JSON of another shape than the library promises
            return Manifest("unreadable", (f"{type(error).__name__}: {error}",))


def _summary(store: dict[str, Any]) -> Manifest:
    manifests, active = store.get("manifests") or {}, store.get("active_manifest")
    failures = ((store.get("validation_results") or {}).get("activeManifest") or {}).get("failure") or []
    problems = sorted({failure["code"] for failure in failures} - set(_OF_THE_DAY))
    invalid = any(not code.startswith(_NAMED) for code in problems)
    if active not in manifests:
        return Manifest("invalid" if invalid else "unreadable", tuple(problems) or ("no active manifest",))
    types: dict[str, None] = {}  # a set in order
    tools: dict[str, None] = {}
    queue, seen = [(active, False)], set()
    while queue and len(seen) < _ITEMS:
        label, component = queue.pop(0)
        if label in seen or label not in manifests:
            continue
        seen.add(label)
        for kind, agents in _claims(manifests[label]):
            # A part that a model made leaves the whole a composite.
            types.setdefault(AI_TYPES[1] if component and kind == AI_TYPES[0] else kind)
            if kind in AI_TYPES:
                tools |= dict.fromkeys(agents)
        for ingredient in (manifests[label].get("ingredients") or [])[:_ITEMS]:
            if ingredient.get("relationship") != "inputTo":  # what a model was shown is not in the picture
                queue.append((ingredient.get("active_manifest"), component or ingredient.get("relationship") == "componentOf"))
    claim = manifests[active]
    return Manifest(
        "invalid" if invalid else "valid",
        tuple(problems),
        claim.get("claim_generator") or " ".join(info.get("name", "") for info in claim.get("claim_generator_info") or []),
        (claim.get("signature_info") or {}).get("issuer") or "",
        tuple(types),
        tuple(tools),
    )


def _claims(manifest: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(source type, software agents) of every action and of embedded IPTC metadata. C2PA 2.2, sections 18.15 and 18.17."""
    found = []
    for assertion in (manifest.get("assertions") or [])[:_ITEMS]:
        data = assertion.get("data")
        if not isinstance(data, dict):
            continue
        if assertion["label"].startswith("c2pa.actions"):
            for action in (data.get("actions") or [])[:_ITEMS]:
                if kind := _last_part(action.get("digitalSourceType")):
                    agent = action.get("softwareAgent")  # a text in version 1, a claim_generator_info in version 2
                    name = agent.get("name") if isinstance(agent, dict) else agent
                    found.append((kind, [name] if isinstance(name, str) else []))
        elif kind := _last_part(data.get("Iptc4xmpExt:DigitalSourceType")):
            found.append((kind, []))
    return found


def _last_part(uri: Any) -> str | None:
    return uri.rstrip("/").rpartition("/")[2] if isinstance(uri, str) else None
