"""What is in a file of requests, and what editing them would cost."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from flows.command.parameters import Parameters
from flows.command.script import output
from memit.requests import Record, drop_conflicts, read_records, sample_records
from tasks.engine.results import is_model_here


def check_requests(parameters: Parameters, file: Path) -> None:
    """Read the file, look for contradictions, count tokens, and print what editing would cost.

    Raises:
        MemitError: the first thing that is wrong with the file.
    """
    records = read_records(file)
    with_truth = sum(record.request.target_true is not None for record in records)
    table = Table(title=str(file), title_justify="left", show_header=False)
    table.add_row("records", f"{len(records)}")
    table.add_row("with a true object", f"{with_truth}")
    table.add_row("with paraphrases", f"{sum(bool(r.paraphrase_prompts) for r in records)}")
    neighbors = sum(bool(r.neighborhood_prompts or r.kept_prompts) for r in records)
    table.add_row("with neighbours", f"{neighbors}")
    table.add_row("contradictions", Text(_contradictions(records)))
    count = parameters.requests.count
    wanted = None if count == "auto" else count
    edited = sample_records(records, wanted, parameters.requests.seed)
    how = "all" if len(edited) == len(records) else f"{len(edited)}, a sample (requests.count)"
    table.add_row("edited", how)
    model = parameters.model
    if model.source in ("local", "package") or is_model_here(model.source, model.name):
        # torch and transformers take seconds to import, and a mistake above is found without them.
        from flows.command.estimate import add_costs

        add_costs(table, parameters, edited)
    else:
        table.add_row("model", "not here before `memit run`, so no tokens and no estimate")
    output.print(table)


def _contradictions(records: Sequence[Record]) -> str:
    _, dropped = drop_conflicts(records)
    if not dropped:
        return "none"
    request = dropped[0].request
    left_out = "1 record contradicts" if len(dropped) == 1 else f"{len(dropped)} records contradict"
    return (
        f"{left_out} an earlier one and would be left out, the first is "
        f"{request.text + request.ending()!r}"
    )
