"""Chat with a trained model about images."""

import re
from pathlib import Path

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb
from mmlab.config.errors import ConfigError, nearest


def main(argv: list[str]) -> int:
    return hydra_verb("chat", chat, [quoted(one) for one in argv])


def quoted(argument: str) -> str:
    """Put a question in Hydra's quotes, without which it could have no comma, apostrophe or <image>."""
    name, _, value = argument.partition("=")
    if name != "question" or value in ("", "null") or value[0] in "'\"":
        return argument
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"{name}='{escaped}'"


def chat(cfg: DictConfig) -> None:
    """Answer one question, or read questions from the terminal until an empty line; image=… is optional.

    mmlab chat run=llava-finetune_tiny image=photo.jpg question="what color is the circle?"

    Several images, image=[a.jpg,b.jpg], stand where the questions mark them with <image>, or all before the first one.
    """
    from mmlab.data.sample_types import SampleError
    from mmlab.evaluate.answers import Answerer
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import kind_of, restore, run_prompt
    from mmlab.training.trainer import place

    # Before the model, which takes long to load.
    files = [] if cfg.image is None else [cfg.image] if isinstance(cfg.image, str) else list(cfg.image)
    data = [read_image_file(str(file)) for file in files]
    folder = find_run(cfg.run, cfg.root)
    kind = kind_of(load_run_config(folder))
    if kind not in ("answers", "describes", "writes"):
        raise ConfigError(f"{cfg.run} does not write text; chat with a run of a language or vision-language model.")
    if kind == "writes" and data:
        raise ConfigError(f"{cfg.run} is a language model and sees no images; leave out image.")
    model, trained = restore(folder)
    prompt, limits = run_prompt(trained, cfg.template), (cfg.max_new_tokens, cfg.temperature)
    answerer = Answerer(place(model, cfg.trainer), prompt, trained.data, *limits)
    pictures = []
    for file, content in zip(files, data, strict=True):
        try:
            pictures += answerer.decode([content])
        except SampleError as error:
            raise ConfigError(f"{file} cannot be read as an image: {error}") from error
    if cfg.question is not None:
        try:
            check_marks(cfg.question, len(pictures), answerer)
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
        try:
            asked = ask_next(answerer, dialogue, question, len(pictures))
            answer = reply(answerer, asked, pictures)
        except SampleError as error:
            print(f"The question cannot be asked: {error}")
            continue
        dialogue = [*asked, Turn("gpt", answer)]
        print(answer)


def check_marks(question: str, pictures: int, answerer) -> None:
    """Raise SampleError for a question that marks other images than there are."""
    from mmlab.data.sample_types import SampleError
    from mmlab.data.turns import IMAGE

    marks = 0 if answerer.spec is None else question.count(IMAGE)
    if marks not in (0, pictures):
        raise SampleError(
            "pictures",
            f"it marks {marks} image(s) with {IMAGE}, but image= names {pictures or 'none'}; mark each, or none.",
        )


def ask_next(answerer, dialogue, question: str, pictures: int):
    """Add a question to a dialogue. Of several pictures, each question may mark the next ones.

    Raises:
        SampleError: the questions mark more pictures than there are, or the first one is empty.
    """
    from mmlab.data.sample_types import SampleError
    from mmlab.data.turns import IMAGE, Turn

    marks = 0 if answerer.spec is None else question.count(IMAGE)
    left = pictures - sum(turn.images for turn in dialogue)
    if marks > left:
        raise SampleError(
            "pictures", f"it marks {marks} image(s) with {IMAGE}, but {left or 'none'} of image= is left."
        )
    if not dialogue and (not marks or pictures == 1):
        return answerer.ask(question, pictures)
    return [*dialogue, Turn("human", question, images=marks)]


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
