"""Causal tracing: at which layers, and at which tokens, the model recalls facts.

Results: `tracing/` with every probability (Parquet), the mean effects with their intervals and the
layers that they propose (`effects.json`), and the figure.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow

from flows.command.script import console
from flows.requests import records_source
from flows.service.step import Run, chunks, step
from memit.requests import Record, read_counterfact
from tasks.engine.tables import read_tables
from tasks.reporting.tracing import draw_tracing, effects
from tasks.requests import write_embedded
from tasks.tracing import choose_traced, trace_piece

TRACING = Path("tracing")
FACTS_PER_PIECE = 5
MAPPED_PER_PIECE = 1
"""Facts that are traced at every token, in a piece."""


@step("tracing", reads=("model",))
def tracing(run: Run) -> None:
    """Trace facts that the model answers, and sum up where restored states bring them back."""
    section = run.parameters.tracing
    source, file = records_source(run.parameters)
    if source == "embedded":
        file = write_embedded("choosing")  # so that traces may guide the choice of settings
    chosen = run.compute(choose_traced, source, file, section.facts, section.seed, run.model)
    records = read_counterfact(chosen.records.checked())
    table = _trace(run, records, chosen.deviation, mapped=False)
    if section.mapped:
        more = _trace(run, records[: section.mapped], chosen.deviation, mapped=True)
        table = pyarrow.concat_tables([table, more])
    found = effects(table)
    run.write_table(TRACING / "traces.parquet", table)
    run.write_json(TRACING / "effects.json", found)
    run.write(TRACING / "tracing.png", lambda path: draw_tracing(table, path))
    critical = ", ".join(map(str, found["critical_layers"]))
    where = f"matter most in the layers {critical}" if critical else "matter in no layer"
    console.print(
        f"\n  {found['facts']} facts: the answer's probability is {found['clean']:.2f}, and "
        f"{found['noised']:.2f} with noise on the subject; MLPs {where}\n"
        f"  [bold]{TRACING}/tracing.png[/], effects.json and traces.parquet beside it"
    )


def _trace(run: Run, records: Sequence[Record], deviation: float, mapped: bool) -> pyarrow.Table:
    """Every probability, see `trace_piece`."""
    budget = run.parameters.tracing.token_budget
    pieces = run.map(
        "facts mapped" if mapped else "facts",
        trace_piece,
        chunks(records, MAPPED_PER_PIECE if mapped else FACTS_PER_PIECE),
        model=run.model,
        deviation=deviation,
        token_budget=run.token_budget(budget, trained_blocks=run.model.model.layers),
        mapped=mapped,
    )
    return read_tables(pieces)
