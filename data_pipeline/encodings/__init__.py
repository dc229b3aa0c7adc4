"""Encodings that ship with the project: README.md here says how each was made."""
