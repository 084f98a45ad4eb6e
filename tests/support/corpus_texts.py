"""The texts of a corpus alone, for tests that look at nothing else of its documents."""

from collections.abc import Iterator
from typing import Any

from leangrid.data.corpora import read_documents


def read_texts(name: str, **options: Any) -> Iterator[str]:
    """The texts of ``read_documents(name, **options)``."""
    return (document.text for document in read_documents(name, **options))
