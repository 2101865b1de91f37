"""What a disk's refusal looks like, also within the errors of libraries, and the sentence about it."""

import errno
import re
from collections.abc import Iterator

from mmlab.config.errors import RunError

REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EFBIG: "the file is larger than the disk allows",
    errno.EIO: "the disk reports an input/output error",
}
# numpy, torch, Pillow and sqlite in their own words, which have no number.
_HIDDEN = re.compile(
    r"\d+ requested and \d+ written|PytorchStreamWriter failed writing|iostream error|unexpected pos \d+ vs"
    r"|encoder error -\d+ when writing|disk is full|attempt to write a readonly database"
)


def refusal(error: BaseException) -> str | None:
    """Why the disk refused, in a few words, if that is behind the error; None for other errors."""
    for each in _chain(error):
        number, text = each.errno if isinstance(each, OSError) else None, str(each)
        if number is None and (inner := re.search(r"os error (\d+)", text)):  # safetensors, tokenizers
            number = int(inner[1])
        if number in REFUSALS:
            return REFUSALS[number]
        if number is None and (match := _HIDDEN.search(text)):
            return "the disk is read-only" if "readonly" in match[0] else "the disk is full"
    return None


def disk_error(error: BaseException) -> RunError | None:
    """The error to show for one that no writer of ours expected; None if no disk is behind it."""
    reason = refusal(error)
    if reason is None:
        return None
    name = next((each.filename for each in _chain(error) if isinstance(each, OSError) and each.filename), "a file")
    return RunError(f"{name} cannot be used: {reason}; everything saved earlier is unchanged.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
