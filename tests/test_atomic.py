"""Files that are written in one step: their modes, what they replace, and what a killed process leaves."""

import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest

import pyroflows as pf
from pyroflows import atomic
from pyroflows.archive import write_archive
from pyroflows.atomic import write_atomically

is_root = os.geteuid() == 0


@pytest.fixture(params=["without a name", "by name"])
def path(request, tmp_path, monkeypatch):
    """On systems that have no files without a name, an unfinished file has one of its own."""
    if request.param == "by name":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return tmp_path / "file"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_of_the_umask(path, umask):
    before = os.umask(umask)
    try:
        write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert mode(path) == 0o666 & ~umask


@pytest.mark.parametrize("kept", [0o600, 0o664, 0o755])
def test_an_older_file_keeps_its_mode(path, kept):
    path.write_bytes(b"old")
    path.chmod(kept)
    write_atomically(path, b"new")
    assert mode(path) == kept and path.read_bytes() == b"new"


@pytest.mark.parametrize("has_target", [True, False])
def test_a_link_stays_and_its_target_is_replaced(path, tmp_path, has_target):
    target = tmp_path / "other" / "target"
    target.parent.mkdir()
    if has_target:
        target.write_bytes(b"old")
    path.symlink_to("other/target")
    write_atomically(path, b"new")
    assert path.is_symlink() and os.readlink(path) == "other/target"
    assert target.read_bytes() == b"new" and not target.is_symlink()
    assert os.listdir(target.parent) == ["target"] and sorted(os.listdir(tmp_path)) == ["file", "other"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    flow = pf.flows.Gaussian(2)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to("/dev/null")
    before = sorted(os.listdir(tmp_path))
    for name in before:
        with pytest.raises(pf.CheckpointError, match="cannot be written"):
            flow.save(tmp_path / name)
    with pytest.raises(pf.CheckpointError, match="/dev/null is no regular file, and is not replaced"):
        flow.save("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", ["no folder/file", "a\0b", "x" * 300])
def test_an_impossible_path_is_an_error(name, tmp_path):
    with pytest.raises(pf.CheckpointError, match="cannot be written"):
        pf.flows.Gaussian(2).save(tmp_path / name)
    with pytest.raises(pf.CheckpointError):
        pf.load_flow(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(is_root, reason="root may read and write everything")
def test_files_without_permission(tmp_path):
    path = tmp_path / "flow"
    pf.flows.Gaussian(2).save(path)
    path.chmod(0o400)
    with pytest.raises(pf.CheckpointError, match="read-only"):
        pf.flows.Gaussian(2).save(path)
    path.chmod(0)
    with pytest.raises(pf.CheckpointError):
        pf.load_flow(path)


def test_a_fifo_is_no_file_to_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(pf.CheckpointError, match="there is no file"):
        pf.load_flow(tmp_path / "fifo")


def test_file_and_folder_are_put_on_the_disk(path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(stat.S_IFMT(os.fstat(fd).st_mode)), fsync(fd)))
    write_atomically(path, b"new")
    assert synced == [stat.S_IFREG, stat.S_IFDIR]


def test_a_write_that_fails_leaves_the_older_file_alone(path, monkeypatch):
    path.write_bytes(b"old")

    def full(fd):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(pf.CheckpointError, match="no space left"):
        write_archive(path, "flow", 1, {}, {})
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]


def test_what_a_dead_process_left_is_removed(path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, of_others = (path.parent / f".pyroflows-{pid}-7.tmp" for pid in (dead.pid, os.getppid()))
    left.touch()
    of_others.touch()
    write_atomically(path, b"new")
    assert not left.exists() and of_others.exists()


SAVING = """
import runpy, sys
write_atomically = runpy.run_path(sys.argv[2])["write_atomically"]
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        write_atomically(sys.argv[1], letter * 200_000)
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_or_the_new_file_whole(tmp_path):
    path = tmp_path / "file"
    generator = random.Random(0)
    # Without the import of the package, and of torch, a child starts at once.
    command = [sys.executable, "-c", SAVING, str(path), atomic.__file__]
    for _ in range(20):
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0.0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if path.exists():
            assert path.read_bytes() in (b"a" * 200_000, b"b" * 200_000)
        # A kill between two calls of the system, microseconds apart, leaves a file that the next write removes.
        assert all(name.startswith(".pyroflows-") for name in set(os.listdir(tmp_path)) - {"file"})
    write_atomically(path, b"last")
    assert os.listdir(tmp_path) == ["file"]
