"""Tokenizers as folders, which models load."""

from pathlib import Path

import pytest

from tests.tiny_tokenizers import TOKENIZERS


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, make in TOKENIZERS.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in TOKENIZERS}
