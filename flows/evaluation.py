"""Step 7: what the edit did. Every prompt is scored before and after; all else follows from that.

Results: ``evaluation/prompts.parquet``, ``evaluation/facts.csv`` and ``metrics.json``.
"""

from __future__ import annotations

import json

from flows.command import given_parameters, run_flow
from flows.parameters import Parameters

if __name__ == "__main__":
    given_parameters()

from prefect import flow, unmapped

from memit.requests import read_counterfact
from tasks.artifacts import write_file, write_json
from tasks.evaluation import make_metrics, measure_perplexity, read_table, score_piece
from tasks.loading import token_budget
from tasks.model import open_model
from tasks.progress import gather
from tasks.results import (
    DELTA_FILE,
    EDIT_FILE,
    FACTS_FILE,
    HELD_OUT_FILE,
    METRICS_FILE,
    PROMPTS_FILE,
    REQUESTS_FILE,
    STATISTICS_FILE,
    finish_step,
    upstream,
)
from tasks.runners import thread_runner


@flow(
    name="evaluation",
    validate_parameters=False,
    task_runner=thread_runner(),
)
def evaluation(parameters: Parameters) -> None:
    """Score the prompts that are missing, on both models, and sum up."""
    import pyarrow.csv
    import pyarrow.parquet

    from memit.evaluation.counterfact import before_and_after, facts_table, prompts_of

    given = upstream("model", "requests", "statistics", "edit")
    section = parameters.evaluation
    model = open_model(**parameters.model.placement()).model_copy(
        update={"served_in": section.dtype}
    )
    delta = given["edit"].file(DELTA_FILE)
    budget = token_budget(section.token_budget, model)
    prompts = prompts_of(read_counterfact(REQUESTS_FILE))
    size = section.prompts_per_piece
    pieces = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    futures = [
        future
        for state in (None, delta)
        for future in score_piece.map(
            pieces, model=unmapped(model), edit=unmapped(state), token_budget=unmapped(budget)
        )
    ]
    scored = gather("evaluation", "prompts", futures, [len(piece) for piece in pieces] * 2)
    before, after = read_table(scored[: len(pieces)]), read_table(scored[len(pieces) :])
    costs = [piece.cost for piece in scored]
    perplexities = None
    if json.loads(STATISTICS_FILE.read_text())["held_out_documents"]:
        held_out = given["statistics"].file(HELD_OUT_FILE)
        measured = [measure_perplexity(held_out, model, s, budget) for s in (None, delta)]
        perplexities = (measured[0].perplexity, measured[1].perplexity)
        costs += [one.cost for one in measured]
    joined, facts = before_and_after(before, after), facts_table(before, after)
    write_file(PROMPTS_FILE, lambda path: pyarrow.parquet.write_table(joined, path))
    write_file(FACTS_FILE, lambda path: pyarrow.csv.write_csv(facts, path))
    summary = json.loads(EDIT_FILE.read_text(encoding="utf-8"))
    write_json(METRICS_FILE, make_metrics(before, after, perplexities, summary))
    finish_step("evaluation", [PROMPTS_FILE, FACTS_FILE, METRICS_FILE], given, costs)


if __name__ == "__main__":
    run_flow(evaluation)
