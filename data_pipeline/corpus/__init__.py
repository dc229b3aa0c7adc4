"""The packaged corpus: README.md here states its source and status."""
