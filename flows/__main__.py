"""Run one flow with `params.yaml`: `python -m flows targets`, as the stages of dvc.yaml do.

The parameters are checked before torch and Prefect are imported.
"""

import sys
from importlib import import_module
from pathlib import Path

from flows.command.script import given_parameters, reporting, run_flow, slow_imports


def main(name: str) -> None:
    """Run a flow."""
    given_parameters()
    with slow_imports():
        flow = getattr(import_module(f"flows.{name}"), name)
    run_flow(flow)


if __name__ == "__main__":
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m flows FLOW, where FLOW is one of {', '.join(names)}")
    reporting(lambda: main(sys.argv[1]))
