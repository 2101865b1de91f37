"""Talk with a trained model about a picture."""

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb


def main(argv: list[str]) -> int:
    return hydra_verb("chat", chat, argv)


def chat(cfg: DictConfig) -> None:
    """Answer one question, or ask for questions at the terminal until an empty line.

    mmlab chat run=llava-finetune_tiny image=photo.jpg question="what color is the circle?"
    """
    from mmlab.evaluate.answers import Answerer
    from mmlab.runs.run import find_run
    from mmlab.stage.assembly import restore, run_prompt
    from mmlab.training.trainer import place

    # Read first: a wrong path should not cost the loading of a model.
    picture_bytes = None if cfg.image is None else read_picture_file(cfg.image)
    model, trained = restore(find_run(cfg.run, cfg.root))
    answerer = Answerer(
        place(model, cfg.trainer),
        run_prompt(trained, cfg.template),
        trained.data.aspect,
        cfg.max_new_tokens,
        cfg.temperature,
    )
    picture = None if picture_bytes is None else decode(picture_bytes, answerer.spec, str(cfg.image))
    if cfg.question is not None:
        print(answerer([answerer.ask(cfg.question, picture)], [picture])[0])
        return
    talk(answerer, picture)


def talk(answerer, picture) -> None:
    """Ask at the terminal; what was said stays part of the dialogue."""
    from mmlab.data.turns import Turn

    dialogue: list[Turn] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        dialogue += [Turn("human", question)] if dialogue else answerer.ask(question, picture)
        answer = answerer([dialogue], [picture])[0]
        dialogue.append(Turn("gpt", answer))
        print(answer)


def read_picture_file(path: str) -> bytes:
    """Raises ConfigError when the picture cannot be read."""
    from pathlib import Path

    from mmlab.config.errors import ConfigError, nearest

    file = Path(path)
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.is_file())
        raise ConfigError(f"{path} is a folder, not a picture; it holds {', '.join(inside[:3]) or 'no files'}.")
    if not file.is_file():
        beside = [str(p) for p in file.parent.glob("*") if p.is_file()]
        raise ConfigError(f"There is no picture {path}.{nearest(path, beside)}")
    return file.read_bytes()


def decode(data: bytes, spec, path: str):
    """Raises ConfigError when the file is no picture that can be shown to the model."""
    from mmlab.config.errors import ConfigError
    from mmlab.data.images import decode_image
    from mmlab.data.sample import SampleError

    try:
        return decode_image(data, spec)
    except SampleError as error:
        raise ConfigError(f"{path} cannot be read as a picture: {error}") from error
