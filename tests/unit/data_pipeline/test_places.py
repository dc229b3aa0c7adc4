"""Names, paths and URLs as users write them: what is refused, and in which words."""

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.places import path_problem, shown, text_problem, url_problem, without_credentials
from data_pipeline.remote import find_store


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("runs/mine", None),
        ("läufe/データ with spaces", None),
        ("a\nb", "it has the control character \\n"),
        ("a\0b", "it has the control character \\x00"),
        ("a\x1b[2Jb", "it has the control character \\x1b"),
        ("a\u2028b", "it has the control character \\u2028"),
        ("a\udcffb", "it has the byte 0xff, which is not UTF-8"),
        ("a\ud800b", "it has the control character \\ud800"),
    ],
)
def test_text_that_cannot_be_a_name_is_refused(text: str, problem: str | None) -> None:
    assert text_problem(text) == problem
    assert path_problem(text) == problem
    assert url_problem(text) == problem
    shown(text).encode()
    assert shown(text).isprintable()


def test_paths_that_linux_refuses_are_refused_by_their_length() -> None:
    assert path_problem("ä" * 127) is None
    assert (path_problem(f"a/{'ä' * 128}") or "").endswith("has 256 bytes; a file name has at most 255")
    assert path_problem("/a" * 2047) is None
    assert path_problem("/a" * 2048) == "it has 4096 bytes; a path has at most 4095"
    assert shown("x" * 300) == f"{'x' * 120}… (300 characters)"


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:5000",
        "https://[::1]:5000/mlflow",
        "sqlite:////data/mlflow.db",
        "postgresql://me@host/db",
        "s3://bucket/a@b",
        "s3://arn:aws:s3:us-west-2:1:accesspoint/mine/runs@v2",
        "https://host/path@v2",
        "hf://datasets/me/mine@main/x.parquet",
        "github://org:repository@main/data",
        "sftp://me@host/runs",
        "databricks",
        "no/url@all:at",
    ],
)
def test_ordinary_urls_pass(url: str) -> None:
    assert url_problem(url) is None


@pytest.mark.parametrize(
    "url",
    ["http://localhost:5000x", "http://localhost:0", "http://localhost:70000", "http://", "http://[::1"],
)
def test_a_url_without_a_host_or_with_a_wrong_port_is_refused(url: str) -> None:
    assert url_problem(url) == "it is not of the form http://HOST:PORT, with a port from 1 to 65535"


def test_a_url_with_a_space_is_refused() -> None:
    assert url_problem("http://my host:5000") == "it has a space"


@pytest.mark.parametrize(
    ("url", "carrier"),
    [
        ("https://me:hunter2@host/mlflow", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("https://hunter2@host/mlflow", "MLFLOW_TRACKING_TOKEN"),
        ("http://me:hun/ter2@host", "MLFLOW_TRACKING_USERNAME"),
        ("http://me:hun#ter2@host", "MLFLOW_TRACKING_USERNAME"),
        ("https://host/?token=hunter2", "MLFLOW_TRACKING_TOKEN"),
        ("postgresql+psycopg2://me:hunter2@host/db", "PGPASSWORD"),
        ("postgresql://host/db?password=hunter2", "PGPASSWORD"),
        ("mysql+pymysql://me:hunter2@host/db", "read_default_file"),
        ("s3://key:hunter2@bucket/runs", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("gcs://me:hunter2@bucket/runs", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("sftp://me:hunter2@host/runs", "the store's own environment variables"),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str, carrier: str) -> None:
    problem = url_problem(url)
    assert problem is not None and problem.startswith("it has credentials in it")
    assert carrier in problem
    for text in (problem, without_credentials(url)):
        assert "hunter2" not in text and "ter2" not in text


def test_a_store_is_not_asked_with_credentials_in_its_url() -> None:
    with pytest.raises(ConfigError, match=r"^memory://…@place: it has credentials in it"):
        find_store("memory://me:hunter2@place")
