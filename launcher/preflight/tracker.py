"""Checks before the launch whether MLflow can take the record: the URI, the experiment, and the server.

It asks a server for a moment only. A URI that can never work is a problem; a server that does not take
requests at this moment is a warning, because training never depends on it.
"""

import base64
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path

from gpt.config.run import RunConfig
from launcher.findings import Findings

_TIMEOUT_S = 1.0
_LONGEST_EXPERIMENT = 500  # MLflow's limit
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ADVICE = "Give http://HOST:PORT of an MLflow server, sqlite:///FILE, or no tracking.uri at all."
_SQLITE = "sqlite:///"
_SQLITE_HEADER = b"SQLite format 3\0"


def check_tracker(config: RunConfig, findings: Findings, *, is_in_container: bool = False) -> None:
    """Refuse what MLflow can never accept; warn when the server does not take requests now.

    The drivers of databases are not checked for a job in a container, which has packages of its own.
    """
    if not config.tracking.enabled:
        return
    findings.problem(_experiment_problem(config.tracking.experiment))
    uri = config.tracking.uri
    if uri is None:
        findings.warn(_ignored_variable())
        return
    problem = _uri_problem(uri, is_in_container=is_in_container)
    if problem is not None:
        findings.problem(f"tracking.uri = {_shown(uri)!r} {problem}")
    elif uri.startswith(("http://", "https://")):
        findings.warn(_server_warning(uri, config.tracking.experiment))


def _experiment_problem(name: str) -> str | None:
    if not name.strip():
        return f"tracking.experiment = {name!r} is empty. Give it a name, or leave it out."
    if len(name) > _LONGEST_EXPERIMENT:
        return (
            f"tracking.experiment has {len(name)} characters, and MLflow takes at most "
            f"{_LONGEST_EXPERIMENT}. Give a shorter name."
        )
    if not name.isprintable():
        return f"tracking.experiment = {name!r} has a control character. Give a name without it."
    return None


def _ignored_variable() -> str | None:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return None
    return (
        f"MLFLOW_TRACKING_URI = {_shown(uri)} is not used: only the config decides where a run is tracked. "
        "tracking.uri is unset, so it is tracked in MLflow's database beside the run directory. To track it "
        f"there instead, add --set tracking.uri={_shown(uri)}"
    )


def _uri_problem(uri: str, *, is_in_container: bool) -> str | None:
    """What is wrong with a URI, as the rest of a sentence about it; None if MLflow can use it."""
    if uri == "databricks":
        return None
    if not uri.isprintable() or " " in uri:
        return f"has a space or a control character. {_ADVICE}"
    scheme, separator, rest = uri.partition("://")
    if not separator:
        looks_like_host = re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri)
        hint = f"Did you mean http://{uri}?" if looks_like_host else _ADVICE
        return f"has no scheme such as http://. {hint}"
    kind, _, driver = scheme.lower().partition("+")
    if kind in ("http", "https") and not driver:
        return _address_problem(uri)
    if kind == "sqlite":
        return _sqlite_problem(uri)
    if kind in _DATABASES:
        return None if is_in_container else _driver_problem(uri)
    if kind == "file":
        return f"names a folder of plain files, which MLflow no longer writes. {_ADVICE}"
    if kind == "postgres":
        return f"has the scheme postgres, which SQLAlchemy does not know. Write postgresql://{_shown(rest)}"
    if kind in ("databricks", *(plugin.name for plugin in entry_points(group="mlflow.tracking_store"))):
        return None
    return f"has the scheme {scheme!r}, which MLflow does not know. {_ADVICE}"


def _address_problem(uri: str) -> str | None:
    try:
        parts = urllib.parse.urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"is not a valid address ({error}). {_ADVICE}"
    if not host:
        return f"names no host. {_ADVICE}"
    return None


def _sqlite_problem(uri: str) -> str | None:
    name = uri.removeprefix(_SQLITE)
    if name in (uri, "", ":memory:"):
        return f"names no file. Give {_SQLITE}FILE, with three slashes before the path."
    if "?" in name:
        return "has a '?', which SQLAlchemy reads as the start of options. Use another file name."
    path = Path(name)
    if path.is_dir():
        return "is a folder. Give the path of a file in it."
    if path.exists():
        try:
            with path.open("rb") as file:
                header = file.read(len(_SQLITE_HEADER))
        except OSError as error:
            return f"cannot be read ({error.strerror}). Use another file, or change its permissions."
        if header not in (b"", _SQLITE_HEADER):
            return "is a file, but not an SQLite database. Use another file name."
    above = path.parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(path if path.exists() else above, os.W_OK):
        return f"cannot be written: there is no permission to write in {above}. Use another folder."
    return None


def _driver_problem(uri: str) -> str | None:
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except (SQLAlchemyError, ValueError) as error:
        return f"is no URI of a database that can be used here ({_shown(str(error))}). {_ADVICE}"
    except ImportError as error:
        module = error.name or str(error)
        return (
            f"needs the Python package {module!r}, which is not installed. Install the driver of this "
            "database (for PostgreSQL: pip install psycopg2-binary), or name another one (postgresql+DRIVER://…)."
        )
    return None


def _server_warning(uri: str, experiment: str) -> str | None:
    """Why the server does not take requests from here; None if it does."""
    where = f"tracking.uri = {_shown(uri)}"
    later = "Training goes on without it, and the metrics are sent once it"
    try:
        _ask(uri, "/health")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return f"{where} does not answer from here ({reason or type(error).__name__}). {later} answers."
    query = urllib.parse.urlencode({"experiment_name": experiment})
    try:
        _ask(uri, f"/api/2.0/mlflow/experiments/get-by-name?{query}")
    except urllib.error.HTTPError as error:
        return _refusal(where, error, f"{later} does.")
    except (OSError, ValueError, http.client.HTTPException):
        pass  # it was there a moment ago
    return None


def _refusal(where: str, error: urllib.error.HTTPError, later: str) -> str | None:
    """What a server means that answers, but with an error."""
    if error.code == 401:
        return (
            f"{where} asks for a login (401) and does not accept this one. Set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where the job gets its environment. {later}"
        )
    if error.code == 403:
        with error:
            text = error.read(1000).decode(errors="replace")
        cause = (
            "it does not know this host name: start it with --allowed-hosts" if "host" in text.lower() else ""
        )
        return (
            f"{where} refuses requests from here (403): "
            f"{cause or 'the user may not do this, or a proxy is in between'}. {later}"
        )
    return None  # an experiment that does not exist yet is a 404


def _ask(uri: str, path: str) -> None:
    parts = urllib.parse.urlsplit(uri)
    address = urllib.parse.urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", "")
    )
    request = urllib.request.Request(address + path, headers=_login(parts))
    urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()


def _login(parts: urllib.parse.SplitResult) -> dict[str, str]:
    """The header with which MLflow's client logs in."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or urllib.parse.unquote(parts.username or "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or urllib.parse.unquote(parts.password or "")
    if user:
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _shown(text: str) -> str:
    """`text` without the user and the password of a URI in it."""
    return re.sub(r"(^|//)[^/@\s]+@", r"\1…@", text)
