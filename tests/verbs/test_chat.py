"""`mmlab chat` with an image that it cannot read."""

import pytest

from mmlab.config.errors import ConfigError
from mmlab.verbs.chat import read_image_file


def test_a_wrong_path_names_the_nearest_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "photo.png").touch()
    for path, sentence in {
        "photos": "photos is a folder, not an image; it contains cat.jpg.",
        "photos/cats.jpg": "There is no image photos/cats.jpg. Did you mean 'photos/cat.jpg'?",
        "photoss": "There is no image photoss. Did you mean 'photo.png'?",
        "nowhere/cat.jpg": "There is no image nowhere/cat.jpg.",
    }.items():
        with pytest.raises(ConfigError) as error:
            read_image_file(path)
        assert str(error.value) == sentence
    assert read_image_file("photos/cat.jpg") == b"cat"
