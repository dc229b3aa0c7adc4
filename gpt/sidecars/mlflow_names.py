"""Names that MLflow accepts for metrics, parameters and tags.

MLflow allows letters, digits and ` _ . - / :` in at most 250 characters, and no name that is another path of
the same file. Every other character, and the colon itself, becomes `:` with its code in hexadecimal and `:`,
so different names stay different: `code-c++` becomes `code-c:2b::2b:`.
"""

import hashlib
import re

_LONGEST = 250
_HASH_DIGITS = 16
_FOREIGN = re.compile(r"[^/\w.\- ]")
# Parts that a path would drop or resolve: empty ones, "." and "..", which would name another file.
_DOTS = re.compile(r"(?<![^/])\.{1,2}(?![^/])")


def mlflow_name(name: str) -> str:
    """`name` as MLflow accepts it; different names give different results."""
    escaped = _FOREIGN.sub(_code, name)
    escaped = _DOTS.sub(lambda dots: "".join(map(_code_of, dots[0])), escaped)
    escaped = re.sub(r"^\.(?=\.)|^/|/(?=/)|/$", _code, escaped) or ":"
    if len(escaped) <= _LONGEST:
        return escaped
    head = escaped[: _LONGEST - _HASH_DIGITS - 2]
    if head.count(":") % 2:
        head = head[: head.rindex(":")]  # half a code
    # No code begins with "h", so a shortened name differs from every name that is not shortened.
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
    return f"{head}:h{digest}"


def _code(found: re.Match[str]) -> str:
    return _code_of(found[0])


def _code_of(character: str) -> str:
    return f":{ord(character):x}:"
