import pytest

from mmlab.config.errors import ConfigError
from mmlab.runs import shard_patterns
from mmlab.runs.index_files import INDEX_NAME, MANIFEST
from mmlab.runs.shard_patterns import lacks_index, named_shards, set_name


@pytest.fixture
def root(tmp_path):
    for name in ("a/000.tar", "a/001.tar", "a/002.tar", "a/._002.tar", "b/x.tar", "a/notes.txt", "a/3.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("a", ["000", "001", "002"]),
        ("a/{001..002}.tar", ["001", "002"]),
        ("a/{002,000}.tar", ["002", "000"]),
        ("a/001.tar", ["001"]),
        ("b::a/{000..001}.tar", ["x", "000", "001"]),
    ],
)
def test_folders_tars_and_patterns_name_shards(root, path, names):
    shards = named_shards(path, str(root))
    assert [shard.name for shard in shards] == [f"{name}.tar" for name in names]
    assert set_name(shards) == path[0]


def test_addresses_are_expanded_and_not_asked(root):
    shards = named_shards("s3://bucket/laion/{00..02}.tar", str(root))
    assert [str(shard) for shard in shards] == [f"s3://bucket/laion/0{n}.tar" for n in range(3)]
    assert named_shards("{00..02}.tar", "s3://bucket/laion") == shards
    assert set_name(shards) == "laion"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("pipe:cat a/000.tar", "neither a folder nor an address such as s3://bucket/laion; commands never run"),
        ("a::pipe:cat a/000.tar", "commands never run"),
        ("a/{000..003}.tar", r"no shard .*/003\.tar, one of 4 that .* names\. Did you mean '00\d\.tar'"),
        ("a/{000..001", "braces that do not match"),
        ("a/*.tar", "wildcard; give a folder"),
        ("a/3.tar.gz", "not a plain .tar; decompress it first"),
        ("aa", r"there is no folder .*/aa\. Did you mean 'a'"),
        ("a::a/000.tar", "names a shard twice"),
        ("a/{0..99999999999}.tar", "more than 100 shards"),
        ("a/{0..49}{0..999..99}.tar", "more than 100 shards"),
        ("https://host/{0..1}.tar?sig=hunter-2", r"the address https://host/\{0\.\.1\}\.tar was given with a query"),
        ("https://me:hunter-2@host/{0..1}.tar", "was given with a login"),
        ("s3://bucket/laion", r"name the shards, as in s3://bucket/laion/\{000\.\.009\}\.tar"),
    ],
)
def test_what_names_no_shards_is_refused(root, path, says, monkeypatch):
    monkeypatch.setattr(shard_patterns, "MOST", 100)
    with pytest.raises(ConfigError, match=says) as error:
        named_shards(path, str(root))
    assert "hunter" not in str(error.value)


def test_an_empty_folder_is_refused(root):
    (root / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.tar files in .*empty"):
        named_shards("empty", str(root))


def test_local_shards_may_lack_an_index(root):
    assert lacks_index("a", str(root)) and lacks_index("a/000.tar", str(root)) and lacks_index("a::b", str(root))
    (root / "a" / INDEX_NAME).mkdir()
    (root / "a" / INDEX_NAME / MANIFEST).touch()
    assert not lacks_index("a", str(root)) and not lacks_index("s3://bucket/laion")
