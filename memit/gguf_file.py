"""Language models in GGUF files, the format of llama.cpp, read with transformers and `gguf`.

Quantised weights become matrices of the dtype that is asked for; the file itself never changes.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from transformers import modeling_gguf_pytorch_utils as loader
from transformers.utils.import_utils import is_gguf_available

from memit.errors import InputError, IntegrityError


def quantisation(path: Path) -> str:
    """How most weights of a GGUF file are stored, such as Q4_1 or F32.

    Raises:
        InputError, IntegrityError: see `read_header`.
    """
    numbers: Counter[str] = Counter()
    for tensor in read_header(path).tensors:
        numbers[tensor.tensor_type.name] += tensor.n_elements
    return numbers.most_common(1)[0][0]


def read_header(path: str | Path) -> Any:
    """The `gguf.GGUFReader` of a file, whose tensors are all in it; no weight is read.

    Raises:
        InputError: it is no GGUF file, or the package `gguf` is missing.
        IntegrityError: it is damaged, cut short, or one of several parts.
    """
    if not is_gguf_available():
        raise InputError(f"{path} is read with the package gguf: pip install gguf.")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is neither a model directory nor a GGUF file: name one.")
        state = os.fstat(file.fileno())
    try:
        reader = _read(os.path.abspath(path), state.st_mtime_ns, state.st_size)
        parts = reader.fields.get("split.count")
        if not reader.tensors or (parts is not None and parts.contents() > 1):
            raise ValueError("parts of a model are joined with gguf-split")
    except Exception as error:  # the reader raises whatever damaged numbers lead to
        raise IntegrityError(f"{path} is damaged or in parts ({error}): fetch it again.") from error
    return reader


@lru_cache(maxsize=1)
def _read(path: str, _changed: int, _size: int) -> Any:
    from gguf.gguf_reader import GGUFReader  # not on every image

    class Reader(GGUFReader):
        """Reads a plain view of the file: slices of a memory map take four times as long."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    reader = Reader(path)
    for name in ("merges", "scores", "token_type"):  # long lists, which tokenizers read themselves
        reader.fields.pop(f"tokenizer.ggml.{name}", None)
    return reader


@contextmanager
def opened(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What `from_pretrained` takes to read a model: a name or a directory, and a GGUF file in it.

    While it reads a file, transformers neither parses the header again nor maps names once per
    module, which takes four times as long as the rest. Nothing beside the file counts.
    """
    if not os.path.isfile(source):
        yield str(source), {}
        return
    read_header(source)
    import gguf  # not on every image

    quick = {"GGUFReader": read_header, "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
    with (
        patch.multiple(gguf, **quick),
        patch.object(loader, "tqdm", lambda tensors, **_: tensors),
        TemporaryDirectory() as empty,
    ):
        yield empty, {"gguf_file": os.path.abspath(source)}
