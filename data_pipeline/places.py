"""What is wrong with a name, a path or a URL as a user wrote it. Nothing is opened here.

A place that passes can be written to UTF-8 files, put on one line of a script, and passed to the operating
system. Credentials in URLs are refused, because configs, logs and MLflow's parameters show every URL.
"""

import os
import re
import unicodedata
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

NAME_BYTES = 255  # the longest name of a file on Linux's file systems
PATH_BYTES = 4095  # the longest path that Linux takes, without the final NUL
_SHOWN = 120  # characters of a place in a message
_LINE_ENDS = "\u2028\u2029"
_WEB = ("http", "https")  # a user without a password may be a token there
_NO_USER = ("github",)  # fsspec writes github://ORG:REPOSITORY@COMMIT/PATH
_SECRETS = ("password", "passwd", "pwd", "token", "secret", "api_key", "apikey", "access_key", "secret_key")
_CARRIERS = {
    "http": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) for a tracking "
    "server, FSSPEC_HTTP_CLIENT_KWARGS for files",
    "postgresql": "PGPASSWORD, or the file ~/.pgpass",
    "mysql": "a file that ?read_default_file=~/.my.cnf names",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_FAMILIES = {"https": "http", "postgres": "postgresql", "mariadb": "mysql", "s3a": "s3", "gcs": "gs"}
_FAMILIES |= {"abfs": "az", "abfss": "az"}


def shown(place: object) -> str:
    """A place for a message: one line, at most 120 characters, the rest as escapes."""
    text = escaped(str(place))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def escaped(text: str) -> str:
    """A text that any stream can print on one line: control characters and bytes are shown as escapes."""
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode() if _is_odd(character) else character
        for character in text
    )


def text_problem(text: str) -> str | None:
    """Why a text cannot name anything: control characters, or bytes that are not UTF-8."""
    for character in text:
        if 0xDC80 <= ord(character) <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
            return f"it has the byte 0x{ord(character) - 0xDC00:02x}, which is not UTF-8"
        if _is_odd(character):
            return f"it has the control character {escaped(character)}"
    return None


def path_problem(path: str | Path) -> str | None:
    """Why no file can have this path: its characters or its length."""
    text = str(path)
    if (problem := text_problem(text)) is not None:
        return problem
    for part in Path(text).parts:
        if (size := len(os.fsencode(part))) > NAME_BYTES:
            return f"its part {shown(part)} has {size} bytes; a file name has at most {NAME_BYTES}"
    if (size := len(os.fsencode(text))) > PATH_BYTES:
        return f"it has {size} bytes; a path has at most {PATH_BYTES}"
    return None


def url_problem(url: str) -> str | None:
    """Why a URL cannot be used: its characters, its port, or credentials in it.

    A text without `://` is a path, and is none of this function's business.
    """
    if (problem := text_problem(url)) is not None:
        return problem
    if "://" not in url:
        return None
    if (problem := _credentials_problem(url)) is not None:
        return problem
    scheme = url.partition("://")[0].lower()
    if scheme not in _WEB:
        return None
    if any(character.isspace() for character in url):
        return "it has a space"
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        is_whole = False
    return None if is_whole else f"it is not of the form {scheme}://HOST:PORT, with a port from 1 to 65535"


def without_credentials(url: str) -> str:
    """A URL for a message, with `…` in place of what may be credentials."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return shown(url)
    kept = rest.rpartition("@")
    rest = f"…@{kept[2]}" if kept[1] else rest
    before, mark, _ = rest.partition("?")
    return shown(f"{scheme}://{before}{mark}{'…' if mark else ''}")


def _credentials_problem(url: str) -> str | None:
    """Why a URL with a password, a token or a key in it is refused, and what carries them instead."""
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower().partition("+")[0]  # postgresql+psycopg2
    if not _has_secret(scheme, rest):
        return None
    family = _FAMILIES.get(scheme, scheme)
    carrier = _CARRIERS.get(family, "the store's own environment variables or configuration file")
    return (
        "it has credentials in it, which configs, logs and MLflow would show. Leave them out of the URL: "
        f"they are read from {carrier}"
    )


def _has_secret(scheme: str, rest: str) -> bool:
    """Whether the part of a URL after `://` has a user's secret in it, or a parameter with one."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = host.rpartition("@")
    if at and scheme not in _NO_USER and (":" in user or scheme in _WEB):
        return True
    if scheme in _WEB and "@" in rest and re.search(r":(?!\d*$)", host):
        return True  # a slash or a `#` in a password ends what looks like the host: http://me:a/b@host
    return any(name.lower() in _SECRETS for name, _ in parse_qsl(rest.partition("?")[2]))


def _is_odd(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _LINE_ENDS
