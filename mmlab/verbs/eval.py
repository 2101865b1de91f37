"""Ask a trained model questions with known answers: scores, predictions, a picture of both."""

from pathlib import Path

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb


def main(argv: list[str]) -> int:
    return hydra_verb("eval", evaluate, argv)


def evaluate(cfg: DictConfig) -> None:
    """Score exact match per question type; write scores.json, predictions.jsonl and grid.png.

    mmlab eval run=llava-finetune_tiny data.path=data/shapes/test data.blind_from=data/shapes/train
    """
    import json

    from tqdm import tqdm

    from mmlab.config.run import find_run
    from mmlab.data.index import ShardIndex
    from mmlab.evaluate.answers import Answerer, answer_questions
    from mmlab.evaluate.exact_match import matches, score
    from mmlab.evaluate.grid import draw_grid
    from mmlab.evaluate.questions import BlindAnswers, read_questions
    from mmlab.stage.restore import restore, run_prompt
    from mmlab.training.trainer import place

    folder = find_run(cfg.run, cfg.root)
    index = ShardIndex.open(cfg.data.path)
    questions = read_questions(index, cfg.types, cfg.limit)
    model, trained = restore(folder)
    answerer = Answerer(
        place(model, cfg.trainer), run_prompt(trained, cfg.template), trained.data.aspect, cfg.max_new_tokens
    )
    predictions = [""] * len(questions)
    done = tqdm(total=len(questions), unit="question", disable=None, dynamic_ncols=True)
    for n, answer in answer_questions(answerer, index, questions, cfg.batch_size):
        predictions[n] = answer
        done.update()
    done.close()

    scores = score(questions, predictions)
    if cfg.data.blind_from is not None:
        blind = BlindAnswers(read_questions(ShardIndex.open(cfg.data.blind_from)))
        scores["blind"] = score(questions, [blind(question) for question in questions])
    out = Path(cfg.out or folder / "eval" / Path(cfg.data.path).name)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    with (out / "predictions.jsonl").open("w") as lines:
        for question, prediction in zip(questions, predictions, strict=True):
            row = {
                "key": question.key,
                "type": question.type,
                "question": question.text,
                "answer": question.answer,
            }
            right = matches(prediction, question.answer)
            lines.write(json.dumps({**row, "prediction": prediction, "right": right}) + "\n")
    draw_grid(index, questions, predictions, scores).save(out / "grid.png")
    report(scores, out)


def report(scores: dict, out: Path) -> None:
    """Print the scores as a table, blind answers beside them."""
    blind = scores.get("blind")
    print(
        f"{'':<14}{'questions':>10}{'accuracy':>10}{'blind':>10}"
        if blind
        else f"{'':<14}{'questions':>10}{'accuracy':>10}"
    )
    rows = [("all", scores, blind)] + [(t, s, blind and blind["types"][t]) for t, s in scores["types"].items()]
    for name, row, without in rows:
        tail = f"{without['accuracy']:>10.1%}" if without else ""
        print(f"{name:<14}{row['questions']:>10,}{row['accuracy']:>10.1%}{tail}")
    print(f"pictures with answers: {out / 'grid.png'}")
