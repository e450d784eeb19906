"""Names that are safe to write down: keys in uids, shard names in paths, and names in words."""

import hashlib
import posixpath
import re
from pathlib import PurePosixPath

MAX_KEY = 1000  # bytes
MAX_SHARD_NAME = 200  # bytes: a file system takes 255, and an unfinished file carries a mark and an ending
LOST = "~lost"  # key of the row that stands for all that a damaged shard no longer gives

_WEBDATASET_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


def escaped(name: str) -> str:
    r"""A name as valid UTF-8 text without control characters; two names never become one, and `unescaped` gives it back.

    Bytes that are no UTF-8 (surrogate escapes) and controls become \xff or \u0085, a backslash becomes \x5c.
    """
    if name.isprintable() and "\\" not in name:  # nearly every name; surrogates are not printable
        return name
    return "".join(map(_escape, name))


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x20 or code in (0x5C, 0x7F):
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 else character


def unescaped(text: str) -> str:
    """The name that `escaped` was given."""
    if "\\" not in text:
        return text
    return re.sub(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})", _unescape, text)


def _unescape(match: re.Match) -> str:
    code = int(match[1] or match[2], 16)
    return chr(0xDC00 + code) if match[1] and code >= 0x80 else chr(code)


def safe_key(name: str) -> str:
    """A member's name as a key: `escaped`, and where it is longer than MAX_KEY bytes its start and a hash."""
    key = escaped(name)
    if len(key.encode()) <= MAX_KEY:
        return key
    return key.encode()[: MAX_KEY - 40].decode("utf-8", "ignore") + "~" + _hash(name, 16)


def safe_shard_name(path: str) -> str:
    """A relative path as a file name: folders joined by __, no separator, control or leading dot, at most MAX_SHARD_NAME bytes.

    A path that had to be changed or cut carries its hash, so that two paths do not become one name.
    """
    plain = path.replace("/", "__")
    name = re.sub(r"[^\w.+=@, ()~-]", "_", plain)
    name = "_" + name[1:] if name.startswith((".", " ", "~")) else name
    if name == plain and len(name.encode()) <= MAX_SHARD_NAME:
        return name
    return name.encode()[: MAX_SHARD_NAME - 20].decode("utf-8", "ignore") + "-" + _hash(path, 8)


def _hash(name: str, digits: int) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:digits]


def webdataset_key(name: str) -> tuple[str | None, str]:
    """(key, suffix in lower case) of a tar's member, split as `webdataset.tariterators.base_plus_ext` does: at the first dot of the
    base name. The key is None where the name has no dot."""
    match = _WEBDATASET_NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else (None, "")


def name_in_words(path: str) -> str:
    """A file's folder and name as words, the caption of last resort: 'snow_park/IMG-red fox.jpg' -> 'snow park IMG red fox'."""
    folder, base = posixpath.split(path)
    parts = (posixpath.basename(folder), PurePosixPath(base).stem)
    return " ".join(re.sub(r"[\W_]+", " ", part).strip() for part in parts).strip()
