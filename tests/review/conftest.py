"""A results store to review."""

from tests.archive.conftest import archive, bundles, command  # noqa: F401
