"""Outputs that were recorded elsewhere, and the right answers in their data sets' own files."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.sources.files import existing
from mmlab.data.sources.scienceqa import PROBLEMS, SPLITS, load_problems, load_split
from mmlab.evaluate.scores.scienceqa_score import reference_of
from mmlab.evaluate.scores.score import Reference, texts_of

IDS = ("question_id", "questionId", "image_id", "key", "id")
TEXTS = ("prediction", "description", "text", "caption", "output", "answer")
"""Ours come first: a line of ours holds the right answer, too."""


@dataclass(frozen=True)
class Recorded:
    """What a model said.

    Attributes:
        texts: question id → reply.
        indices: question id → the index that was read from it, where the file has them.
    """

    texts: dict[str, str]
    indices: dict[str, int] = field(default_factory=dict)

    def aligned(self, references: Sequence[Reference]) -> list[str | None]:
        """The reply for each reference, None where there is none.

        Raises:
            DataError: there is none at all.
        """
        found = [self.texts.get(reference.key) for reference in references]
        if all(text is None for text in found):
            said, asked = next(iter(self.texts)), references[0].key
            raise DataError(f"no prediction has the id of a question: they are called such as '{said}' and '{asked}'.")
        return found


def read_predictions(path: str | Path) -> Recorded:
    """Read recorded outputs in any of the usual layouts.

    LLaVA's result file `{"outputs": {id: text}, "results": {id: index}}`; a JSON object `{id: text}`; or objects with
    an id and a text, as a JSON list or as lines: `question_id`, `questionId`, `image_id`, `key` or `id`, and
    `prediction`, `description`, `text`, `caption`, `output` or `answer`. Or a folder of MME's result files,
    `<task>.txt` with lines of picture, question, right answer and reply, parted by tabs.

    Raises:
        DataError: no such file, none of these layouts, or an id that comes twice.
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
        raise DataError(f"{path} holds no predictions, such as {{id: text}}.")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{path}: the prediction for {name} is no text but {type(text).__name__}.")
    for name, index in indices.items():
        if not isinstance(index, int):
            raise DataError(f"{path}: the index recorded for {name} is no whole number: {index!r}.")
    return Recorded(texts, indices)


def read_references(metric: str, path: str | Path, splits: str | Path | None, split: str) -> list[Reference]:
    """Read the right answers in the layout of the metric's data set, or as `{key, answers, types, …}` per line.

    Args:
        metric: a scorer's name.
        path: `problems.json` of ScienceQA, or the folder with it; VQAv2's annotations; GQA's questions; POPE's lines
            of `{question_id, label}`; COCO's captions; a folder of MME's `<task>.txt`.
        splits: ScienceQA's `pid_splits.json`; None takes the one beside the problems.
        split: of ScienceQA.

    Raises:
        ConfigError: splits for a metric that has none.
        DataError: a file that is missing or has another layout, a question without a right answer, or an id that comes
            twice.
    """
    path = Path(path)
    layouts = {"vqa": _vqa, "gqa": _gqa, "pope": _pope, "captions": _captions}
    if metric == "scienceqa":
        found = _scienceqa(path, splits, split)
    elif splits is not None:
        raise ConfigError(f"metric={metric} has no splits.")
    else:
        found = _mme(path) if metric == "mme" and path.is_dir() else _references(path, layouts.get(metric))
    if not found:
        raise DataError(f"{path} holds no right answers{f' of split {split}' if metric == 'scienceqa' else ''}.")
    keys: set[str] = set()
    for reference in found:
        if not reference.answers:
            raise DataError(f"{path}: there is no right answer for {reference.key}.")
        if reference.key in keys:
            raise DataError(f"{path}: there are two right answers for {reference.key}.")
        keys.add(reference.key)
    return found


def load(path: Path) -> Any:
    """A JSON file, or the list of a file of JSON lines.

    Raises:
        DataError: there is no such file, or it is neither.
    """
    text = _text(existing(path))
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as first:
        try:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            raise DataError(f"{path} is neither JSON nor JSON lines: {first}.") from None
    if not isinstance(loaded, dict | list):
        raise DataError(f"{path} holds a {type(loaded).__name__}, neither an object nor a list.")
    return [loaded] if isinstance(loaded, dict) and _is_line(loaded) else loaded


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None


def _is_line(entry: dict[str, Any]) -> bool:
    """Whether an object is the only line of a file of lines."""
    says = any(isinstance(entry.get(name), str) for name in (*TEXTS, "label")) or isinstance(entry.get("answers"), list)
    return says and any(name in entry for name in IDS)


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
        raise DataError(f"{path} has another layout than its data set's: {error!r}.") from error
    raise DataError(f"{path} does not hold lines of {{key, answers, types, picture, choices}}.")


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
    """Key, task, picture and right answer of each line, and its reply if it has one."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(f"{folder} is a folder without <task>.txt files, which only MME's are; give the file in it.")
    for file in files:
        for number, line in enumerate(_text(file).rstrip("\n").split("\n"), 1):
            cells = line.split("\t")
            if len(cells) < least:
                raise DataError(f"{file}, line {number}: expected {least} cells parted by tabs, not {len(cells)}.")
            picture, question, answer = cells[:3]
            yield (f"{file.stem}/{picture}/{question}", file.stem, picture, answer), "".join(cells[3:4])


def _captions(loaded: Any, name: str) -> Iterable[Reference]:
    pictures: dict[str, list[str]] = {}
    for one in loaded["annotations"] if isinstance(loaded, dict) else loaded:
        pictures.setdefault(str(one["image_id"]), []).append(str(one["caption"]))
    return [Reference(key, tuple(texts), (), key) for key, texts in pictures.items()]
