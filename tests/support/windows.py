"""A process that lacks what Windows lacks and refuses what Windows refuses: `python windows.py COMMAND...`.

It runs moe2gguf without the modules and functions of Unix, and without llama.cpp: four commands that work on Windows
do not need it, and Python on Unix starts no process without these functions. It also opens no folder, flushes no file
that was opened for reading only, and neither replaces nor removes a file that is open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

MODULES = ("fcntl", "grp", "llama_cpp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
OS = (
    *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "chown", "fork", "geteuid", "getloadavg", "getuid"),
    *("mkfifo", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity", "setsid"),
)
SIGNALS = ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1")
SOCKETS = ("AF_UNIX", "recv_fds", "send_fds")


def become_windows() -> None:
    """Change this process."""
    if_writable, opened, flushed = fcntl.fcntl, os.open, os.fsync

    def open_file(path: Any, *arguments: Any, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *arguments, **more)

    def flush(descriptor: int) -> None:
        if if_writable(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flushed(descriptor)

    os.open, os.fsync = open_file, flush  # type: ignore[assignment]
    os.replace, os.rename = _with_closed(os.replace), _with_closed(os.rename)
    os.unlink, os.remove = _with_closed(os.unlink), _with_closed(os.remove)
    os.stat, os.lstat, os.fstat = _without_blocks(os.stat), _without_blocks(os.lstat), _without_blocks(os.fstat)
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    for module, names in ((os, OS), (signal, SIGNALS), (socket, SOCKETS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]


def _with_closed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses files that this process has open."""

    def refuse_open(*paths: Any, **more: Any) -> Any:
        names = {os.path.realpath(path) for path in paths}
        for link in os.listdir("/proc/self/fd"):
            try:
                place = os.readlink(f"/proc/self/fd/{link}")
            except OSError:
                continue
            if place in names:
                raise PermissionError(errno.EACCES, "it is used by another process", place)
        return function(*paths, **more)

    return refuse_open


def _without_blocks(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose result has no number of blocks."""

    def look(*arguments: Any, **more: Any) -> Any:
        found = function(*arguments, **more)
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        fields.pop("st_blocks")
        return SimpleNamespace(**fields) if not stat.S_ISLNK(found.st_mode) else found

    return look


if __name__ == "__main__":
    become_windows()
    from moe2gguf.cli import main

    main()
