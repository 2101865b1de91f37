"""The one rule by which a class is looked up. It needs only Python: exported pipelines get a copy of it."""

from collections.abc import Sequence
from typing import Any


def class_index(name: Any, names: Sequence[str]) -> int:
    """Return the index of a class: of its name, or else of its position in `names`, counted from 0.

    Positions are taken only where no name is itself a number. With the names 3, 5 and 7 the number 1 is no class; it is
    not the second one, 5.

    Args:
        name: of the class, or its position, as text or as a whole number.
        names: of all classes, in their order.

    Raises:
        ValueError: there is no such class.
    """
    text = str(name).strip()
    if text in names:
        return list(names).index(text)

    def is_number(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return True

    if text.isascii() and text.isdigit() and int(text) < len(names) and not any(map(is_number, names)):
        return int(text)
    few = f"; the classes are {', '.join(names)}" if len(names) <= 12 else f" among {len(names)}"
    raise ValueError(f"There is no class '{name}'{few}.")
