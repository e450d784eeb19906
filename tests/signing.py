"""C2PA manifests for the tests: a certificate made on the spot, so that no key lies in the repository."""

import io
from datetime import UTC, datetime, timedelta
from functools import cache

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"


@cache
def _signer_info() -> c2pa.C2paSignerInfo:
    """An end-entity certificate under a root of its own, with what the C2PA certificate profile asks for."""
    now = datetime.now(UTC)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    names = [x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)]) for name in ("Test root", "Test signer")]

    def certificate(subject: x509.Name, public: ec.EllipticCurvePublicKey, is_root: bool) -> x509.Certificate:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(names[0]).public_key(public)
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(30))
        made = made.add_extension(x509.BasicConstraints(is_root, None), True)
        usage = x509.KeyUsage(not is_root, False, False, False, False, is_root, is_root, False, False)
        made = made.add_extension(usage, True).add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), False)
        if not is_root:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        return made.sign(root_key, hashes.SHA256())

    chain = [certificate(names[1], key.public_key(), False), certificate(names[0], root_key.public_key(), True)]
    pem = b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return c2pa.C2paSignerInfo(b"es256", pem, private, None)


def signed(
    image: bytes,
    mime: str = "image/jpeg",
    source_type: str = "digitalCapture",
    agent: str = "Test tool",
    ingredient: tuple[bytes, str] | None = None,
) -> bytes:
    """`image` with a manifest; `ingredient` is (JPEG bytes, relationship): opened as a parent, placed as a component, or an input."""
    actions = [{"action": "c2pa.created", "softwareAgent": {"name": agent}, "digitalSourceType": TYPES + source_type}]
    if ingredient:
        used = {"parameters": {"ingredientIds": ["part"]}}
        if ingredient[1] == "parentOf":
            actions = [{"action": "c2pa.opened"} | used]
        else:
            actions.append({"action": "c2pa.placed" if ingredient[1] == "componentOf" else "c2pa.edited"} | used)
    manifest = {
        "claim_generator_info": [{"name": "provenance test", "version": "1"}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }
    with c2pa.Builder(manifest) as builder, c2pa.Signer.from_info(_signer_info()) as signer:
        if ingredient:
            part = {"title": "part", "relationship": ingredient[1], "instance_id": "part", "label": "part"}
            builder.add_ingredient(part, "image/jpeg", io.BytesIO(ingredient[0]))
        out = io.BytesIO()
        builder.sign(signer, mime, io.BytesIO(image), out)
    return out.getvalue()
