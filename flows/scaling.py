"""Edit more and more records with every method: the paper's scaling curves.

Results: `scaling/` with the table (Markdown and CSV), the figure, and `metrics.json`.
"""

from collections.abc import Iterator
from contextlib import suppress
from math import nan
from pathlib import Path

from flows.command.checks import check_scaling
from flows.command.script import console
from flows.compare import Sample, Setup, finish, prepare, shared_targets, try_method
from flows.service.step import Run, step
from memit.errors import InputError
from memit.requests import Record
from tasks.reporting.formats import titled
from tasks.reporting.labels import label
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


@step("scaling", reads=("model", "prefixes", "statistics"), check=check_scaling)
def scaling(run: Run) -> None:
    """Edit samples of every size with each method, measure it, and draw the curves."""
    setup = prepare(run, SCALING)
    points = list(_points(setup, _draw(setup)))
    notes = list(_notes(setup, points))
    run.write_text(SCALING / "table.md", markdown(points, notes, setup.only_known))
    run.write_text(SCALING / "table.csv", csv_text(points))
    run.write(SCALING / "scaling.png", lambda path: draw_scaling(points, path, setup.only_known))
    run.write_json(SCALING / "metrics.json", plain(points))
    finish(run, {method: _logged(points, method) for method in methods_of(points)})
    console.print(f"\n  [bold]{SCALING}/table.md[/], scaling.png and table.csv beside it")


def _available(setup: Setup) -> int:
    """How many records a size may have. Those that the model knows are only counted, which asks it
    for all, if they may be too few."""
    parameters = setup.run.parameters
    section = parameters.scaling
    if parameters.requests.only_known and None not in section.counts:
        with suppress(InputError):
            setup.draw(max(filter(None, section.counts)), section.seed)
            return setup.split.count
    return setup.available


def _draw(setup: Setup) -> list[tuple[int, Sample]]:
    """Each sample with its seed, as far as the records go.

    Raises:
        InputError: they are too few for any size.
    """
    section, available = setup.run.parameters.scaling, _available(setup)
    for count in section.counts:
        if count is not None and count > available:
            console.print(
                f"[yellow]warning:[/] scaling.counts names {count} edits, and only {available} "
                "records can be edited: this size is left out."
            )
    sizes = {count or available for count in section.counts if (count or 0) <= available}
    if not sizes:
        raise InputError(
            f"scaling.counts is {list(section.counts)}, but only {available} records can be "
            "edited: add a smaller size."
        )
    return [
        (seed, setup.draw(count, seed))
        for count in sorted(sizes)
        for seed in range(section.seed, section.seed + section.repeated(count, available))
    ]


def _points(setup: Setup, samples: list[tuple[int, Sample]]) -> Iterator[Point]:
    section, records = setup.run.parameters.scaling, _union(samples)
    targets = {method.name: shared_targets(setup.run, method, records) for method in setup.methods}
    for seed, sample in samples:
        for method in setup.methods:
            if len(sample.records) > setup.most(method):
                continue
            ready = targets[method.name]
            tried = try_method(
                setup, method, sample, ready, section.generation_records, seed, thorough=False
            )
            metrics = tried.metrics({}) | {"dropped": len(tried.edit.dropped)}
            yield Point(method.name, len(sample.records), seed, metrics)
            score = f"{titled('score', 'S', setup.only_known)} {metrics.get('score', nan):5.1f}"
            console.print(
                f"[green]✓[/] {len(sample.records):>6} edits  {label(method.name):<10} "
                f"{score}  {tried.seconds:9.1f} s"
            )


def _union(samples: list[tuple[int, Sample]]) -> list[Record]:
    """All records of all samples once, by ascending case."""
    found = {record.case_id: record for _, sample in samples for record in sample.records}
    return [found[case] for case in sorted(found)]


def _logged(points: list[Point], method: str) -> list[tuple[str, float, int]]:
    return [
        (metric, mean.value, mean.edits)
        for metric, _ in PANELS
        for mean in curve(points, method, metric)
    ]


def _notes(setup: Setup, points: list[Point]) -> Iterator[str]:
    section, split = setup.run.parameters.scaling, setup.split
    yield (
        f"samples of each size: {section.samples}, or more where these have fewer than "
        f"{section.least_records} records, of {split.count} records; {split.training_count} others "
        "were set aside for editors that learn"
    )
    written = section.generation_records
    yield f"GE is of the texts of {'all' if written is None else f'at most {written}'} records"
    for method in setup.methods:
        yield f"{label(method.name)}: {method.editor}"
        if setup.most(method) < split.count:
            yield f"{label(method.name)}: samples of at most {setup.most(method)} records"
    for point in points:
        if dropped := point.metrics["dropped"]:
            yield (
                f"{label(point.method)}: {dropped} of {point.edits} requests (seed {point.seed}) "
                "could not be written and count as failures"
            )
