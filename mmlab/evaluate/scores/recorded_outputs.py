"""Files of recorded outputs of models, and of right answers in the formats of their data sets."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.bad_samples import BadSamples
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.files import read_text
from mmlab.data.sources.scienceqa import PROBLEMS, SPLITS, load_problems, load_split
from mmlab.evaluate.scores.scienceqa_score import reference_of
from mmlab.evaluate.scores.score_table import Reference, texts_of

IDS = ("question_id", "questionId", "image_id", "key", "id")
TEXTS = ("prediction", "description", "text", "caption", "output", "answer")
"""Our names come first, because our lines also have the right answer."""

T = TypeVar("T")


@dataclass(frozen=True)
class Recorded:
    """Recorded outputs of a model.

    Attributes:
        texts: question id → reply.
        indices: question id → the index that was read from the reply, if the file has them.
    """

    texts: dict[str, str]
    indices: dict[str, int] = field(default_factory=dict)

    def aligned(self, references: Sequence[Reference]) -> list[str | None]:
        """The reply for each reference, None if it is missing.

        Raises:
            DataError: all are missing.
        """
        replies = [self.texts.get(reference.key) for reference in references]
        if all(text is None for text in replies):
            example, key = next(iter(self.texts)), references[0].key
            raise DataError(f"no prediction has the id of a question; examples of ids are '{example}' and '{key}'.")
        return replies


def read_predictions(path: str | Path, bad: BadSamples | None = None) -> Recorded:
    """Read recorded outputs in one of the usual formats.

    LLaVA's result file `{"outputs": {id: text}, "results": {id: index}}`; a JSON object `{id: text}`; or objects with
    an id and a text, as a JSON list or as lines: `question_id`, `questionId`, `image_id`, `key` or `id`, and
    `prediction`, `description`, `text`, `caption`, `output` or `answer`. Or a folder of MME's result files,
    `<task>.txt` with lines of image, question, right answer and reply, separated by tabs.

    Args:
        path: the file or folder.
        bad: where predictions without a text or an id are counted; their questions have no prediction.

    Raises:
        DataError: no such file, another format, a duplicate id, or more bad predictions than the budget allows.
    """
    bad = BadSamples(path, 0, unit="prediction") if bad is None else bad
    if Path(path).is_dir():
        return Recorded({key: reply for (key, *_), reply in _mme_lines(Path(path), 4, bad)})
    loaded = load(Path(path))
    if isinstance(loaded, list):
        pairs = _each(enumerate(loaded), _pair, bad)
        texts = dict(pairs)
        if not texts and bad:
            bad.refuse_all("predictions")
        if len(texts) < len(pairs):
            ids = [name for name, _ in pairs]
            raise DataError(f"{path}: there are two predictions for {next(n for n in ids if ids.count(n) > 1)}.")
        indices: Any = {}
    else:
        texts = loaded.get("outputs", loaded)
        indices = loaded.get("results", {}) if "outputs" in loaded else {}
    if not isinstance(texts, dict) or not texts or not isinstance(indices, dict):
        raise DataError(f"{path} has no predictions, such as {{id: text}}.")
    for name, index in indices.items():
        if not isinstance(index, int):
            raise DataError(f"{path}: the index recorded for {name} must be an integer, not {index!r}.")
    if not isinstance(loaded, list):
        texts = dict(_each(texts.items(), _text_of, bad))
    if not texts:
        bad.refuse_all("predictions")
    return Recorded(texts, indices)


def read_references(
    metric: str, path: str | Path, splits: str | Path | None, split: str, bad: BadSamples | None = None
) -> list[Reference]:
    """Read right answers in the format of the metric's data set, or as `{key, answers, types, …}` per line.

    Args:
        metric: a scorer's name.
        path: `problems.json` of ScienceQA, or the folder with it; VQAv2's annotations; GQA's questions; POPE's lines
            of `{question_id, label}`; COCO's captions; a folder of MME's `<task>.txt`.
        splits: ScienceQA's `pid_splits.json`; None: the one beside the problems.
        split: of ScienceQA.
        bad: where malformed entries and questions without a right answer are counted; they are left out.

    Raises:
        ConfigError: splits for a metric that has none.
        DataError: a file that is missing or has another format, a duplicate id, or more bad entries than the budget
            allows.
    """
    path = Path(path)
    bad = BadSamples(path, 0, unit="question") if bad is None else bad
    if metric == "scienceqa":
        references = _scienceqa(path, splits, split)
    elif splits is not None:
        raise ConfigError(f"metric={metric} has no splits.")
    else:
        mme = metric == "mme" and path.is_dir()
        references = _mme(path, bad) if mme else _references(path, metric, bad)
    for reference in references:
        if not reference.answers:
            bad.add(reference.key, SampleError("no-answer", "There is no right answer."))
    references = [reference for reference in references if reference.answers]
    if not references and bad:
        bad.refuse_all("right answers")
    if not references:
        raise DataError(f"{path} has no right answers{f' of split {split}' if metric == 'scienceqa' else ''}.")
    keys: set[str] = set()
    for reference in references:
        if reference.key in keys:
            raise DataError(f"{path}: there are two right answers for {reference.key}.")
        keys.add(reference.key)
    return references


def load(path: Path) -> Any:
    """A JSON file, or the list of a file of JSON lines.

    Raises:
        DataError: there is no such file, it is neither, or has another encoding.
    """
    text = read_text(path)
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as first:
        try:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            raise DataError(f"{path} is neither JSON nor JSON lines: {first}.") from None
    if not isinstance(loaded, dict | list):
        raise DataError(f"{path} must hold an object or a list, not a {type(loaded).__name__}.")
    return [loaded] if isinstance(loaded, dict) and _is_line(loaded) else loaded


def _is_line(entry: dict[str, Any]) -> bool:
    """Whether an object is the only line of a file of lines."""
    text = any(isinstance(entry.get(name), str) for name in (*TEXTS, "label")) or isinstance(entry.get("answers"), list)
    return text and any(name in entry for name in IDS)


def _each(entries: Iterable[tuple[Any, Any]], make: Callable[[Any, Any], T], bad: BadSamples) -> list[T]:
    """What `make` makes of each (name, entry); entries that do not have its format are counted."""
    rows = list(entries)
    bad.total += len(rows)
    made: list[T] = []
    for name, entry in rows:
        with bad.left_out(f"entry {name}" if isinstance(name, int) else str(name)):
            try:
                made.append(make(name, entry))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise SampleError("format", f"It does not have the format of its data set: {error!r}.") from error
    return made


def _pair(number: int, entry: Any) -> tuple[str, str]:
    if isinstance(entry, dict):
        name, text = (next((key for key in keys if key in entry), None) for keys in (IDS, TEXTS))
        if name is not None and text is not None:
            return _text_of(str(entry[name]), entry[text])
    raise SampleError("format", f"Expected an object with an id ({', '.join(IDS)}) and a text ({', '.join(TEXTS)}).")


def _text_of(name: str, text: Any) -> tuple[str, str]:
    if not isinstance(text, str):
        raise SampleError("format", f"The prediction must be a text, not {type(text).__name__}.")
    return name, text


def _scienceqa(path: Path, splits: str | Path | None, split: str) -> list[Reference]:
    problems = path / PROBLEMS if path.is_dir() else path
    beside = problems.parent / SPLITS
    chosen = splits or (beside if beside.is_file() else None)
    return [reference_of(problem) for problem in load_split(chosen, split, load_problems(problems))]


Layout = tuple[Callable[[Any], Iterable[tuple[Any, Any]]], Callable[[Any, Any], Reference | None]]
"""From a file's contents to (name, entry) of each question, and from these to a reference, or None for none."""


def _references(path: Path, metric: str, bad: BadSamples) -> list[Reference]:
    layouts: dict[str, Layout] = {
        "vqa": (lambda loaded: enumerate(loaded["annotations"]), _vqa),
        "gqa": (lambda loaded: loaded.items(), _gqa),
        "pope": (enumerate, partial(_pope, path.stem.removeprefix("coco_pope_"))),
    }
    loaded = load(path)
    if isinstance(loaded, list) and any(isinstance(one, dict) and {"answers", "key"} <= one.keys() for one in loaded):
        layouts[metric] = enumerate, _own
    try:
        if metric == "captions" and metric not in layouts:
            return _captions(loaded["annotations"] if isinstance(loaded, dict) else loaded, bad)
        if metric in layouts:
            entries, make = layouts[metric]
            return [one for one in _each(entries(loaded), make, bad) if one is not None]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} does not have the format of its data set: {error!r}.") from error
    raise DataError(f"{path} has no lines of {{key, answers, types, picture, choices}}.")


def _own(_: int, entry: dict[str, Any]) -> Reference:
    answers, types = texts_of(entry, "answers"), texts_of(entry, "types")
    picture = str(entry.get("picture", entry["key"]))
    return Reference(str(entry["key"]), answers, types, picture, int(entry.get("choices", 0)))


def _vqa(_: int, one: dict[str, Any]) -> Reference:
    answers = tuple(str(answer["answer"]) for answer in one["answers"])
    types = tuple(str(one[field]) for field in ("answer_type", "question_type") if one.get(field))
    return Reference(str(one["question_id"]), answers, types, str(one.get("image_id", "")))


def _gqa(key: str, one: dict[str, Any]) -> Reference | None:
    if not one.get("isBalanced", True):
        return None  # the official accuracy is that of the balanced questions
    kinds = one.get("types") or {}
    form = kinds.get("structural")
    types = [str(kinds[field]) for field in ("structural", "semantic") if kinds.get(field)]
    types += [] if form is None else ["open" if form == "query" else "binary"]
    return Reference(str(key), (str(one["answer"]),), tuple(types), str(one.get("imageId", "")))


def _pope(category: str, _: int, one: dict[str, Any]) -> Reference:
    types = (str(one.get("category", category)),)
    return Reference(str(one["question_id"]), (str(one["label"]),), types, str(one.get("image", "")))


def _mme(folder: Path, bad: BadSamples) -> list[Reference]:
    lines = _mme_lines(folder, 3, bad)
    return [Reference(key, (answer,), (task,), picture) for (key, task, picture, answer), _ in lines]


def _mme_lines(folder: Path, least: int, bad: BadSamples) -> list[tuple[tuple[str, str, str, str], str]]:
    """Key, task, image and right answer of each line, and its reply if it has one."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(f"{folder} has no <task>.txt files, as a folder of MME does; name a file, not a folder.")

    def cells_of(where: str, line: str) -> tuple[tuple[str, str, str, str], str]:
        cells = line.split("\t")
        if len(cells) < least:
            raise SampleError("format", f"Expected {least} cells separated by tabs, not {len(cells)}.")
        task, (picture, question, answer) = where.rpartition(".txt, line ")[0], cells[:3]
        return (f"{task}/{picture}/{question}", task, picture, answer), "".join(cells[3:4])

    texts = [(file.stem, read_text(file).rstrip("\n").split("\n")) for file in files]
    lines = ((f"{task}.txt, line {n}", line) for task, lines in texts for n, line in enumerate(lines, 1))
    read = _each(lines, cells_of, bad)
    return read or bad.refuse_all("lines")


def _captions(entries: list[Any], bad: BadSamples) -> list[Reference]:
    pairs = _each(enumerate(entries), lambda _, one: (str(one["image_id"]), str(one["caption"])), bad)
    pictures: dict[str, list[str]] = {}
    for key, text in pairs:
        pictures.setdefault(key, []).append(text)
    return [Reference(key, tuple(texts), (), key) for key, texts in pictures.items()]
