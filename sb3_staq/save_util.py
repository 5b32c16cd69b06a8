"""Saving that never leaves a half-written file, and loading that notices damage."""

import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from stable_baselines3.common.save_util import open_path

PathOrFile = str | pathlib.Path | io.BufferedIOBase
# Begins the checksum behind a pickle, which unpickling does not reach
TRAILER = b"\nsha256:"


@contextmanager
def atomic_write(path: PathOrFile, suffix: str = "") -> Iterator[Any]:
    """
    Open a file for writing that replaces ``path`` in one step once it is complete.

    If the process fails or is killed half-way, the old file stays as it was; only a kill leaves a temporary file. An
    existing file keeps its mode, and a link stays a link. Pipes and devices are written to directly. Other paths are
    completed as in SB3: a missing suffix is added, missing folders are created, and a folder's name gets ``_2``.

    :param path: the file to write; an open file is written to as it is
    :param suffix: suffix for a path that has none, without the dot
    :return: context manager giving the open file
    """
    if not isinstance(path, (str, pathlib.Path)):
        yield path
        return
    path = pathlib.Path(path)
    if path.suffix == "" and suffix and not _is_special(path):
        path = pathlib.Path(f"{path}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2")
        path = pathlib.Path(f"{path}_2")
    path = pathlib.Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_special(path):
        with open(path, "wb") as file:
            yield file
        return
    if path.exists():
        open(path, "ab").close()  # refuses a file that is read-only
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # after closing, as Windows asks for
    finally:
        temporary.unlink(missing_ok=True)


def _is_special(path: pathlib.Path) -> bool:
    """Return whether this is a pipe or a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


class _HashingFile:
    """Passes what is written on to a file, and keeps its checksum."""

    def __init__(self, file: Any):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: Any) -> None:
        self.hash.update(data)
        self.file.write(data)


def dump_checked(value: Any, file: Any) -> None:
    """Pickle a value into an open file, followed by a checksum that later shows whether it is complete."""
    hashing_file = _HashingFile(file)
    pickle.dump(value, hashing_file, pickle.HIGHEST_PROTOCOL)
    file.write(TRAILER + hashing_file.hash.hexdigest().encode())


def check_pickle(path: PathOrFile, suffix: str = "") -> None:
    """
    Compare a pickle with its checksum. Files without one, such as SB3's, are not checked.

    :raise ValueError: if it is damaged
    """
    with _opened(path, suffix) as file:
        start = file.tell()
        left = file.seek(0, os.SEEK_END) - start - len(TRAILER) - 64
        file.seek(start + max(0, left))
        trailer, digest = file.read(), hashlib.sha256()
        file.seek(start)
        if trailer.startswith(TRAILER):
            for done in range(0, left, 2**24):
                digest.update(file.read(min(left - done, 2**24)))
            file.seek(start)
            if trailer != TRAILER + digest.hexdigest().encode():
                raise ValueError(f"{file_name(path)} is damaged: its contents do not fit its checksum")


@contextmanager
def open_archive(path: PathOrFile, suffix: str = "") -> Iterator[Any]:
    """
    Open a zip file, such as a model or a policy, if all its members match their checksums.

    :return: context manager giving the open file
    :raise ValueError: if it is damaged
    """
    with _opened(path, suffix) as file:
        start = file.tell()
        try:
            with zipfile.ZipFile(file) as archive:
                _check_archive(file, archive)
        except MemoryError:
            raise
        except Exception as error:  # of many kinds, since damage may be anywhere
            raise ValueError(f"{file_name(path)} is damaged: {error}") from error
        finally:
            file.seek(start)
        yield file


def _check_archive(file: Any, archive: zipfile.ZipFile) -> None:
    bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"the contents of {bad!r} do not fit their checksum")
    for info in archive.infolist():  # PyTorch silently reads nothing from a folder
        if info.external_attr & 0x10 and not info.is_dir():
            raise ValueError(f"its member {info.filename!r} is a folder")
    # If the end is missing, an archive inside may provide one; a wrong length in the directory hides later members
    file.seek(-22 - len(archive.comment), os.SEEK_END)
    end = file.read()
    n_members = int.from_bytes(end[10:12], "little")  # 0xFFFF if the number is elsewhere
    if not end.startswith(b"PK\5\6") or n_members not in (len(archive.infolist()), 0xFFFF):
        raise ValueError("members at its end are missing")


def read_data(file: Any) -> dict[str, Any]:
    """Read the data of a model from its open zip file, without unpickling anything; empty if it is no model."""
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read("data")) if "data" in archive.namelist() else {}


def file_name(path: PathOrFile) -> str:
    """Return the path of a file for messages, or "the file" if it has none."""
    return str(path) if isinstance(path, (str, pathlib.Path)) else str(getattr(path, "name", "the file"))


def _opened(path: PathOrFile, suffix: str) -> Any:
    """Open a file, found in the same way as SB3 does; an open one stays open."""
    return open_path(path, "r", suffix=suffix) if isinstance(path, (str, pathlib.Path)) else nullcontext(path)
