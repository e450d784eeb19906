"""The tiny world: real photographs that scikit-image ships, cut small, as a folder and as tars, with the usual troubles in it."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

import pipelines  # noqa: F401  first: it tells OpenMP how to wait, before torch is loaded


def encode(pixels: np.ndarray, container: str = "JPEG", **options) -> bytes:
    """Pixels as the bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, container, **options)
    return buffer.getvalue()


def photographs(count: int, side: int = 96) -> list[np.ndarray]:
    """`count` distinct square crops of astronaut, coffee, rocket and cat."""
    sources = [data.astronaut(), data.coffee(), data.rocket(), data.chelsea()]
    crops = []
    for i in range(count):
        picture = sources[i % 4]
        step = i // 4
        top = (step * 67) % (picture.shape[0] - side)
        left = (step * 101) % (picture.shape[1] - side)
        crops.append(np.ascontiguousarray(picture[top : top + side, left : left + side]))
    return crops


def tar_of(files: list[tuple[str, bytes]], path: Path) -> Path:
    """A tar of (name, bytes), in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 files: 20 photographs (one PNG with alpha, one grey), one empty, one truncated, one HTML as .jpg, one with a caption."""
    folder = tmp_path_factory.mktemp("world") / "pictures"
    (folder / "deep.folder").mkdir(parents=True)
    crops = photographs(20)
    for i, crop in enumerate(crops[:18]):
        (folder / f"photo_{i:02d}.jpg").write_bytes(encode(crop, quality=90))
    (folder / "photo_00.txt").write_text("an astronaut in an orange suit")
    (folder / "photo_01.json").write_text('{"caption": "a cup of coffee", "width": 1}')
    alpha = np.dstack([crops[18], np.full(crops[18].shape[:2], 128, np.uint8)])
    (folder / "deep.folder" / "with alpha.png").write_bytes(encode(alpha, "PNG"))
    (folder / "deep.folder" / "grey.v2.png").write_bytes(encode(crops[19].mean(-1).astype(np.uint8), "PNG"))
    (folder / "broken_empty.jpg").write_bytes(b"")
    (folder / "broken_cut.jpg").write_bytes(encode(crops[3], quality=90)[:900])
    (folder / "broken_html.jpg").write_bytes(b"<html>404</html>")
    (folder / "notes.md").write_text("not an image")
    return folder


@pytest.fixture(scope="session")
def tiny_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three WebDataset tars of 8 samples: captions, a dotted folder, a sample without image, a broken image, two images in a key."""
    folder = tmp_path_factory.mktemp("tars")
    crops = photographs(24, side=80)
    for shard in range(3):
        files: list[tuple[str, bytes]] = []
        for i in range(8):
            key = f"a.b/{shard:02d}{i:04d}"
            crop = crops[shard * 8 + i]
            if (shard, i) == (1, 2):
                files.append((f"{key}.txt", b"only words"))
                continue
            files.append((f"{key}.jpg", encode(crop)[:300] if (shard, i) == (2, 5) else encode(crop)))
            if (shard, i) == (0, 3):
                files.append((f"{key}.second.png", encode(crop[::-1], "PNG")))
            if i % 2:
                files.append((f"{key}.txt", f"caption {shard} {i}".encode()))
        tar_of(files, folder / f"{shard:05d}.tar")
    return folder


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray cluster for the whole session (it takes about 12 s to start), with the dashboard that takes jobs."""
    import ray

    workers_see = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent / "unit")}}
    ray.init("local", runtime_env=workers_see, num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    """A real Chromium, silent by itself."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()
