"""Sources on an object store: a real S3-compatible server on loopback gives the rows that the local disk gives."""

import os
import shutil
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, photographs, tar_of

from curation import readers
from curation.sources import SourceChangedError, fetch, list_shards, load_listing, read_samples, save_listing, source_shards

moto_server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")

PICTURES = [encode(picture) for picture in photographs(6, 48)]


class Requests:
    """A door before the server: it counts what is asked, and after `healthy` ones refuses the next `failures`, as a busy store does."""

    def __init__(self, app):
        self.app, self.healthy, self.failures, self.log = app, 0, 0, []

    def __call__(self, environ, start_response):
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            self.log.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
            if self.healthy:
                self.healthy -= 1
            elif self.failures:
                self.failures -= 1
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                return [body] if environ["REQUEST_METHOD"] == "GET" else []
        return self.app(environ, start_response)


@pytest.fixture(scope="module")
def server():
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    server._server.app = Requests(server._server.app)
    yield server
    server.stop()


@pytest.fixture
def requests(server, monkeypatch):
    """The door of the server, with the environment that leads there and nothing else."""
    host, port = server.get_host_and_port()
    for name, value in (
        ("ACCESS_KEY_ID", "x"),
        ("SECRET_ACCESS_KEY", "x"),
        ("ENDPOINT_URL", f"http://{host}:{port}"),
        ("REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    yield server._server.app
    server._server.app.failures = 0
    s3fs.S3FileSystem.clear_instance_cache()


def upload(local: Path, bucket: str) -> str:
    store = s3fs.S3FileSystem()
    store.mkdir(bucket)
    for path in sorted(local.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{bucket}/{path.relative_to(local)}", path.read_bytes())
    store.invalidate_cache()
    return f"s3://{bucket}"


def rows_of(shards) -> list[dict]:
    return [row for shard in shards for batch in read_samples(shard, 4) for row in batch.to_pylist()]


@pytest.fixture
def world(tmp_path) -> Path:
    """Tars (one gzipped), Parquet with bytes, Parquet with paths, an Arrow file, and a folder of images with captions."""
    for name in ("tars", "bytes", "paths/train", "arrow", "pics/deep.er"):
        (tmp_path / name).mkdir(parents=True)
    for i in range(3):
        files = [f for j in (0, 1) for f in ((f"a.b/{i}{j}.jpg", PICTURES[2 * i + j]), (f"a.b/{i}{j}.txt", f"words {i}{j}".encode()))]
        tar_of(files, tmp_path / "tars" / f"{i:03d}.tar")
    table = pa.table({"image": PICTURES, "text": [f"row {i}" for i in range(6)]})
    pq.write_table(table, tmp_path / "bytes" / "x.parquet", row_group_size=2)
    with pa.ipc.new_stream(str(tmp_path / "arrow" / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    for i, picture in enumerate(PICTURES):
        (tmp_path / "paths" / "train" / f"{i}.png").write_bytes(picture)
        (tmp_path / "pics" / "deep.er" / f"é {i}#%20?.jpg").write_bytes(picture)
        (tmp_path / "pics" / "deep.er" / f"é {i}#%20?.txt").write_bytes(b"words\n")
    pq.write_table(
        pa.table({"path": [*(f"train/{i}.png" for i in range(6)), "../tars/000.tar", "gone.png"]}), tmp_path / "paths" / "index.parquet"
    )
    return tmp_path


@pytest.mark.parametrize(
    "place", ["tars", "tars/{000..002}.tar", "bytes", "bytes/*.parquet", "paths/*.parquet", "arrow", "pics", "t*/*[02].tar"]
)
def test_a_store_gives_the_rows_of_the_local_disk(world, requests, place):
    bucket = uuid.uuid4().hex
    upload(world, bucket)
    local, remote = list_shards(f"{world}/{place}", 4), list_shards(f"s3://{bucket}/{place}", 4)
    assert [shard.name for shard in remote] == [shard.name for shard in local]
    rows, expected = rows_of(remote), rows_of(local)
    for row, other in zip(rows, expected, strict=True):
        if row["error"]:
            row["error"] = row["error"].replace(f"{bucket}/", f"{world}/")
        assert row == other
    wanted = [row["uid"] for row in rows[1::2]]
    assert [row["uid"] for row in fetch(remote, wanted)] == wanted
    save_listing(remote, str(world / "run"))
    assert load_listing(str(world / "run")) == remote


def test_transient_refusals_of_the_store_are_tried_again(world, requests):
    source = upload(world / "tars", "transient")
    for failures in (1, 3):
        s3fs.S3FileSystem.clear_instance_cache()
        requests.failures = failures
        shards = list_shards(source)
        requests.failures = failures
        assert [row["error"] for row in rows_of(shards)] == [None] * 6
        assert requests.failures == 0


def test_a_store_that_goes_away_fails_the_shard_and_is_no_lost_row(world, requests, monkeypatch):
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for kind in ("tars", "bytes", "pics", "arrow"):
        s3fs.S3FileSystem.clear_instance_cache()
        shard = list_shards(upload(world / kind, f"away-{kind}"))[0]
        requests.log.clear()
        assert all(row["error"] is None for row in rows_of([shard]))
        for healthy in {0, 1, 2, len(requests.log) - 1}:
            s3fs.S3FileSystem.clear_instance_cache()
            requests.healthy, requests.failures = healthy, 1000
            with pytest.raises(OSError):
                rows_of([shard])
            requests.healthy = requests.failures = 0


def test_listing_asks_for_pages_not_for_every_object(world, requests):
    upload(world / "tars", "pages")
    store = s3fs.S3FileSystem()
    for i in range(60):
        store.pipe_file(f"pages/{i:03d}.tar", b"")
    for source in ("s3://pages", "s3://pages/*.tar", "s3://pages/{000..059}.tar"):
        s3fs.S3FileSystem.clear_instance_cache()
        requests.log.clear()
        assert len(list_shards(source)) == 60
        assert len(requests.log) <= 4, requests.log


def test_a_large_tar_is_read_in_ranges_and_fetch_skips_what_it_does_not_want(tmp_path, requests, monkeypatch):
    noise = os.urandom(300_000)
    (tmp_path / "in").mkdir()
    tar_of([(f"{i:02d}.jpg", bytes([i]) + noise) for i in range(20)], tmp_path / "in" / "x.tar")
    (shard,) = list_shards(upload(tmp_path / "in", "ranges"))
    monkeypatch.setitem(readers._REMOTE, "block_size", 1 << 18)
    requests.log.clear()
    assert [row["image"][0] for row in rows_of([shard])] == list(range(20))
    whole = [bounds for method, _, bounds in requests.log if method == "GET"]
    assert len(whole) >= 10 and all(bounds.startswith("bytes=") for bounds in whole)
    requests.log.clear()
    assert [row["key"] for row in fetch([shard], {f"x/{i:02d}" for i in (3, 15)})] == ["03", "15"]
    read = sum(int(end) - int(start) + 1 for method, _, bounds in requests.log if method == "GET" for start, end in [bounds[6:].split("-")])
    assert read < shard.size * 0.95


def test_an_object_that_changed_is_refused_with_its_old_and_new_etag(world, requests):
    source, run = upload(world / "tars", "changes"), str(world / "run")
    save_listing(source_shards(source, run), run)
    store = s3fs.S3FileSystem()
    other = (world / "tars" / "001.tar").read_bytes()
    store.pipe_file("changes/000.tar", other)
    store.pipe_file("changes/003.tar", other)
    with pytest.raises(SourceChangedError, match=r"s3://changes/000\.tar changed since .* bytes, ETag \w+ -> \d+ bytes, ETag \w+"):
        list(read_samples(load_listing(run)[0]))
    with pytest.raises(SourceChangedError, match=r"1 files .*\n.*000\.tar.*ETag"):
        source_shards(source, run, relist=True)
    store.pipe_file("changes/000.tar", (world / "tars" / "000.tar").read_bytes())
    assert [shard.name for shard in source_shards(source, run, relist=True)] == ["000", "001", "002", "003"]


def test_a_folder_on_a_store_notices_a_changed_image(world, requests):
    source = upload(world / "pics", "images")
    shards = list_shards(source, 4)
    path = f"images/{shards[0].members[1]}"
    s3fs.S3FileSystem().pipe_file(path, PICTURES[0] + b"x")
    with pytest.raises(SourceChangedError, match="changed since"):
        rows_of(shards)
    s3fs.S3FileSystem().rm_file(path)
    with pytest.raises(SourceChangedError, match="-> missing"):
        rows_of(shards)


def test_a_missing_package_bucket_or_path_is_a_clear_error(requests, tmp_path):
    with pytest.raises(ValueError, match=r"'nope://x' .*use a local path, s3://, gs:// or hf://|Protocol not known"):
        list_shards("nope://x")
    with pytest.raises(ValueError, match="matches nothing"):
        list_shards("s3://no-such-bucket-here/*.tar")
    s3fs.S3FileSystem().mkdir("gaps")
    s3fs.S3FileSystem().pipe_file("gaps/000.tar", b"")
    with pytest.raises(ValueError, match=r"2 of 3 paths are not there, the first is 'gaps/001.tar'"):
        list_shards("s3://gaps/{000..002}.tar")


def test_a_missing_filesystem_package_is_named_with_the_command(monkeypatch):
    import sys

    for scheme, package in (("gs", "gcsfs"), ("az", "adlfs")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=f"pip install {package}"):
            list_shards(f"{scheme}://bucket/*.tar")


def test_a_list_may_lie_on_the_store(world, requests):
    upload(world / "tars", "lists")
    s3fs.S3FileSystem().pipe_file("lists/all.txt", b"# mine\n000.tar\ns3://lists/002.tar\n")
    assert [shard.name for shard in list_shards("@s3://lists/all.txt")] == ["000", "002"]
    assert len(list_shards(["s3://lists/000.tar", "s3://lists/00[12].tar"])) == 3
    shutil.copy(world / "tars" / "000.tar", world / "other.tar")
    assert [shard.name for shard in list_shards(["s3://lists/000.tar", str(world / "other.tar")])] == ["000", "other"]
