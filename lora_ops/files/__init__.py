"""Files: one checked reader, one atomic writer."""

from .format import CHECKPOINT, LORA, Entry, Header, Identity, Limits
from .reading import TensorFile, identity, read, read_header, read_tensors, sha256
from .writing import write

__all__ = [
    "CHECKPOINT",
    "LORA",
    "Entry",
    "Header",
    "Identity",
    "Limits",
    "TensorFile",
    "identity",
    "read",
    "read_header",
    "read_tensors",
    "sha256",
    "write",
]
