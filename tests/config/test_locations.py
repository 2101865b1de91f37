from pathlib import Path

import pytest

from mmlab.config.errors import ConfigError
from mmlab.config.locations import Url, is_url, location, refuse_address


def test_parts_of_an_address_are_those_of_a_path():
    url = Url("s3://bucket/a/set.tar")
    assert (url.name, url.suffix, str(url.parent), url.resolve()) == ("set.tar", ".tar", "s3://bucket/a", url)
    assert url.scheme == Url("S3://bucket").scheme == "s3"
    assert str(Url("s3://bucket/") / "set") == "s3://bucket/set" and Url("s3://bucket/").name == "bucket"


def test_where_a_text_points_to():
    assert location("s3://b/x", "data") == location("x", "s3://b") == Url("s3://b/x")
    assert location("x", "data") == Path("data/x") and location("/x", "s3://b") == Path("/x")
    assert is_url("gs://b") and is_url(Url("x")) and not is_url("C:/x") and not is_url("a/b://c")
    for text in ("pipe:touch x", "pipe:s3 cat s3://b/x"):
        with pytest.raises(ConfigError, match="commands never run"):
            location(text)


def test_an_address_is_refused_where_files_are_written():
    for address in ("s3://b/x", Path("s3://b/x")):
        with pytest.raises(ConfigError, match=r"^s3://b/x is an address; give a local folder\.$"):
            refuse_address(address)
    for path in ("data/x", Path("/data:/x"), "a b:c", "C:/x"):
        refuse_address(path)
