"""Write the pages of a recipe for your own data: LLaVA's stages, with sizes chosen from the data's counts."""

from pathlib import Path

from mmlab.config.errors import ConfigError, DataError
from mmlab.config.locations import is_url
from mmlab.verbs._shard_arguments import Parser

DESCRIPTION = """Write a data page, a model page, and a page for each stage into ./conf, which every command reads.

The folder holds shards in train/ and, to watch the training, in val/, as `mmlab shards build … --split val=0.05` writes
them. Sizes, steps and lengths are chosen from the number of pictures, captions and questions by the rules of
docs/own_data.md. Change the pages as you like: nothing else refers to them."""


def main(argv: list[str]) -> int:
    """Count what a folder of shards holds, write the pages, and print the commands that come next.

    Raises:
        ConfigError: the name is not one, is that of a shipped page, or there are such pages already.
        DataError: the data have no pictures, or neither captions nor questions.
    """
    parser = Parser(prog="mmlab init", description=DESCRIPTION)
    parser.add_argument("name", metavar="NAME", help="of the recipe: its stages are experiment=NAME/finetune, …")
    parser.add_argument("data", metavar="DIR", help="folder of the shards")
    parser.add_argument("--out", default="conf", metavar="DIR", help="folder of configs to write to (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace pages of that name")
    args = parser.parse_args(argv)
    if not args.name.isidentifier():
        raise ConfigError(f"'{args.name}' cannot name a recipe; use letters, digits and '_', such as my_data.")
    if is_url(args.data):
        raise ConfigError(
            f"{args.data} is an address, and all records are counted; give a folder with some shards of it."
        )
    from mmlab.config.compose import conf_dir
    from mmlab.runs.disk import no_file, write_text
    from mmlab.verbs._recipe_pages import pages

    out, recipe = no_file(Path(args.out)), recipe_for(args.name, Path(args.data))
    made = pages(recipe)
    if taken := next((path for path in made if (conf_dir() / path).exists()), None):
        raise ConfigError(f"{args.name} is the name of a page that comes with mmlab ({taken}); give another name.")
    texts = {out / path: text for path, text in made.items()}
    if (present := [path for path in texts if path.exists()]) and not args.overwrite:
        raise ConfigError(f"{present[0]} exists; give another name, or --overwrite to replace it.")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    print(*texts, sep="\n", end="\n\n")
    print(*recipe.commands, sep="\n")
    return 0


def recipe_for(name: str, root: Path):
    """The recipe for a folder of shards.

    Raises:
        DataError: no shards, no pictures, or neither captions nor questions.
    """
    from mmlab.data.index import ShardIndex
    from mmlab.data.survey import survey
    from mmlab.verbs._recipe_pages import Recipe

    train = "train" if (root / "train").is_dir() else "."
    counts = survey(ShardIndex.open(root / train))
    val = len(ShardIndex.open(root / "val")) if train == "train" and (root / "val").is_dir() else 0
    if not counts.pictures:
        raise DataError(
            f"{root / train} has no pictures; a language model alone is trained with model=language_only "
            "stage=language_pretraining."
        )
    if not counts.questions and not counts.captions and counts.classes:
        kinds = f"{counts.classes:,} {'class' if counts.classes == 1 else 'classes'}"
        raise DataError(
            f"{root / train} has pictures of {kinds} and no text: experiment=ldm/class_tiny learns to draw them; "
            "questions about them need captions or answers, such as a table for `mmlab shards build captions`."
        )
    if not counts.questions and not counts.captions:
        raise DataError(
            f"{root / train} has neither captions nor questions, so there is nothing that LLaVA could learn to say; "
            "build the shards from records with texts, or with --captions."
        )
    return Recipe(name, root, train, counts, val)
