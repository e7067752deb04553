"""What runs, in which order: a Prefect flow for each step, and one that chains them.

Prefect reads its settings when it is first imported, so this project's are set here, before that.
Variables that are already set take precedence.
"""

import os
import sys
from pathlib import Path
from urllib.request import getproxies_environment

if sys.platform == "win32":
    sys.exit("error: memit runs on Linux and macOS; on Windows run it inside of WSL.")

import pwd

_ROOT = Path(os.environ.get("DVC_ROOT") or ".").resolve()

_SETTINGS = {
    "PREFECT_HOME": str(_ROOT / ".prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The terminal shows progress and one sentence when something fails; the log is in the UI.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # A server that is started again must still know who holds the GPU, and until when.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    # A run that was asked for starts soon.
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    # Equal runs give equal bits on a GPU only with a fixed workspace.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

try:
    pwd.getpwuid(os.getuid())
except KeyError:  # containers have users without a name, whom DVC and MLflow ask for it
    os.environ.setdefault("USER", str(os.getuid()))
    os.environ.setdefault("HOME", str(_ROOT / ".cache"))

# Prefect's server, and MLflow's, are on this machine, where no proxy leads.
_LOOPBACK = "127.0.0.1,localhost,::1"
_PROXIES = getproxies_environment()
_EXCEPTED = _PROXIES.get("no", "")
if _PROXIES and _EXCEPTED != "*":
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"{_EXCEPTED},{_LOOPBACK}".lstrip(",")
