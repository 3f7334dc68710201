"""Files: one checked reader, one atomic writer."""

from .folder import write_folder
from .format import LORA_HEADER, Entry, Header, Identity
from .reading import TensorFile, identity, read, read_header, read_tensors, read_text, sha256, stated_hash, tensor_hash
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
    "read_text",
    "sha256",
    "stated_hash",
    "tensor_hash",
    "write",
    "write_folder",
]
