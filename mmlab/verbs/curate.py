"""Make training data with models: describe images, repair, filter, review, write shards."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.compose import hydra_verb
from mmlab.config.errors import ConfigError, nearest

USAGE = """mmlab curate <command> [key=value]   (mmlab curate <command> --help says more)

  minigpt4          describe images with a trained model, repair with a language model, filter, write shards
  llava_instruct    dialogues about images from their captions and boxes, by a language model; filter, write shards
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
    """Make the data of MiniGPT-4's second stage; after a kill or the review, the same command continues.

    mmlab curate minigpt4 run=minigpt4/stage1_tiny template=minigpt4 data.path=data/shapes/train out=data/curated \\
        llm.model=gpt-4o-mini

    The endpoint's key is read from OPENAI_API_KEY, or from the variable that llm.variable names.
    """
    from mmlab.config.build import build
    from mmlab.curate.client import Client
    from mmlab.curate.curation_report import minigpt4_lines
    from mmlab.curate.minigpt4_pipeline import curate
    from mmlab.data.index import ShardIndex
    from mmlab.evaluate.answers import Answerer
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import restore, run_prompt
    from mmlab.training.artifacts import content_hashes
    from mmlab.training.trainer import place

    config: Any = OmegaConf.to_object(cfg)
    folder, index = find_run(config.run, config.root), ShardIndex.open(config.data.path)
    prompt = run_prompt(load_run_config(folder), config.template)

    def load_describer() -> Answerer:
        model, trained = restore(folder)
        return Answerer(place(model, config.trainer), prompt, trained.data, config.max_new_tokens)

    identity = {"run": folder.name, "parts": content_hashes(folder), "template": prompt.template}
    identity |= {"system": prompt.system, "max_new_tokens": config.max_new_tokens}
    client = Client(config.llm, build(config.llm), Path(config.out, "replies"))
    report = curate(config, index, load_describer, identity, client)
    print("\n".join(minigpt4_lines(report)))
    if report["written"] is None:
        print(f"{report['reviewed']['left']} to review: mmlab curate review out={config.out}, then repeat this command")
    else:
        print(f"shards: {Path(config.out, 'shards')}")


def llava_instruct(cfg: DictConfig) -> None:
    """Make LLaVA's instruction data: conversation, detailed description, complex reasoning; the same command resumes.

    mmlab curate llava_instruct data.path=data/coco/train out=data/instruct llm.model=gpt-4o-mini examples=prompts
    mmlab curate llava_instruct data.images=train2017 data.captions=captions_train2017.json \\
        data.instances=instances_train2017.json out=data/instruct llm=local llm.source=Qwen/Qwen2.5-7B-Instruct

    `examples` is a folder in the layout of LLaVA's prompts: <type>/000_caps.txt and <type>/000_conv.txt, …
    """
    from mmlab.config.build import build
    from mmlab.curate.client import Client
    from mmlab.curate.curation_report import instruct_lines
    from mmlab.curate.llava_instruct_pipeline import ENTRIES, curate, open_images
    from mmlab.curate.llava_instruct_prompts import load_prompts

    config: Any = OmegaConf.to_object(cfg)
    out = Path(config.out)
    prompts, client = load_prompts(config), Client(config.llm, build(config.llm), out / "replies")
    index, counts = open_images(config.data, out)
    report = curate(config, prompts, index, client, counts)
    print("\n".join(instruct_lines(report)))
    shards = f", shards: {out / 'shards'}" if report["written"]["samples"] else ""
    print(f"dialogues: {out / ENTRIES}{shards}")


def review(cfg: DictConfig) -> None:
    """Show each image and its description on a local web page, and save every decision immediately.

    mmlab curate review out=data/curated
    """
    from mmlab.curate.review_server import serve

    serve(Path(cfg.out), cfg.port, cfg.open)
