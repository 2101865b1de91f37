"""Files of recorded outputs of models, and of right answers in the formats of their data sets."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.sources.files import read_text
from mmlab.data.sources.scienceqa import PROBLEMS, SPLITS, load_problems, load_split
from mmlab.evaluate.scores.scienceqa_score import reference_of
from mmlab.evaluate.scores.score_table import Reference, texts_of

IDS = ("question_id", "questionId", "image_id", "key", "id")
TEXTS = ("prediction", "description", "text", "caption", "output", "answer")
"""Our names come first, because our lines also have the right answer."""


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


def read_predictions(path: str | Path) -> Recorded:
    """Read recorded outputs in one of the usual formats.

    LLaVA's result file `{"outputs": {id: text}, "results": {id: index}}`; a JSON object `{id: text}`; or objects with
    an id and a text, as a JSON list or as lines: `question_id`, `questionId`, `image_id`, `key` or `id`, and
    `prediction`, `description`, `text`, `caption`, `output` or `answer`. Or a folder of MME's result files,
    `<task>.txt` with lines of image, question, right answer and reply, separated by tabs.

    Raises:
        DataError: no such file, another format, or a duplicate id.
    """
    if Path(path).is_dir():
        return Recorded({key: reply for (key, *_), reply in _mme_lines(Path(path), 4)})
    loaded = load(Path(path))
    if isinstance(loaded, list):
        pairs = [_pair(entry, f"{path}, entry {number}") for number, entry in enumerate(loaded)]
        texts = dict(pairs)
        if len(texts) < len(pairs):
            ids = [name for name, _ in pairs]
            raise DataError(f"{path}: there are two predictions for {next(n for n in ids if ids.count(n) > 1)}.")
        indices: Any = {}
    else:
        texts = loaded.get("outputs", loaded)
        indices = loaded.get("results", {}) if "outputs" in loaded else {}
    if not isinstance(texts, dict) or not texts or not isinstance(indices, dict):
        raise DataError(f"{path} has no predictions, such as {{id: text}}.")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{path}: the prediction for {name} must be a text, not {type(text).__name__}.")
    for name, index in indices.items():
        if not isinstance(index, int):
            raise DataError(f"{path}: the index recorded for {name} must be an integer, not {index!r}.")
    return Recorded(texts, indices)


def read_references(metric: str, path: str | Path, splits: str | Path | None, split: str) -> list[Reference]:
    """Read right answers in the format of the metric's data set, or as `{key, answers, types, …}` per line.

    Args:
        metric: a scorer's name.
        path: `problems.json` of ScienceQA, or the folder with it; VQAv2's annotations; GQA's questions; POPE's lines
            of `{question_id, label}`; COCO's captions; a folder of MME's `<task>.txt`.
        splits: ScienceQA's `pid_splits.json`; None: the one beside the problems.
        split: of ScienceQA.

    Raises:
        ConfigError: splits for a metric that has none.
        DataError: a file that is missing or has another format, a question without a right answer, or a duplicate id.
    """
    path = Path(path)
    layouts = {"vqa": _vqa, "gqa": _gqa, "pope": _pope, "captions": _captions}
    if metric == "scienceqa":
        references = _scienceqa(path, splits, split)
    elif splits is not None:
        raise ConfigError(f"metric={metric} has no splits.")
    else:
        mme = metric == "mme" and path.is_dir()
        references = _mme(path) if mme else _references(path, layouts.get(metric))
    if not references:
        raise DataError(f"{path} has no right answers{f' of split {split}' if metric == 'scienceqa' else ''}.")
    keys: set[str] = set()
    for reference in references:
        if not reference.answers:
            raise DataError(f"{path}: there is no right answer for {reference.key}.")
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


def _pair(entry: Any, where: str) -> tuple[str, Any]:
    if isinstance(entry, dict):
        name, text = (next((key for key in keys if key in entry), None) for keys in (IDS, TEXTS))
        if name is not None and text is not None:
            return str(entry[name]), entry[text]
    raise DataError(f"{where}: expected an object with an id ({', '.join(IDS)}) and a text ({', '.join(TEXTS)}).")


def _scienceqa(path: Path, splits: str | Path | None, split: str) -> list[Reference]:
    problems = path / PROBLEMS if path.is_dir() else path
    beside = problems.parent / SPLITS
    chosen = splits or (beside if beside.is_file() else None)
    return [reference_of(problem) for problem in load_split(chosen, split, load_problems(problems))]


Layout = Callable[[Any, str], Iterable[Reference]]


def _references(path: Path, layout: Layout | None) -> list[Reference]:
    loaded = load(path)
    try:
        if isinstance(loaded, list) and all("answers" in entry and "key" in entry for entry in loaded):
            return [_own(entry) for entry in loaded]
        if layout is not None:
            return list(layout(loaded, path.stem))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} does not have the format of its data set: {error!r}.") from error
    raise DataError(f"{path} has no lines of {{key, answers, types, picture, choices}}.")


def _own(entry: dict[str, Any]) -> Reference:
    answers, types = texts_of(entry, "answers"), texts_of(entry, "types")
    picture = str(entry.get("picture", entry["key"]))
    return Reference(str(entry["key"]), answers, types, picture, int(entry.get("choices", 0)))


def _vqa(loaded: Any, name: str) -> Iterable[Reference]:
    for one in loaded["annotations"]:
        answers = tuple(str(answer["answer"]) for answer in one["answers"])
        types = tuple(str(one[field]) for field in ("answer_type", "question_type") if one.get(field))
        yield Reference(str(one["question_id"]), answers, types, str(one.get("image_id", "")))


def _gqa(loaded: Any, name: str) -> Iterable[Reference]:
    for key, one in loaded.items():
        if not one.get("isBalanced", True):
            continue  # the official accuracy is that of the balanced questions
        kinds = one.get("types") or {}
        form = kinds.get("structural")
        types = [str(kinds[field]) for field in ("structural", "semantic") if kinds.get(field)]
        types += [] if form is None else ["open" if form == "query" else "binary"]
        yield Reference(str(key), (str(one["answer"]),), tuple(types), str(one.get("imageId", "")))


def _pope(loaded: Any, name: str) -> Iterable[Reference]:
    category = name.removeprefix("coco_pope_")
    for one in loaded:
        types = (str(one.get("category", category)),)
        yield Reference(str(one["question_id"]), (str(one["label"]),), types, str(one.get("image", "")))


def _mme(folder: Path) -> list[Reference]:
    return [Reference(key, (answer,), (task,), picture) for (key, task, picture, answer), _ in _mme_lines(folder, 3)]


def _mme_lines(folder: Path, least: int) -> Iterable[tuple[tuple[str, str, str, str], str]]:
    """Key, task, image and right answer of each line, and its reply if it has one."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(f"{folder} has no <task>.txt files, as a folder of MME does; name a file, not a folder.")
    for file in files:
        for number, line in enumerate(read_text(file).rstrip("\n").split("\n"), 1):
            cells = line.split("\t")
            if len(cells) < least:
                raise DataError(f"{file}, line {number}: expected {least} cells separated by tabs, not {len(cells)}.")
            picture, question, answer = cells[:3]
            yield (f"{file.stem}/{picture}/{question}", file.stem, picture, answer), "".join(cells[3:4])


def _captions(loaded: Any, name: str) -> Iterable[Reference]:
    pictures: dict[str, list[str]] = {}
    for one in loaded["annotations"] if isinstance(loaded, dict) else loaded:
        pictures.setdefault(str(one["image_id"]), []).append(str(one["caption"]))
    return [Reference(key, tuple(texts), (), key) for key, texts in pictures.items()]
