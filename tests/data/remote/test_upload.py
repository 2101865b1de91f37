import gzip
import json

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.config.locations import Url
from mmlab.data.building import Build, Rows, write_rows
from mmlab.data.formats import Members
from mmlab.data.indexing import index_set
from mmlab.data.manifest import Manifest
from mmlab.data.remote import upload
from mmlab.data.remote.store import open_store
from mmlab.data.shard_files import ShardWriter
from mmlab.data.tally import Tally
from mmlab.runs.index_files import INDEX_NAME, MANIFEST, upload_draft
from mmlab.verbs.shards import main
from tests.tiny_files import png, write_tar
from tests.tiny_servers import s3_server


@pytest.fixture(scope="module")
def s3():
    with s3_server() as client:
        yield client


@pytest.fixture
def url(s3, request, tmp_path, monkeypatch) -> Url:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Url(f"s3://bucket/{request.node.name}")


def contents(url: Url) -> dict[str, bytes]:
    found = {}
    for place in (url, url / INDEX_NAME):
        store = open_store(place)
        found |= {f"{place}/{blob.name}": store.read(blob.name, 0, blob.size)[0] for blob in store.list("")}
    return found


def rows(count: int = 5, text: str = "x") -> Rows:
    def convert(where: str, entry: str, tally: Tally) -> tuple[str, Members]:
        with tally.row(where):
            return where, {"txt": entry}

    return Rows([(f"k{i}", f"{text}{i}") for i in range(count)], convert, Tally())


def build(url, overwrite=False, **options):
    return write_rows(rows(**options), url, Build(2, overwrite, identity="one"), quiet=True)[0]["train"]


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Names of the objects that are written."""
    written, put = [], upload.put
    monkeypatch.setattr(upload, "put", lambda url, name, source: written.append(name) or put(url, name, source))
    return written


def test_a_set_is_built_into_a_bucket(url, written, tmp_path):
    index = build(url)
    assert written == ["uploading.json", *written[1:-1], MANIFEST] and len(written) == 8
    assert [path.removeprefix(f"{url}/") for path in contents(url)] == [
        "shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "index/manifest.json",
        "index/shard-000000.safetensors", "index/shard-000001.safetensors", "index/shard-000002.safetensors",
    ]  # fmt: skip
    local = write_rows(rows(), tmp_path / "local", Build(2), quiet=True)[0]["train"]
    assert (index.root, index.hash, len(index)) == (url, local.hash, 5)
    assert index.manifest == Manifest.of(contents(url)[f"{url}/index/{MANIFEST}"])
    assert [entry.etag for entry in index.manifest.entries] == [blob.etag for blob in open_store(url).list()]
    assert index_set(url, quiet=True).read == 0
    assert not list((tmp_path / "cache" / "mmlab" / "builds").iterdir())


def test_an_upload_that_was_cut_is_no_set_and_continues(url, written, monkeypatch):
    put = upload.put

    def cut(url, name, source):
        if name == "shard-000001.tar":
            raise DataError("cut")
        return put(url, name, source)

    with monkeypatch.context() as patch:
        patch.setattr(upload, "put", cut)
        patch.setattr(upload, "_AT_ONCE", 1)
        with pytest.raises(DataError, match="cut"):
            build(url)
    there = contents(url)
    assert f"{url}/shard-000000.tar" in there and f"{url}/index/{MANIFEST}" not in there
    assert upload_draft(url).with_name(f"{upload_draft(url).name}.building").is_dir()
    with pytest.raises(DataError, match=r"an upload to s3://\S+ was stopped, .*repeat the command"):
        index_set(url, quiet=True)
    written.clear()
    build(url)
    assert "shard-000000.tar" not in written and {"shard-000001.tar", MANIFEST} <= {*written}
    finished = contents(url)
    assert f"{url}/index/uploading.json" not in finished and not list(upload_draft(url).parent.iterdir())
    build(url, overwrite=True)
    assert contents(url) == finished


def test_a_bucket_that_is_not_empty_is_replaced_on_demand_only(s3, url):
    build(url)
    with pytest.raises(ConfigError, match=r"s3://\S+ is not empty; give another address or --overwrite"):
        build(url)
    with pytest.raises(ConfigError, match="is not empty"):
        ShardWriter(str(url))
    index = build(url, True, count=3, text="another")
    assert len(index) == 3 and len(contents(url)) == 5
    s3.put_object(Bucket="bucket", Key=f"{str(url).removeprefix('s3://bucket/')}/notes.txt", Body=b"mine")
    with pytest.raises(ConfigError, match=r"cannot be replaced: 'notes\.txt' in it"):
        build(url, True)


def test_splits_are_uploaded_to_folders_and_continued_when_one_is_there(url, monkeypatch, written):
    def convert(where: str, entry: int, tally: Tally) -> tuple[str, Members]:
        with tally.row(where):
            return where, {"png": png(8, entry + 1)}

    rows = Rows([(f"k{i}", i) for i in range(20)], convert, Tally())
    build = Build(splits={"val": 0.3}, identity="one")
    put = upload.put

    def cut(place, name, source):
        if place == url / "val":
            raise DataError("cut")
        return put(place, name, source)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="cut"):
        patch.setattr(upload, "put", cut)
        write_rows(rows, url, build, quiet=True)
    assert f"{url}/train/index/{MANIFEST}" in contents(url / "train")
    written.clear()
    indexes, _ = write_rows(rows, url, build, quiet=True)
    assert written.count("shard-000000.tar") == 1  # of val
    assert not any("uploading" in name for part in ("train", "val") for name in contents(url / part))
    assert [str(index.root) for index in indexes.values()] == [f"{url}/train", f"{url}/val"]
    assert sum(map(len, indexes.values())) == 20


def test_samples_are_written_to_a_bucket(url):
    with ShardWriter(str(url), 2, quiet=True) as writer:
        for i in range(3):
            writer.write(f"s{i}", {"json": {"n": i}})
    assert len(writer.index) == 3 and json.loads(contents(url)[f"{url}/index/{MANIFEST}"])["hash"] == writer.index.hash


def test_web_servers_and_missing_buckets_are_refused(s3):
    with pytest.raises(ConfigError, match="is a web server; shards are written to a folder or a bucket"):
        ShardWriter("https://127.0.0.1/set")
    with pytest.raises(ConfigError, match="was given with a login") as caught:
        ShardWriter("https://me:secret@127.0.0.1/set")
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="there is no bucket"):
        ShardWriter("s3://another/set")


def test_tars_of_a_bucket_are_built_into_another(s3, url, tmp_path, capsys):
    members = [(f"k{i}.{name}", data) for i in range(3) for name, data in (("input.png", png()), ("note.txt", b"n"))]
    tar = write_tar(tmp_path / "plain.tar", *members)
    packed = write_tar(tmp_path / "packed.tar", ("z.input.png", png())).read_bytes()
    (tmp_path / "plain.tgz").write_bytes(gzip.compress(packed))
    for name in ("plain.tar", "plain.tgz"):
        s3.upload_file(str(tmp_path / name), "bucket", f"{tmp_path.name}/{name}")
    options = ["--members", "image=input.png", "--shard-samples", "2"]
    assert main(["build", "tars", f"s3://bucket/{tmp_path.name}", *options, str(url)]) == 0
    assert f"{url}: 4 samples in 2 shards" in capsys.readouterr().out
    assert main(["build", "tars", f"s3://bucket/{tmp_path.name}/plain.tar", *options, str(url), "--overwrite"]) == 0
    local = tmp_path / "out"
    assert main(["build", "tars", str(tar), *options, str(local)]) == 0
    assert index_set(url, quiet=True).manifest.hash == index_set(local, quiet=True).manifest.hash
    assert main(["build", "tars", "s3://bucket/none", *options, str(tmp_path / "other")]) == 1
    assert "s3://bucket/none holds no tar." in capsys.readouterr().err
