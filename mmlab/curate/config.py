"""Settings of curation: language models, the two pipelines and the review."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mmlab.config.errors import ConfigError
from mmlab.config.fields import Settings, choice, number, section
from mmlab.curate.rules import check_rules
from mmlab.training.config import HardwareConfig


@dataclass
class LLMConfig(Settings):
    """What the client of any language model needs; base of the models' own settings."""

    workers: int = number(1, above=0)  # concurrent requests
    prompt_price: float | None = number(None, at_least=0)  # per million tokens; None: costs are not reported
    completion_price: float | None = number(None, at_least=0)


@dataclass
class EndpointConfig(LLMConfig):
    """An endpoint that speaks OpenAI's chat-completions protocol. Its key stays in the environment."""

    _target_: str = "mmlab.curate.endpoint.Endpoint"
    url: str = "https://api.openai.com/v1"  # base address; /chat/completions is appended
    model: str = MISSING
    variable: str | None = "OPENAI_API_KEY"  # environment variable that holds the key; None sends none
    # Part of each request.
    settings: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 512})
    timeout: float = number(120.0, above=0)  # seconds, both of silence and of one attempt as a whole
    attempts: int = number(6, above=0)
    backoff: float = number(1.0, at_least=0)  # seconds before the second attempt, doubled for each further one
    requests_per_minute: float | None = number(None, above=0)
    workers: int = number(8, above=0)


@dataclass
class LocalModelConfig(LLMConfig):
    """A transformers causal language model on this machine."""

    _target_: str = "mmlab.curate.local_model.LocalModel"
    source: str = MISSING  # hub name or folder
    template: str = "tokenizer"  # conversation template; "tokenizer": the tokenizer's chat template
    max_tokens: int = number(512, above=0)  # of a reply


@dataclass
class CurateDataConfig(Settings):
    path: str = MISSING


@dataclass
class CurateMiniGPT4Config(Settings):
    """The numbers and prompts of MiniGPT-4's second stage (arXiv 2304.10592, §3.2)."""

    run: str = MISSING  # name or folder of the run whose model describes the images
    root: str = "runs"
    data: CurateDataConfig = field(default_factory=CurateDataConfig)
    out: str = MISSING
    llm: Any = section("llm")
    samples: int = number(5000, above=0)  # images drawn from the data; all if there are fewer
    seed: int = number(0, at_least=0)  # of that draw
    template: str | None = None  # None: the one it was trained with
    instruction: str = "Describe this image in detail. Give as many details as possible. Say everything you see."
    continuation: str = "Continue"
    continue_up_to: int = number(80, at_least=0)  # tokens
    max_new_tokens: int = number(300, above=0)  # of a description, and of its continuation; as in the published demo
    batch_size: int = number(16, above=0)
    repair: str = (
        "Fix the error in the given paragraph. Remove any repeating sentences, meaningless characters, not English "
        "sentences, and so on. Remove unnecessary repetition. Rewrite any incomplete sentences. Return directly the "
        "results without explanation. Return directly the input paragraph if it is already correct without explanation."
    )
    # A description without a reply: requested again by the next command, kept unchanged, or dropped.
    unrepaired: str = choice("retry", "keep", "drop")
    rules: list[str] = field(
        default_factory=lambda: ["empty", "repeats", "unfinished", "apology", "explanation", "symbols", "language"]
    )
    # The shards are written once all descriptions are decided; with those decided so far; or without a review.
    review: str = choice("all", "decided", "none")
    trainer: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rules(self.rules)


@dataclass
class InstructDataConfig(Settings):
    """Either shards whose records have captions or boxes, or COCO's files."""

    path: str | None = None
    images: str | None = None  # image folder; None: no images, the dialogues are only written to the JSON
    captions: str | None = None  # such as captions_train2017.json
    instances: str | None = None  # such as instances_train2017.json
    table: str | None = None  # a .jsonl of captions and instances, instead of both
    missing_budget: float = number(0.0, at_least=0, at_most=1)  # share of the images that may be missing


@dataclass
class InstructSamplesConfig(Settings):
    """Images per response type, all if there are fewer; the numbers of LLaVA-Instruct-158K."""

    conversation: int = number(58000, at_least=0)
    detail_description: int = number(23000, at_least=0)
    complex_reasoning: int = number(77000, at_least=0)


@dataclass
class InstructPromptsConfig(Settings):
    """System message per response type; None: system_message.txt next to the examples."""

    conversation: str | None = MISSING
    detail_description: str | None = MISSING
    complex_reasoning: str | None = MISSING


@dataclass
class CurateLLaVAInstructConfig(Settings):
    """LLaVA's instruction data (arXiv 2304.08485, §3)."""

    data: InstructDataConfig = field(default_factory=InstructDataConfig)
    out: str = MISSING
    llm: Any = section("llm")
    examples: str | None = None  # folder of few-shot examples, with a subfolder per type; None: none
    samples: InstructSamplesConfig = field(default_factory=InstructSamplesConfig)
    prompts: InstructPromptsConfig = field(default_factory=InstructPromptsConfig)
    requests: list[str] = MISSING  # one is drawn as the question of each detailed description
    seed: int = number(0, at_least=0)  # of all draws: images, requests, position of the image
    # A question without a reply: requested again by the next command, or dropped.
    unanswered: str = choice("retry", "drop")
    rules: list[str] = field(
        default_factory=lambda: [
            *("empty", "repeats", "unfinished", "apology", "symbols", "language"),
            *("caption", "description", "coordinates", "information"),
        ]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rules(self.rules)
        data = self.data
        if bool(data.path) == bool(data.captions or data.instances or data.table) or (data.path and data.images):
            raise ConfigError("Give data.path=… for shards, or data.captions=…, data.instances=… or data.table=….")
        if not self.requests or not all(text.strip() for text in self.requests):
            raise ConfigError(
                "requests must not be empty or contain an empty string; a detailed description needs a question."
            )


@dataclass
class CurateReviewConfig(Settings):
    out: str = MISSING  # folder of a curation
    port: int = number(8765, at_least=0, at_most=65535)  # 0: any free port
    open: bool = False  # open the page in this machine's browser
