"""Files: one checked reader, one atomic writer."""

from .format import LORA_HEADER, Entry, Header, Identity
from .reading import TensorFile, identity, read, read_header, read_tensors, sha256
from .writing import write

__all__ = [
    "LORA_HEADER",
    "Entry",
    "Header",
    "Identity",
    "TensorFile",
    "identity",
    "read",
    "read_header",
    "read_tensors",
    "sha256",
    "write",
]
