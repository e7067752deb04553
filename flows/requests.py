"""Step 2: which facts are written. Choose, sample and check them; one file that the rest reads.

Result: ``artifacts/requests.json``, records in the CounterFact schema.
"""

from __future__ import annotations

from flows.command import given_parameters, run_flow
from flows.parameters import Parameters

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from tasks.artifacts import copy_file, describe
from tasks.model import open_model
from tasks.requests import choose_requests, locate_records
from tasks.results import REQUESTS_FILE, WORLD, finish_step, upstream


@flow(name="requests", validate_parameters=False)
def requests(parameters: Parameters) -> None:
    """Choose the records of the experiment and check that each can be edited."""
    given = upstream("model")
    section = parameters.requests
    if section.source == "synthetic":
        file = WORLD / "records.json"
    else:
        file = locate_records(section.path, section.url, section.sha256)
    chosen = choose_requests(
        "counterfact" if section.source == "synthetic" else section.source,
        describe(file),
        section.count,
        section.seed,
        open_model(**parameters.model.placement()),
    )
    copy_file(chosen.records.checked(), REQUESTS_FILE)
    finish_step("requests", [REQUESTS_FILE], given, [chosen.cost])


if __name__ == "__main__":
    run_flow(requests)
