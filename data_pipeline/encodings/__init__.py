"""The packaged encodings. README.md says how each was made."""
