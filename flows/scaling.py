"""All methods on ever more edits: the paper's scaling curves.

Results: ``scaling/`` with the table (Markdown and CSV), the figure, and ``metrics.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flows.command.parameters import Parameters
from flows.command.script import console, given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.command.checks import check_scaling
from flows.methods import Bench, Goals, Sample, finish, prepare, try_method
from flows.service.gpu_slot import taking_turns
from flows.service.workers import with_runner
from memit.requests import Record
from tasks.compare import LABELS
from tasks.engine.artifacts import write_file, write_json, write_text
from tasks.engine.cost import Cost
from tasks.engine.workers import thread_runner
from tasks.reporting.scaling import (
    PANELS,
    Point,
    csv_text,
    curve,
    draw_scaling,
    markdown,
    methods_of,
    plain,
)

SCALING = Path("scaling")


@flow(name="scaling", validate_parameters=False, task_runner=thread_runner())
@taking_turns
@with_runner
def scaling(parameters: Parameters) -> None:
    """Edit samples of every size with each method, measure it, and draw the curves."""
    bench = prepare(parameters, SCALING)
    samples = _draw(bench)
    costs: list[Cost] = []
    points = list(_points(bench, samples, costs))
    files = _write(bench, points)
    metrics = {method: _logged(points, method) for method in methods_of(points)}
    finish("scaling", bench, files, costs, metrics)
    console.print(f"\n  [bold]{SCALING}/table.md[/], scaling.png and table.csv beside it")


def _draw(bench: Bench) -> list[tuple[int, Sample]]:
    """Each sample with its seed, as far as the records go."""
    section = bench.parameters.scaling
    there_are = bench.split.count
    for count in section.counts:
        if count is not None and count > there_are:
            console.print(
                f"[yellow]warning:[/] scaling.counts names {count} edits, and {there_are} records "
                "can be edited: this size is left out."
            )
    sizes = {count or there_are for count in section.counts}
    return [
        (seed, bench.draw(count, seed))
        for count in sorted(size for size in sizes if size <= there_are)
        for seed in range(section.seed, section.seed + _samples(bench, count))
    ]


def _samples(bench: Bench, count: int) -> int:
    """How many samples of a size are drawn: all records only once, few edits more often."""
    section = bench.parameters.scaling
    if count == bench.split.count:
        return 1
    return max(section.samples, -(-section.least_records // count))


def _points(bench: Bench, samples: list[tuple[int, Sample]], costs: list[Cost]) -> Iterator[Point]:
    texts_of = bench.parameters.scaling.generation_records
    goals = Goals(bench, _union(samples) if "memit" in bench.parameters.compare.methods else [])
    for seed, sample in samples:
        for method in bench.methods:
            edit, measured = try_method(
                bench, method, sample, goals, texts_of=texts_of, seed=seed, thorough=False
            )
            costs += [edit.cost, *measured.costs]
            metrics = measured.metrics(sample.records, {})
            count = len(sample.records)
            yield Point(
                method.name,
                count,
                seed,
                metrics | {"seconds": edit.cost.seconds, "dropped": edit.dropped},
            )
            console.print(
                f"[green]✓[/] {count:>6} edits  {method.label:<10} "
                f"S {metrics.get('score', float('nan')):5.1f}  {edit.cost.seconds:9.1f} s"
            )


def _union(samples: list[tuple[int, Sample]]) -> list[Record]:
    """All records of all samples once, in the order of their cases."""
    found = {record.case_id: record for _, sample in samples for record in sample.records}
    return [found[case] for case in sorted(found)]


def _logged(points: list[Point], method: str) -> list[tuple[str, float, int]]:
    return [
        (metric, mean.value, mean.edits)
        for metric, _ in PANELS
        for mean in curve(points, method, metric)
    ]


def _write(bench: Bench, points: list[Point]) -> list[Path]:
    """Write the results and give their paths."""
    section = bench.parameters.scaling
    notes = [
        f"samples of each size: {section.samples}, or more where these have fewer than "
        f"{section.least_records} records, of {bench.split.count} records; "
        f"{bench.split.training_count} others were set aside for editors that learn",
        f"GE is of the texts of at most {section.generation_records} records"
        if section.generation_records is not None
        else "GE is of the texts of all records",
        *(f"{method.label}: {method.editor}" for method in bench.methods),
        *(
            f"{LABELS.get(p.method, p.method)}: {p.metrics['dropped']} of {p.edits} requests (seed "
            f"{p.seed}) could not be written and count as failures"
            for p in points
            if p.metrics["dropped"]
        ),
    ]
    names = ("table.md", "table.csv", "scaling.png", "metrics.json")
    files = [SCALING / name for name in names]
    write_text(files[0], markdown(points, notes))
    write_text(files[1], csv_text(points))
    write_file(files[2], lambda path: draw_scaling(points, path))
    write_json(files[3], plain(points))
    return files


if __name__ == "__main__":
    run_flow(scaling, check_scaling)
