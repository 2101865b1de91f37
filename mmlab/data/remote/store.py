"""One interface over object stores: `obstore` for S3, Google, Azure and HTTP, `fsspec` for other schemes."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError, UserError, nearest
from mmlab.config.locations import AZURE, REFUSED, Url, split_address
from mmlab.data.remote.store_errors import CREDENTIALS, StoreFault, changed, sort_error

S3 = ("s3", "s3a")
HTTP = ("http", "https")
# Limits of one request; a whole download has a deadline of its own, and continues after a timeout where it was.
CONNECT_TIMEOUT = timedelta(seconds=10)
READ_TIMEOUT = timedelta(seconds=15)  # without a byte
REQUEST_TIMEOUT = timedelta(seconds=60)  # with the body
WRITE_TIMEOUT, WRITE_RETRIES = timedelta(seconds=300), 8  # one part
PART = 16 << 20  # bytes of a part of an upload
MOST_PARTS = 9000  # S3 takes 10,000
CREDENTIALS_LAST = timedelta(minutes=5)  # boto3 renews its own in time


@dataclass(frozen=True)
class Blob:
    """An object: its name below the store's address, its size in bytes, and its ETag, None where there is none."""

    name: str
    size: int
    etag: str | None


Blobs = list[Blob]


class Store(ABC):
    """Objects below an address. No method but `write` and `delete` tries twice.

    Every method raises a `StoreFault` for what may pass, such as a timeout, and a final DataError, RunError or
    ConfigError for what does not: an object that is missing, refused or changed (`ChangedError`).
    """

    def __init__(self, url: Url):
        self.url = url

    @abstractmethod
    def stat(self, name: str) -> Blob:
        """Ask for an object's size and ETag."""

    @abstractmethod
    def get(self, name: str, start: int, stop: int, etag: str | None = None) -> tuple[Blob, Iterator[bytes]]:
        """Ask for bytes `start` to `stop` of an object; they are yielded as they arrive, and may end too early.

        Args:
            etag: the object must have it.
        """

    def read(self, name: str, start: int, stop: int, etag: str | None = None) -> tuple[bytes, Blob]:
        """Read bytes `start` to `stop` of an object, as `get`, all or none."""
        blob, chunks = self.get(name, start, stop, etag)
        data = b"".join(chunks)
        if len(data) != stop - start:
            raise StoreFault(f"{self.url / name} cannot be read: {len(data)} of {stop - start} bytes came.")
        return data, blob

    @abstractmethod
    def write(self, name: str, source: Path | bytes) -> Blob:
        """Write or replace an object, a large one in parts."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; a missing one is no error."""

    @abstractmethod
    def list(self, suffix: str = ".tar") -> Blobs:
        """List the objects directly below the address by name, without hidden ones (`.name`)."""

    @contextmanager
    def _errors(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise sort_error(error, str(self.url), name) from None

    def _same(self, blob: Blob, etag: str | None) -> Blob:
        if etag is not None and blob.etag is not None and blob.etag != etag:
            raise changed(str(self.url / blob.name))
        return blob

    def _written(self, name: str, size: int) -> Blob:
        blob = self.stat(name)
        if blob.size != size:
            raise StoreFault(f"{self.url / name} has {blob.size} bytes after {size} were written.")
        return blob


def open_store(url: Url) -> Store:
    """Open the store below an address; nothing is sent yet.

    Raises:
        ConfigError: the address has a password, a query or an unknown scheme; a package or credentials are missing.
    """
    parts = split_address(url)
    scheme = parts.scheme.lower()
    if not parts.netloc and scheme != "memory":
        raise ConfigError(f"{url} names no {'server' if scheme in HTTP else 'bucket'}.")
    if scheme in (*S3, "gs", "gcs", *AZURE, *HTTP):
        return ObjectStore(url)
    return DriverStore(url)


class ObjectStore(Store):
    """A bucket or a server that `obstore` reads."""

    def __init__(self, url: Url):
        super().__init__(url)
        self.scheme = url.scheme
        with self._errors():
            self._store, self._writer = self._open(writes=False), None

    def _open(self, writes: bool) -> Any:
        from obstore.store import HTTPStore, from_url

        timeout = WRITE_TIMEOUT if writes else REQUEST_TIMEOUT
        client: Any = {"connect_timeout": CONNECT_TIMEOUT, "timeout": timeout}
        client |= {"allow_http": self.scheme == "http" or _plain_endpoint()}
        if not writes:  # a server may be silent while it puts the parts of an upload together
            client["read_timeout"] = READ_TIMEOUT
        # The deadline of a download governs, so nothing is read again behind its back.
        retry: Any = {"max_retries": WRITE_RETRIES if writes else 0, "retry_timeout": timeout}
        options: Any = {"client_options": client, "retry_config": retry}
        if self.scheme in HTTP:
            return HTTPStore.from_url(str(self.url), **options)
        if self.scheme in S3 and (provider := _boto3_chain(str(self.url))) is not None:
            options["credential_provider"] = provider
        address = re.sub("^gcs://", "gs://", str(self.url), flags=re.IGNORECASE)
        return from_url(address, **options)

    def stat(self, name: str) -> Blob:
        with self._errors(name):
            return self._blob(name, self._store.head(name))

    def get(self, name: str, start: int, stop: int, etag: str | None = None) -> tuple[Blob, Iterator[bytes]]:
        options: dict[str, Any] = {"range": (start, stop)}
        if etag is not None and not etag.startswith("W/"):  # a weak ETag matches nothing
            options["if_match"] = etag
        with self._errors(name):
            result = self._store.get(name, options=options)
            blob = self._same(self._blob(name, result.meta), etag)
        return blob, self._chunks(name, result)

    def _chunks(self, name: str, result: Any) -> Iterator[bytes]:
        with self._errors(name):
            yield from result.stream(min_chunk_size=1)

    def write(self, name: str, source: Path | bytes) -> Blob:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        with self._errors(name):
            part = max(PART, -(-size // MOST_PARTS))
            self._for_writing().put(name, source, chunk_size=part, max_concurrency=2)
        return self._written(name, size)

    def delete(self, name: str) -> None:
        with self._errors(name), suppress(FileNotFoundError):
            self._for_writing().delete(name)

    def list(self, suffix: str = ".tar") -> Blobs:
        if self.scheme in HTTP:
            raise DataError(
                f"{self.url} is a web server, which cannot list its shards; index them where they lie as files"
                " (mmlab shards index <folder>) and put the folder index beside them on the server."
            )
        with self._errors():
            objects = self._store.list_with_delimiter()["objects"]
            return _visible([self._blob(entry["path"], entry) for entry in objects], suffix)

    def _for_writing(self) -> Any:
        if self._writer is None:
            self._writer = self._open(writes=True)
        return self._writer

    def _blob(self, name: str, meta: Any) -> Blob:
        return Blob(name, meta["size"], _etag(meta["e_tag"]))


class DriverStore(Store):
    """A file system that a driver of `fsspec` reads."""

    def __init__(self, url: Url):
        from fsspec import available_protocols, get_filesystem_class
        from fsspec.core import url_to_fs

        super().__init__(url)
        scheme = url.scheme
        try:
            get_filesystem_class(scheme)
            with self._errors():
                self._files, self._root = url_to_fs(f"{scheme}{str(url)[len(scheme) :]}".rstrip("/"))
        except ValueError:
            schemes = {*S3, "gs", *AZURE, *HTTP, *available_protocols()} - REFUSED
            raise ConfigError(f"{url} has an unknown scheme, '{scheme}'.{nearest(scheme, schemes)}") from None
        except ImportError as error:
            raise ConfigError(f"{url} needs a driver that is missing: {str(error).rstrip('.')}.") from None

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def stat(self, name: str) -> Blob:
        with self._errors(name):
            self._files.invalidate_cache(self._root)
            info = self._files.info(self._path(name))
            if info["type"] != "file":
                raise FileNotFoundError
            return _driver_blob(name, info)

    def get(self, name: str, start: int, stop: int, etag: str | None = None) -> tuple[Blob, Iterator[bytes]]:
        blob = self._same(self.stat(name), etag)
        with self._errors(name):
            data = self._files.cat_file(self._path(name), start=start, end=stop)
        return blob, iter([data])

    def write(self, name: str, source: Path | bytes) -> Blob:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        path = self._path(name)
        with self._errors(name):
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(source, bytes):
                self._files.pipe_file(path, source)
            else:
                self._files.put_file(str(source), path)
        return self._written(name, size)

    def delete(self, name: str) -> None:
        with self._errors(name), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def list(self, suffix: str = ".tar") -> Blobs:
        with self._errors():
            self._files.invalidate_cache(self._root)
            entries = self._files.ls(self._root, detail=True)
            files = [entry for entry in entries if entry["type"] == "file"]
            return _visible([_driver_blob(entry["name"].rpartition("/")[2], entry) for entry in files], suffix)


def _driver_blob(name: str, info: dict[str, Any]) -> Blob:
    if info.get("size") is None:
        raise DataError(f"the driver does not tell how large {name} is; shards need a store that does.")
    return Blob(name, int(info["size"]), _etag(next((info[key] for key in ("ETag", "etag") if info.get(key)), None)))


def _visible(blobs: Blobs, suffix: str) -> Blobs:
    chosen = [blob for blob in blobs if blob.name.endswith(suffix) and not blob.name.startswith(".")]
    return sorted(chosen, key=lambda blob: blob.name)


def _etag(text: str | None) -> str | None:
    """An ETag with its quotes, which lists of some stores leave out."""
    if not text:
        return None
    return text if text.startswith(('"', "W/")) else f'"{text}"'


def _plain_endpoint() -> bool:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    return any(os.environ.get(name, "").lower().startswith("http://") for name in names)


def _boto3_chain(address: str) -> Any:
    """boto3's credentials (profiles, login by SSO, roles), if it is installed and the environment has no keys."""
    own = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    skipped = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on")
    if skipped or any(os.environ.get(name) for name in own) or find_spec("boto3") is None:
        return None
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider(ttl=CREDENTIALS_LAST)
    except ValueError:
        raise ConfigError(f"there are no credentials for {address}: {CREDENTIALS['s3']}.") from None
