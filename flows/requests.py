"""Step 2: which facts are written. Choose, sample and check them; one file that the rest reads.

Result: ``artifacts/requests.json``, records in the CounterFact schema.
"""

from __future__ import annotations

from flows.command.parameters import Parameters
from flows.command.script import console, given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import flow
from rich.text import Text

from flows.service.gpu_slot import taking_turns
from tasks.engine.artifacts import Artifact, copy_file, describe
from tasks.engine.results import REQUESTS_FILE, WORLD, finish_step, upstream
from tasks.model import open_model
from tasks.requests import Source, choose_requests, locate_records


@flow(name="requests", validate_parameters=False)
@taking_turns
def requests(parameters: Parameters) -> None:
    """Choose the records of the experiment and check that each can be edited."""
    given = upstream("model")
    section = parameters.requests
    chosen = choose_requests(
        *records_source(parameters),
        section.count,
        section.seed,
        open_model(**parameters.model.placement()),
    )
    if chosen.weak:
        console.print("[yellow]warning:[/]", Text(chosen.weak), soft_wrap=True)
    copy_file(chosen.records.checked(), REQUESTS_FILE)
    finish_step("requests", [REQUESTS_FILE], given, [chosen.cost])


def records_source(parameters: Parameters) -> tuple[Source, Artifact]:
    """The kind and the file of the records that the section ``requests`` names."""
    section = parameters.requests
    if section.source == "synthetic":
        return "counterfact", describe(WORLD / "records.json")
    return section.source, describe(locate_records(section.path, section.url, section.sha256))


if __name__ == "__main__":
    run_flow(requests)
