"""Writing files: never half, never another mode or kind of file; and reading them: damage is noticed."""

import errno
import io
import json
import os
import pathlib
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl

from sb3_staq.save_util import atomic_write, check_algorithm, load_pickles, open_archive, save_pickles

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def write(path, content=b"new"):
    with atomic_write(path) as file:
        file.write(content)


def names(folder):
    return sorted(item.name for item in folder.iterdir())


# Writers that are killed, or not. The child opens the file, says so, and goes on when it is told to
CHILD = """
import socket, sys
from sb3_staq.save_util import atomic_write
if len(sys.argv) > 2:
    socket.gethostname = lambda: sys.argv[2]
with atomic_write(sys.argv[1]) as file:
    file.write(b"from the child")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""


class Child:
    def __init__(self, path, *args):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "writing\n"

    def finish(self):
        self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0

    def kill(self):
        self.process.kill()
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL


def test_a_killed_writers_leftovers_go_with_the_next_save(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write(tmp_path / "other")
    for _ in range(2):
        Child(path).kill()
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 3  # the second child has removed what the first left
    write(tmp_path / "other")
    assert len(names(tmp_path)) == 3  # those of another file stay
    write(path)
    assert names(tmp_path) == ["file", "other"]
    assert path.read_bytes() == b"new"


def test_a_living_writer_is_left_alone(tmp_path):
    path = tmp_path / "file"
    child = Child(path)
    write(path)
    assert path.read_bytes() == b"new"
    child.finish()
    assert path.read_bytes() == b"from the child"
    assert names(tmp_path) == ["file"]


def test_another_machines_leftovers_go_when_they_are_old(tmp_path):
    """Locks may not reach another machine, so its files count as dead after a day only."""
    path = tmp_path / "file"
    Child(path, "another machine").kill()
    write(path)
    leftover = next(item for item in tmp_path.iterdir() if item != path)
    hours_ago = time.time() - 23 * 3600
    os.utime(leftover, (hours_ago, hours_ago))
    write(path)
    assert leftover.exists()
    os.utime(leftover, (hours_ago - 2 * 3600,) * 2)
    write(path)
    assert names(tmp_path) == ["file"]


def test_many_writers_at_once(tmp_path):
    """What lies at the path is always what one of them wrote, no save fails, and nothing else is left."""
    path = tmp_path / "file"
    contents = [bytes([i]) * 50_000 for i in range(6)]
    write(path, contents[0])
    errors = []

    def save(content):
        try:
            for _ in range(60):
                write(path, content)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    n_reads = 0
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() in contents
        n_reads += 1
    assert n_reads > 10
    assert errors == []
    assert names(tmp_path) == ["file"]


def test_writers_that_are_taken_for_leftovers_before_they_are_locked(tmp_path, monkeypatch):
    """The moment between creating a file and locking it: another writer removes it, and a second one is made."""
    fcntl = pytest.importorskip("fcntl")
    path, lock, n_removed = tmp_path / "file", fcntl.flock, 0

    def slow_lock(file, how):
        nonlocal n_removed
        if not how & fcntl.LOCK_NB and n_removed < 2:
            n_removed += 1
            write(path, b"from the other")  # locks without delay
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow_lock)
    write(path)
    assert n_removed == 2
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_without_locks(tmp_path, monkeypatch):
    """A file system that has none: only old files are removed."""
    fcntl = pytest.importorskip("fcntl")
    Child(tmp_path / "file").kill()

    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write(tmp_path / "file")
    assert len(names(tmp_path)) == 2
    monkeypatch.setattr("sb3_staq.save_util.fcntl", None)  # as on Windows
    write(tmp_path / "file")
    assert len(names(tmp_path)) == 2
    monkeypatch.undo()
    write(tmp_path / "file")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes(umask, tmp_path):
    """As a plain ``open`` would leave them; at no time is the content of a private file open to others."""
    old_umask = os.umask(umask)
    try:
        (tmp_path / "plain").write_bytes(b"")
        write(tmp_path / "new")
    finally:
        os.umask(old_umask)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    for mode in (0o600, 0o640, 0o666, 0o755):
        os.chmod(tmp_path / "new", mode)
        with atomic_write(tmp_path / "new") as file:
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
            file.write(b"new")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode


def test_pipes_and_devices_are_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    write(tmp_path / "pipe", b"through the pipe")
    reader.join(10)
    assert received == [b"through the pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left"):
        write("/dev/full")


def test_links_stay_links(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")  # there is no file yet
    for content in (b"first", b"second"):
        write(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "file").read_bytes() == content
    assert names(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize("name", ["a" * 251 + ".zip", "ü" * 127, "b" * 255])
def test_long_names(name, tmp_path):
    """As long as file systems take, in bytes; and longer ones fail as with ``open``."""
    for content in (b"first", b"second"):
        write(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == content
    assert names(tmp_path) == [name]
    with pytest.raises(OSError, match="too long"):
        write(tmp_path / f"{name}ü")
    assert names(tmp_path) == [name]


FULL_DISK = """
import resource, sys
from sb3_staq.save_util import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_write(sys.argv[1]) as file:
        file.write(bytes(5000))
except OSError as error:
    print(error)
"""


def test_a_full_disk(tmp_path):
    """The ordinary error; the old file is as it was, and there is nothing beside it."""
    write(tmp_path / "file", b"old")
    result = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path / "file"], capture_output=True, text=True)
    assert "File too large" in result.stdout, result.stderr
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_an_exception_half_way(tmp_path):
    write(tmp_path / "file", b"old")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic_write(tmp_path / "file") as file:
            file.write(b"half")
            raise error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(AS_ROOT, reason="root may write everywhere")
def test_what_must_not_be_written(tmp_path):
    write(tmp_path / "file", b"old")
    (tmp_path / "file").chmod(0o400)
    with pytest.raises(PermissionError):
        write(tmp_path / "file")
    (tmp_path / "file").chmod(0o600)
    tmp_path.chmod(0o500)
    try:
        for name in ("file", "new"):
            with pytest.raises(PermissionError):
                write(tmp_path / name)
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_folder_that_is_a_file(tmp_path):
    write(tmp_path / "file", b"old")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        write(tmp_path / "file" / "below")
    assert names(tmp_path) == ["file"]


# Damage


def flips(data, n):
    """Copies of data with one bit changed, at n places evenly spread."""
    for bit in range(0, 8 * len(data), max(1, 8 * len(data) // n)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        yield bytes(changed)


def test_every_flipped_bit_of_pickles(tmp_path):
    path = tmp_path / "buffer.pkl"
    save_pickles(path, np.arange(5.0), {"extra": [1, 2]})
    array, extra = load_pickles(path)
    assert np.array_equal(array, np.arange(5.0))
    assert extra == {"extra": [1, 2]}
    data = path.read_bytes()
    for changed in flips(data, 8 * len(data)):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"buffer.pkl is damaged: "):
            load_pickles(path)


def test_truncated_files(tmp_path):
    path = tmp_path / "buffer.pkl"
    save_pickles(path, np.arange(5.0))
    data = path.read_bytes()
    length = len(pickle.dumps(np.arange(5.0), protocol=pickle.HIGHEST_PROTOCOL))
    for size in range(len(data)):
        path.write_bytes(data[:size])
        if size == length:
            assert np.array_equal(load_pickles(path)[0], np.arange(5.0))  # just as SB3 would have written it
        else:
            with pytest.raises(ValueError, match=r"buffer.pkl is damaged: "):
                load_pickles(path)


def test_pickles_of_and_for_sb3(tmp_path):
    save_pickles(tmp_path / "ours", {"a": 1}, "more")
    assert names(tmp_path) == ["ours.pkl"]
    assert load_from_pkl(tmp_path / "ours") == {"a": 1}
    save_to_pkl(tmp_path / "theirs.pkl", {"b": 2})
    assert load_pickles(tmp_path / "theirs") == [{"b": 2}]
    with pytest.raises(FileNotFoundError):
        load_pickles(tmp_path / "nothing")


def test_open_files_of_pickles(tmp_path):
    """They stay open and are read from where they are."""
    file = io.BytesIO()
    file.write(b"before")
    save_pickles(file, [1], [2])
    file.seek(6)
    assert load_pickles(file) == [[1], [2]]
    file.seek(6)
    assert load_from_pkl(file) == [1]
    data = bytearray(file.getvalue())
    data[10] ^= 1
    file = io.BytesIO(bytes(data))
    file.seek(6)
    with pytest.raises(ValueError, match=r"the file is damaged: wrong checksum"):
        load_pickles(file)
    assert not file.closed
    os.mkfifo(tmp_path / "pipe.pkl")
    writer = threading.Thread(target=save_pickles, args=(tmp_path / "pipe.pkl", [1], [2]), daemon=True)
    writer.start()
    assert load_pickles(tmp_path / "pipe.pkl") == [[1], [2]]
    writer.join(10)


def test_a_missing_class_is_no_damage(tmp_path):
    save_pickles(tmp_path / "file.pkl", pathlib.Path("x"))
    data = (tmp_path / "file.pkl").read_bytes()
    (tmp_path / "theirs.pkl").write_bytes(data[: data.index(b"\ncrc32")].replace(b"pathlib", b"pathlob"))
    with pytest.raises(ModuleNotFoundError, match="pathlob"):
        load_pickles(tmp_path / "theirs.pkl")


def make_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", "{}" * 10)
        archive.writestr("policy.pth", bytes(range(50)))


def test_every_flipped_bit_of_an_archive(tmp_path):
    """Each is refused, by name, or of no consequence: the members that are found are the right ones."""
    path = tmp_path / "model.zip"
    make_archive(path)
    n_refused, data = 0, path.read_bytes()
    for changed in flips(data, 8 * len(data)):
        path.write_bytes(changed)
        try:
            with open_archive(path) as file, zipfile.ZipFile(file) as archive:
                assert {name: archive.read(name) for name in archive.namelist()} == {
                    "data": b"{}" * 10,
                    "policy.pth": bytes(range(50)),
                }
        except ValueError as error:
            assert "model.zip is damaged: " in str(error)
            n_refused += 1
    assert n_refused > 8 * 70  # the members' contents alone


def test_flipped_bits_of_pytorchs_archive(tmp_path):
    """PyTorch reads more of the directory than Python does."""
    path = tmp_path / "policy.pth"
    tensors = {"a": th.arange(10.0), "b": th.ones(3)}
    th.save(tensors, path)
    data = path.read_bytes()
    start = data.index(b"PK\1\2")
    n_loaded = n_refused = 0
    for changed in flips(data[start:], 1200):
        path.write_bytes(data[:start] + changed)
        try:
            with open_archive(path) as file:
                loaded = th.load(file)
        except (ValueError, RuntimeError):
            n_refused += 1
            continue
        assert all(th.equal(loaded[key], value) for key, value in tensors.items())
        n_loaded += 1
    assert n_refused > n_loaded > 0


def test_no_archive_at_all(tmp_path):
    (tmp_path / "text.zip").write_text("a text")
    with (
        pytest.raises(ValueError, match=r"text.zip is damaged: File is not a zip file"),
        open_archive(tmp_path / "text", "zip"),
    ):
        pass
    with pytest.raises(FileNotFoundError), open_archive(tmp_path / "nothing", "zip"):
        pass


# Other algorithms


def check(file):
    with open_archive(file, "zip") as opened:
        check_algorithm(opened, "Ours", ("memory_size", "other_size"))


@pytest.mark.parametrize(
    "cls, what", [(SAC, "SAC"), (DDPG, "TD3"), (DQN, "DQN"), (PPO, "ActorCriticPolicy"), (A2C, "ActorCriticPolicy")]
)
def test_files_of_other_algorithms(cls, what, tmp_path):
    env = "Pendulum-v1" if cls in (SAC, DDPG) else "CartPole-v1"
    cls("MlpPolicy", env, device="cpu", policy_kwargs=dict(net_arch=[2])).save(tmp_path / "other.zip")
    with pytest.raises(ValueError, match=rf"Invalid path='.*other.zip': expected a model of Ours, got a file.*{what}"):
        check(tmp_path / "other")


def test_files_of_our_own_and_of_nobody(tmp_path):
    for data, is_ours in [
        ({"memory_size": 3}, True),
        ({"other_size": None, "policy_class": {"__module__": "elsewhere"}}, True),
        ({"policy_class": {"__module__": "elsewhere"}}, False),
        ({"size": 3}, False),
        (None, False),
    ]:
        with zipfile.ZipFile(tmp_path / "file.zip", "w") as archive:
            archive.writestr("x", "" if data is None else json.dumps(data))
            if data is not None:
                archive.writestr("data", json.dumps(data))
        if is_ours:
            check(tmp_path / "file.zip")
        else:
            with pytest.raises(ValueError, match="expected a model of Ours, got a"):
                check(tmp_path / "file.zip")
