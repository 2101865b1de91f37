"""ScienceQA as LLaVA learns it: one question, with reasoning and answer as its reply."""

from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.data.formats import KeyMaker, Members
from mmlab.data.shards import Samples
from mmlab.data.sources.folder import PictureFolder
from mmlab.data.sources.json_file import load_json
from mmlab.data.sources.scienceqa_problems import LETTERS, PROBLEMS, SPLITS, Problem, load_problems, load_split
from mmlab.data.turns import IMAGE

FORMS = ("QCM-LEA", "QCM-ALE")
"""Question, context, multiple choice; then lecture, explanation, answer, or the answer first."""


def scienceqa(
    root: str | Path,
    split: str = "train",
    form: str = "QCM-LEA",
    captions: str | Path | None = None,
    missing_budget: float = 1.0,
) -> Samples:
    """Read the official layout: `problems.json`, `pid_splits.json`, and `images/<split>/<id>/<file>` where there are.

    A problem whose picture is not there, or is neither JPEG nor PNG nor WebP, becomes a text alone, and is counted.

    Args:
        root: the folder of these.
        split: one of `pid_splits.json`, or of the problems themselves where there is no such file.
        form: `QCM-LEA` reasons first, `QCM-ALE` answers first.
        captions: a JSON file of captions, which then stand in the context: `{"captions": {id: text}}`.
        missing_budget: share of the split's pictures that may be missing or of another format.

    Returns:
        Counts: `samples`, `with_picture`, `text_only` (problems without a picture), `missing`, `unsupported`, and
        `captioned` with captions.

    Raises:
        ConfigError: an unknown form.
        DataError: a missing file or split, a malformed problem (named by its id), or more pictures missing than the
            budget allows.
    """
    if form not in FORMS:
        raise ConfigError(f"unknown form '{form}' of ScienceQA; known: {', '.join(FORMS)}.{nearest(form, FORMS)}")
    root = Path(root)
    splits = root / SPLITS
    problems = load_split(splits if splits.exists() else None, split, load_problems(root / PROBLEMS))
    said = {} if captions is None else _captions(Path(captions))
    pictured = sum(problem.image is not None for problem in problems)
    folder = _folder(root / "images", missing_budget, pictured)
    keys = KeyMaker()
    counts = {"samples": 0, "with_picture": 0, "text_only": len(problems) - pictured}
    for problem in problems:
        where = f"{root / PROBLEMS}, problem {problem.id}"
        name = f"{problem.split or split}/{problem.id}/{problem.image}"
        picture = folder.read(name, where) if folder and problem.image else None
        counts["samples"] += 1
        counts["with_picture"] += picture is not None
        members: Members = {} if picture is None else {picture[0]: picture[1]}
        yield keys(problem.id), members | {"json": record(problem, form, said.get(problem.id, ""), picture is not None)}
    counts["missing"] = folder.missing if folder else pictured
    counts["unsupported"] = folder.unsupported if folder else 0
    if captions is not None:
        counts["captioned"] = sum(problem.id in said for problem in problems)
    return counts


def record(problem: Problem, form: str, caption: str = "", picture: bool = True) -> dict[str, Any]:
    """A problem as a sample's record, with what a scorer compares a reply with."""
    question = prompt(problem, caption) + (f"\n{IMAGE}" if picture else "")
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply(problem, form)}]
    reference = {"answers": [problem.letter], "choices": len(problem.choices), "types": list(problem.columns)}
    return {"id": problem.id, "conversations": turns, "reference": reference}


def prompt(problem: Problem, caption: str = "") -> str:
    """Question, context and options as LLaVA's converter writes them.

    It writes a field's name before the question and then takes that name away wherever it stands, and has quirks with
    spaces (see `_tidied`): so has this, since the published models were trained on such text.
    """
    context = f"{problem.hint} {caption}".strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
    text = f"Question: {problem.question}\nContext: {context}\nOptions: {options}"
    return _tidied(text).replace("Question: ", "")


def reply(problem: Problem, form: str) -> str:
    """The reasoning and the answer in the order of `form`, as LLaVA's converter writes them (see `prompt`)."""
    lecture, solution = (text.replace("\\n", "\n") for text in (problem.lecture, problem.solution))
    answer = f"The answer is {problem.letter}."
    reasons = f"{lecture} {solution}"
    text = f"Answer: {reasons} {answer}" if form == "QCM-LEA" else f"Answer: {answer} BECAUSE: {reasons}"
    return _tidied(text).replace("Answer: ", "")


def _tidied(text: str) -> str:
    """Every two spaces as one, once; and without a BECAUSE that nothing follows, then without any."""
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def _folder(path: Path, missing_budget: float, pictured: int) -> PictureFolder | None:
    """The pictures, or None where there are none at all and none have to be."""
    if path.is_dir():
        return PictureFolder(path, missing_budget, pictured)
    if pictured > int(missing_budget * pictured):
        raise DataError(f"there is no picture folder {path}, and {pictured} problems are about a picture.")
    return None


def _captions(path: Path) -> dict[str, str]:
    found = load_json(path)
    found = found.get("captions", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise DataError(f'{path} does not hold {{"captions": {{problem id: text}}}}.')
    return found
