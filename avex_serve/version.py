"""The version, in one place: a bento carries the package's files without its metadata."""

__version__ = "0.1.0"
