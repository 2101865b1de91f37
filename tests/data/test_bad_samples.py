import json

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.bad_samples import BadSamples, sample_errors
from mmlab.data.config import FLOOR
from mmlab.data.formats import DEPTH_CAP, check_record, parse_record
from mmlab.data.sample_types import SampleError

HALF = json.dumps({"caption": "a cut \ud83d"}).encode()


def nested(depth: int) -> bytes:
    return b'{"x":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("members", "reason", "says"),
    [
        ({"json": HALF}, "unicode", r"U\+D83D, after .*a cut '"),
        ({"json": '{"caption": "\udc00"}'.encode(errors="surrogatepass")}, "unicode", r"U\+DC00"),
        ({"json": b'{"\\ud800": 1}'}, "unicode", r"U\+D800"),
        ({"json": b'{"a": 1e999}'}, "json", "not JSON"),
        ({"json": b'{"a": ' + b"9" * 5000 + b"}"}, "json", "does not parse"),
        ({"json": nested(DEPTH_CAP + 1)}, "json", "more than 100 deep"),
        ({"json": nested(100_000)}, "json", "does not parse"),
        ({"json": b"[1]"}, "json", "a list, not an object"),
        ({"json": b""}, "json", "does not parse"),
        ({"txt": b"caf\xe9"}, "unicode", r"\.txt is not UTF-8"),
    ],
)
def test_records_that_no_text_file_or_tokenizer_takes(members, reason, says):
    with pytest.raises(SampleError, match=says) as caught:
        parse_record(members)
    assert caught.value.reason == reason


def test_records_of_other_writers():
    whole = {"caption": "😀", "similarity": None}
    assert parse_record({"json": json.dumps({"caption": "😀", "similarity": float("nan")}).encode()}) == whole
    assert parse_record({"json": b"\xef\xbb\xbf{}", "txt": b"\xef\xbb\xbfa star\n"}) == {"caption": "a star"}
    assert parse_record({"json": nested(DEPTH_CAP)})
    check_record({"x": [[]] * 200})


class PanicException(BaseException):
    """Named as the panics of libraries in Rust are."""


def test_whatever_the_content_raises_is_one_error():
    for error in (TypeError("half\na line"), KeyError("x"), RecursionError(), PanicException("at src/lib.rs")):
        with (
            pytest.raises(
                SampleError, match=rf"{type(error).__name__}.*\(test_bad_samples\.py, line \d+, in"
            ) as caught,
            sample_errors(),
        ):
            raise error
        assert caught.value.reason == type(error).__name__ and "\n" not in str(caught.value)
    for error in (SampleError("json", "x"), DataError("x"), ConfigError("x"), MemoryError(), OSError(5, "I/O error")):
        with pytest.raises(type(error)) as caught, sample_errors():
            raise error
        assert caught.value is error
    with pytest.raises(KeyboardInterrupt), sample_errors():
        raise KeyboardInterrupt


def test_bad_samples_are_counted_named_and_limited():
    bad = BadSamples("shards/x", 20_000)
    for key in ("a", "b", "a"):
        with bad.left_out(key):
            raise SampleError("decode", f"unreadable {key}.")
    with bad.left_out("c"):
        json.loads("{")
    assert len(bad) == 3 and bad.reasons == {"decode": 2, "JSONDecodeError": 1}
    assert str(bad) == "3 samples cannot be used (decode 2, JSONDecodeError 1), such as 'a': unreadable a"
    assert bad.as_json()["listed"][1] == {"key": "b", "reason": "decode", "message": "unreadable b."}
    for n in range(17):
        bad.add(f"n{n}", SampleError("json", "x"))
    with pytest.raises(
        DataError, match=r"^shards/x: 21 samples cannot .* of 20,000, which is more than bad_budget=0\.001"
    ):
        bad.add("one more", SampleError("json", "x"))
    few = BadSamples("shards/x", 12, 0.0)
    for n in range(FLOOR):
        few.add(f"n{n}", SampleError("json", "x"))
    with pytest.raises(DataError, match=r"shards/x has no images that can be used: 10 samples"):
        few.refuse_all("images")
