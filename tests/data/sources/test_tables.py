import pytest

from mmlab.config.errors import DataError
from mmlab.data.sources.tables import rows
from mmlab.data.tally import Tally


def read(path, text: str, encoding: str = "utf-8") -> tuple[list[list], Tally]:
    path.write_bytes(text.encode(encoding))
    tally = Tally()
    return [list(row.values()) for _, row in rows(path, tally)], tally


def test_a_quotation_mark_in_a_tsv_is_text(tmp_path):
    text = '"a red half\t1\r\nsecond\t2\r\nthe word "half"\t3\r\n\r\n"x" is\t4\r\n"y"\t5\r\na\rb\t6'
    values, tally = read(tmp_path / "t.tsv", f"caption\timage\r\n{text}")
    assert values == [
        *(['"a red half', "1"], ["second", "2"], ['the word "half"', "3"], ['"x" is', "4"]),
        *(['"y"', "5"], ["a\rb", "6"]),
    ]
    assert tally.rows == 0


def test_a_csv_follows_rfc_4180(tmp_path):
    text = 'image,caption\r\n1,"a, ""b""\r\nand c"\r\n\r\n2,5" long\r\n"3",\r\n'
    values, tally = read(tmp_path / "t.csv", text)
    assert values == [["1", 'a, "b"\r\nand c'], ["2", '5" long'], ["3", ""]]
    assert tally.rows == 0 and tally.details["rows_of_several_lines"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('1.jpg,"a red half\n2.jpg,b\n', r"t\.csv, line 2: its quotation marks .*unexpected end of data"),
        ('1.jpg,a\n2.jpg,"x" at the start\n', r"t\.csv, line 3: its quotation marks"),
        ('1.jpg,"a red half\n2.jpg,b\n3.jpg,the word "half"\n', r"t\.csv, line 2: its quotation marks"),
        ('1.jpg,"a red half\n2.jpg,a blue half"\n', r"t\.csv, lines 2 to 3: by their quotation marks they are one row"),
    ],
)
def test_quotation_marks_of_a_csv_that_do_not_match_are_errors(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "t.csv", f"image,caption\n{text}")


def test_a_row_of_several_lines_is_compared_with_the_images(tmp_path):
    text = 'caption,image\n"a red half,1\nfourth",4\n'
    assert read(tmp_path / "t.csv", text)[0] == [["a red half,1\nfourth", "4"]]
    for name in ("1.jpg", "4.png"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="lines 2 to 3: by their quotation marks they are one row, but each names"):
        list(rows(tmp_path / "t.csv", Tally(), tmp_path))


def test_fields_that_a_program_may_have_quoted_are_counted(tmp_path):
    _, tally = read(tmp_path / "t.tsv", 'caption\timage\n"a ""red"" box"\t1.jpg\na "box"\t2.jpg\n')
    assert tally.details["fields_in_quotation_marks"] == 1


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_rows_that_do_not_fit_the_header_are_counted(tmp_path, suffix):
    lines = ["image,caption", "1,a", "2,b,c", "3", "4,d\0", "5,e"]
    text = "\n".join(lines).replace(",", "," if suffix == ".csv" else "\t")
    values, tally = read(tmp_path / f"t{suffix}", text)
    assert values == [["1", "a"], ["5", "e"]]
    assert tally.left_out == {"fields": 2, "nul": 1} and "line 3: It has 3 fields, the header 2" in tally.lines()[0]


@pytest.mark.parametrize("name", ["t.csv", "T.CSV", "t.tsv", "t.TSV"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_names_and_encodings(tmp_path, name, encoding):
    between = "," if name.lower().endswith("csv") else "\t"
    long = "wort " * 40_000  # Python's csv has a limit of 131,072 characters
    values, _ = read(tmp_path / name, f"image{between}caption\n1{between}größe\n2{between}{long}\n", encoding)
    assert values == [["1", "größe"], ["2", long]]


def test_other_encodings_are_named(tmp_path):
    for name in ("t.csv", "t.tsv"):
        with pytest.raises(DataError, match=r"t\..sv, line 2, is not UTF-8: byte 0xF6\. If it is Latin-1"):
            read(tmp_path / name, "image\ngröße\n", "latin-1")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfei\x00m\x00\x00\xd8\x00\xd8")
    with pytest.raises(DataError, match=r"line 1, is not the UTF-16 that its first bytes imply"):
        list(rows(tmp_path / "t.csv", Tally()))


def test_other_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="column 'image' is there twice"):
        read(tmp_path / "t.csv", "image, image\n1,2\n")
    with pytest.raises(DataError, match=r"'image;caption' is one column; commas separate those of a \.csv"):
        read(tmp_path / "t.csv", "image;caption\n1;2\n")
    with pytest.raises(DataError, match=r"t\.tsv is empty"):
        read(tmp_path / "t.tsv", "\n")
    with pytest.raises(DataError, match=r"no row below its header: 1\.jpg, a"):
        read(tmp_path / "t.tsv", "1.jpg\ta\n")
    with pytest.raises(DataError, match=r"a table is a \.csv, \.tsv, \.jsonl or \.json file, not '\.xlsx'"):
        read(tmp_path / "t.xlsx", "")
    with pytest.raises(DataError, match=r"is a folder; give a file, such as t\.csv, t\.tsv, t\.xlsx in it"):
        list(rows(tmp_path, Tally()))


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_json_by_its_content(tmp_path, name):
    lines = '{"image": 1}\n\n{"image": 2}\n'
    assert read(tmp_path / name, lines)[0] == [[1], [2]]
    assert read(tmp_path / name, lines, "utf-8-sig")[0] == [[1], [2]]
    values, tally = read(tmp_path / name, '{"image": 1}\n{"image": \n[2]\n')
    assert values == [[1]] and tally.left_out == {"json": 2}
    with pytest.raises(DataError, match=r"line 2, is not UTF-8"):
        read(tmp_path / name, '{"image": 1}\n{"image": "größe"}\n', "latin-1")


def test_a_json_list_and_its_annotations(tmp_path):
    for text in ('[{"image": 1}, 2]', '{"annotations": [{"image": 1}, 2]}\n'):
        values, tally = read(tmp_path / "t.json", text)
        assert values == [[1]] and tally.left_out == {"json": 1}
    with pytest.raises(DataError, match="`mmlab shards build coco`"):
        read(tmp_path / "t.json", '{"images": [], "annotations": []}')
    with pytest.raises(DataError, match="is not JSON: "):
        read(tmp_path / "t.json", '[{"image": 1},\n')
