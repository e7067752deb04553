"""Python programs without their imports, which take most of the time of a short one.

They are forks of a process that has imported everything, one for all processes of a test session.
"""

import gc
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import import_module, reload
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import FileLock

import tests

IMPORTED = ("tests.acceptance.project", "mlflow", "dvc.cli")


class Forked:
    """A command of Python's, in a session of its own; otherwise like `subprocess.Popen`.

    The code is that of `ROOT`, which must be the project's.
    """

    def __init__(
        self, words: Sequence[str], cwd: Path, env: Mapping[str, str], stdout: IO[Any], **_: Any
    ) -> None:
        self.words = words[1:] if words[0] == sys.executable else ["-m", *words]
        self.connection = Client(_address())
        self.connection.send((self.words, cwd, dict(env), stdout.name))
        self.pid: int = self.connection.recv()
        self.status: int | None = None

    def poll(self, timeout: float | None = 0.0) -> int | None:
        """Its exit status if it has ended."""
        if self.status is None and self.connection.poll(timeout):
            self.status = self.connection.recv()
        return self.status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; gives its exit status."""
        status = self.poll(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(list(self.words), timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


def _address() -> str:
    """Where the process listens; it ends with the tests."""
    address = tests.session / "forks"
    with FileLock(tests.session / "forks.lock"):
        if not address.exists():
            owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
            words = [sys.executable, "-m", __name__, str(address), str(owner)]
            none = subprocess.DEVNULL
            process = subprocess.Popen(
                words, cwd=tests.ROOT, stdin=none, stdout=none, start_new_session=True
            )
            while not address.exists():
                assert process.poll() is None
                time.sleep(0.05)
    return str(address)


def _serve(address: str, owner: int) -> None:
    """Accept commands for as long as the owner lives; returns in each fork when it has ended."""
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()
    with Listener(address) as listener:
        while True:
            connection = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        return _become(connection)
    connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def _end_with(owner: int) -> None:
    while psutil.pid_exists(owner):
        time.sleep(1)
    os._exit(0)


def _become(connection: Connection) -> None:
    """Run the command that is asked for."""
    words, place, environment, output = connection.recv()
    os.setsid()
    connection.send(os.getpid())
    connection.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    reload(import_module("flows"))  # which sets variables
    import_module("prefect.context").refresh_global_settings_context()
    is_module = words[0] == "-m"
    sys.argv[:] = words[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    _serve(sys.argv[1], int(sys.argv[2]))
