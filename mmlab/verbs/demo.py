"""Try a trained run, or two side by side, on a page in the browser."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb
from mmlab.config.errors import ConfigError
from mmlab.verbs.config import SampleConfig

PAGES = {"answers": "chat", "describes": "chat", "writes": "chat", "draws": "form"}
"""What a run's model does (see `kind_of`) → its page."""


def main(argv: list[str]) -> int:
    return hydra_verb("demo", demo, argv)


def demo(cfg: DictConfig) -> None:
    """Serve a page for a run: a chat about pictures, or a form that draws images. Ctrl-C ends it.

    mmlab demo run=llava/finetune_tiny
    mmlab demo run=llava/align_tiny compare=llava/finetune_tiny template=v1      # the same questions to both
    mmlab demo run=ldm/class_tiny port=8000
    """
    if find_spec("gradio") is None:
        raise ConfigError("mmlab demo needs Gradio: pip install 'mmlab[demo]'.")
    from mmlab.demo.serving import listen, server, upload_folder

    runs = [cfg.run] if cfg.compare is None else [cfg.run, cfg.compare]
    kind = kind_of_page(runs, cfg.root)
    with listen(cfg.host, cfg.port) as port, upload_folder() as folder:
        page, visits = chat(cfg, runs, folder) if kind == "chat" else form(cfg, runs, folder)
        host, number = port.getsockname()[:2]
        print(f"open http://{f'[{host}]' if ':' in host else host}:{number} (Ctrl-C ends it)", flush=True)
        server(page, visits, cfg.host).run(sockets=[port])


def kind_of_page(runs: list[str], root: str) -> str:
    """`chat` or `form`, as all of the runs need.

    Raises:
        ConfigError: a run that has no page, or runs that need different ones.
    """
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import kind_of

    kinds = [PAGES.get(kind_of(load_run_config(find_run(run, root)))) for run in runs]
    for run, kind in zip(runs, kinds, strict=True):
        if kind is None:
            raise ConfigError(
                f"{run} neither answers nor draws; the demo shows vision-language models (a chat about pictures), "
                "latent diffusion and code priors (a form that draws images)."
            )
    if len(set(kinds)) > 1:
        raise ConfigError(f"{runs[0]} and {runs[1]} cannot be compared: one of them answers, and the other one draws.")
    return str(kinds[0])


def chat(cfg: DictConfig, runs: list[str], uploads: Path) -> tuple[Any, Any]:
    """The page of runs that answer, and its visitors."""
    from mmlab.demo.chat_page import chat_page
    from mmlab.demo.talks import Speaker
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import restore, run_prompt
    from mmlab.training.trainer import place

    folders = [find_run(run, cfg.root) for run in runs]
    prompts = [run_prompt(load_run_config(folder), cfg.template) for folder in folders]
    speakers = []
    for run, folder, prompt in zip(runs, folders, prompts, strict=True):
        model, trained = restore(folder)
        speakers.append(Speaker(run, place(model, cfg.trainer), prompt, trained.data))
    return chat_page(speakers, uploads, cfg.max_new_tokens)


def form(cfg: DictConfig, runs: list[str], uploads: Path) -> tuple[Any, Any]:
    """The page of runs that draw, and its visitors."""
    from mmlab.demo.form_page import form_page
    from mmlab.verbs._drawers import RunDrawer

    if cfg.template is not None:
        raise ConfigError(f"{cfg.run} draws images, without a chat template; leave out template.")
    if cfg.trainer.precision == "auto":
        cfg.trainer.precision = SampleConfig().trainer.precision  # the same image of a seed as mmlab sample
    return form_page([RunDrawer(run, cfg.root, cfg.trainer) for run in runs], uploads)
