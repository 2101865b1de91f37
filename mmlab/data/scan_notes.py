"""What a scan of shards notes beside their samples: members that are not read, records that cannot be used."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

MOST_TYPES = 256
"""Response types of a set; more of them are some other field."""
_NAMED = 20  # kinds of members that are not read, and bad records, that an index names
_LONGEST = 200  # characters of such names


@dataclass(frozen=True)
class ScanNotes:
    """What was found in shards beside samples that can be used.

    Attributes:
        skipped: members that are not read, such as `.url` or `._*` → their number; the most common ones, and `other`.
        bad_records: number of records that cannot be used; the reader replaces their samples.
        examples: keys of some of them → what is wrong.
        question_types: type → how many `questions` of records have it; None for sets with too many types.
    """

    skipped: dict[str, int] = field(default_factory=dict)
    bad_records: int = 0
    examples: dict[str, str] = field(default_factory=dict)
    question_types: dict[str, int] | None = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line for each of them that there is."""
        skipped = ", ".join(f"{name} {number:,}" for name, number in self.skipped.items())
        examples = "; ".join(f"{key!r}: {message}" for key, message in list(self.examples.items())[:3])
        records = f"{self.bad_records:,} records cannot be used, such as {examples.rstrip('.')}"
        return [f"members that are not read: {skipped}"] * bool(skipped) + [records] * bool(self.bad_records)

    @classmethod
    def of(cls, skipped: Counter[str], bad_records: dict[str, str], types: Counter[str]) -> "ScanNotes":
        """The notes on one shard: numbers of members, key → what is wrong with its record, numbers of questions."""
        short = {key[:_LONGEST]: message[:_LONGEST] for key, message in islice(bad_records.items(), _NAMED)}
        kinds = Counter[str]()
        for name, number in skipped.items():
            kinds[name[:_LONGEST]] += number
        return cls(dict(kinds), len(bad_records), short, dict(types)).joined()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ScanNotes":
        """The notes of which `content` are the fields.

        Raises:
            ValueError, TypeError, AttributeError: they are something else.
        """
        notes = cls(**content)
        counts = (notes.bad_records, *notes.skipped.values(), *(notes.question_types or {}).values())
        texts = notes.examples.values()
        if any(type(count) is not int for count in counts) or not all(isinstance(text, str) for text in texts):
            raise ValueError("its notes are of other types")
        return notes

    def joined(self, *others: "ScanNotes") -> "ScanNotes":
        """These notes and others as one."""
        skipped, types, examples, number, too_many = Counter[str](), Counter[str](), dict[str, str](), 0, False
        for one in (self, *others):
            skipped += Counter(one.skipped)
            number += one.bad_records
            too_many |= one.question_types is None
            types += Counter(one.question_types or {})
            examples |= dict(list(one.examples.items())[: max(_NAMED - len(examples), 0)])
        other = skipped.pop("other", 0)
        common = dict(skipped.most_common(_NAMED))
        if other := other + skipped.total() - sum(common.values()):
            common["other"] = other
        named = None if too_many or len(types) > MOST_TYPES else dict(sorted(types.items()))
        return ScanNotes(common, number, examples, named)

    def instead(self) -> str:
        """For the message that there are no samples: what there is instead, and what would be a sample."""
        if not self.skipped:
            return ""
        there = ", ".join(f"{name} ({number:,})" for name, number in self.skipped.items())
        return f", only {there}; a member is named 'key.jpg': its extension begins at the first dot of its file name"
