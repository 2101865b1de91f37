import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from mmlab.data.shard_files import ShardWriter
from mmlab.report.contact_sheet import BAD, GOOD, as_picture, contact_sheet
from mmlab.report.shard_sheet import sample_sheet
from tests.tiny_files import bomb, png


def share(sheet: Image.Image, color: str) -> float:
    return float((np.asarray(sheet) == ImageColor.getrgb(color)).all(-1).mean())


def test_pictures_keep_their_pixels():
    picture = Image.new("RGB", (64, 64), (1, 2, 3))
    sheet = contact_sheet([picture], ["text"], cell=128)
    assert share(sheet, "#010203") == pytest.approx(128 * 128 / (sheet.width * sheet.height))


def test_tensors_arrays_and_large_or_long_pictures():
    red = torch.zeros(3, 8, 4, dtype=torch.uint8)
    red[0] = 255
    assert as_picture(red).size == (4, 8) and as_picture(red).getpixel((0, 0)) == (255, 0, 0)
    assert as_picture(red.float() / 255).getpixel((0, 0)) == (255, 0, 0)
    for picture in (red, red.numpy(), Image.new("L", (2000, 3)), Image.new("RGBA", (3, 999))):
        contact_sheet([picture], [""])
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        as_picture(np.zeros((8, 8, 3), np.uint8))


def test_cards_wrap_to_columns_and_rows():
    one, two, five = (contact_sheet([None] * n, ["a"] * n, columns=2) for n in (1, 2, 5))
    assert one.width < two.width == five.width
    assert one.height == two.height < five.height / 2


def test_a_row_is_as_tall_as_its_tallest_picture():
    wide, square = np.zeros((3, 8, 16), np.uint8), np.zeros((3, 16, 16), np.uint8)
    flat, mixed, tall = (contact_sheet(pair, ["", ""], cell=64) for pair in ([wide] * 2, [wide, square], [square] * 2))
    assert flat.height == tall.height - 32 and mixed.height == tall.height


def test_a_color_marks_its_card():
    plain = contact_sheet([None], ["yes"])
    assert share(plain, GOOD) == share(plain, BAD) == 0
    assert share(contact_sheet([None], ["yes"], colors=[GOOD]), GOOD) > 0.01
    assert share(contact_sheet([None], ["yes"], colors=[BAD]), BAD) > 0.01


def test_long_texts_are_cut_off():
    short = contact_sheet([None], ["one line"])
    long = contact_sheet([None], ["many words " * 30])
    cut = contact_sheet([None], ["line\n" * 500])
    unbroken = contact_sheet([None], ["x" * 200])
    assert short.height < long.height <= cut.height < 2000
    assert short.width == long.width == unbroken.width
    assert short.height < unbroken.height


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="1 pictures, 2 texts"):
        contact_sheet([None], ["a", "b"])


def test_a_sheet_of_shards_shows_unreadable_samples_too(tmp_path):
    with ShardWriter(tmp_path / "set", quiet=True) as writer:
        writer.write("a", {"png": png(), "json": {"caption": "red"}})
        writer.write(
            "b",
            {"json": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}},
        )
        writer.write("c", {"jpg": bomb(), "txt": "bomb"})
        writer.write("d", {"json": b"{broken"})
        writer.write("e", {"json": b'{"questions": [1]}'})
        writer.write("f", {"png": png(), "cls": "3"})
    assert sample_sheet(writer.index, 6).height > sample_sheet(writer.index, 3).height
    assert sample_sheet(writer.index, 100).size == sample_sheet(writer.index, 6).size
