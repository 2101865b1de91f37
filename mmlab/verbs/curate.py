"""Make training data with models: describe pictures, repair, filter, review, write shards."""

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb
from mmlab.config.errors import ConfigError, nearest

USAGE = """mmlab curate <command> [key=value]   (mmlab curate <command> --help says more)

  minigpt4          describe pictures with a trained model, repair by a language model, filter, write shards
  llava_instruct    dialogues about pictures from their captions and boxes, by a language model; filter, write shards
  review            accept, edit and reject MiniGPT-4's descriptions in a browser"""


def main(argv: list[str]) -> int:
    commands = {"minigpt4": minigpt4, "llava_instruct": llava_instruct, "review": review}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in commands:
        raise ConfigError(
            f"There is no command '{argv[0]}' of curate.{nearest(argv[0], commands)} Commands: {', '.join(commands)}."
        )
    return hydra_verb(f"curate_{argv[0]}", commands[argv[0]], argv[1:])


def minigpt4(cfg: DictConfig) -> None:
    """Make the data of MiniGPT-4's second stage; the same command goes on where it was killed, or after the review.

    mmlab curate minigpt4 run=minigpt4/stage1_tiny template=minigpt4 data.path=data/shapes/train out=data/curated \\
        llm.model=gpt-4o-mini

    The key of the endpoint is read from OPENAI_API_KEY, or the variable that llm.variable names.
    """
    from pathlib import Path

    from mmlab.config.build import build
    from mmlab.curate.pipeline import MiniGPT4, curate
    from mmlab.curate.report import lines
    from mmlab.data.index import ShardIndex
    from mmlab.runs.run import find_run

    # A wrong name or address should not cost the loading of a model.
    recipe = MiniGPT4(
        **{name: cfg[name] for name in ("samples", "seed", "instruction", "continuation", "continue_up_to", "repair")},
        **{name: cfg[name] for name in ("batch_size", "unrepaired", "review")},
        rules=list(cfg.rules),
        workers=cfg.llm.workers,
        prices=(cfg.llm.prompt_price, cfg.llm.completion_price),
    )
    folder, index = find_run(cfg.run, cfg.root), ShardIndex.open(cfg.data.path)
    counts = curate(recipe, index, describer(cfg, folder), build(cfg.llm), Path(cfg.out))
    print("\n".join(lines(counts)))
    if counts["written"] is None:
        print(f"{counts['reviewed']['left']} wait for a person: mmlab curate review out={cfg.out}, then this again.")
    else:
        print(f"shards: {Path(cfg.out, 'shards')}")


def describer(cfg: DictConfig, folder):
    """The run's model, loaded when it is first asked, and what its descriptions depend on."""
    from mmlab.curate.pipeline import Lazy
    from mmlab.evaluate.answers import Answerer
    from mmlab.runs.run import load_run_config
    from mmlab.stage.assembly import restore, run_prompt
    from mmlab.training.artifacts import fingerprints
    from mmlab.training.trainer import place

    prompt = run_prompt(load_run_config(folder), cfg.template)

    def load() -> Answerer:
        model, trained = restore(folder)
        return Answerer(place(model, cfg.trainer), prompt, trained.data.aspect, cfg.max_new_tokens)

    asked = {"template": prompt.template, "system": prompt.system, "max_new_tokens": cfg.max_new_tokens}
    return Lazy(load, {"run": folder.name, "parts": fingerprints(folder), **asked})


def llava_instruct(cfg: DictConfig) -> None:
    """Make LLaVA's instruction data: conversation, detailed description, complex reasoning; the same command goes on.

    mmlab curate llava_instruct data.path=data/coco/train out=data/instruct llm.model=gpt-4o-mini examples=prompts
    mmlab curate llava_instruct data.images=train2017 data.captions=captions_train2017.json \\
        data.instances=instances_train2017.json out=data/instruct llm=local llm.source=Qwen/Qwen2.5-7B-Instruct

    `examples` is a folder in the layout of LLaVA's prompts: <type>/000_caps.txt and <type>/000_conv.txt, …
    """
    from pathlib import Path

    from mmlab.config.build import build
    from mmlab.curate.instruct_pipeline import ENTRIES, curate, pictures
    from mmlab.curate.instruct_report import lines
    from mmlab.data.index import ShardIndex

    # A wrong name or address should not cost the reading of a hundred thousand pictures.
    recipe, backend, out = instruct_recipe(cfg), build(cfg.llm), Path(cfg.out)
    files = {name: value for name, value in cfg.data.items() if name != "path"}
    told = any(files[name] for name in ("captions", "instances", "table"))
    if bool(cfg.data.path) == told or (cfg.data.path and files["images"]):
        raise ConfigError("Give data.path=… for shards, or data.captions=…, data.instances=… or data.table=… instead.")
    index, read = (ShardIndex.open(cfg.data.path), None) if cfg.data.path else pictures(out, files)
    counts = curate(recipe, index, backend, out, read)
    print("\n".join(lines(counts)))
    shards = f", shards: {out / 'shards'}" if counts["written"]["samples"] else ""
    print(f"dialogues: {out / ENTRIES}{shards}")


def instruct_recipe(cfg: DictConfig):
    """The recipe, with the examples read from their folder."""
    from pathlib import Path

    from mmlab.curate.examples import load_examples, system_message
    from mmlab.curate.instruct_pipeline import LLaVAInstruct

    folder = None if cfg.examples is None else Path(cfg.examples)
    wanted = [kind for kind, count in cfg.samples.items() if count]

    def prompt(kind: str) -> str:
        if (text := cfg.prompts[kind]) is not None:
            return text
        if folder is None:
            raise ConfigError(f"prompts.{kind}=null is read from a folder with examples; give examples=…")
        return system_message(folder, kind)

    return LLaVAInstruct(
        samples=dict(cfg.samples),
        prompts={kind: prompt(kind) for kind in wanted},
        examples={kind: load_examples(folder, kind) for kind in wanted} if folder else {},
        requests=list(cfg.requests),
        rules=list(cfg.rules),
        **{"seed": cfg.seed, "unanswered": cfg.unanswered, "workers": cfg.llm.workers},
        prices=(cfg.llm.prompt_price, cfg.llm.completion_price),
    )


def review(cfg: DictConfig) -> None:
    """Show each picture beside its description on a page of this machine, and save every decision at once.

    mmlab curate review out=data/curated
    """
    from pathlib import Path

    from mmlab.curate.review_server import serve

    serve(Path(cfg.out), cfg.port, cfg.open)
