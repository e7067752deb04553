"""What ``compare`` and ``scaling`` share: from systems and records to measured systems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.parameters import Parameters, overridden
from flows.requests import records_source
from flows.statistics import collect_layers
from memit.requests import Record, read_counterfact
from tasks.artifacts import Artifact, describe
from tasks.edit import spread_edit
from tasks.evaluation import (
    ScoredPiece,
    measure_perplexity,
    read_table,
    score_in_pieces,
    score_piece,
)
from tasks.generation import having_prompts, write_texts
from tasks.loading import ModelReference, token_budget
from tasks.measure import Cost, total_cost
from tasks.model import open_model
from tasks.prefixes import read_prefixes
from tasks.progress import gather
from tasks.requests import choose_requests, locate_records
from tasks.results import (
    HELD_OUT_FILE,
    MEND_NETWORK_FILE,
    PREFIXES_FILE,
    SERAC_MODELS_FILE,
    STATISTICS,
    STATISTICS_FILE,
    Manifest,
)
from tasks.runners import scatter
from tasks.systems import (
    Split,
    System,
    SystemEdit,
    answer_piece,
    edit_with,
    make_systems,
    sample_questions,
    select_targets,
    split_records,
)
from tasks.targets import TargetsPiece, optimise_targets, target_settings
from tasks.unfinished import forget_work

if TYPE_CHECKING:
    import pyarrow

    from memit.evaluation.zsre import ZsreRecord
    from memit.hyperparameters import Hyperparameters


LEARNT = {"mend": MEND_NETWORK_FILE, "serac": SERAC_MODELS_FILE}
"""Systems that learn before they edit, in a step of their own, and what that leaves."""


@dataclass(frozen=True)
class Sample:
    """Records that are edited together."""

    file: Artifact
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Bench:
    """Everything that the systems of one comparison have in common."""

    parameters: Parameters
    model: ModelReference
    hyperparameters: Hyperparameters
    systems: tuple[System, ...]
    split: Split
    prefixes: tuple[str, ...]
    moments: Mapping[int, Artifact]
    trained: Mapping[str, Artifact]
    """What systems have learnt before they edit, by their names."""
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


def prepare(parameters: Parameters, given: Mapping[str, Manifest], folder: Path) -> Bench:
    """Read the settings and the earlier steps' results, and collect what is missing.

    ``folder`` is where second moments of layers are kept that the step ``statistics`` left out.
    """
    model = open_model(**parameters.model.placement())
    hyperparameters = parameters.hyperparameters(model.model.id, model.model.layers)
    section = parameters.compare
    systems = make_systems(
        section.systems,
        section.settings,
        hyperparameters,
        model.model.id,
        model.model.layers,
        section.editors,
    )
    systems = [_with_section(system, parameters, model.model.id) for system in systems]
    held_out = json.loads(STATISTICS_FILE.read_text(encoding="utf-8"))["held_out_documents"]
    return Bench(
        parameters=parameters,
        model=model,
        hyperparameters=hyperparameters,
        systems=tuple(systems),
        split=split(parameters),
        prefixes=read_prefixes(PREFIXES_FILE),
        moments=_moments(parameters, given["statistics"], model, systems, folder),
        trained={step: given[step].file(LEARNT[step]) for step in learning_steps(parameters)},
        held_out=given["statistics"].file(HELD_OUT_FILE) if held_out else None,
        questions=_questions(section.zsre),
    )


def _questions(path: str | None) -> dict[int, ZsreRecord] | None:
    from memit.evaluation.zsre import read_zsre

    return None if path is None else {record.case_id: record for record in read_zsre(path)}


def _with_section(system: System, parameters: Parameters, model: str) -> System:
    """A system that learns, with the settings of its section."""
    from memit.editors.mend import Mend, mend_preset
    from memit.editors.serac import Serac, serac_preset

    if system.name == "mend":
        return replace(system, editor=Mend(overridden(mend_preset(model), parameters.mend)))
    if system.name == "serac":
        return replace(system, editor=Serac(overridden(serac_preset(model), parameters.serac)))
    return system


def learning_steps(parameters: Parameters) -> list[str]:
    """The steps in which systems of the comparison learn."""
    return [step for step in LEARNT if step in parameters.compare.systems]


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
    systems: Sequence[System],
    folder: Path,
) -> dict[int, Artifact]:
    """The second moments of all layers that a system needs."""
    needed = sorted({layer for system in systems for layer in system.editor.moment_layers})
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
        section = bench.parameters.targets
        size = section.requests_per_piece
        parts = [records[first : first + size] for first in range(0, len(records), size)]
        above = bench.model.model.layers - 1 - bench.hyperparameters.layers[-1]
        self.bench = bench
        self.pieces: list[TargetsPiece] = gather(
            "targets",
            "edits",
            scatter(
                optimise_targets,
                [[record.request for record in part] for part in parts],
                model=bench.model,
                prefixes=bench.prefixes,
                hyperparameters=target_settings(bench.hyperparameters),
                token_budget=token_budget(section.token_budget, bench.model, trained_blocks=above),
            ),
            [len(part) for part in parts],
        )
        self.sizes = [len(part) for part in parts]
        self.place = {
            record.case_id: (piece, row)
            for piece, part in enumerate(parts)
            for row, record in enumerate(part)
        }

    def edit(self, sample: Sample) -> SystemEdit:
        """MEMIT's edit of a sample; its seconds are those of its share of the targets, too."""
        places = [self.place[record.case_id] for record in sample.records]
        used = sorted({piece for piece, _ in places})
        targets = select_targets(
            [self.pieces[piece].targets for piece in used],
            [(used.index(piece), row) for piece, row in places],
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
        shares = [self.pieces[p].cost.seconds / self.sizes[p] for p, _ in places]
        summary = json.loads(made.summary.checked().read_text(encoding="utf-8"))
        return SystemEdit(
            edit=made.delta,
            cost=total_cost([Cost(seconds=sum(shares)), made.cost]),
            dropped=len(summary["dropped"]),
        )


def edit_sample(
    bench: Bench, system: System, sample: Sample, goals: Goals, seed: int
) -> SystemEdit:
    """One system's edit of a sample."""
    if system.name == "memit":
        return goals.edit(sample)
    edit = edit_with(
        system.name,
        system.editor,
        system.code,
        bench.model,
        sample.file,
        bench.split.training,
        bench.trained.get(system.name),
        bench.prefixes,
        {layer: bench.moments[layer] for layer in system.editor.moment_layers},
        token_budget(
            bench.parameters.targets.token_budget,
            bench.model,
            trained_blocks=bench.model.model.layers,  # a system may train any block
        ),
        seed,
    )
    forget_work("system", system.editor, system.code, bench.model, sample.file, seed)
    return edit


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was found out about a system; every number follows from it."""

    prompts: pyarrow.Table
    """Scored prompts."""
    texts: pyarrow.Table | None
    """Generated texts; None where there is nothing to generate."""
    perplexity: float | None
    edit: SystemEdit
    costs: tuple[Cost, ...]


def measure(
    bench: Bench,
    edit: SystemEdit,
    sample: Sample,
    *,
    texts_of: int | None,
    seed: int,
    thorough: bool,
) -> Measured:
    """Score the sample's prompts, and let the model write about ``texts_of`` of its records.

    A thorough measurement takes the perplexity, and asks the neighbourhood prompts behind the
    edited fact, too (CounterFact+).
    """
    scored = _score(bench, edit, sample, thorough)
    costs = [piece.cost for piece in scored]
    budget = token_budget(bench.parameters.evaluation.token_budget, bench.model)
    described = having_prompts(sample.records, texts_of)
    texts = perplexity = None
    if described:
        texts, writing = write_texts(described, bench.model, edit.edit, seed, budget)
        costs += writing
    if thorough and bench.held_out is not None:
        measured = measure_perplexity(bench.held_out, bench.model, edit.edit, budget)
        perplexity = measured.perplexity
        costs.append(measured.cost)
    return Measured(read_table(scored), texts, perplexity, edit, (edit.cost, *costs))


def _score(bench: Bench, edit: SystemEdit, sample: Sample, thorough: bool) -> list[ScoredPiece]:
    """Tables of all prompts or questions, in pieces."""
    from memit.evaluation.counterfact import plus_prompts_of, prompts_of

    items: list[Any]
    if bench.questions is not None:
        score, items = answer_piece, [bench.questions[r.case_id] for r in sample.records]
    else:
        score, items = score_piece, prompts_of(sample.records)
        items += plus_prompts_of(sample.records) if thorough else []
    section = bench.parameters.evaluation
    budget = token_budget(section.token_budget, bench.model)
    return score_in_pieces(score, items, section.prompts_per_piece, bench.model, edit.edit, budget)
