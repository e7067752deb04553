"""``dvc repro`` with one Prefect server for all stages: ``python -m flows.reproduce [options]``.

DVC decides which stages run; a bare stage starts a server of its own, which costs it half a minute.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from flows.command import given_parameters, reporting

if __name__ == "__main__":
    given_parameters()

from flows.preflight import check_inputs
from flows.record import dvc_command
from flows.server import prefect_server


def reproduce(options: Sequence[str]) -> int:
    """Run ``dvc repro`` with these options; gives its exit status."""
    with prefect_server():
        return subprocess.run([dvc_command(), "repro", *options], check=False).returncode


if __name__ == "__main__":
    given = given_parameters()
    reporting(lambda: check_inputs(given))
    sys.exit(reporting(lambda: reproduce(sys.argv[1:])))
