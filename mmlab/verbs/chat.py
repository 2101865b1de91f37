"""Chat with a trained model about an image."""

from pathlib import Path

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb
from mmlab.config.errors import ConfigError, nearest


def main(argv: list[str]) -> int:
    return hydra_verb("chat", chat, argv)


def chat(cfg: DictConfig) -> None:
    """Answer one question, or read questions from the terminal until an empty line; image=… is optional.

    mmlab chat run=llava-finetune_tiny image=photo.jpg question="what color is the circle?"
    """
    from mmlab.data.sample_types import SampleError
    from mmlab.evaluate.answers import Answerer
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import kind_of, restore, run_prompt
    from mmlab.training.trainer import place

    # Before the model, which takes long to load.
    data = None if cfg.image is None else read_image_file(cfg.image)
    folder = find_run(cfg.run, cfg.root)
    kind = kind_of(load_run_config(folder))
    if kind not in ("answers", "describes", "writes"):
        raise ConfigError(f"{cfg.run} does not write text; chat with a run of a language or vision-language model.")
    if kind == "writes" and data is not None:
        raise ConfigError(f"{cfg.run} is a language model and sees no images; leave out image.")
    model, trained = restore(folder)
    prompt, limits = run_prompt(trained, cfg.template), (cfg.max_new_tokens, cfg.temperature)
    answerer = Answerer(place(model, cfg.trainer), prompt, trained.data, *limits)
    try:
        pictures = answerer.decode([] if data is None else [data])
    except SampleError as error:
        raise ConfigError(f"{cfg.image} cannot be read as an image: {error}") from error
    if cfg.question is not None:
        try:
            print(reply(answerer, answerer.ask(cfg.question, len(pictures)), pictures))
        except SampleError as error:
            raise ConfigError(f"The question cannot be asked: {error}") from error
        return
    talk(answerer, pictures)


def reply(answerer, dialogue, pictures) -> str:
    """Return the answer to a dialogue; raises SampleError if its texts cannot become a prompt."""
    from mmlab.data.bad_samples import sample_errors

    with sample_errors():
        prompt = answerer.tokens(dialogue, pictures)
    return answerer.complete([prompt], [pictures])[0][0]


def talk(answerer, pictures) -> None:
    """Read questions from the terminal; earlier turns stay part of the dialogue."""
    from mmlab.data.sample_types import SampleError
    from mmlab.data.turns import Turn

    dialogue: list[Turn] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        asked = [*dialogue, Turn("human", question)] if dialogue else answerer.ask(question, len(pictures))
        try:
            answer = reply(answerer, asked, pictures)
        except SampleError as error:
            print(f"The question cannot be asked: {error}")
            continue
        dialogue = [*asked, Turn("gpt", answer)]
        print(answer)


def read_image_file(path: str) -> bytes:
    """Return a file's bytes; ConfigError with the closest name if there is no such file."""
    file = Path(path)
    if file.is_dir():
        names = sorted(p.name for p in file.iterdir() if p.is_file())
        raise ConfigError(f"{path} is a folder, not an image; it contains {', '.join(names[:3]) or 'no files'}.")
    if not file.is_file():
        siblings = [str(p) for p in file.parent.glob("*") if p.is_file()]
        raise ConfigError(f"There is no image {path}.{nearest(path, siblings)}")
    return file.read_bytes()
