"""Write a file in one step: whoever reads it, or whatever kills the writer, finds the older file or the new one."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from threading import get_native_id


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file, which takes the place of an older one only once it is complete and on the disk.

    A symbolic link stays, and the file that it names is replaced. A new file gets the mode that ``open`` would give it,
    by the umask; an older one keeps its mode. On Linux the unfinished file has no name until it is complete, so that a
    process that is killed leaves nothing behind. What one leaves behind on other systems, a later write to the same
    folder removes.

    Args:
        path: the path of the file.
        data: its contents.

    Raises:
        OSError: if the file cannot be written, or the path is that of a directory, a device, or anything else that is
            no regular file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(f"{folder}/file", b"old")
        ...     write_atomically(f"{folder}/file", b"new")
        ...     os.listdir(folder), Path(f"{folder}/file").read_bytes()
        (['file'], b'new')
    """
    target = Path(os.path.realpath(path))
    mode = _mode_of(target)
    _remove_leftovers(target.parent)
    unfinished = target.parent / f".pyroflows-{os.getpid()}-{get_native_id()}.tmp"
    try:
        with os.fdopen(_new_file(unfinished), "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            if not unfinished.exists():
                # Only with a descriptor of a folder does Python follow the link that names an open file.
                folder = os.open(target.parent, os.O_RDONLY)
                try:
                    os.link(f"/proc/self/fd/{file.fileno()}", unfinished.name, dst_dir_fd=folder)
                finally:
                    os.close(folder)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync(target.parent)


def _mode_of(target: Path) -> int | None:
    """The mode of an older file; None if there is none."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{target} is no regular file, and is not replaced")
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{target} is read-only")
    return stat.S_IMODE(found.st_mode)


def _new_file(path: Path) -> int:
    """Open a file without a name in the folder of a path; one of this path where the system has no such files."""
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").exists():
        with suppress(OSError):
            return os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of processes that no longer run."""
    for path in folder.glob(".pyroflows-*-*.tmp"):
        with suppress(OSError, ValueError):
            if not _is_running(int(path.name.split("-")[1])):
                path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(folder: Path) -> None:
    """Put the new name of a file on the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
