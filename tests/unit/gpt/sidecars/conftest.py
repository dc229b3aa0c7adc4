"""Fixtures of the tests of the sidecars."""

from tests.unit.gpt.sidecars.support import empty_database, run_dir, server

__all__ = ["empty_database", "run_dir", "server"]
