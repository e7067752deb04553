"""What ``compare`` and ``scaling`` share: from methods and records to measured methods."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.command.parameters import Parameters, overridden
from flows.command.script import console
from flows.evaluation import Measured, held_out_text, measure
from flows.requests import records_source
from flows.service.dvc_lock import origin
from flows.statistics import collect_layers
from flows.targets import targets_of
from memit.errors import UnreachableError
from memit.requests import Record, read_counterfact
from tasks.compare import (
    Method,
    MethodEdit,
    Split,
    answer_piece,
    edit_with,
    make_methods,
    sample_questions,
    select_targets,
    split_records,
)
from tasks.edit import spread_edit
from tasks.engine.artifacts import Artifact, copy_file, describe
from tasks.engine.checkpoints import forget_work
from tasks.engine.cost import Cost, total_cost
from tasks.engine.loaded_model import ModelReference, token_budget
from tasks.engine.results import (
    MEND_NETWORK_FILE,
    PREFIXES_FILE,
    SERAC_MODELS_FILE,
    STATISTICS,
    Manifest,
    finish_step,
    upstream,
)
from tasks.evaluation import score_piece
from tasks.generation import having_prompts
from tasks.mend import Trained
from tasks.model import open_model
from tasks.prefixes import read_prefixes
from tasks.reporting.tracking import Family, log_family, tracking_uri
from tasks.requests import choose_requests, locate_records

if TYPE_CHECKING:
    from memit.evaluation.zsre import ZsreRecord
    from memit.hyperparameters import Hyperparameters


LEARNT = {"mend": MEND_NETWORK_FILE, "serac": SERAC_MODELS_FILE}
"""Methods that learn before they edit, in a step of their own, and what that leaves."""


@dataclass(frozen=True)
class Sample:
    """Records that are edited together."""

    file: Artifact
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Bench:
    """Everything that the methods of one comparison have in common."""

    parameters: Parameters
    given: Mapping[str, Manifest]
    """What the steps before left."""
    model: ModelReference
    hyperparameters: Hyperparameters
    methods: tuple[Method, ...]
    split: Split
    prefixes: tuple[str, ...]
    moments: Mapping[int, Artifact]
    trained: Mapping[str, Artifact]
    """What methods have learnt before they edit, by their names."""
    held_out: Artifact | None
    """Text for the perplexity."""
    questions: Mapping[int, ZsreRecord] | None
    """What zsRE asks of each case; None for records in CounterFact's manner."""

    def draw(self, count: int | None, seed: int) -> Sample:
        """Records to edit; ``None`` draws all that there are.

        Raises:
            InputError: there are fewer.
        """
        if self.questions is not None:
            file = sample_questions(self.split.edited, count, seed)
        else:
            chosen = choose_requests("counterfact", self.split.edited, count, seed, self.model)
            file = chosen.records
        return Sample(file, tuple(read_counterfact(file.checked())))


def prepare(parameters: Parameters, folder: Path) -> Bench:
    """Read the settings and the earlier steps' results, and collect what is missing.

    The results will be in ``folder``, and below it the second moments of layers that the step
    ``statistics`` left out.
    """
    given = upstream("model", "prefixes", "statistics", *learning_steps(parameters))
    model = open_model(**parameters.model.placement())
    hyperparameters = parameters.hyperparameters(model.model.id, model.model.layers)
    section = parameters.compare
    methods = make_methods(
        section.methods,
        section.settings,
        hyperparameters,
        model.model.id,
        model.model.layers,
        section.editors,
    )
    methods = [_with_section(method, parameters, model.model.id) for method in methods]
    return Bench(
        parameters=parameters,
        given=given,
        model=model,
        hyperparameters=hyperparameters,
        methods=tuple(methods),
        split=split(parameters),
        prefixes=read_prefixes(PREFIXES_FILE),
        moments=_moments(parameters, given["statistics"], model, methods, folder / "statistics"),
        trained={step: given[step].file(LEARNT[step]) for step in learning_steps(parameters)},
        held_out=held_out_text(given["statistics"]),
        questions=_questions(section.zsre),
    )


def _questions(path: str | None) -> dict[int, ZsreRecord] | None:
    from memit.evaluation.zsre import read_zsre

    return None if path is None else {record.case_id: record for record in read_zsre(path)}


def _with_section(method: Method, parameters: Parameters, model: str) -> Method:
    """A method that learns, with the settings of its section."""
    from memit.editors.mend import Mend, mend_preset
    from memit.editors.serac import Serac, serac_preset

    if method.name == "mend":
        return replace(method, editor=Mend(overridden(mend_preset(model), parameters.mend)))
    if method.name == "serac":
        return replace(method, editor=Serac(overridden(serac_preset(model), parameters.serac)))
    return method


def learning_steps(parameters: Parameters) -> list[str]:
    """The steps in which methods of the comparison learn."""
    return [step for step in LEARNT if step in parameters.compare.methods]


def split(parameters: Parameters) -> Split:
    """The records to edit and those to learn from: zsRE's, or those that ``requests`` names."""
    section = parameters.compare
    if section.zsre is None:
        source, file = records_source(parameters)
    else:
        source, file = "zsre", describe(locate_records(section.zsre, None, None))
    return split_records(source, file, section.training_records, parameters.requests.seed)


def _moments(
    parameters: Parameters,
    statistics: Manifest,
    model: ModelReference,
    methods: Sequence[Method],
    folder: Path,
) -> dict[int, Artifact]:
    """The second moments of all layers that a method needs."""
    needed = sorted({layer for method in methods for layer in method.editor.moment_layers})
    paths = {layer: STATISTICS / f"layer-{layer:02}.parquet" for layer in needed}
    there = {n: statistics.file(p) for n, p in paths.items() if str(p) in statistics.files}
    missing = [layer for layer in needed if layer not in there]
    folder.mkdir(parents=True, exist_ok=True)  # DVC expects it
    if not missing:
        return there
    collected, _ = collect_layers(parameters, model, missing).write(folder)
    return there | {layer: describe(path) for layer, path in collected.items()}


# --- editing ------------------------------------------------------------------------------------


class Goals:
    """MEMIT's targets of many records, from which each sample takes its own.

    A target depends on nothing but its request, so that samples share them.
    """

    def __init__(self, bench: Bench, records: Sequence[Record]) -> None:
        requests = [record.request for record in records]
        self.bench = bench
        self.pieces = targets_of(requests, bench.parameters, bench.model, bench.prefixes)
        self.rows = {record.case_id: row for row, record in enumerate(records)}

    def edit(self, sample: Sample) -> MethodEdit:
        """MEMIT's edit of a sample; its seconds are those of its share of the targets, too."""
        rows = [self.rows[record.case_id] for record in sample.records]
        size = self.bench.parameters.targets.requests_per_piece
        used = sorted({row // size for row in rows})
        targets = select_targets(
            [self.pieces[piece].targets for piece in used],
            [used.index(row // size) * size + row % size for row in rows],
        )
        bench = self.bench
        layers = bench.hyperparameters.layers
        made = spread_edit(
            bench.model,
            sample.file,
            bench.prefixes,
            targets,
            {layer: bench.moments[layer] for layer in layers},
            bench.hyperparameters,
            token_budget(bench.parameters.edit.token_budget, bench.model, trained_blocks=0),
            bench.parameters.edit.on_failure,
        )
        spent = total_cost([piece.cost for piece in self.pieces]).seconds
        summary = json.loads(made.summary.checked().read_text(encoding="utf-8"))
        return MethodEdit(
            edit=made.delta,
            cost=total_cost([Cost(seconds=spent * len(rows) / len(self.rows)), made.cost]),
            dropped=len(summary["dropped"]),
        )


def edit_sample(
    bench: Bench, method: Method, sample: Sample, goals: Goals, seed: int
) -> MethodEdit:
    """One method's edit of a sample."""
    if method.name == "memit":
        return goals.edit(sample)
    edit = edit_with(
        method.name,
        method.editor,
        method.code,
        bench.model,
        sample.file,
        bench.split.training,
        bench.trained.get(method.name),
        bench.prefixes,
        {layer: bench.moments[layer] for layer in method.editor.moment_layers},
        token_budget(
            bench.parameters.targets.token_budget,
            bench.model,
            trained_blocks=bench.model.model.layers,  # a method may train any block
        ),
        seed,
    )
    forget_work("method", method.editor, method.code, bench.model, sample.file, seed)
    return edit


# --- measuring ----------------------------------------------------------------------------------


Tried = tuple[MethodEdit, Measured]
"""What a method made of a sample, and what that did."""


def try_method(
    bench: Bench,
    method: Method,
    sample: Sample,
    goals: Goals,
    *,
    texts_of: int | None,
    seed: int,
    thorough: bool,
) -> Tried:
    """Edit, score the sample's prompts, and let the model write about ``texts_of`` of its records.

    A thorough measurement takes the perplexity, and asks the neighbourhood prompts behind the
    edited fact, too (CounterFact+).
    """
    from memit.evaluation.counterfact import plus_prompts_of, prompts_of

    edit = edit_sample(bench, method, sample, goals, seed)
    asked: list[Any]
    if bench.questions is not None:
        score, asked = answer_piece, [bench.questions[r.case_id] for r in sample.records]
    else:
        score, asked = score_piece, prompts_of(sample.records)
        asked += plus_prompts_of(sample.records) if thorough else []
    measured = measure(
        bench.model,
        edit.edit,
        score,
        asked,
        having_prompts(sample.records, texts_of),
        bench.held_out if thorough else None,
        bench.parameters.evaluation,
        seed,
    )
    return edit, measured


# --- results ------------------------------------------------------------------------------------


def finish(
    step: str,
    bench: Bench,
    files: Sequence[Path],
    costs: Sequence[Cost],
    metrics: Mapping[str, list[tuple[str, float, int]]],
) -> None:
    """Write the manifest of a comparison, and log it to MLflow with each method's ``metrics``:
    name, value and step."""
    moments = sorted((files[0].parent / "statistics").glob("layer-[0-9]*"))
    manifest = finish_step(step, [*files, *moments], bench.given, costs)
    family = Family(
        experiment=bench.parameters.report.experiment,
        step=step,
        digest=manifest.digest,
        parameters=bench.parameters.model_dump(),
        tags=origin(bench.parameters, {step: manifest}),
        files=files,
        methods=metrics,
    )
    try:
        log_family(family, tracking_uri(bench.parameters.report.tracking_uri))
    except UnreachableError as error:
        console.print(f"[yellow]warning:[/] {error}")


def learn(
    step: str, given: Mapping[str, Manifest], train: Callable[..., Trained], *inputs: Any
) -> None:
    """Train what a method needs, or find what was trained on these inputs, and finish its step."""
    trained = train(*inputs)
    forget_work(step, *inputs)
    losses = LEARNT[step].parent / "losses.json"
    copy_file(trained.file.checked(), LEARNT[step])
    copy_file(trained.losses.checked(), losses)
    finish_step(step, [LEARNT[step], losses], given, [trained.cost])
