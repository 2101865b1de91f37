"""Samples whose content cannot be used: one rule for what counts as one, and counts of those that a verb leaves out."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Any, NoReturn

from mmlab.config.errors import DataError, UserError
from mmlab.config.locations import Location
from mmlab.data.config import FLOOR, ShardsConfig
from mmlab.data.sample_types import SampleError

_LISTED = 1000  # bad samples that a report lists; further ones are only counted
_LENGTH = 300  # characters of another library's message


@contextmanager
def sample_errors() -> Iterator[None]:
    """Around reading, decoding and preparing one sample: whatever its content raises becomes a `SampleError`.

    The reason of an exception that nobody expected is its class, and its message says where it was raised. What is not
    the content's fault is raised unchanged: a UserError, a lack of memory, and an OSError, which is the disk's
    (`decode_image` catches those of decoders).

    Raises:
        SampleError: the content cannot be used.
    """
    try:
        yield
    except (SampleError, UserError, MemoryError, OSError):
        raise
    except BaseException as error:
        # A panic in a library that is written in Rust, such as tokenizers, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        frame = extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:_LENGTH]
        where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
        name = type(error).__name__
        raise SampleError(name, f"{name}: {text} ({where})" if text else f"{name} ({where})") from error


class BadSamples:
    """The samples of one set of shards that an evaluation or a verb leaves out.

    A sample counts once, however often it is read.

    Args:
        root: the shards' folder or address, for messages.
        total: number of their samples.
        budget: share of them that may be bad; `FLOOR` of them always may.
        unit: what they are called.

    Attributes:
        errors: key → what is wrong with the sample.
    """

    def __init__(self, root: str | Location, total: int, budget: float = ShardsConfig.bad_budget, unit: str = "sample"):
        self.root, self.total, self.budget, self.unit = root, total, budget, unit
        self.errors: dict[str, SampleError] = {}

    def __len__(self) -> int:
        return len(self.errors)

    @contextmanager
    def left_out(self, key: str) -> Iterator[None]:
        """Around the use of one sample: if its content raises, the rest of the block is skipped, and it is counted.

        Raises:
            DataError: more samples than the budget allows.
        """
        try:
            with sample_errors():
                yield
        except SampleError as error:
            self.add(key, error)

    def add(self, key: str, error: SampleError) -> None:
        """Count a sample; raises DataError if there are more than the budget allows."""
        self.errors.setdefault(key, error)
        if len(self) > max(FLOOR, self.budget * self.total):
            raise DataError(
                f"{self.root}: {self} of {self.total:,}, which is more than bad_budget={self.budget:g} allows."
            )

    def refuse_all(self, what: str) -> NoReturn:
        """Raise DataError because nothing is left; `what` is a plural, such as `images`."""
        raise DataError(f"{self.root} has no {what} that can be used{f': {self}' if self.errors else ''}.")

    @property
    def reasons(self) -> dict[str, int]:
        """Number of samples for each reason, the most common one first."""
        return dict(Counter(error.reason for error in self.errors.values()).most_common())

    def __str__(self) -> str:
        """`2 samples cannot be used (decode 2), such as s3: …`."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.items())
        first = next(iter(self.reasons))
        key, error = next((key, error) for key, error in self.errors.items() if error.reason == first)
        number = f"{len(self):,} {self.unit}{'s' * (len(self) > 1)}"
        return f"{number} cannot be used ({reasons}), such as {key!r}: {str(error).rstrip('.')}"

    def as_json(self) -> dict[str, Any]:
        """Their number, the reasons, and the first of them with key, reason and message."""
        listed = [
            {"key": key, "reason": error.reason, "message": str(error)}
            for key, error in list(self.errors.items())[:_LISTED]
        ]
        return {f"{self.unit}s": len(self), "reasons": self.reasons, "listed": listed}
