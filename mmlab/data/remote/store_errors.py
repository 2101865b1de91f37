"""What the errors of object stores mean: faults that pass and are tried again, and errors that are final."""

import re

from mmlab.config.errors import ConfigError, DataError, RunError, UserError
from mmlab.runs.redact import redact_text


class StoreFault(DataError):
    """A fault that may pass: a timeout, a cut connection, too many requests, a failing server."""


class UnreachedError(DataError):
    """Faults did not pass in the time that a request may take."""


class MissingError(DataError):
    """There is no such object."""


class ChangedError(DataError):
    """The object is not the one that was asked for: it was replaced, or cut."""


# What the variables and files are that a provider chain reads; no secret is ever read by code of ours.
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_WEB_IDENTITY_TOKEN_FILE, the machine's role and, with boto3"
    " installed, AWS_PROFILE are looked at; AWS_SKIP_SIGNATURE=true reads a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud's default login and the machine's service account are looked at;"
    " GOOGLE_SKIP_SIGNATURE=true reads a public bucket",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET, and the"
    " machine's managed identity are looked at; AZURE_SKIP_SIGNATURE=true reads a public container",
}
_PASSING = {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529}
_DENIED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed", "InvalidAccessKeyId"}
_PASSING_CODES = {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "IncompleteBody"}
# A server's own text may repeat what was sent to it, so only its status and the one-word code of S3 are shown.
_STATUS = re.compile(r"status code: (\d{3})(?: ([A-Za-z][A-Za-z -]*))?")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_KINDS = (
    (re.compile(r"kind: Timeout|TimedOut|timed out", re.IGNORECASE), "no answer came in time"),
    (re.compile(r"dns error|failed to lookup"), "its host is not known"),
    (re.compile(r"ConnectionRefused"), "the connection was refused"),
    (re.compile(r"IncompleteBody|kind: Body|kind: Interrupted|ConnectionReset|BrokenPipe"), "the connection was cut"),
    (re.compile(r"kind: Connect"), "no connection could be made"),
    (re.compile(r"HTTP error|error sending request"), "the connection failed"),
)


def sort_error(error: Exception, address: str, name: str) -> UserError:
    """Return the error to raise for one of `obstore` or of a driver of `fsspec`; secrets never show.

    Args:
        error: as raised.
        address: of the store.
        name: of the object in it; "" for the store.

    Returns:
        A `StoreFault` if it may pass, else a DataError, RunError or ConfigError.
    """
    where, text = f"{address.rstrip('/')}/{name}" if name else address, str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    number = int(status[1]) if status else 0
    answer = " ".join(word for word in (*(status.groups("") if status else ()), code[1] if code else "") if word)
    kind = type(error).__name__
    if "NoSuchBucket" in text:
        return DataError(f"there is no bucket of {where}.")
    if "169.254." in text or "Error getting credentials" in text or "token request" in text:
        return StoreFault(f"there are no credentials for {where}: {_chain(address)}.")
    if "Account must be specified" in text:
        return ConfigError(f"{where} names no account: {_chain(address)}.")
    if number in (401, 403) or kind in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError"):
        return DataError(f"access to {where} is denied{f' ({answer})' if answer else ''}: {_chain(address)}.")
    if code and code[1] in _DENIED_CODES:
        return DataError(f"access to {where} is denied ({answer}): {_chain(address)}.")
    if isinstance(error, FileNotFoundError) or number in (404, 410):
        return MissingError(f"there is no {where}.")
    if kind == "PreconditionError" or number == 412:
        return changed(where)
    if number == 416:
        return ChangedError(f"{where} is shorter than when it was indexed; run mmlab shards index again.")
    if number in (301, 302, 307, 308) or "without LOCATION" in text:
        return ConfigError(f"{where} lies in another region; set AWS_REGION to the bucket's.")
    if number in _PASSING or (code and code[1] in _PASSING_CODES):
        return StoreFault(f"{where} cannot be reached: the server answered {answer}.")
    if "Range request not supported" in text:
        return DataError(f"the server of {where} sends no ranges of bytes; copy the files to a store that does.")
    if number:
        return DataError(f"{where} cannot be used: the server answered {answer}.")
    if match := re.search(r"Requested (\S+), got (\S+)", text):
        return StoreFault(f"{where} cannot be read: bytes {match[1]} were asked for, {match[2].rstrip(',')} came.")
    if match := next((sentence for pattern, sentence in _KINDS if pattern.search(text)), None):
        return StoreFault(f"{where} cannot be reached: {match}.")
    return _unknown(error, where)


def changed(where: str) -> ChangedError:
    """The error for an object whose ETag or size differs."""
    return ChangedError(f"{where} has changed since it was indexed; run mmlab shards index again.")


def _unknown(error: Exception, where: str) -> UserError:
    """An error in foreign words: its first line, without what follows a `?` in addresses and without secrets."""
    lines = str(error).strip().splitlines() or [""]
    text = redact_text(re.sub(r"\?\S*", "", lines[0]))[:200].strip().rstrip(".")
    text = f"{type(error).__name__}{f': {text}' if text else ''}"
    passing = isinstance(error, OSError | EOFError) or type(error).__name__.startswith(("Client", "Server", "Http"))
    if passing:  # drivers raise their connections' errors as OSError
        return StoreFault(f"{where} cannot be reached: {text}.")
    return RunError(f"{where} cannot be used: {text}.")


def _chain(address: str) -> str:
    scheme = address.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return "web servers are read without a login"
    kind = {"s3a": "s3", "gcs": "gs"}.get(scheme, "az" if scheme in ("azure", "adl", "abfs", "abfss") else scheme)
    return CREDENTIALS.get(kind, "give its driver the login")
