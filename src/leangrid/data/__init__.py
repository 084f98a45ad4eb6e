"""Text in, token windows out: where calibration and evaluation text comes from and how it is cut."""

from leangrid.data.calibration import decoded_start, windows, windows_hash
from leangrid.data.corpora import documents, joined, texts
from leangrid.data.documents import Reading
from leangrid.data.sampling import sample, stream

__all__ = ["Reading", "decoded_start", "documents", "joined", "sample", "stream", "texts", "windows", "windows_hash"]
