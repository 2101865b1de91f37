"""The clock of chat templates: a fixed moment, so that a prompt does not depend on the day, place or language."""

from datetime import UTC, datetime
from string import ascii_letters

from mmlab.config.errors import ConfigError
from mmlab.runs.disk import to_json

DATE = "2024-07-26"
"""The default of `prompt.date`."""
_MONTHS = "January February March April May June July August September October November December"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"


def moment_of(date: str) -> datetime:
    """Return the moment that an ISO date, or date and time, names in UTC; raises ConfigError for other texts."""
    try:
        return datetime.fromisoformat(date).replace(tzinfo=UTC)
    except ValueError as error:
        raise ConfigError(f"prompt.date={date} is not a date such as {DATE}.") from error


def fix_clock(template: str, date: str) -> str:
    """Return a chat template that gets the date `date` where it asks transformers for the present one (`strftime_now`).

    It is a macro in front of the template, because transformers passes no functions to templates.
    """
    if "strftime_now" not in template:
        return template
    steps = "".join(f" | replace({to_json(code)}, {to_json(text)})" for code, text in _texts(date).items())
    # The empty expression keeps a line break at the start of the template.
    return "{% macro strftime_now(format) %}{{ format" + steps + " }}{% endmacro %}{{ '' }}" + template


def _texts(date: str) -> dict[str, str]:
    """What each format code of `strftime` becomes, in English whatever the locale."""
    moment = moment_of(date)
    month, day = _MONTHS.split()[moment.month - 1], _DAYS.split()[moment.weekday()]
    texts = {f"%{flag}{letter}": moment.strftime(f"%{flag}{letter}") for flag in ("", "-") for letter in ascii_letters}
    texts |= {"%B": month, "%b": month[:3], "%h": month[:3], "%A": day, "%a": day[:3]}
    texts |= {"%p": "AM" if moment.hour < 12 else "PM", "%s": str(int(moment.timestamp()))}
    texts["%x"], texts["%X"] = moment.strftime("%m/%d/%y"), moment.strftime("%H:%M:%S")
    texts["%c"] = f"{day[:3]} {month[:3]} {moment.strftime('%e %H:%M:%S %Y')}"
    return {"%%": "\x00", **texts, "\x00": "%"}
