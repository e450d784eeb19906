"""A coverage-guided fuzzer on what strangers send: images, their metadata, and tars. Not part of `make test`; it runs until stopped.

    pip install atheris
    python tests/fuzz.py image|metadata|tar [-max_total_time=600] [CORPUS_DIR]

An input is a finding when anything but the documented error is raised, when it takes more than 10 seconds or 2 GiB. libFuzzer writes
it to crash-*, slow-unit-* or oom-*; mend the code and put the input, named for what is wrong with it, into tests/hostile.py.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["PIL", "curation", "tarfile", "defusedxml", "pillow_heif"]):
    from curation.decode import DecodeError, ImageBatch, Limits, decode_for
    from curation.sources import list_shards, read_samples
    from curation.stages.basics import compute
    from curation.stages.provenance import Provenance

import hostile
from conftest import tar_of

LIMITS = Limits(max_pixels=4_000_000)
PLACE = tempfile.mkdtemp()


def image(content: bytes) -> None:
    """Decoding and the facts; the verdict may not depend on how much is asked for."""
    found = []
    for reads in ("view", "pixels"):
        try:
            decoded = decode_for(content, reads, LIMITS)
        except DecodeError as error:
            found.append(str(error))
        else:
            found.append(None)
            compute(ImageBatch(["a"], [content], [decoded.pixels], [decoded.header], views=[decoded.view]))
    assert found[0] == found[1], found


def metadata(content: bytes) -> None:
    """Provenance of any bytes is a row of values, never an exception."""
    values = PROVENANCE(ImageBatch(["a"], [content], [], []))
    assert all(len(cells) == 1 for cells in values.values())


def tar(content: bytes) -> None:
    """A tar of any bytes gives rows or says that the shard is unreadable."""
    path = Path(PLACE, "a.tar")
    path.write_bytes(content)
    uids = [uid for shard in list_shards(str(path)) for batch in read_samples(shard) for uid in batch["uid"].to_pylist()]
    assert len(uids) == len(set(uids))


TARGETS = {"image": image, "metadata": metadata, "tar": tar}


def seeds(target: str) -> str:
    """A folder of files to start from: the hostile images that are small, or tars of them."""
    folder = Path(tempfile.mkdtemp())
    files = [file for file in hostile.images() if len(file.content) < 20_000]
    for i, file in enumerate(files):
        if target == "tar":
            if i % 20 == 0:
                tar_of(
                    [(f"a/{j}.{name}", x.content) for j, x in enumerate(files[i : i + 3]) for name in ("jpg", "txt")], folder / f"{i}.tar"
                )
        else:
            (folder / file.name).write_bytes(file.content)
    return str(folder)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python tests/fuzz.py {'|'.join(TARGETS)} [libFuzzer flags] [corpus folder]")
    PROVENANCE = Provenance().load("cpu") if sys.argv[1] == "metadata" else None
    flags = [flag for flag in sys.argv[2:] if flag.startswith("-")]
    folders = [folder for folder in sys.argv[2:] if not folder.startswith("-")]
    atheris.Setup(
        [sys.argv[0], "-timeout=10", "-rss_limit_mb=2048", "-max_len=30000", *flags, *folders, seeds(sys.argv[1])], TARGETS[sys.argv[1]]
    )
    atheris.Fuzz()
