"""Object stores: one interface, and errors that either pass or are final."""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from mmlab.config.errors import ConfigError, DataError, UserError
from mmlab.config.locations import Url
from mmlab.data.remote import store as store_module
from mmlab.data.remote.store import Blob, open_store
from mmlab.data.remote.store_errors import ChangedError, MissingError, StoreFault, sort_error
from tests.tiny_servers import RangeServer, etag_of, s3_environment, s3_server

ODD = "a~b*c %41+#ü.tar"


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_server() as client:
        yield client


@pytest.fixture
def server(tmp_path) -> Iterator[RangeServer]:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "0.tar").write_bytes(bytes(range(256)) * 400)
    with RangeServer(tmp_path) as server:
        yield server


@pytest.mark.parametrize("address", ["s3://bucket/sets/one", "memory://sets/one"])
def test_objects_are_written_listed_read_and_deleted(s3, address, tmp_path):
    store = open_store(Url(address))
    for name in ("1.tar", "0.tar", ODD, ".hidden.tar", "index/0.tar", "note.txt"):
        store.write(name, name.encode())
    (tmp_path / "file").write_bytes(b"0123456789")
    written = store.write("0.tar", tmp_path / "file")
    assert written == store.stat("0.tar") == Blob("0.tar", 10, written.etag)
    assert [blob.name for blob in store.list()] == ["0.tar", "1.tar", ODD]
    assert store.list()[0] == written
    assert [blob.name for blob in store.list(".txt")] == ["note.txt"]
    assert [blob.name for blob in open_store(Url(address) / "index").list("")] == ["0.tar"]
    assert store.read("0.tar", 3, 7, written.etag) == (b"3456", written)
    assert store.read(ODD, 0, 3)[0] == ODD.encode()[:3]
    assert store.read("index/0.tar", 6, 11)[0] == b"0.tar"
    with pytest.raises(DataError):
        store.read("0.tar", 8, 12)
    store.delete("0.tar")
    store.delete("0.tar")
    with pytest.raises(MissingError, match=f"there is no {address}/0.tar"):
        store.stat("0.tar")


def test_a_large_file_is_written_in_parts(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "PART", 5 << 20)
    data = os.urandom(11 << 20)
    (tmp_path / "large").write_bytes(data)
    store = open_store(Url("s3://bucket"))
    blob = store.write("large.tar", tmp_path / "large")
    assert blob.size == len(data) and blob.etag is not None and blob.etag.endswith('-3"')
    assert store.read("large.tar", (5 << 20) - 9, (5 << 20) + 9)[0] == data[(5 << 20) - 9 : (5 << 20) + 9]


def test_buckets_that_do_not_exist_are_named(s3):
    with pytest.raises(DataError, match="there is no bucket of s3://other/x"):
        open_store(Url("s3://other/x")).list()


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_an_answer_is_compared_with_what_was_asked_for(server, scheme):
    file = server.folder / "bucket" / "0.tar"
    with s3_environment(server.address):
        store = open_store(Url(f"{server.address}/bucket" if scheme == "http" else "s3://bucket"))
        blob = Blob("0.tar", 102_400, etag_of(file))
        assert store.stat("0.tar") == blob
        assert store.read("0.tar", 10, 20, blob.etag) == (bytes(range(10, 20)), blob)
        with pytest.raises(ChangedError, match="changed since it was indexed; run mmlab shards index again"):
            store.read("0.tar", 10, 20, '"other"')  # the server refuses it
        assert server.answers[412] == 1
        server.planned.append("wrong_etag")
        with pytest.raises(ChangedError, match="changed"):
            store.read("0.tar", 10, 20, blob.etag)  # the server does not
        with pytest.raises(ChangedError, match="is shorter"):
            store.read("0.tar", 102_400, 102_410)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("503", "the server answered 503 Service Unavailable"),
        ("429", "the server answered 429 Too Many Requests"),
        ("500", "the server answered 500"),
        ("cut", "the connection was cut"),
        ("reset", "the connection was cut"),
        ("stall", "no answer came in time"),
        ("wrong_range", r"bytes 0\.\.100000 were asked for, 1\.\.100001 came"),
    ],
)
def test_faults_that_may_pass(server, fault, sentence, monkeypatch):
    if fault == "stall":
        monkeypatch.setattr(store_module, "READ_TIMEOUT", timedelta(seconds=0.2))
    server.stall = 5
    store = open_store(Url(f"{server.address}/bucket"))
    server.planned.append(fault)
    with pytest.raises(StoreFault, match=sentence):
        store.read("0.tar", 0, 100_000)
    assert server.requests["GET"] == 1  # nothing was tried behind our back
    monkeypatch.undo()
    assert len(open_store(store.url).read("0.tar", 0, 100_000)[0]) == 100_000


@pytest.mark.parametrize("status", ["401", "403"])
def test_an_answer_is_final_if_access_is_denied_and_no_secret_shows(server, status, monkeypatch):
    with s3_environment(server.address) as secrets:
        monkeypatch.setenv("AWS_SESSION_TOKEN", "session-Token-0123456789")  # is sent, and repeated by the server
        store = open_store(Url("s3://bucket"))
        server.planned.extend([status, "503"])
        with pytest.raises(DataError, match=r"access to s3://bucket/0\.tar is denied .*AWS_ACCESS_KEY_ID") as error:
            store.read("0.tar", 0, 10)
        assert not isinstance(error.value, StoreFault)
        with pytest.raises(StoreFault) as fault:
            store.read("0.tar", 0, 10)
        for text in (str(error.value), str(fault.value)):
            assert "session-Token" not in text and secrets["AWS_SECRET_ACCESS_KEY"] not in text
            assert secrets["AWS_ACCESS_KEY_ID"] not in text and "Signature=" not in text
        assert error.value.__suppress_context__


def test_servers_without_a_service_are_named(server):
    store = open_store(Url(f"{server.address}/bucket"))
    with pytest.raises(DataError, match="is a web server, which cannot list its shards; index them where they lie"):
        store.list()
    server.ranges = False
    with pytest.raises(DataError, match="sends no ranges of bytes") as error:
        store.read("0.tar", 0, 10)
    assert not isinstance(error.value, StoreFault)
    with pytest.raises(DataError, match=r"1\.tar is denied \(403 Forbidden\): web servers are read without a login"):
        store.write("1.tar", b"x")
    with pytest.raises(StoreFault, match="cannot be reached: the connection was refused"):
        open_store(Url("http://127.0.0.1:1/bucket")).stat("0.tar")


def test_credentials_come_from_the_chain_of_boto3(server, tmp_path):
    with s3_environment(server.address):
        del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(tmp_path / "config")}
        os.environ["AWS_SHARED_CREDENTIALS_FILE"] = str(tmp_path / "credentials")
        with pytest.raises(ConfigError, match=r"no credentials for s3://bucket: AWS_ACCESS_KEY_ID .*SKIP_SIGNATURE"):
            open_store(Url("s3://bucket"))
        keys = "aws_access_key_id = of-the-profile\naws_secret_access_key = a-secret-of-the-profile\n"
        (tmp_path / "credentials").write_text(f"[mine]\n{keys}")
        os.environ["AWS_PROFILE"] = "mine"
        assert open_store(Url("s3://bucket")).stat("0.tar").size == 102_400
        assert "Credential=of-the-profile/" in server.logins[-1]
        os.environ["AWS_SKIP_SIGNATURE"] = "true"
        assert open_store(Url("s3://bucket")).stat("0.tar").size == 102_400
        assert server.logins[-1] == ""


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("s4://bucket/x", "unknown scheme, 's4'. Did you mean 's3'"),
        ("oss://bucket/x", "needs a driver that is missing: Install ossfs"),
        ("file:///data", "no address of a store; give a folder"),
        ("reference://x", "no address of a store"),
        ("s3://", "s3:// names no bucket"),
        ("https:///x", "names no server"),
        ("https://[x", "cannot be read"),
        ("https://me:hunter-2-password@host/x", r"the address https://host/x was given with a login"),
        ("s3://hunter-2-password@bucket/x", r"the address s3://bucket/x was given with a login"),
        ("https://host/x?sig=hunter-2-password", r"https://host/x was given with a query"),
        ("az://container/x", "names no account: AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_addresses_that_are_refused(address, sentence, monkeypatch):
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=sentence) as error:
        open_store(Url(address))
    assert "hunter" not in str(error.value) and "\n" not in str(error.value)


def test_errors_in_foreign_words_show_no_secret(monkeypatch):
    monkeypatch.setenv("MY_STORE_TOKEN", "correct-horse-battery-1")
    text = "bad reply for https://host/x?sig=abcdefgh with correct-horse-battery-1\nAuthorization: xyz"
    for error, kind in ((OSError(text), StoreFault), (ValueError(text), UserError)):
        sentence = sort_error(error, "oss://bucket", "0.tar")
        assert isinstance(sentence, kind) and isinstance(sentence, StoreFault) == isinstance(error, OSError)
        assert "oss://bucket/0.tar" in str(sentence) and "https://host/x with <redacted>" in str(sentence)
        assert "Authorization" not in str(sentence) and "abcdefgh" not in str(sentence)
