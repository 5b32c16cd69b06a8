"""Saving that never leaves half a file behind."""

import io
import os
import pathlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def atomic_write(path: str | pathlib.Path | io.BufferedIOBase, suffix: str = "") -> Iterator[Any]:
    """
    Open a file for writing that replaces ``path`` in one step once it is complete: a process that fails or is killed
    half-way leaves the old file as it was. The path is completed as SB3 does: a missing suffix is added, missing
    folders are created, and a folder's name gets ``_2``.

    :param path: the file to write; an open file is written to as it is
    :param suffix: suffix for a path that has none, without the dot
    :return: context manager giving the open file
    """
    if not isinstance(path, (str, pathlib.Path)):
        yield path
        return
    path = pathlib.Path(path)
    if path.suffix == "" and suffix:
        path = pathlib.Path(f"{path}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2")
        path = pathlib.Path(f"{path}_2")
    path = pathlib.Path(os.path.realpath(path))  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
