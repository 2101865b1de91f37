"""Settings of the data (conf/data) and of the form in which samples become text."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import II, MISSING

from mmlab.config.errors import ConfigError
from mmlab.config.fields import Settings, choice, number, section
from mmlab.config.locations import Location, Url, location, user_cache
from mmlab.data.aspects import Shape, bucket_shapes
from mmlab.data.clock import DATE, moment_of

FLOOR = 10
"""Replaced samples that never stop a run, so that a bad one among the first does not."""
ASPECTS = ("pad", "crop", "stretch")
"""How an image becomes square: padded with CLIP's mean color, cropped to its center, or stretched."""
ANYRES = "anyres"
"""A base view, stretched to a square, and as many tiles of its size as the image's own size asks for (LLaVA-NeXT)."""


@dataclass
class Prompt(Settings):
    """The form in which samples become token sequences.

    Raises:
        ConfigError: an unknown name, or a combination that the plain template cannot express.
    """

    template: str = "v1"  # see `TEMPLATES`; `tokenizer` is the tokenizer's own chat template
    # What stands for an image: its tokens, its caption, the caption's tokens scattered at random over `places`, or
    # nothing.
    pictures: str = choice("tokens", "text", "scattered", "none")
    supervise: str = choice("answers", "all")  # answers and their stops, or every token of text
    # System message; None: the conversation's own, or else the template's; empty: none.
    system: str | None = None
    # The date that the tokenizer's chat template is told where it asks for today's: a run has one, whenever it resumes.
    date: str = DATE
    # Part of a record that is used. auto: the first of questions, conversations and caption that it has; every: all of
    # them.
    turns: str = choice("auto", "every", "conversations", "questions", "caption")
    places: int = number(64, above=0)  # of a scattered caption; `tokens` takes as many as the model has
    requests: str = choice("llava", "minigpt4")  # instructions that ask for a caption: brief or detailed ones
    # blip: lower case, without punctuation, at most 50 words (BLIP-2, MiniGPT-4's stage 1)
    captions: str = choice("raw", "blip")

    def __post_init__(self) -> None:
        from mmlab.data.templates import template_named

        super().__post_init__()
        moment_of(self.date)
        template = template_named(self.template)
        if self.system and not template.has_system:
            raise ConfigError(f"prompt.template={self.template} has no place for prompt.system; leave it out.")
        if self.template == "plain" and self.pictures == "text":
            raise ConfigError(
                "prompt.template=plain with prompt.pictures=text would show the caption that the model has to write; "
                "use prompt.pictures=none to learn captions as text."
            )


@dataclass
class SourceConfig(Settings):
    """One set of shards in a mixture."""

    # Folder or address (s3://…) with shards and their index, relative to data.root; with data/loader=stream a folder, a
    # tar or a pattern such as part-{000..099}.tar, or several of these joined by `::`.
    path: str = MISSING
    weight: float | None = number(None, above=0)  # None for all sources: proportional to their sizes
    name: str | None = None  # in reports; None: the folder's name
    caption: str | None = None  # of all its samples, in place of their own


@dataclass
class CacheConfig(Settings):
    """Copies of remote shards on a local disk, shared by all processes of a machine."""

    folder: str | None = None  # None: $MMLAB_SHARD_CACHE, or mmlab/shards in $XDG_CACHE_HOME or ~/.cache
    gigabytes: float = number(50, above=0)  # of all copies together; the shards of two blocks should fit
    ahead: int = number(2, at_least=0)  # shards that are fetched beyond the next block
    deadline: float = number(600, above=0)  # seconds for each shard, in which faults of the store are retried

    @property
    def path(self) -> Path:
        """The folder of the copies."""
        return Path(self.folder or os.environ.get("MMLAB_SHARD_CACHE") or user_cache("shards")).expanduser()

    @property
    def bytes(self) -> int:
        """The limit of the copies."""
        return int(self.gigabytes * 1e9)


@dataclass
class IndexedLoaderConfig(Settings):
    """Shards with an index, which the data module reads itself."""

    _target_: str | None = None


@dataclass
class StreamLoaderConfig(Settings):
    """Shards without an index, read by webdataset's pipeline; see `StreamLoader` for what it does not promise."""

    _target_: str | None = "mmlab.data.stream_loader.StreamLoader"  # null: data/loader=indexed
    shardshuffle: bool = True  # another order of the shards in each pass
    shuffle: int = number(10_000, at_least=0)  # samples in the buffer from which the next one is drawn; 0: in order
    resampled: bool = False  # draw shards at random, again and again, instead of each one once per pass
    samples: int | None = number(None, above=0)  # of one pass, if they are counted: trainer.max_epochs needs it


@dataclass
class ShardsConfig(Settings):
    """Settings of all data; those of the subclasses are read by the stage's collate."""

    _target_: str = MISSING
    root: str = MISSING  # folder or address that the paths of the sources start from
    train: list[SourceConfig] = field(default_factory=list)  # sources of the training mixture
    val: list[SourceConfig] = field(default_factory=list)  # read once per validation, in the order of their shards
    global_batch: int = number(MISSING, above=0)  # samples per optimizer step, over all devices
    micro_batch: int = number(MISSING, above=0)  # samples that one device takes at a time
    workers: int = number(0, at_least=0)  # processes per device that prepare batches; 0: the main process
    loader: Any = section("data/loader", default=None)  # None: shards with an index
    seed: int = II("seed")  # of the order and of all per-sample randomness
    block_shards: int = number(8, above=0)  # shards whose samples are shuffled together
    cache: CacheConfig = field(default_factory=CacheConfig)  # of remote shards
    # Decode JPEGs to a half, a quarter or an eighth where twice the pixels that the model takes remain: faster for
    # photos of many megapixels, and values that differ by 0.15 to 0.8 of 255 on average.
    reduce_jpegs: bool = False
    # Shares of sources without weights: size: in proportion to their samples; type: equal for all response types.
    balance: str = choice("size", "type")
    bad_budget: float = number(0.001, at_least=0, at_most=1)  # share of a source's samples that may be replaced

    def folder(self, source: SourceConfig) -> Location:
        """The folder or the address that holds the source's shards and their index."""
        return location(source.path, self.root)

    @property
    def remote(self) -> bool:
        """Whether a training source is an address."""
        parts = (part for source in self.train for part in source.path.split("::"))
        return any(isinstance(location(part, self.root), Url) for part in parts)

    def check_mixture(self) -> None:
        """Raise ConfigError without a training source, and where weights are missing or contradict `balance`."""
        if not self.train:
            raise ConfigError("'data.train' has no source; give data.train=[{path: …}].")
        weighted = [source.weight is not None for source in self.train]
        if any(weighted) and not all(weighted):
            raise ConfigError(f"'data.train.{weighted.index(False)}' has no weight; give every source one, or none.")
        if any(weighted) and self.balance == "type":
            raise ConfigError("data.balance=type weights the response types; leave out the weights of 'data.train'.")
        if self.streamed and self.balance == "type":
            raise ConfigError("data.balance=type needs an index, which has the types; leave out data/loader=stream.")
        if self.streamed and len(self.train) > 1 and not any(weighted):
            raise ConfigError(
                "shards without an index have no sizes; with data/loader=stream give each source a weight."
            )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of aspect buckets; none where all images have one shape."""
        return ()

    @property
    def streamed(self) -> bool:
        """Whether training reads shards without an index."""
        return isinstance(self.loader, StreamLoaderConfig) and self.loader._target_ is not None

    def check_lanes(self, name: str, shards: int, world: int) -> None:
        """Raise ConfigError if streams of a source have fewer shards than workers of all ranks, which share them."""
        lanes = world * max(1, self.workers)
        if shards < lanes and not self.loader.resampled:
            raise ConfigError(
                f"source '{name}' has {shards} shard{'s' * (shards > 1)}, fewer than the {lanes} workers of all ranks; "
                "lower data.workers, or set data.loader.resampled=true."
            )

    def check_epochs(self) -> None:
        """Raise ConfigError if the samples of a pass, of which `max_epochs` is a multiple, are not known."""
        if self.streamed and self.loader.samples is None:
            raise ConfigError(
                "trainer.max_epochs counts samples, and nobody has counted those of shards without an index; give "
                "trainer.max_steps=… trainer.max_epochs=null, or state a pass's samples with data.loader.samples=…"
            )


@dataclass
class ImageTextDataConfig(ShardsConfig):
    """Images with texts."""

    _target_: str = "mmlab.data.module.ImageTextData"
    max_length: int = number(2048, above=0)  # longest row or caption in tokens, image tokens included
    pack: bool = False  # fill rows with several samples
    aspect: str = choice(*ASPECTS, ANYRES)
    # Rows and columns of the tiles that `anyres` chooses from. LLaVA-NeXT's `image_grid_pinpoints` for tiles of 336 px.
    grids: list[list[int]] = field(default_factory=lambda: [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]])
    # contrastive: a random crop of 70 to 100 % of the area; with questions: the whole at this size, at a random place.
    augment: bool = False


@dataclass
class AspectBucketsConfig(Settings):
    """Shapes of about `size`² pixels, so that images keep theirs; each batch has one of them."""

    # Longer side over shorter side, such as 2; images beyond it are cropped more. null: all images are squares.
    max_aspect: float | None = number(None, above=1, at_most=16)
    # All sides in pixels are multiples of it, and it is one of the first stage's factor times the denoiser's. 64 fits
    # Stable Diffusion (NovelAI's buckets). Smaller steps give more buckets, of which less is cropped.
    step: int = number(64, above=0)


@dataclass
class ImageDataConfig(ShardsConfig):
    """Images to generate, or their cached latents or codes."""

    _target_: str = "mmlab.data.module.ImageData"
    size: int = number(MISSING, above=0)  # side of the square images in pixels
    buckets: AspectBucketsConfig = field(default_factory=AspectBucketsConfig)  # shapes of images that are no squares
    aspect: str = choice(*ASPECTS, default="crop")
    flip: bool = False  # mirror half of the images; wrong for captions that say left and right
    latents: bool = False  # the shards hold latents or codes (mmlab shards encode), not images

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the buckets, if any; raises ConfigError if `size` and `buckets` do not fit together."""
        if self.buckets.max_aspect is None:
            return ()
        return bucket_shapes(self.size, self.buckets.max_aspect, self.buckets.step)

    def check_mixture(self) -> None:
        """Raise ConfigError also for what aspect buckets do not go with."""
        super().check_mixture()
        if not self.shapes:
            return
        if self.aspect != "crop":
            raise ConfigError(f"data.buckets crops images to their buckets; data.aspect={self.aspect} does not apply.")
        if self.latents:
            raise ConfigError("data.latents=true has cached squares; set data.latents=false to train in data.buckets.")
        if self.streamed:
            raise ConfigError(
                "data.buckets needs the sizes of images, which an index has; leave out data/loader=stream."
            )
        if self.balance == "type":
            raise ConfigError("data.buckets does not go with data.balance=type; give the sources weights instead.")

    def check_step(self, divisor: int) -> None:
        """Raise ConfigError unless the model, which divides sides by `divisor`, takes all buckets."""
        if self.shapes and self.buckets.step % divisor:
            raise ConfigError(
                f"data.buckets.step={self.buckets.step} must be a multiple of {divisor}, by which the model divides "
                "the sides of images."
            )
