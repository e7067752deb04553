"""Step 2: choose, sample and check the facts that are written; all later steps read one file.

Result: `artifacts/requests.json`, records in the CounterFact schema.
"""

from rich.text import Text

from flows.command.parameters import Parameters, RequestsSection
from flows.command.script import console
from flows.service.step import Run, step
from memit.facts.subjects import subjects_to_keep
from tasks.engine.artifacts import Artifact, describe
from tasks.engine.results import REQUESTS_FILE, WORLD
from tasks.requests import (
    ChosenRequests,
    Source,
    Split,
    choose_requests,
    keep_records,
    locate_records,
    read_source,
    split_records,
    write_embedded,
)


@step("requests", reads=("model",))
def requests(run: Run) -> None:
    """Choose the records of the experiment and check that each can be edited."""
    section = run.parameters.requests
    source, file = records_source(run.parameters)
    chosen = run.compute(
        choose_requests, source, file, section.wanted, section.seed, run.model, section.only_known
    )
    if chosen.count < chosen.available:
        console.print(_sample_note(section, chosen), soft_wrap=True)
    if chosen.dropped:
        console.print(
            f"[yellow]warning:[/] left out: {chosen.dropped:,} of the records, which contradict "
            "an earlier one (`memit check` names the first)."
        )
    if chosen.weak:
        console.print("[yellow]warning:[/]", Text(chosen.weak), soft_wrap=True)
    if chosen.known_share is not None:
        run.notes["known_share"] = round(chosen.known_share, 1)
    if source == "embedded":
        run.notes["neighbors_dropped"] = chosen.neighbors_dropped
    run.copy(chosen.records, REQUESTS_FILE)
    if (earlier := run.history) is not None:  # one of another model is refused before long work
        console.print(
            f"  batch {len(earlier.batches) + 1} of {earlier.folder.parent}", soft_wrap=True
        )


def _sample_note(section: RequestsSection, chosen: ChosenRequests) -> str:
    """How many of the facts that were given are edited, and which settings chose them."""
    reasons = ["a sample (requests.count)"] if section.wanted is not None else []
    reasons += ["those that the model knows (requests.known)"] if section.only_known else []
    return f"  {chosen.count:,} of {chosen.available:,} facts are edited: {' of '.join(reasons)}"


def records_source(parameters: Parameters) -> tuple[Source, Artifact]:
    """The kind and the file of the records that the section `requests` names."""
    section = parameters.requests
    if section.source == "synthetic":
        return "counterfact", describe(WORLD / "records.json")
    if section.source == "embedded":
        return section.source, write_embedded()
    return section.source, describe(locate_records(section.path, section.url, section.sha256))


def records_to_keep(parameters: Parameters, *, tuning: bool) -> Artifact:
    """Facts of this project whose subjects have a share in C: not those that are edited, or were
    chosen on."""
    section, given = parameters.requests, parameters.tune.facts
    if tuning and given is None:
        return keep_records(subjects_to_keep((), "reported"))
    if tuning or section.source != "embedded":
        if tuning:
            source, file = "counterfact", describe(locate_records(given, None, None))
        else:
            source, file = records_source(parameters)
        edited = [record.request.subject for record in read_source(source, file.checked())[0]]
        return keep_records(subjects_to_keep(edited))
    return keep_records(subjects_to_keep((), "choosing"))


def split_source(parameters: Parameters) -> Split:
    """The records of a comparison, those to edit and those to learn from: zsRE's, or those that
    `requests` names."""
    section = parameters.compare
    if section.zsre is None:
        source, file = records_source(parameters)
    else:
        source, file = "zsre", describe(locate_records(section.zsre, None, None))
    return split_records(source, file, section.training_records, parameters.requests.seed)
