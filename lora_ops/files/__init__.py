"""Files: one checked reader, one atomic writer."""

from .folder import Files, write_folder, write_folder_numbered
from .format import LORA_HEADER, Entry, Header, Identity
from .reading import (
    TensorFile,
    identity,
    read,
    read_header,
    read_rows,
    read_tensors,
    read_text,
    sha256,
    stated_hash,
    tensor_hash,
)
from .writing import Lazy, Progress, meter, write, write_numbered, write_text

__all__ = [
    "LORA_HEADER",
    "Entry",
    "Files",
    "Header",
    "Identity",
    "Lazy",
    "Progress",
    "TensorFile",
    "identity",
    "meter",
    "read",
    "read_header",
    "read_rows",
    "read_tensors",
    "read_text",
    "sha256",
    "stated_hash",
    "tensor_hash",
    "write",
    "write_folder",
    "write_folder_numbered",
    "write_numbered",
    "write_text",
]
