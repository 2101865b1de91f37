"""The pages of a recipe for a small data set: LLaVA's stages, with every size chosen from the data's counts.

The rules are stated in docs/own_data.md.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from mmlab.data.survey import Survey
from mmlab.runs.disk import to_json

STRIDE = 16  # pixels along a side of what becomes one token
FINE = 320  # pixels of a picture's longer side from which it is seen with SIDES[1] pixels
SIDES = (128, 192)
BATCH = 16
EPOCHS = {"language": 9, "align": 15, "finetune": 60}
STEPS = {
    "language": (300, 400),
    "align": (300, 1500),
    "finetune": (1000, 2500),
}  # fewest, and most: half an hour in all
VOCABULARIES = (512, 1024, 2048, 4096, 8192)
LONGEST = 2048  # tokens of a row
POSITIONS = 512  # of the language model, unless rows are longer


@dataclass(frozen=True)
class Recipe:
    """What is chosen from the counts of a data set.

    Args:
        name: of the recipe, which is also its folder.
        root: folder of the data.
        train: the training shards' folder in it.
        counts: of the training shards.
        val: samples of the validation shards in `val`; 0 without them.
    """

    name: str
    root: Path
    train: str
    counts: Survey
    val: int

    @property
    def side(self) -> int:
        """Pixels along a side of what the model sees."""
        return SIDES[self.counts.side >= FINE]

    @property
    def vocabulary(self) -> int:
        """Tokens: the 256 bytes, and two for each word, with and without a space before it."""
        return next((size for size in VOCABULARIES if size >= 256 + 2 * self.counts.words), VOCABULARIES[-1])

    @property
    def max_length(self) -> int:
        """Tokens of a row: those of the pictures, and one for every two characters of a long dialogue."""
        tokens = (self.side // STRIDE) ** 2 * self.counts.several + self.counts.longest // 2 + 32
        return min(LONGEST, -(-tokens // 128) * 128)

    @property
    def turns(self) -> str:
        """What of a record is trained on; captions alone only where they are not also answers."""
        if not self.counts.questions:
            return "caption"
        return "every" if 2 * self.counts.caption_answers < self.counts.captions else "auto"

    @property
    def stages(self) -> list[str]:
        """The stages of the chain in order."""
        # A stage on captions leaves samples without one out.
        if 3 * self.counts.captions < 2 * self.counts.samples:
            return ["finetune"]
        return ["language", "align", "finetune"] if self.counts.questions else ["language", "finetune"]

    def steps(self, stage: str) -> int:
        """Optimizer steps, so that each sample is seen as often as the stage needs."""
        fewest, most = STEPS[stage]
        return int(min(most, max(fewest, round(EPOCHS[stage] * self.counts.samples / BATCH, -2))))

    @property
    def commands(self) -> list[str]:
        """What to run, in order."""
        runs = [f"mmlab train experiment={self.name}/{stage}" for stage in self.stages]
        shards, test = self.root / self.train, self.root / ("val" if self.val else self.train)
        last = [f"mmlab eval run={self.name}/finetune {shlex.quote(f'data.path={test}')}"] * bool(self.counts.questions)
        tokenizer = shlex.join([str(shards), "--out", str(self.root / "tokenizer")])
        return [
            f"mmlab shards tokenizer {tokenizer} --vocab-size {self.vocabulary}",
            *runs,
            *last,
            f"mmlab export run={self.name}/finetune to=transformers out={self.name}_exported",
        ]


def pages(recipe: Recipe) -> dict[str, str]:
    """The path of each page below the folder of configs → its text."""
    texts = {"language": _language, "align": _align, "finetune": _finetune}
    stages = {f"experiment/{recipe.name}/{stage}.yaml": texts[stage](recipe) for stage in recipe.stages}
    return {f"data/{recipe.name}.yaml": _data(recipe), f"model/{recipe.name}.yaml": _model(recipe), **stages}


def _header(recipe: Recipe) -> str:
    counts, root = recipe.counts, shlex.quote(str(recipe.root))
    pictures = f"{counts.pictures:,} pictures (longer side {counts.side} px)"
    texts = f"{counts.captions:,} captions, {counts.questions:,} questions"
    lines = [
        f"Chosen by `mmlab init {recipe.name} {root}` from {counts.samples:,} samples with {pictures},",
        f"{texts}, {counts.words:,} words, long dialogues of {counts.longest:,} characters. In order:",
        *(f"  {command}" for command in recipe.commands),
    ]
    return "".join(f"# {line}\n" for line in lines)


def _data(recipe: Recipe) -> str:
    val = "[{path: val}]" if recipe.val else "[]"
    return f"""# The data of {recipe.root}.
{_header(recipe)}defaults:
  - /schema/ImageTextDataConfig@_here_
  - _self_
root: {to_json(str(recipe.root), ensure_ascii=False)}
train: [{{path: {recipe.train}}}]
val: {val}
global_batch: {BATCH}
micro_batch: {BATCH}
max_length: {recipe.max_length}
aspect: {"stretch" if recipe.counts.square else "pad"}
"""


def _language_settings(recipe: Recipe) -> str:
    return f"{{architecture: {{max_position_embeddings: {max(POSITIONS, recipe.max_length)}}}}}"


def _model(recipe: Recipe) -> str:
    return f"""# LLaVA with small parts for {recipe.root}; all of them are trained from random weights.
defaults:
  - llava
  - override vision: segformer_tiny
  - _self_
vision: {{image_size: {recipe.side}}}
language: {_language_settings(recipe)}
"""


def _on_captions(recipe: Recipe) -> str:
    """A line break and the line `data` of a stage on captions, if samples without one are no faults there."""
    return "\ndata: {bad_budget: 1}" if recipe.counts.captions < recipe.counts.samples else ""


def _language(recipe: Recipe) -> str:
    return f"""# @package _global_
# Stage 1: a small language model, on the texts of the data with the caption in place of the picture.
{_header(recipe)}defaults:
  - override /model: language_only
  - override /data: {recipe.name}
  - override /stage: language_pretraining
model: {{language: {_language_settings(recipe)}}}
stage: {{prompt: {{system: "", turns: every, pictures: text}}}}{_on_captions(recipe)}
optim: {{lr: 1e-3, weight_decay: 0.01, betas: [0.9, 0.95], warmup_ratio: 0.05}}
trainer: {{max_steps: {recipe.steps("language")}, gradient_clip_val: 1.0}}
"""


def _align(recipe: Recipe) -> str:
    why = "Stage 2: all parts, on captions: what is in a picture is learned from these with the fewest steps."
    return _all_parts(recipe, "align", why, "caption")


def _finetune(recipe: Recipe) -> str:
    return _all_parts(recipe, "finetune", "Last stage: all parts, on questions and answers.", recipe.turns)


def _all_parts(recipe: Recipe, stage: str, why: str, turns: str) -> str:
    """The page of a stage that trains all parts, from those of the stage before it."""
    before = recipe.stages[: recipe.stages.index(stage)]
    start = f"  init_from: [{recipe.name}/{before[-1]}]\n" if before else ""
    return f"""# @package _global_
# {why}
{_header(recipe)}defaults:
  - override /model: {recipe.name}
  - override /data: {recipe.name}
  - override /stage: finetune
stage:
  trainable: [vision, connector, language]
{start}  prompt: {{system: "", turns: {turns}}}{_on_captions(recipe) if turns == "caption" else ""}
optim: {{lr: 1e-3, weight_decay: 0.05, betas: [0.9, 0.98], warmup_ratio: 0.05}}
trainer: {{max_steps: {recipe.steps(stage)}, gradient_clip_val: 1.0}}
"""
