"""Which split a sample belongs to, so that no picture is in two of them."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from mmlab.data.formats import Members, pictures_among
from mmlab.keyed import draw
from mmlab.runs.disk import to_json

REST = "train"
"""The split of all that no other split draws."""


def digests_of(members: Members) -> list[str]:
    """Hashes of a sample's pictures, or of its record if it has none."""
    contents = [members[name] for name in pictures_among(members)] or [members.get("json", b"")]
    data = (one if isinstance(one, bytes) else to_json(one, sort_keys=True).encode() for one in contents)
    return [hashlib.sha256(one).hexdigest() for one in data]


def split_of(digest: str, splits: Mapping[str, float], seed: int) -> str:
    """The split that a picture draws: a function of its bytes and the seed.

    Args:
        digest: of the picture, see `digests_of`.
        splits: name → share of the pictures that belong to it instead of to `REST`.
        seed: of the draw.
    """
    place = draw(seed, f"split/{digest}")
    for name, share in splits.items():
        if place < share:
            return name
        place -= share
    return REST


def representatives(samples: Sequence[Sequence[str]]) -> list[str]:
    """The digest that draws the split of each sample.

    Samples that share a picture, also through other samples, belong together. All of them have the smallest digest of
    their pictures.

    Args:
        samples: digests of each sample.
    """
    parents: dict[str, str] = {}

    def root(digest: str) -> str:
        while (parent := parents.get(digest, digest)) != digest:
            parents[digest] = parents.get(parent, parent)
            digest = parent
        return digest

    for first, *others in samples:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parents[high] = low
    return [root(first) for first, *_ in samples]


def most_connected(samples: Sequence[Sequence[str]]) -> int:
    """The number of samples in the largest group that shares pictures."""
    return max(Counter(representatives(samples)).values(), default=0)
