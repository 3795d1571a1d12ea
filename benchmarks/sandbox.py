"""Runs a program that a model wrote, in a process of its own: `run_program`.

The process has limits of time, memory and files, an empty folder as its working directory, an empty
environment and, if `unshare` may be used, no network. Inside the process, Python's audit hooks refuse what a solution
of a small problem does not need: to open files for writing, to change folders' entries, to start processes, to use
sockets, ctypes or signals. Modules and functions that do such things without telling a hook are taken away. This is a
fence against accidents. It stops no program that is written to break out.

Run as a script, this file is the process: it reads JSON from its standard input (`program`, `word`, `seconds`), runs
the program, and writes the word at the end. So a program that ends early, with whatever status, has not passed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import Any

MOST_BYTES = 2 * 1024**3  # of the process's address space
# Seconds of wall time for a second of processor time: a program that sleeps ends, too, and one that another program
# keeps from running is not called slow.
PATIENCE = 6
# Events of https://docs.python.org/3/library/audit_events.html that are refused, by their beginnings. Those that read
# (os.listdir, os.scandir, open for reading) are allowed: imports need them.
REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.chflags",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
    "os.putenv",
    "pty.spawn",
    "resource.",
    "shutil.",
    "signal.",
    "sqlite3.",
    "syslog.",
    "urllib.Request",
)
_OF_POSIX = (
    "mkfifo",
    "mknod",
    "sched_setaffinity",
    "sched_setparam",
    "sched_setscheduler",
    "setpriority",
)
# Functions that make files, start processes or change others, and of which no hook is told, by their modules.
REMOVED = {
    "os": _OF_POSIX,
    "posix": _OF_POSIX,
    "_posixsubprocess": ("fork_exec",),
    "_signal": ("pidfd_send_signal",),
    "signal": ("pidfd_send_signal",),
    "subprocess": ("_fork_exec",),
}
# Modules that make files, start programs or use a network, and of which no hook is told, and those that run code in
# another interpreter, which has no hooks. They can't be imported.
CLOSED = (
    "_dbm",
    "_gdbm",
    "_interpreters",
    "_multiprocessing",
    "_posixshmem",
    "_posixsubprocess",
    "_testcapi",
    "_testinternalcapi",
    "_tkinter",
    "_xxsubinterpreters",
    "nis",
    "readline",
)


@functools.cache
def network_fence() -> list[str]:
    """The words of a command before which a process has no network; none if `unshare` is missing or not allowed."""
    for words in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        try:
            result = subprocess.run([*words, "true"], capture_output=True, check=False)
        except FileNotFoundError:
            return []
        if result.returncode == 0:
            return words
    return []


def run_program(program: str, seconds: float) -> str:
    """Run a Python program in a process of its own; returns "passed", "timed out", or what went wrong.

    "passed" means that the program's last statement was executed. A program that raises, exits or is killed before has
    not passed. The process is killed after `seconds` of processor time, and with those that it may have started after
    `PATIENCE` times as many of wall time.
    """
    word = secrets.token_hex(16)
    question = json.dumps({"program": program, "word": word, "seconds": seconds})
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*network_fence(), sys.executable, "-I", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            text=True,
        )
        try:
            output, _ = process.communicate(question, timeout=PATIENCE * seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            # the session outlives its first process if the program started others
            _kill_session(process)
    if output == word:
        return "passed"
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timed out"
    return output.replace(word, "").strip() or f"exit status {process.returncode}"


def _kill_session(process: subprocess.Popen[str]) -> None:
    """Kill a process and all of its session, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None and not stream.closed:
            stream.close()


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: raise PermissionError for what `REFUSED` names, and for opening a file that may be written."""
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open":
        _, mode, flags = arguments
        writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        writes_by_flags = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if writes or writes_by_flags:
            raise PermissionError("files can't be written here")


def _close_modules() -> None:
    """Take functions and modules of which no audit hook is told (`REMOVED`, `CLOSED`) away from this process."""
    for name, functions in REMOVED.items():
        module = sys.modules.get(name)
        for function in functions:
            if hasattr(module, function):  # they depend on the version of Python and the system
                delattr(module, function)
    for name in CLOSED:
        # an import statement raises ModuleNotFoundError
        sys.modules[name] = None  # type: ignore[assignment]


def _main() -> None:
    """Run the program that standard input names, with limits, and write its word or the error to standard output."""
    import resource

    question = json.load(sys.stdin)
    # Each limit is a pair. At the first number the system sends a signal or refuses; the second can't be raised again.
    seconds = math.ceil(question["seconds"])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # bytes of a file that is written
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    # What the program prints goes nowhere: the word goes through a descriptor of its own.
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)

    _close_modules()
    sys.addaudithook(_refuse)
    try:
        code = compile(question["program"], "program.py", "exec")
        exec(code, {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: it is no success
        os.write(answer, f"{type(error).__name__}: {error}"[:300].encode(errors="replace"))
        os._exit(1)
    os.write(answer, question["word"].encode())
    os._exit(0)


if __name__ == "__main__":
    _main()
