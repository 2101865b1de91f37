"""The dataclasses of conf/data."""

from dataclasses import dataclass, field

from omegaconf import II, MISSING

from mmlab.config.fields import choice, for_verb, number


@dataclass
class SourceConfig:
    """One set of shards in a mixture."""

    path: str = MISSING  # folder with shards and their index, relative to data.root
    weight: float | None = number(None, above=0)  # None for all sources: proportional to their sizes
    name: str | None = None  # in reports; None: the folder's name


@dataclass
class ShardsConfig:
    """What all data have; the fields that subclasses mark `for_verb` shape a batch, and the stage reads them."""

    _target_: str = "mmlab.data.module.ShardDataModule"
    root: str = for_verb(MISSING)  # joined before the paths of the sources
    train: list[SourceConfig] = field(default_factory=list)
    val: list[SourceConfig] = field(default_factory=list)
    global_batch: int = number(MISSING, above=0)  # samples per optimizer step, over all devices
    micro_batch: int = number(MISSING, above=0)  # samples that one device takes at a time
    workers: int = number(0, at_least=0)
    seed: int = II("seed")
    block_shards: int = number(8, above=0)  # shards whose samples are shuffled together
    # What shares without weights follow: the sources' sizes, or response types, each as often as the others.
    balance: str = choice("size", "type")
    bad_budget: float = number(0.001, at_least=0, at_most=1)  # share of samples that may be replaced


@dataclass
class DataConfig(ShardsConfig):
    """Pictures with texts."""

    max_length: int = for_verb(number(2048, above=0))  # tokens of a row
    pack: bool = for_verb(False)  # several samples in a row
    aspect: str = for_verb(choice("pad", "crop", "stretch"))
    augment: bool = for_verb(False)


@dataclass
class ImageDataConfig(ShardsConfig):
    """Pictures to generate, or their cached latents."""

    size: int = for_verb(number(MISSING, above=0))  # side of the square pictures in pixels
    aspect: str = for_verb(choice("crop", "pad", "stretch"))
    flip: bool = for_verb(False)  # mirror half of the pictures
    latents: bool = for_verb(False)  # the shards hold latents or codes (mmlab shards encode), not pictures
