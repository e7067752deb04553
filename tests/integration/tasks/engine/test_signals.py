"""A process ends on a signal within seconds, whatever another handler does."""

import signal
import subprocess
import sys
import time

import pytest

from tasks.engine.signals import GO_ON, INTERRUPTED, PATIENCE, TERMINATED
from tests import python

DEAF = """
import signal, time
from tasks.engine.signals import exit_on_signal
exit_on_signal()
for asked in (signal.SIGINT, signal.SIGTERM):
    signal.signal(asked, lambda *_: time.sleep(60))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)]
)
def test_a_process_ends_whose_handler_does_not_end_it(sent: signal.Signals, status: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        asked = time.monotonic()
        _, said = process.communicate(timeout=30)
    assert process.returncode == status
    assert time.monotonic() - asked < PATIENCE + 10
    assert GO_ON in said


SWALLOWING = """
import signal, sys, time
from tasks.engine.signals import resend_swallowed

class Last:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

resend_swallowed()
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
try:
    Last()
    time.sleep(30)
except KeyboardInterrupt:
    sys.exit(7)
"""


def test_a_signal_that_python_swallows_is_sent_again() -> None:
    ended = python("-c", SWALLOWING, timeout=25)
    assert (ended.returncode, ended.stderr) == (7, "")
