"""Files that are never left half written, and whose damage is noticed."""

import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import secrets
import socket
import stat
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from stable_baselines3.common.save_util import open_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

File = str | pathlib.Path | io.BufferedIOBase
# A temporary file that nobody has written to for so long is nobody's, in seconds
_MAX_AGE = 24 * 3600
# Ends a file of pickles, followed by their CRC-32 (4 bytes, little-endian)
_TRAILER = b"\ncrc32: "
# Length of what ends a zip
_DIRECTORY_END = 22


# Writing


@contextmanager
def atomic_write(path: File, suffix: str = "") -> Iterator[Any]:
    """
    Open a file for writing that replaces ``path`` in one step once it is complete.

    A process that fails or is killed half-way leaves the old file as it was; the next save removes what it left. The
    path is completed as SB3 does: a missing suffix is added, missing folders are created, and a folder's name gets
    ``_2``. A file that is replaced keeps its mode. Pipes and devices are written to.

    :param path: the file to write; an open file is written to as it is
    :param suffix: suffix for a path that has none, without the dot
    :return: context manager giving the open file
    :raise OSError: as for any file that cannot be written
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
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    path = pathlib.Path(os.path.realpath(path))  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = None
    with suppress(FileNotFoundError), open(path, "r+b") as old:  # refuses what must not be written, as a plain open
        mode = stat.S_IMODE(os.fstat(old.fileno()).st_mode)
    temporary, file = _open_temporary(path)
    try:
        with file:
            if mode is not None:
                os.chmod(temporary, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows replaces no open file
            os.replace(temporary, path)  # before the lock goes with the file
    finally:
        temporary.unlink(missing_ok=True)


def _open_temporary(path: pathlib.Path) -> tuple[pathlib.Path, Any]:
    """A new file in the same folder, locked for as long as it is open; removes those that dead processes left."""
    prefix = f".tmp-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"  # short enough for any name
    host = f"{prefix}{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
    with suppress(OSError):
        for leftover in path.parent.iterdir():
            if leftover.name.startswith(prefix):
                with suppress(OSError):  # locked, or gone meanwhile
                    _remove_if_dead(leftover, leftover.name.startswith(host))
    while True:
        temporary = path.with_name(f"{host}{secrets.token_hex(8)}")
        file = open(temporary, "x+b")
        if fcntl is not None:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, file
        file.close()  # another writer came between the two lines and took it for a leftover


def _remove_if_dead(leftover: pathlib.Path, is_local: bool) -> None:
    """Remove a temporary file that is old, or of this machine and not locked: locks may not reach other machines."""
    with open(leftover, "r+b") as file:
        if time.time() - os.fstat(file.fileno()).st_mtime < _MAX_AGE:
            if fcntl is None or not is_local:
                return
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        leftover.unlink()


# Damage


@contextmanager
def _open(path: File, suffix: str) -> Iterator[Any]:
    """Open a file for reading, as SB3 does; an open file stays open."""
    file = open_path(path, "r", suffix=suffix)
    try:
        yield file if file.seekable() else io.BytesIO(file.read())
    finally:
        if file is not path:
            file.close()


@contextmanager
def naming_damage(file: Any) -> Iterator[None]:
    """
    Turn whatever a damaged file leads to into one error. A class that is missing here is no damage.

    :param file: the open file
    :raise ValueError: "PATH is damaged: ..."
    """
    try:
        yield
    except (ImportError, AttributeError):
        raise
    except Exception as error:
        raise ValueError(f"{file_name(file)} is damaged: {error or type(error).__name__}") from error


def file_name(file: Any) -> str:
    """The path of a file, open or not, for messages."""
    return str(file if isinstance(file, (str, pathlib.Path)) else getattr(file, "name", "the file"))


@contextmanager
def open_archive(path: File, suffix: str = "") -> Iterator[Any]:
    """
    Open a zip file for reading if all its members have their checksums.

    :param path: the file; an open file is read from its start
    :param suffix: suffix that is tried if there is no such file, without the dot
    :return: context manager giving the open file
    :raise ValueError: "PATH is damaged: ..."
    """
    with _open(path, suffix) as file:
        with naming_damage(file), zipfile.ZipFile(file) as archive:
            _check_archive(file, archive)
        file.seek(0)
        yield file


def _check_archive(file: Any, archive: zipfile.ZipFile) -> None:
    """Refuse a zip file of which some reader would take a part for another."""
    damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of its member {damaged}")
    # PyTorch reads nothing from a folder, and says nothing
    folders = [info.filename for info in archive.infolist() if info.external_attr & 0x10 and not info.is_dir()]
    if folders:
        raise zipfile.BadZipFile(f"its member {folders[0]} is a folder")
    # A wrong length in the directory hides the members behind it. The number is 0xFFFF if it is elsewhere
    file.seek(-_DIRECTORY_END, os.SEEK_END)
    end = file.read()
    n_members = int.from_bytes(end[10:12], "little")
    if end.startswith(b"PK\5\6") and n_members not in (len(archive.infolist()), 0xFFFF):
        raise zipfile.BadZipFile(f"{len(archive.infolist())} of {n_members} members found")


def check_algorithm(file: Any, algorithm: str, arguments: Iterable[str]) -> None:
    """
    Refuse the model of another algorithm, without unpickling anything.

    :param file: a model's zip, open for reading
    :param algorithm: the name of the algorithm that is expected
    :param arguments: arguments of that algorithm alone; its files have at least one of them
    :raise ValueError: says what the file is
    """
    with naming_damage(file), zipfile.ZipFile(file) as archive:
        data = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
    file.seek(0)
    if any(argument in data for argument in arguments):
        return
    found = "a zip without a model's arguments"
    if "policy_class" in data:
        # SB3 writes down the attributes of pickled objects as text
        module = str(data["policy_class"].get("__module__"))
        name = re.search(r"<function (\w+)\.__init__", str(data["policy_class"].get("__init__")))
        library, _, rest = module.partition(".")
        package = rest.split(".")[0]
        policy = f"{module}.{name.group(1)}" if name else module
        known = library in ("stable_baselines3", "sb3_contrib") and package != "common"
        found = (
            f"a file of {package.upper()} (policy_class {policy})" if known else f"a file with policy_class {policy}"
        )
    raise ValueError(f"Invalid path={file_name(file)!r}: expected a model of {algorithm}, got {found}")


class _ChecksumWriter(io.BufferedIOBase):
    def __init__(self, file: Any):
        self.file, self.checksum = file, 0

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)


def save_pickles(path: File, *objects: Any) -> None:
    """
    Save objects one after the other, with a checksum behind them. Others' ``pickle.load`` reads the first.

    :param path: the file, "pkl" if it has no suffix
    :param objects: what to save
    """
    with atomic_write(path, "pkl") as file:
        writer = _ChecksumWriter(file)
        for item in objects:
            pickle.dump(item, writer, protocol=pickle.HIGHEST_PROTOCOL)
        file.write(_TRAILER + writer.checksum.to_bytes(4, "little"))


def load_pickles(path: File) -> list[Any]:
    """
    Load the objects of :func:`save_pickles`, or the first of a file without a checksum.

    :param path: the file
    :return: the objects
    :raise ValueError: "PATH is damaged: ..."
    """
    objects: list[Any] = []
    with _open(path, "pkl") as file:
        with naming_damage(file):
            end = _check_trailer(file)
            if end is None:  # SB3's own file, or one that was cut off
                objects.append(pickle.load(file))
                if file is not path and file.read(1):
                    raise ValueError("its checksum is missing")
                return objects
        while file.tell() < end:
            objects.append(pickle.load(file))
        return objects


def _check_trailer(file: Any) -> int | None:
    """Where the pickles of a file end, None if it has no checksum."""
    start = file.tell()
    end = file.seek(0, os.SEEK_END) - len(_TRAILER) - 4
    file.seek(max(start, end))
    trailer = file.read()
    file.seek(start)
    if end < start or not trailer.startswith(_TRAILER):
        return None
    checksum, left = 0, end - start
    while left > 0:
        chunk = file.read(min(left, 2**20))
        checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    if checksum != int.from_bytes(trailer[len(_TRAILER) :], "little"):
        raise ValueError("wrong checksum")
    file.seek(start)
    return end
