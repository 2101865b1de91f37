"""Settings of curation: the language models that help, the pipelines and the review."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mmlab.config.fields import Settings, choice, number, section
from mmlab.training.config import HardwareConfig


@dataclass
class LLMConfig(Settings):
    """What every language model that helps with data has beside its own settings."""

    workers: int = number(1, above=0)  # questions at a time
    prompt_price: float | None = number(None, at_least=0)  # per million tokens; None: costs are not counted
    completion_price: float | None = number(None, at_least=0)


@dataclass
class EndpointConfig(LLMConfig):
    """An endpoint that speaks OpenAI's chat-completions protocol. Its key stays in the environment."""

    _target_: str = "mmlab.curate.endpoint.Endpoint"
    url: str = "https://api.openai.com/v1"
    model: str = MISSING
    variable: str | None = "OPENAI_API_KEY"  # environment variable that holds the key; None sends none
    settings: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 512})
    timeout: float = number(120.0, above=0)  # seconds
    attempts: int = number(6, above=0)
    backoff: float = number(1.0, at_least=0)  # seconds before the second attempt
    requests_per_minute: float | None = number(None, above=0)
    workers: int = number(8, above=0)


@dataclass
class LocalModelConfig(LLMConfig):
    """A transformers causal language model on this machine."""

    _target_: str = "mmlab.curate.local_model.LocalModel"
    source: str = MISSING  # hub name or folder
    template: str = "tokenizer"
    max_tokens: int = number(512, above=0)


@dataclass
class CurateDataConfig(Settings):
    path: str = MISSING


@dataclass
class MiniGPT4Config(Settings):
    """The numbers and prompts of MiniGPT-4's second stage (arXiv 2304.10592, §3.2)."""

    run: str = MISSING  # name or folder of the run whose model describes
    root: str = "runs"
    data: CurateDataConfig = field(default_factory=CurateDataConfig)
    out: str = MISSING
    llm: Any = section("llm")
    samples: int = number(5000, above=0)  # pictures drawn from the data; all where there are fewer
    seed: int = number(0, at_least=0)  # of that draw
    template: str | None = None  # None: the one it was trained with
    instruction: str = "Describe this image in detail. Give as many details as possible. Say everything you see."
    continuation: str = "Continue"
    continue_up_to: int = number(80, at_least=0)  # tokens
    max_new_tokens: int = number(300, above=0)  # of a description, and of its continuation; as the published demo
    batch_size: int = number(16, above=0)
    repair: str = (
        "Fix the error in the given paragraph. Remove any repeating sentences, meaningless characters, not English "
        "sentences, and so on. Remove unnecessary repetition. Rewrite any incomplete sentences. Return directly the "
        "results without explanation. Return directly the input paragraph if it is already correct without explanation."
    )
    # What becomes of a description that the language model does not answer: asked for again by the next command, kept
    # as it is, or dropped.
    unrepaired: str = choice("retry", "keep", "drop")
    rules: list[str] = field(
        default_factory=lambda: ["empty", "repeats", "unfinished", "apology", "explanation", "symbols", "language"]
    )
    # Whom the shards wait for: a decision on all descriptions; on some, and they hold those; or nobody.
    review: str = choice("all", "decided", "none")
    trainer: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass
class InstructDataConfig(Settings):
    """Shards whose records have captions or boxes; or COCO's files in their place."""

    path: str | None = None
    images: str | None = None  # picture folder; None: there are no pictures, the dialogues go into the JSON alone
    captions: str | None = None  # such as captions_train2017.json
    instances: str | None = None  # such as instances_train2017.json
    table: str | None = None  # a .jsonl of captions and instances, in place of both
    missing_budget: float = number(0.0, at_least=0, at_most=1)  # share of the pictures that may be missing


@dataclass
class InstructSamplesConfig(Settings):
    """Pictures asked for each response type, all where there are fewer; those of LLaVA-Instruct-158K."""

    conversation: int = number(58000, at_least=0)
    detail_description: int = number(23000, at_least=0)
    complex_reasoning: int = number(77000, at_least=0)


@dataclass
class InstructPromptsConfig(Settings):
    """What the language model is told for each type; None: system_message.txt beside the examples."""

    conversation: str | None = MISSING
    detail_description: str | None = MISSING
    complex_reasoning: str | None = MISSING


@dataclass
class LLaVAInstructConfig(Settings):
    """LLaVA's instruction data (arXiv 2304.08485, §3)."""

    data: InstructDataConfig = field(default_factory=InstructDataConfig)
    out: str = MISSING
    llm: Any = section("llm")
    examples: str | None = None  # folder of few-shot examples, one below it for each type; None: none
    samples: InstructSamplesConfig = field(default_factory=InstructSamplesConfig)
    prompts: InstructPromptsConfig = field(default_factory=InstructPromptsConfig)
    requests: list[str] = MISSING  # one is drawn for each detailed description, as its question
    seed: int = number(0, at_least=0)  # of what is drawn: pictures, requests, places of the picture
    # What becomes of a question that gets no answer: asked again by the next command, or dropped.
    unanswered: str = choice("retry", "drop")
    rules: list[str] = field(
        default_factory=lambda: [
            *("empty", "repeats", "unfinished", "apology", "symbols", "language"),
            *("caption", "description", "coordinates", "information"),
        ]
    )


@dataclass
class ReviewConfig(Settings):
    out: str = MISSING  # folder of a curation
    port: int = number(8765, at_least=0, at_most=65535)  # 0: any that is free
    open: bool = False  # open the page in this machine's browser
