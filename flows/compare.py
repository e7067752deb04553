"""Edit the same records of the same model with every method: the paper's table.

Results: `comparison/` with the table (Markdown and CSV), every scored prompt, every generated text,
and `metrics.json`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow
from prefect.artifacts import create_table_artifact
from rich.box import SIMPLE
from rich.table import Table

from flows.command.checks import check_comparison, compared_methods
from flows.command.script import console, output
from flows.evaluation import Measured, held_out_text, measure, references_of
from flows.report import log
from flows.requests import split_source
from flows.service.dvc_lock import origin
from flows.service.step import Run, chunks, step
from flows.statistics import collect_layers, corpus_source
from flows.targets import optimise
from memit.evaluation.counterfact import plus_prompts_of, prompts_of
from memit.evaluation.entropy import word_tokenizer
from memit.evaluation.reference import References
from memit.evaluation.zsre import ZsreRecord, questions_of, read_zsre
from memit.requests import EditRequest, Record, read_counterfact
from tasks.edit import Method, MethodEdit, edit_with
from tasks.engine.artifacts import Artifact, describe, store_piece
from tasks.engine.cost import total_cost
from tasks.engine.results import STATISTICS
from tasks.evaluation import having_prompts
from tasks.mend import Continuations, train_mend_network
from tasks.reporting.comparison import LEGEND, Comparison, csv_text, markdown, plain, table_rows
from tasks.reporting.labels import label
from tasks.reporting.published import published
from tasks.reporting.tracking import ParentRun
from tasks.requests import Split, choose_requests, sample_questions
from tasks.serac import pinned, train_serac_models
from tasks.statistics import collect_corpus
from tasks.targets import StoredTargets

COMPARISON = Path("comparison")


@dataclass(frozen=True)
class Sample:
    """Records that are edited together."""

    file: Artifact
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Setup:
    """Everything that the methods of one comparison have in common."""

    run: Run
    methods: Sequence[Method]
    split: Split
    moments: Mapping[int, Artifact]
    """Second moments of every layer that a method needs."""
    learnt: Mapping[str, Artifact]
    """What methods have learnt before they edit."""
    questions: Mapping[int, ZsreRecord] | None
    """zsRE's questions by case; None for records of CounterFact's kind."""

    @property
    def only_known(self) -> bool:
        """Whether facts that the unedited model does not know are left out."""
        return self.questions is None and self.run.parameters.requests.only_known

    def draw(self, count: int | None, seed: int) -> Sample:
        """Records to edit; None draws all of them.

        Raises:
            InputError: there are fewer.
        """
        if self.questions is not None:
            file = sample_questions(self.split.edited, count, seed)
        else:
            source = self.run.parameters.requests.source
            kind = "embedded" if source == "embedded" else "counterfact"
            file = choose_requests(
                kind, self.split.edited, count, seed, self.run.model, self.only_known
            ).records
        return Sample(file, tuple(read_counterfact(file.checked())))

    @cached_property
    def available(self) -> int:
        """How many records `draw` can give: all, or those that the model knows if only these are
        edited."""
        if not self.only_known:
            return self.split.count
        return len(self.draw(None, 0).records)

    def size(self, method: Method) -> int | None:
        """How many records a comparison lets a method edit; None: all of them."""
        section = self.run.parameters.compare
        most = section.at_most.get(method.name)
        limits = section.count or (most and self.available), most
        return min(filter(None, limits), default=None)

    def most(self, method: Method) -> int:
        """How many of the records a method may edit."""
        return self.run.parameters.compare.at_most.get(method.name, self.split.count)


@dataclass(frozen=True)
class SharedTargets:
    """Targets of many records, from which each sample takes its own."""

    plan: Sequence[Sequence[EditRequest]]
    pieces: Sequence[Artifact]
    """The targets of each part of the plan."""
    seconds: float

    @cached_property
    def stored(self) -> StoredTargets:
        """All of them."""
        return StoredTargets("", {}, None).with_pieces(self.plan, self.pieces)

    def of(self, sample: Sample) -> tuple[Artifact, float]:
        """The targets of a sample, and its share of the seconds."""
        chosen = self.stored.of([record.request for record in sample.records])
        share = len(sample.records) / sum(map(len, self.plan))
        return store_piece("targets", ".safetensors", chosen.save), self.seconds * share


@step("compare", reads=("model", "prefixes", "statistics"), check=check_comparison)
def compare(run: Run) -> None:
    """Edit with each method, measure it, and put all of them into one table."""
    setup = prepare(run, COMPARISON)
    section = run.parameters.compare
    tried: dict[str, Tried] = {}
    for method in setup.methods:
        sample = setup.draw(setup.size(method), section.seed)
        targets = shared_targets(run, method, sample.records)
        one = try_method(
            setup, method, sample, targets, section.generation_records, section.seed, thorough=True
        )
        tried[method.name] = one
        console.print(f"[green]✓[/] {label(method.name):<10} {one.seconds:9.1f} s of editing")
    comparison = _compare(setup, tried)
    _write(run, comparison, tried)
    logged = {
        name: [(key, value, 0) for key, value in metrics.items()]
        for name, metrics in comparison.methods.items()
    }
    finish(run, logged)
    create_table_artifact(key="comparison", table=table_rows(comparison))
    show_results(comparison)


def prepare(run: Run, folder: Path) -> Setup:
    """Read settings and earlier results, and collect the second moments that are missing.

    The results will be in `folder`, and below it the second moments of layers that the step
    `statistics` left out.
    """
    model, zsre = run.model.model, run.parameters.compare.zsre
    methods = compared_methods(run.parameters, model.id, model.shape)
    split = split_source(run.parameters)
    return Setup(
        run=run,
        methods=methods,
        split=split,
        moments=_moments(run, methods, folder / "statistics"),
        learnt=_learn(run, split, folder),
        questions=None if zsre is None else {one.case_id: one for one in read_zsre(zsre)},
    )


def _moments(run: Run, methods: Sequence[Method], folder: Path) -> dict[int, Artifact]:
    """The second moments of all layers that a method needs."""
    needed = sorted({layer for method in methods for layer in method.editor.moment_layers})
    paths = {layer: STATISTICS / f"layer-{layer:02}.parquet" for layer in needed}
    collected = run.given["statistics"].files
    found = {n: run.input("statistics", p) for n, p in paths.items() if str(p) in collected}
    missing = [layer for layer in needed if layer not in found]
    folder.mkdir(parents=True, exist_ok=True)  # DVC expects it
    if missing:
        written, _ = collect_layers(run, missing).write(folder)
        run.files += written.values()
        found |= {layer: describe(path) for layer, path in written.items()}
    return found


def _learn(run: Run, split: Split, folder: Path) -> dict[str, Artifact]:
    """Train what compared methods need, on records that are not edited, or find what was trained on
    these inputs; the losses of each training are left in `folder`."""
    parameters = run.parameters
    found: dict[str, Artifact] = {}
    for name in parameters.compare.methods:
        if name == "mend":
            inputs = run.model, _mend_examples(run, split), parameters.mend_settings
            trained = run.compute(train_mend_network, *inputs)
        elif name == "serac":
            settings = pinned(parameters.serac_settings)
            trained = run.compute(train_serac_models, run.model, split.training, settings)
        else:
            continue
        run.copy(trained.losses, folder / f"{name}-losses.json")
        found[name] = trained.file
    return found


def _mend_examples(run: Run, split: Split) -> Artifact | Continuations:
    parameters, section = run.parameters, run.parameters.mend
    if section.learn_from == "records":
        return split.training
    held_out = parameters.statistics.held_out_documents
    corpus = collect_corpus(corpus_source(parameters), section.texts, section.texts, held_out)
    texts = corpus.ranges[0].texts
    return Continuations(texts, section.texts, section.continuation_tokens, section.seed)


# --- editing and measuring ----------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """What a method made of a sample, and what that did."""

    sample: Sample
    edit: MethodEdit
    seconds: float
    """Of editing, with the sample's share of the targets."""
    measured: Measured

    def metrics(self, references: References) -> dict[str, float]:
        """All metrics; edits that could not be written count as failures."""
        cases = [self.sample.records[index].case_id for index in self.edit.dropped]
        found = self.measured.metrics(self.sample.records, references, cases)
        return found | {"seconds": self.seconds}


def shared_targets(run: Run, method: Method, records: Sequence[Record]) -> SharedTargets | None:
    """The targets of all records that a method's samples draw from; None if it needs none."""
    hyperparameters = method.editor.target_hyperparameters
    if hyperparameters is None:
        return None
    requests, known = [record.request for record in records], len(run.costs)
    plan = chunks(requests, run.parameters.targets.requests_per_piece)
    pieces = optimise(run, plan, hyperparameters)
    return SharedTargets(plan, pieces, total_cost(run.costs[known:]).seconds)


def edit_sample(
    run: Run,
    method: Method,
    sample: Sample,
    targets: SharedTargets | None,
    moments: Mapping[int, Artifact],
    seed: int = 0,
    **learning: Artifact | None,
) -> tuple[MethodEdit, float]:
    """A method's edit of a sample, and its seconds with the share of the targets'; `learning` are
    the records that it learns from, and what it has learnt."""
    parameters = run.parameters
    ready, seconds = targets.of(sample) if targets else (None, 0.0)
    if ready:
        budget = run.token_budget(parameters.edit.token_budget, trained_blocks=0)
    else:  # it may train any block
        blocks = run.model.model.layers
        budget = run.token_budget(parameters.targets.token_budget, trained_blocks=blocks)
    made = run.compute(
        edit_with,
        method,
        run.model,
        sample.file,
        prefixes=run.prefixes,
        moments={layer: moments[layer] for layer in method.editor.moment_layers},
        targets=ready,
        token_budget=budget,
        on_failure=parameters.edit.on_failure,
        seed=seed,
        **learning,
    )
    return made, round(seconds + run.costs[-1].seconds, 3)


def try_method(
    setup: Setup,
    method: Method,
    sample: Sample,
    targets: SharedTargets | None,
    texts_of: int | None,
    seed: int,
    *,
    thorough: bool,
) -> Tried:
    """Edit, score the sample's prompts, and let the model write about `texts_of` of its records.

    A thorough measurement takes the perplexity, and asks the neighborhood prompts behind the
    edited fact, too (CounterFact+).
    """
    edit, seconds = edit_sample(
        setup.run,
        method,
        sample,
        targets,
        setup.moments,
        seed,
        training=setup.split.training,
        trained=setup.learnt.get(method.name),
    )
    if setup.questions is not None:
        asked = questions_of(setup.questions[record.case_id] for record in sample.records)
    else:
        asked = prompts_of(sample.records)
        asked += plus_prompts_of(sample.records) if thorough else []
    measured = measure(
        setup.run,
        edit.edit,
        asked,
        having_prompts(sample.records, texts_of),
        sample.records,
        held_out_text(setup.run) if thorough else None,
        seed,
    )
    return Tried(sample, edit, seconds, measured)


# --- results ------------------------------------------------------------------------------------


def finish(run: Run, metrics: Mapping[str, list[tuple[str, float, int]]]) -> None:
    """Record the results, and log to MLflow each method's metrics: name, value and step."""
    manifest = run.finish()
    parent = ParentRun(
        experiment=run.parameters.report.experiment,
        step=run.step,
        digest=manifest.digest,
        parameters=run.parameters.model_dump(),
        tags=origin(run.parameters, {run.step: manifest}),
        files=[path for path in run.files if path.parent.name != "statistics"],
        methods=metrics,
    )
    log(run.parameters, parent)


def show_results(comparison: Comparison) -> None:
    """Print the first table without its intervals, and where to look next."""
    rows = table_rows(comparison)
    title = f"{comparison.records} edits of {comparison.model}"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0, collapse_padding=True)
    for name in rows[0]:
        is_name = name == "method"
        table.add_column(name, justify="left" if is_name else "right", min_width=9 * is_name)
    for row in rows:
        table.add_row(*row.values())
    output.print()
    output.print(table)
    output.print(" ".join(LEGEND.split()), style="dim")
    console.print(
        f"\nWith intervals, more metrics and all settings: [bold]{COMPARISON}/table.md[/]; every "
        "prompt and every text in the Parquet files beside it.\n"
    )


def _compare(setup: Setup, tried: Mapping[str, Tried]) -> Comparison:
    parameters, model = setup.run.parameters, setup.run.model.model
    has_texts = any(len(one.measured.texts) for one in tried.values())
    references = references_of(parameters) if has_texts and setup.questions is None else {}
    edits = {name: len(one.sample.records) for name, one in tried.items()}
    data_set = parameters.requests.source if setup.questions is None else "zsre"
    results = published(data_set, model.id, max(edits.values()))
    return Comparison(
        model=model.id,
        records=max(edits.values()),
        edits=edits,
        methods={name: one.metrics(references) for name, one in tried.items()},
        exact_entropy=word_tokenizer()[1],
        only_known=setup.only_known,
        published={} if setup.only_known else results,
        notes=tuple(_notes(setup, tried)),
    )


def _notes(setup: Setup, tried: Mapping[str, Tried]) -> Iterator[str]:
    split, section = setup.split, setup.run.parameters.compare
    sample = max((one.sample for one in tried.values()), key=lambda each: len(each.records))
    yield (
        f"{len(sample.records)} of {split.count} records that can be edited; {split.dropped} were "
        f"left out because they contradict others, {split.training_count} were set aside for "
        f"editors that learn, and {split.prompts_dropped} neighborhood prompts with them."
    )
    if setup.questions is not None:
        yield (
            "zsRE: ES, PS and NS are the share of the answer's tokens that the model would choose, "
            "for the edited question, its paraphrase, and a question about something else."
        )
    if written := len(having_prompts(sample.records, section.generation_records)):
        yield f"GE and RS are of the texts of {written} records."
    for method in setup.methods:
        yield f"{label(method.name)}: {method.editor}"
    for name, one in tried.items():
        if count := len(one.edit.dropped):
            yield f"{label(name)}: {count} requests could not be written and count as failures."


def _write(run: Run, comparison: Comparison, tried: Mapping[str, Tried]) -> None:
    for part in ("prompts", "texts"):
        named = [_with_method(name, getattr(one.measured, part)) for name, one in tried.items()]
        table = pyarrow.concat_tables(named)
        path = COMPARISON / ("generations.parquet" if part == "texts" else "prompts.parquet")
        run.write_table(path, table)
    for name, text in (("table.md", markdown(comparison)), ("table.csv", csv_text(comparison))):
        run.write_text(COMPARISON / name, text)
    run.write_json(COMPARISON / "metrics.json", plain(comparison))


def _with_method(name: str, table: pyarrow.Table) -> pyarrow.Table:
    return table.add_column(0, "method", pyarrow.array([name] * len(table), pyarrow.string()))
