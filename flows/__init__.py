"""What runs, in which order: a Prefect flow for each step, and one that chains them.

Prefect reads its settings when it is first imported, so those of this project are set here, before.
What stands in the environment already is left alone.
"""

import os
from pathlib import Path

_ROOT = Path(os.environ.get("DVC_ROOT") or ".").resolve()

_SETTINGS = {
    "PREFECT_HOME": str(_ROOT / ".prefect"),
    # The first start makes a data base, which takes longer than Prefect's 20 s on a slow machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Its shutdown prints harmless tracebacks otherwise.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # The terminal shows progress and one sentence when something fails; the log is in the UI.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # Five tries take a minute for each request, and a run whose server is gone makes several.
    "PREFECT_CLIENT_MAX_RETRIES": "4",
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
