"""For every source of `mmlab shards build`: each row is a sample that training can use, or is counted under a name."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmlab.data.config import Prompt
from mmlab.data.dialogues import conversations_of
from mmlab.data.formats import PICTURES, parse_record, pictures_among
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.data.sources.drawn_problems import write_problems
from mmlab.data.tally import Tally
from mmlab.verbs._shard_build import SOURCES
from mmlab.verbs.shards import main
from tests.tiny_files import bomb, jpeg, png, write_tar

Case = tuple[str, Callable[[], tuple[list[str], int, set[str]]]]
CASES: list[Case] = []
"""Source, and what writes its files into the working folder: arguments, rows, and reasons that must be named."""


def case(source: str):
    def register(write: Callable[[], tuple[list[str], int, set[str]]]):
        CASES.append((source, write))
        return write

    return register


def image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, kind)
    return file.getvalue()


def folder() -> None:
    """Images of all kinds, some of them broken, and files that are none."""
    files = {
        **{"a.jpg": jpeg(), "b.PNG": png(), "sub/c.webp": image("WEBP"), "sub/deep/d.bmp": image("BMP")},
        **{"e.tif": image("TIFF"), "f.GIF": image("GIF"), "g.avif": b"x", "h.heic": b"x", "cut.jpg": jpeg()[:300]},
        **{"bomb.jpg": bomb(), ".hidden.jpg": jpeg(), ".git/i.jpg": jpeg(), "notes.md": b"x", "Thumbs.db": b"x"},
        **{"no_suffix": jpeg(), "猫.jpg": jpeg(), "a.b.jpg": jpeg()},
    }
    for name, data in files.items():
        path = Path("pictures", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


FOLDER_REASONS = {"unsupported .avif", "unsupported .heic", "decode", "pixels", "hidden", "no image"}


@case("images")
def images_in_folders():
    folder()
    return ["pictures"], 17, FOLDER_REASONS


@case("captions")
def captions_beside_images():
    folder()
    for name in ("a", "b", "sub/c", "sub/deep/d", "e", "cut", "bomb", "猫", "a.b", "orphan"):
        Path("pictures", f"{name}.txt").write_text("\ufeffa caption" if name == "a" else "a caption", "utf-8")
    return ["pictures"], 18, {*FOLDER_REASONS, "no-caption", "text without image"}


ROWS = [
    *('"a red half\t1.jpg', "second\t2.jpg", 'the word "half"\t1.jpg', '"x" at the start\t1.jpg', "one field"),
    *("a\tb\tc", "", "\t1.jpg", "no image\t", "nul\0\t1.jpg", "bell\a\t1.jpg", f"{'long ' * 40_000}\t1.jpg"),
    *("missing\t3.jpg", "outside\t../1.jpg", "half\u2028line\t1.jpg", "page\tpage.jpg"),
]


def numbered() -> None:
    Path("pictures").mkdir()
    for name in ("1.jpg", "2.jpg"):
        Path("pictures", name).write_bytes(jpeg())
    Path("pictures/page.jpg").write_bytes(b"<html>")


@case("captions")
def captions_in_a_tsv():
    numbered()
    Path("t.TSV").write_text("\r\n".join(["caption\timage", *ROWS]), "utf-16")
    reasons = {"fields", "no-caption", "no-image", "nul", "missing", "outside", "unsupported"}
    return ["pictures", "--captions", "t.TSV", "--missing-budget", "1"], 15, reasons


@case("captions")
def captions_in_a_csv():
    numbered()
    rows = [
        "image,caption,label",
        '1.jpg,"two\nlines, and ""quotes""",3',
        "1.jpg,a, b,3",
        "2.jpg,late\x85line,x",
        "1.jpg",
    ]
    Path("t.csv").write_text("\n".join(rows), "utf-8-sig")
    return ["pictures", "--captions", "t.csv"], 4, {"fields"}


@case("captions")
def captions_in_json():
    numbered()
    notes = [
        {"image_id": "1", "caption": "a"},
        {"image_id": 2, "caption": "b"},
        {"image_id": 1, "caption": ["c"]},
        {"image_id": None, "caption": "d"},
        {"image_id": "1", "caption": "\ud83d"},
        "text",
    ]
    Path("filter_cap.json").write_text(json.dumps({"annotations": notes}) + "\n")
    return ["pictures", "--captions", "filter_cap.json"], 6, {"no-caption", "no-image", "unicode", "json"}


@case("images")
def images_in_json_lines():
    numbered()
    rows = ['{"image": "1.jpg", "class": 3}', '{"image": "1.jpg", "class": [3]}', "{", "[]", '{"image": "2.jpg"}']
    Path("t.jsonl").write_text("\n".join(rows))
    return ["pictures", "--labels", "t.jsonl"], 5, {"class", "json"}


@case("llava_json")
def dialogues():
    numbered()

    def turns(*texts: str):
        return [dict(zip(("from", "value"), text.split(" ", 1), strict=True)) for text in texts]

    usual = ("human <image>\nq", "gpt a")
    entries = [
        {"image": "1.jpg", "conversations": turns(*usual)},
        {"image": "1.jpg", "conversations": turns("system s", "gpt hi", *usual, "human bye")},
        {"image": ["1.jpg"], "conversations": turns("human no marker", "gpt a")},
        {"image": ["1.jpg", "2.jpg"], "conversations": turns(*usual)},
        {"image": {"path": "1.jpg"}, "conversations": turns(*usual)},
        {"image": "3.jpg", "conversations": turns(*usual)},
        {"image": "../1.jpg", "conversations": turns(*usual)},
        {"conversations": turns(*usual)},
        {"image": "1.jpg", "conversations": turns(*usual, *usual)},
        {"image": "1.jpg", "conversations": turns("user q", "assistant a")},
        {"image": "1.jpg", "conversations": turns("human q", "human q", "gpt a")},
        {"image": "1.jpg", "conversations": turns("human q", "gpt  ")},
        {"image": "1.jpg", "conversations": []},
        {"image": "1.jpg", "conversations": [{"from": "human"}, "text"]},
        {"image": "1.jpg", "conversations": turns("human q", "gpt \udc00")},
        {"id": {"a": 1}, "image": "1.jpg", "conversations": turns(*usual)},
        ["text"],
    ]
    Path("chat.json").write_text("\n".join(map(json.dumps, entries)) + "\nnot JSON\n")
    reasons = {"pictures", "no-image", "missing", "outside", "no-picture", "role", "order", "empty-answer", "turns"}
    return ["chat.json", "pictures", "--missing-budget", "1"], 18, {*reasons, "unicode", "json"}


@case("messages")
def messages():
    numbered()

    def chat(*parts, **fields):
        turns = [{"role": "user", "content": [*parts, {"type": "text", "text": "q"}]}]
        return {"messages": [*turns, {"role": "assistant", "content": "a"}], **fields}

    image = {"type": "image"}
    entries = [
        *(chat(image, images=["1.jpg"]), chat(), chat({**image, "url": "pictures/2.jpg"})),
        *(chat(image), chat(image, image, images=["1.jpg", "2.jpg", "1.jpg"]), chat({"type": "audio"})),
        *(
            chat({**image, "url": "https://x.org/1.jpg"}),
            chat(image, images=["3.jpg"]),
            chat("\ud83d"),
            {"messages": []},
        ),
        *(chat(image, images=["page.jpg"]), chat({**image, "base64": "!"}), [], {"messages": [3]}),
    ]
    Path("pictures/pictures").symlink_to(".")
    Path("chat.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\nnot JSON\n")
    reasons = {"no-picture", "pictures", "part", "remote", "missing", "unicode", "turns", "unsupported", "json"}
    return ["chat.jsonl", "--images", "pictures", "--missing-budget", "1"], 15, reasons


@case("parquet")
def parquet():
    chat = pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string()}))
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    texts = [{"user": "q", "assistant": "a"}]
    rows = [
        *((jpeg(), texts), (png(), [*texts, *texts]), (None, texts), (jpeg()[:300], texts), (bomb(), texts)),
        *((png(), [{"user": "q", "assistant": None}]), (png(), None), (b"<html>", texts), (None, None)),
    ]
    columns = {
        "image": pa.array([data and {"bytes": data, "path": None} for data, _ in rows], image),
        "texts": pa.array([texts for _, texts in rows], chat),
    }
    pq.write_table(pa.table(columns), "a.parquet")
    return ["a.parquet", "--missing-budget", "1"], 9, {"decode", "pixels", "empty-answer", "unsupported", "no-image"}


@case("coco")
def coco():
    numbered()
    names = ("1.jpg", "2.jpg", "3.jpg", "page.jpg", "1.jpg")
    pictures = [{"id": n, "file_name": name, "width": 8, "height": 6} for n, name in enumerate(names)]
    notes = [{"image_id": n, "caption": "c" if n < 4 else " "} for n in range(5)]
    Path("captions.json").write_text(json.dumps({"images": pictures, "annotations": notes}))
    reasons = {"missing", "unsupported", "without text"}
    return ["pictures", "--captions", "captions.json", "--missing-budget", "1"], 5, reasons


@case("coco")
def coco_table():
    numbered()
    lines = ['{"image": "1.jpg", "captions": ["a"]}', "{", '"text"', '{"image": "2.jpg", "captions": ["\\udc00"]}']
    Path("t.jsonl").write_text("\n".join(lines))
    return ["pictures", "--table", "t.jsonl"], 4, {"json", "unicode"}


@case("voc")
def voc():
    numbered()
    Path("xml").mkdir()
    thing = "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>6</ymax></bndbox></object>"
    names = ("1.jpg", "2.jpg", "page.jpg", "3.jpg", "../1.jpg", "1.jpg", "1.jpg")
    for n, name in enumerate(names):
        boxes = "" if n == 5 else thing.format("cat", 800 if n == 6 else 8)
        size = "<size><width>8</width><height>6</height></size>"
        Path(f"xml/{n}.xml").write_text(f"<annotation><filename>{name}</filename>{size}{boxes}</annotation>")
    Path("xml/cut.xml").write_text("<annotation>")
    reasons = {"unsupported", "missing", "outside", "without text", "box", "xml"}
    return ["pictures", "xml", "--missing-budget", "1"], 8, reasons


@case("yolo")
def yolo():
    folder()
    Path("names.txt").write_text("cat\n")
    for name, text in {"a": "0 0.5 0.5 1 1", "b": "", "sub/c": "1 0.5 0.5 1 1", "e": "x"}.items():
        Path("labels", name).parent.mkdir(parents=True, exist_ok=True)
        Path("labels", f"{name}.txt").write_text(text)
    for name in ("sub/deep/d", "f", "cut", "bomb", "猫", "a.b"):
        Path("labels", name).parent.mkdir(parents=True, exist_ok=True)
        Path("labels", f"{name}.txt").write_text("0 0.5 0.5 1 1")
    return ["pictures", "--labels", "labels", "--names", "names.txt"], 17, {*FOLDER_REASONS, "without text", "box"}


@case("tars")
def tars():
    members = [
        *(("a.jpg", jpeg()), ("a.txt", b"cat"), ("b.jpg", jpeg()[:300]), ("c.jpg", bomb()), ("d.txt", b"\xff")),
        *(("e.json", b"["), ("f.jpg", b"<html>"), ("g.jpg", jpeg()), ("g.png", png()), ("h.pyd", b"x")),
        *(("i.json", b'{"conversations": [{"from": "human", "value": "q"}]}'), ("._a.jpg", b"x")),
    ]
    write_tar(Path("t/0.tar"), *members)
    return ["t"], 9, {"decode", "pixels", "unicode", "json", "unsupported", "pictures", "no-member", "no-answer"}


@case("easy_vqa")
def easy_vqa():
    root = Path("easy/train/images")
    root.mkdir(parents=True)
    for n in range(4):
        (root / f"{n}.png").write_bytes(png() if n else png()[:50])
    questions = [["what color is the shape?", "red", n] for n in range(4)]
    Path("easy/train/questions.json").write_text(json.dumps([*questions, ["  ", "red", 3]]))
    return ["easy", "--held-out", "2", "--split", "train"], 4, {"other split", "empty-question"}


@case("scienceqa")
def scienceqa():
    write_problems("problems", {"train": 6, "val": 1, "test": 1}, size=16)
    pictures = sorted(Path("problems/images/train").rglob("*.png"))
    pictures[0].unlink()
    pictures[1].write_bytes(png()[:50])
    return ["problems"], 6, set()


@case("shapes")
def shapes():
    return ["--count", "3", "--size", "16"], 3, set()


@case("instructions")
def instructions():
    return ["--count", "3", "--size", "16"], 3, set()


def test_every_source_is_tried():
    assert {source for source, _ in CASES} == set(SOURCES)


@pytest.mark.parametrize(("source", "write"), CASES, ids=[write.__name__ for _, write in CASES])
def test_rows_add_up_and_can_be_trained_on(tmp_path, monkeypatch, capsys, source, write):
    monkeypatch.chdir(tmp_path)
    arguments, rows, reasons = write()
    assert main(["build", source, *arguments, "out"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    summary = re.search(r"^rows (\d+) = written (\d+) \+ left out (\d+)$", printed, re.M)
    assert summary is not None, printed
    counts = {name: int(n) for name, n in re.findall(r"^left out: (.+?) (\d+), such as .", printed, re.M)}
    written, lost = int(summary[2]), int(summary[3])
    assert (int(summary[1]), written + lost, sum(counts.values())) == (rows, rows, lost), printed
    assert reasons == set(counts), printed
    assert printed.replace("\n", "").isprintable()
    index = ShardIndex.open("out")
    joined = re.search("records joined ([0-9]+)", printed)
    assert len(index) == written - (int(joined[1]) if joined else 0)
    for i in range(len(index)):
        members = index.read(i, (*PICTURES, "json", "txt"))
        record = parse_record(members)
        pictures = [decode_image(members[name], ImageSpec(4)) for name in pictures_among(members)]
        if any(record.get(part) for part in ("conversations", "questions", "caption", "captions")):
            assert conversations_of(record, Prompt(turns="every"), 0, len(pictures))


def test_an_example_is_one_line_without_control_characters():
    tally = Tally()
    tally.leave_out("json", "a\x1b[31m\nb\ud83d猫")
    assert tally.lines() == ["json 1, such as a\\x1b[31m\\nb\\ud83d猫"]
