"""Settings of the data (conf/data) and of the form in which samples become text."""

from dataclasses import dataclass, field

from omegaconf import II, MISSING

from mmlab.config.errors import ConfigError
from mmlab.config.fields import Settings, check_value, choice, number


@dataclass
class Prompt(Settings):
    """The form in which samples become token sequences.

    Raises:
        ConfigError: an unknown name, or a combination that the plain template cannot express.
    """

    template: str = "v1"  # conversation template; `tokenizer` is the tokenizer's own chat template
    # What stands for a picture: its places in the sequence, its caption there, the caption's tokens at random among as
    # many places, or nothing.
    pictures: str = choice("tokens", "text", "scattered", "none")
    supervise: str = choice("answers", "all")  # answers and their stops, or every token of text
    system: str | None = None  # system message; None: the template's own, empty: none
    # The part of a record that is used; `auto` is the first of questions, conversations and caption that it has,
    # `every` is all of them.
    turns: str = choice("auto", "every", "conversations", "questions", "caption")
    places: int = number(64, above=0)  # of a scattered caption; those of `tokens` are the model's
    requests: str = choice("llava", "minigpt4")  # whose requests for a caption: brief ones, or detailed ones
    captions: str = choice("raw", "blip")  # blip: lower case, no marks, 50 words (BLIP-2 and MiniGPT-4's stage 1)

    def __post_init__(self) -> None:
        from mmlab.data.templates import TEMPLATES

        super().__post_init__()
        check_value("prompt.template", self.template, {"choices": tuple(TEMPLATES)})
        if self.template == "plain" and self.system:
            raise ConfigError("prompt.template=plain has no place for prompt.system; leave it out.")
        if self.template == "plain" and self.pictures == "text":
            raise ConfigError(
                "prompt.template=plain with prompt.pictures=text would show the caption that the model has to write; "
                "use prompt.pictures=none to learn captions as text."
            )


@dataclass
class SourceConfig(Settings):
    """One set of shards in a mixture."""

    path: str = MISSING  # folder with shards and their index, relative to data.root
    weight: float | None = number(None, above=0)  # None for all sources: proportional to their sizes
    name: str | None = None  # in reports; None: the folder's name


@dataclass
class ShardsConfig(Settings):
    """What all data have; the fields of subclasses shape a batch, and the stage's collate reads them."""

    _target_: str = MISSING
    root: str = MISSING  # joined before the paths of the sources
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
class ImageTextDataConfig(ShardsConfig):
    """Pictures with texts."""

    _target_: str = "mmlab.data.module.ImageTextData"
    max_length: int = number(2048, above=0)  # tokens of a row
    pack: bool = False  # several samples in a row
    aspect: str = choice("pad", "crop", "stretch")
    augment: bool = False


@dataclass
class ImageDataConfig(ShardsConfig):
    """Pictures to generate, or their cached latents."""

    _target_: str = "mmlab.data.module.ImageData"
    size: int = number(MISSING, above=0)  # side of the square pictures in pixels
    aspect: str = choice("crop", "pad", "stretch")
    flip: bool = False  # mirror half of the pictures
    latents: bool = False  # the shards hold latents or codes (mmlab shards encode), not pictures
