"""All methods on the same model and the same records: the paper's table.

Results: ``comparison/`` with the table (Markdown and CSV), every scored prompt, every generated
text, and ``metrics.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flows.command.parameters import Parameters
from flows.command.script import console, given_parameters, run_flow
from flows.evaluation import references

if __name__ == "__main__":
    given_parameters()

from prefect import flow
from prefect.artifacts import create_table_artifact
from rich.box import SIMPLE
from rich.table import Table

from flows.command.checks import check_comparison
from flows.methods import (
    Bench,
    Goals,
    Sample,
    Tried,
    finish,
    prepare,
    try_method,
)
from flows.service.gpu_slot import taking_turns
from flows.service.workers import with_runner
from tasks.engine.artifacts import write_file, write_json, write_text
from tasks.engine.workers import thread_runner
from tasks.generation import having_prompts
from tasks.reporting.comparison import Comparison, csv_text, markdown, plain, table_rows
from tasks.reporting.published import published

COMPARISON = Path("comparison")


@flow(name="compare", validate_parameters=False, task_runner=thread_runner())
@taking_turns
@with_runner
def compare(parameters: Parameters) -> None:
    """Edit with each method, measure it, and put all of them into one table."""
    bench = prepare(parameters, COMPARISON)
    section = parameters.compare
    sample = bench.draw(section.count, section.seed)
    tried = dict(_try_all(bench, sample))
    comparison = _compare(bench, sample, tried)
    files = _write(comparison, tried)
    finish(
        "compare",
        bench,
        files,
        [cost for edit, measured in tried.values() for cost in (edit.cost, *measured.costs)],
        {
            name: [(key, value, 0) for key, value in metrics.items()]
            for name, metrics in comparison.methods.items()
        },
    )
    create_table_artifact(key="comparison", table=table_rows(comparison))
    show_results(comparison)


def show_results(comparison: Comparison) -> None:
    """Print the first table without its intervals, and where to look next."""
    rows = table_rows(comparison)
    title = f"{comparison.records} edits of {comparison.model}"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0, collapse_padding=True)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print()
    console.print(table)
    console.print(
        f"\nWith intervals, more metrics and all settings: [bold]{COMPARISON}/table.md[/]; every "
        "prompt and every text in the Parquet files beside it.\n"
    )


def _try_all(bench: Bench, sample: Sample) -> Iterator[tuple[str, Tried]]:
    """Each method's name with what it did."""
    section = bench.parameters.compare
    goals = Goals(bench, sample.records if "memit" in section.methods else ())
    for method in bench.methods:
        edit, measured = try_method(
            bench,
            method,
            sample,
            goals,
            texts_of=section.generation_records,
            seed=section.seed,
            thorough=True,
        )
        yield method.name, (edit, measured)
        console.print(f"[green]✓[/] {method.label:<10} {edit.cost.seconds:9.1f} s of editing")


def _compare(bench: Bench, sample: Sample, tried: dict[str, Tried]) -> Comparison:
    from memit.evaluation.entropy import word_tokenizer

    wanted = references(bench.parameters) if bench.questions is None else {}
    methods = {
        name: measured.metrics(sample.records, wanted) | {"seconds": edit.cost.seconds}
        for name, (edit, measured) in tried.items()
    }
    count = len(sample.records)
    return Comparison(
        model=bench.model.model.id,
        records=count,
        methods=methods,
        exact_entropy=word_tokenizer()[1],
        published=published(_data_set(bench), bench.model.model.id, count),
        notes=(*_notes(bench, sample), *_dropped(bench, tried)),
    )


def _data_set(bench: Bench) -> str:
    return bench.parameters.requests.source if bench.questions is None else "zsre"


def _notes(bench: Bench, sample: Sample) -> tuple[str, ...]:
    split = bench.split
    section = bench.parameters.compare
    written = len(having_prompts(sample.records, section.generation_records))
    notes = [
        f"{len(sample.records)} of {split.count} records that can be edited; {split.dropped} were "
        f"left out because they contradict others, {split.training_count} were set aside for "
        f"editors that learn, and {split.prompts_dropped} neighborhood prompts with them.",
    ]
    if bench.questions is not None:
        notes.append(
            "zsRE: ES, PS and NS are the share of the answer's tokens that the model would choose, "
            "for the edited question, its paraphrase, and a question about something else."
        )
    if written:
        notes.append(f"GE and RS are of the texts of {written} records.")
    return (*notes, *(f"{method.label}: {method.editor}" for method in bench.methods))


def _dropped(bench: Bench, tried: dict[str, Tried]) -> Iterator[str]:
    for method in bench.methods:
        count = tried[method.name][0].dropped
        if count:
            yield f"{method.label}: {count} requests could not be written and count as failures."


def _write(comparison: Comparison, tried: dict[str, Tried]) -> list[Path]:
    """Write the results and give their paths."""
    import pyarrow
    import pyarrow.parquet as parquet

    def with_method(name: str, table: pyarrow.Table) -> pyarrow.Table:
        return table.add_column(0, "method", pyarrow.array([name] * len(table), pyarrow.string()))

    tables = {
        COMPARISON / "prompts.parquet": [
            with_method(name, measured.prompts) for name, (_, measured) in tried.items()
        ],
        COMPARISON / "generations.parquet": [
            with_method(name, measured.texts) for name, (_, measured) in tried.items()
        ],
    }
    for path, parts in tables.items():
        whole = pyarrow.concat_tables(parts)
        write_file(path, lambda partial, whole=whole: parquet.write_table(whole, partial))
    files = [*tables]
    for name, text in (("table.md", markdown(comparison)), ("table.csv", csv_text(comparison))):
        write_text(COMPARISON / name, text)
        files.append(COMPARISON / name)
    write_json(COMPARISON / "metrics.json", plain(comparison))
    files.append(COMPARISON / "metrics.json")
    return files


if __name__ == "__main__":
    run_flow(compare, check_comparison)
