"""Where a set of shards lies: in a local folder, or below the address of an object store."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from mmlab.config.errors import ConfigError

# Schemes of fsspec that read this machine's files, wrap another scheme or read instructions from a file.
REFUSED = {"file", "local", "data", "dir", "generic", "reference", "zip", "tar", "libarchive", "git", "dask", "jlab"}
REFUSED |= {"jupyter", "cached", "blockcache", "filecache", "simplecache", "async_wrapper", "asyncwrapper", "pyscript"}
AZURE = ("az", "azure", "adl", "abfs", "abfss")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Url:
    """The address of a folder or an object, such as `s3://bucket/laion`; pathlib would collapse its slashes."""

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.address.rstrip('/')}/{name}")

    def resolve(self) -> "Url":
        """The address itself, which is always absolute."""
        return self

    @property
    def scheme(self) -> str:
        """What comes before `://`, in lower case."""
        return self.address.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The last part of the path, or the bucket."""
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        """The address without its last part."""
        return Url(self.address.rstrip("/").rpartition("/")[0])

    @property
    def suffix(self) -> str:
        """What follows the last dot of the name, with the dot."""
        return Path(self.name).suffix


Location = Path | Url


def is_url(text: str | Location) -> bool:
    """Whether a text is an address (`scheme://…`) rather than a path."""
    return isinstance(text, Url) or (isinstance(text, str) and _URL.match(text) is not None)


def split_address(url: Url) -> SplitResult:
    """The parts of an address.

    Raises:
        ConfigError: it cannot be read, or is of no store; or it has a login or a query, which may be secret and do not
            show.
    """
    try:
        parts = urlsplit(str(url))
    except ValueError as error:
        raise ConfigError(f"an address cannot be read: {error}.") from None
    scheme = parts.scheme.lower()
    if parts.password is not None or (parts.username is not None and scheme not in AZURE):
        raise ConfigError(
            f"the address {scheme}://{parts.hostname or ''}{parts.path} was given with a login; give it without one,"
            " logins come from the environment."
        )
    if parts.query or parts.fragment:
        bare = str(url).partition("?")[0].partition("#")[0]
        raise ConfigError(f"the address {bare} was given with a query; give it without one.")
    if scheme in REFUSED:
        raise ConfigError(f"{url} is no address of a store; give a folder, or an address such as s3://bucket/laion.")
    return parts


def refuse_address(path: str | Path) -> None:
    """Raise ConfigError for an address, also as a path: pathlib would make a folder called `s3:`."""
    if _URL.match(text := re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+:)/+", r"\1//", str(path))):
        raise ConfigError(f"{text} is an address; give a local folder.")


def location(text: str | Location, root: str | Location = "") -> Location:
    """Return where a text points to.

    Args:
        text: an address or a path.
        root: a folder or an address that a relative path starts from.

    Raises:
        ConfigError: a command, such as webdataset's `pipe:`.
    """
    if not isinstance(text, str):
        return text if isinstance(text, Url) else text.expanduser()
    if is_url(text):
        return Url(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?!:)", text):  # `::` joins patterns of shards
        raise ConfigError(f"'{text}' is neither a folder nor an address such as s3://bucket/laion; commands never run.")
    if is_url(root) and not text.startswith(("/", "~")):
        return Url(str(root)) / text
    return Path(str(root), text).expanduser() if str(root) else Path(text).expanduser()


def user_cache(name: str) -> Path:
    """A folder of the user's cache: `~/.cache/mmlab/<name>`, or below `$XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmlab" / name
