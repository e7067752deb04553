"""Step 3: the contexts before each prompt, sampled once from the unedited model and kept.

Result: ``artifacts/prefixes.json``.
"""

from __future__ import annotations

from flows.command.parameters import Parameters
from flows.command.script import given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.service.gpu_slot import taking_turns
from tasks.engine.artifacts import write_json
from tasks.engine.results import PREFIXES_FILE, finish_step, upstream
from tasks.model import open_model
from tasks.prefixes import draw_prefixes


@flow(name="prefixes", validate_parameters=False)
@taking_turns
def prefixes(parameters: Parameters) -> None:
    """Sample the prefixes, or find those that were sampled with this model and seed."""
    given = upstream("model")
    sampled = draw_prefixes(open_model(**parameters.model.placement()), parameters.prefixes.seed)
    write_json(PREFIXES_FILE, {"prefixes": list(sampled.prefixes)})
    finish_step("prefixes", [PREFIXES_FILE], given, [sampled.cost])


if __name__ == "__main__":
    run_flow(prefixes)
