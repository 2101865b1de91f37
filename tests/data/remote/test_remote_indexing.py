from pathlib import Path

import pytest

from mmlab.config.errors import DataError
from mmlab.config.locations import Url
from mmlab.data.indexing import index_part, index_set
from mmlab.data.manifest import Manifest
from mmlab.data.remote import remote_indexing
from mmlab.data.remote.download import retried
from mmlab.data.remote.remote_indexing import RemoteShards, check_writable
from mmlab.data.remote.store import DriverStore, ObjectStore, open_store
from mmlab.data.remote.store_errors import StoreFault, UnreachedError
from mmlab.runs.index_files import INDEX_NAME, MANIFEST, VARIABLE
from tests.tiny_files import png, write_tar
from tests.tiny_servers import RangeServer, s3_environment, s3_server


@pytest.fixture(scope="module")
def s3():
    with s3_server() as client:
        yield client


@pytest.fixture
def local(tmp_path) -> Path:
    for i in range(4):
        members = [(f"k{i}-{j}.{name}", data) for j in range(2) for name, data in (("png", png()), ("txt", b"x"))]
        write_tar(tmp_path / "local" / f"{i}.tar", *members)
    return tmp_path / "local"


@pytest.fixture
def url(s3, local, request) -> Url:
    """A bucket's folder of its own with four shards."""
    name = request.node.name.replace("[", "-").replace("]", "")
    for path in local.glob("*.tar"):
        s3.upload_file(str(path), "bucket", f"{name}/{path.name}")
    return Url(f"s3://bucket/{name}")


def names(s3, url: Url) -> list[str]:
    prefix = str(url).removeprefix("s3://bucket/") + "/"
    objects = s3.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return [entry["Key"].removeprefix(prefix) for entry in objects]


def manifest_of(url: Url) -> Manifest:
    store = open_store(url / INDEX_NAME)
    return Manifest.of(store.read(MANIFEST, 0, store.stat(MANIFEST).size)[0])


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """Names of the shards that are read."""
    scans, scan = [], remote_indexing.scan_shard
    monkeypatch.setattr(remote_indexing, "scan_shard", lambda path, *rest: scans.append(path.name) or scan(path, *rest))
    return scans


def test_a_bucket_gets_the_index_of_its_shards(s3, url, local, scans, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    done = index_set(url, quiet=True)
    assert (done.read, scans) == (4, ["0.tar", "1.tar", "2.tar", "3.tar"])
    index = [f"index/{i}.safetensors" for i in range(4)]
    assert names(s3, url) == ["0.tar", "1.tar", "2.tar", "3.tar", *index, "index/manifest.json"]
    assert not list((tmp_path / "work").iterdir())
    assert done.manifest == manifest_of(url)
    assert done.manifest.hash == index_set(local, quiet=True).manifest.hash
    for entry, blob in zip(done.manifest.entries, open_store(url).list(), strict=True):
        assert (entry.bytes, entry.etag) == (blob.size, blob.etag) and blob.etag is not None
    assert index_set(url, quiet=True).read == 0 and len(scans) == 4
    assert index_set(url, quiet=True, again=True).read == 4


def test_only_shards_that_changed_are_read_again(s3, url, local, scans, tmp_path, monkeypatch):
    index_set(url, quiet=True)
    scans.clear()
    name = str(url).removeprefix("s3://bucket/")
    write_tar(tmp_path / "new.tar", ("k1-0.txt", b"y"))
    s3.upload_file(str(tmp_path / "new.tar"), "bucket", f"{name}/1.tar")
    s3.delete_object(Bucket="bucket", Key=f"{name}/3.tar")
    write_tar(tmp_path / "new.tar", ("new.txt", b"y"))
    s3.upload_file(str(tmp_path / "new.tar"), "bucket", f"{name}/4.tar")
    fetched = []
    fetch = RemoteShards._fetched
    monkeypatch.setattr(RemoteShards, "_fetched", lambda self, name: fetched.append(name) or fetch(self, name))
    assert index_set(url, quiet=True).read == 2 and scans == ["1.tar", "4.tar"]
    assert fetched == ["1.safetensors"]  # of the unchanged ones, only the hashes of keys
    assert "index/3.safetensors" not in names(s3, url)
    assert index_set(url, ["txt"], quiet=True).read == 4


def test_parts_are_joined_without_reading(s3, url, local, scans):
    assert [index_part(url, (k, 3), quiet=True) for k in (3, 1, 2)] == [(1, 1), (2, 2), (1, 1)]
    assert scans == ["2.tar", "0.tar", "3.tar", "1.tar"] and f"index/{MANIFEST}" not in names(s3, url)
    assert index_set(url, quiet=True).read == 0
    joined = manifest_of(url)
    assert index_set(url, quiet=True, again=True).manifest == joined


def test_processes_index_a_bucket(s3, url):
    assert index_set(url, workers=2, quiet=True).read == 4
    assert manifest_of(url).samples.tolist() == [2] * 4


def test_a_key_in_two_objects(s3, url, local, tmp_path):
    write_tar(tmp_path / "new.tar", ("k2-1.txt", b"y"))
    s3.upload_file(str(tmp_path / "new.tar"), "bucket", f"{str(url).removeprefix('s3://bucket/')}/9.tar")
    with pytest.raises(DataError, match=r"'k2-1' is in two shards of s3://\S+: 2\.tar and 9\.tar"):
        index_set(url, quiet=True)
    assert f"index/{MANIFEST}" not in names(s3, url)


def test_damage_is_named_with_the_address(s3, url):
    s3.put_object(Bucket="bucket", Key=f"{str(url).removeprefix('s3://bucket/')}/1.tar", Body=b"no tar" * 200)
    with pytest.raises(DataError, match=rf"{url}/1\.tar, byte 0: this is not a tar file"):
        index_set(url, quiet=True)


def test_damaged_tables_and_manifests_are_replaced(s3, url, scans):
    before = index_set(url, quiet=True).manifest
    scans.clear()
    name = str(url).removeprefix("s3://bucket/")
    s3.put_object(Bucket="bucket", Key=f"{name}/index/{MANIFEST}", Body=b"[]")
    s3.put_object(Bucket="bucket", Key=f"{name}/index/2.safetensors", Body=b"\xff" * 300)
    assert index_set(url, quiet=True).manifest == before == manifest_of(url) and scans == ["2.tar"]


def test_a_bucket_that_refuses_writes_has_its_index_elsewhere(local, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "indexes"))
    (tmp_path / "served").mkdir()
    local.rename(tmp_path / "served" / "bucket")
    with RangeServer(tmp_path / "served") as server, s3_environment(server.address):
        done = index_set("s3://bucket", quiet=True)
        assert f"the index of s3://bucket is in {tmp_path}/indexes/bucket-" in capsys.readouterr().err
        (folder,) = (tmp_path / "indexes").iterdir()
        assert Manifest.of((folder / MANIFEST).read_bytes()) == done.manifest and done.read == 4
        assert index_set("s3://bucket", quiet=True).read == 0
        with pytest.raises(DataError, match=r"access to s3://bucket/index/\.probe-\w+ is denied"):
            index_set("s3://bucket", quiet=True, elsewhere=False)


def test_a_bucket_that_cannot_be_reached_has_its_index_nowhere_else(url, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "indexes"))

    def fail(*args):
        raise StoreFault("the server answered 503")

    monkeypatch.setattr(ObjectStore, "write", fail)
    monkeypatch.setattr(remote_indexing, "retried", lambda call, deadline=0.0: retried(call, min(deadline, 0.01)))
    with pytest.raises(UnreachedError, match=r"the server answered 503, in 1 attempts"):
        index_part(url, (1, 2), quiet=True)
    assert not (tmp_path / "indexes").exists()


def test_a_driver_of_fsspec_is_a_store_like_others(local, scans):
    url = Url("memory://sets/indexed")
    for path in local.glob("*.tar"):
        open_store(url).write(path.name, path)
    assert index_set(url, quiet=True).read == 4 and manifest_of(url).samples.tolist() == [2] * 4
    open_store(url).write("2.tar", local / "3.tar")
    open_store(url).delete("3.tar")
    scans.clear()
    assert index_set(url, quiet=True, again=True).read == 3
    assert [blob.name for blob in open_store(url / INDEX_NAME).list("")] == [
        "0.safetensors", "1.safetensors", "2.safetensors", MANIFEST,
    ]  # fmt: skip


def test_processes_that_start_at_once_do_not_delete_each_others_probe(monkeypatch):
    url, written = Url("memory://sets/probed/index"), DriverStore._written

    def meanwhile(*args):
        monkeypatch.setattr(DriverStore, "_written", written)
        check_writable(url)  # as another process does
        return written(*args)

    monkeypatch.setattr(DriverStore, "_written", meanwhile)
    check_writable(url)


def test_damage_on_the_way_is_not_indexed(local, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "indexes"))
    (tmp_path / "served").mkdir()
    local.rename(tmp_path / "served" / "bucket")
    expected = index_set(tmp_path / "served" / "bucket", quiet=True).manifest.hash
    with RangeServer(tmp_path / "served") as server, s3_environment(server.address):
        server.planned.extend(["flip", "", "503", "", "cut", "flip"])
        assert index_set("s3://bucket", quiet=True).manifest.hash == expected
        assert server.faults == {"flip": 2, "503": 1, "cut": 1}
        # ETags that are no MD5 say nothing: a damaged tar is fetched again, and each shard is read.
        monkeypatch.setattr("tests.tiny_servers._etag", lambda file, changed, size: f'"{"0" * 31}{file.stem}"')
        server.sent.clear()
        assert index_set("s3://bucket", quiet=True).manifest.hash == expected
        assert [len(server.sent[f"bucket/{i}.tar"]) for i in range(4)] == [2, 1, 1, 1]


def test_a_web_server_cannot_be_indexed(tmp_path):
    with pytest.raises(DataError, match="web server, which cannot list its shards"):
        index_set("http://127.0.0.1:9/set", quiet=True)


def test_an_address_without_shards(s3):
    with pytest.raises(DataError, match=r"s3://bucket/nothing holds no \.tar files"):
        index_set("s3://bucket/nothing", quiet=True)
    with pytest.raises(DataError, match="there is no bucket"):
        index_set("s3://nothing/set", quiet=True)
