"""The named results of the steps, and the file in which each step describes its own.

Next to its results every step writes `artifacts/steps/<step>.json`: the digests of its files, those
of the results that it read, and its cost. A later step checks the digests before it uses anything,
so that a damaged file or one of another experiment is refused by name.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from memit.errors import IntegrityError
from memit.files.digests import content_digest, file_sha256
from tasks.engine.artifacts import (
    Artifact,
    Value,
    as_piece,
    cache_directory,
    describe,
    write_json,
    write_text,
)
from tasks.engine.cost import Cost, total_cost

STEPS = ("model", "requests", "prefixes", "statistics", "targets", "edit", "evaluation", "report")
"""In the order in which they run."""

MODEL_FILE = Path("artifacts/model/model.json")
WEIGHTS = Path("artifacts/model/weights")
WORLD = Path("artifacts/model/world")
REQUESTS_FILE = Path("artifacts/requests.json")
PREFIXES_FILE = Path("artifacts/prefixes.json")
STATISTICS = Path("artifacts/statistics")
STATISTICS_FILE = STATISTICS / "statistics.json"
HELD_OUT_FILE = STATISTICS / "held_out.parquet"
TARGETS_FILE = Path("artifacts/targets.safetensors")
STORED_TARGETS_FILE = Path("artifacts/stored_targets.safetensors")
EDIT = Path("artifacts/edit")
DELTA_FILE = EDIT / "delta.safetensors"
EDITED_WEIGHTS_FILE = EDIT / "weights.safetensors"
EDIT_FILE = EDIT / "edit.json"
EVALUATION = Path("evaluation")
ANSWERS_FILE = EVALUATION / "answers.csv"
PROMPTS_FILE = EVALUATION / "prompts.parquet"
GENERATIONS_FILE = EVALUATION / "generations.parquet"
KEPT_FILE = EVALUATION / "kept.csv"
GENERATED_FILE = EVALUATION / "generated.csv"
FACTS_FILE = EVALUATION / "facts.csv"
DETAILS_FILE = EVALUATION / "intervals.json"
METRICS_FILE = Path("metrics.json")
TIMINGS_FILE = Path("timings.json")
REPORT = Path("report")
FIGURES = tuple(REPORT / f"{name}.svg" for name in ("margins", "losses", "updates"))
TABLE_FILE = REPORT / "results.md"
PAGE_FILE = REPORT / "index.html"
STEP_FILES = {
    "compare": Path("comparison/step.json"),
    "scaling": Path("scaling/step.json"),
    "tune": Path("tuning/step.json"),
    "tracing": Path("tracing/step.json"),
}
"""Files of steps outside of the experiment; those of its own steps are in `artifacts/steps/`, on
which the report depends."""


class Manifest(Value):
    """What a step made, from what, and at what cost."""

    step: str
    files: dict[str, str]
    """Path of each result, relative to the working directory, and its SHA-256."""
    inputs: dict[str, str]
    """Steps whose results were read, and their digests."""
    cost: Cost
    notes: dict[str, float] = Field(default_factory=dict)
    """What is to be known of how they were made."""

    @property
    def digest(self) -> str:
        """SHA-256 over the results: equal ones are the same, whenever and from what they were made.

        So a step is up to date for `upstream` whenever it is for DVC.
        """
        return content_digest([self.step, self.files])

    def file(self, path: Path) -> Artifact:
        """One of the results, as the input of a task.

        Raises:
            IntegrityError: the step has not made it.
        """
        if str(path) not in self.files:
            raise IntegrityError(f"{path} is missing: run the step {self.step} again.")
        return Artifact(
            path=str(path.absolute()), sha256=self.files[str(path)], size=path.stat().st_size
        )


def finish_step(
    step: str,
    files: Iterable[Path],
    inputs: Mapping[str, Manifest],
    costs: Sequence[Cost],
    notes: Mapping[str, float] | None = None,
) -> Manifest:
    """Record what a step made, from what, and its cost. The last thing that a step does."""
    manifest = Manifest(
        step=step,
        files={str(path): describe(path).sha256 for path in sorted(files)},
        inputs={name: given.digest for name, given in sorted(inputs.items())},
        cost=total_cost(costs),
        notes=dict(notes or {}),
    )
    _remove_stale(manifest)
    write_json(_step_file(step), manifest.model_dump())
    # Commands that only read results need no Prefect, whose import takes a second.
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        write_text(_flow_run_note(manifest), str(context.flow_run.id))
    return manifest


def _remove_stale(manifest: Manifest) -> None:
    """Delete what the step wrote beside or below its results with other settings, unless it was
    changed."""
    folders = {Path(name).parent for name in manifest.files}
    with suppress(IntegrityError):
        for name, digest in _read_manifest(manifest.step).files.items():
            path = Path(name)
            is_below = ".." not in path.parts and not folders.isdisjoint(path.parents)
            is_stale = name not in manifest.files and is_below
            if is_stale and path.is_file() and file_sha256(path) == digest:
                path.unlink()


def flow_runs(manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """The Prefect flow run that last finished each step with these results, as far as known."""
    notes = {step: _flow_run_note(manifest) for step, manifest in manifests.items()}
    return {step: note.read_text() for step, note in notes.items() if note.exists()}


def _flow_run_note(manifest: Manifest) -> Path:
    return cache_directory() / "flow-runs" / manifest.digest


def upstream(*steps: str) -> dict[str, Manifest]:
    """The manifests of the steps whose results are read, after all of their files were checked.

    Raises:
        IntegrityError: a result is missing, damaged, or belongs to another experiment.
    """
    manifests = {step: _read_manifest(step) for step in steps}
    for manifest in manifests.values():
        _check_files(manifest)
        for name, digest in manifest.inputs.items():
            if name in manifests and manifests[name].digest != digest:
                raise IntegrityError(
                    f"the results of {manifest.step} were made from other results of {name} than "
                    f"the present ones: run the step {manifest.step} again."
                )
    return manifests


class PastRun(Value):
    """The facts of a finished run, and its delta."""

    origin: str
    """Where the facts come from."""
    commit: str = ""
    """The git commit of that file, if it has one."""
    records: Artifact
    delta: Artifact


def remember_run(given: Mapping[str, Manifest], origin: str, commit: str) -> None:
    """Note the pieces that hold a finished run's facts and delta, and keep the note of the run
    before it, so that the two can be compared."""
    records = as_piece(given["requests"].file(REQUESTS_FILE), "requests")
    delta = as_piece(given["edit"].file(DELTA_FILE), "edit")
    run = PastRun(origin=origin, commit=commit, records=records, delta=delta)
    runs = [known for known in last_runs() if (known.records, known.delta) != (records, delta)]
    write_json(_past_runs(), [known.model_dump() for known in [*runs[-1:], run]])


def last_runs() -> list[PastRun]:
    """The last two finished runs that differ, or fewer, the older one first, and last the one whose
    delta is in this directory: DVC brings back results without running a step."""
    try:
        runs = [PastRun.model_validate(run) for run in json.loads(_past_runs().read_bytes())]
    except (OSError, ValueError):
        return []
    here = file_sha256(DELTA_FILE) if DELTA_FILE.is_file() else ""
    return sorted(
        (run for run in runs if run.records.intact()), key=lambda run: run.delta.sha256 == here
    )


def run_of(delta_file: Path) -> PastRun | None:
    """The one of the last two runs that made a delta."""
    digest = file_sha256(delta_file)
    return next((run for run in last_runs() if run.delta.sha256 == digest), None)


def _past_runs() -> Path:
    return cache_directory() / "past-runs.json"


def is_model_here(source: str, name: str) -> bool:
    """Whether the model in this directory is the one of this `source` and `id`."""
    with suppress(OSError, ValueError, LookupError):
        found = json.loads(MODEL_FILE.read_bytes())
        return (found["source"], found["id"]) == (source, name)
    return False


def is_edit_here(delta_file: Path) -> bool:
    """Whether a delta is that of the step `edit` in this directory."""
    return DELTA_FILE.is_file() and file_sha256(delta_file) == file_sha256(DELTA_FILE)


def is_measured(delta_file: Path) -> bool:
    """Whether the metrics in this directory are those of a delta."""
    with suppress(IntegrityError):
        edit, evaluation = _read_manifest("edit"), _read_manifest("evaluation")
        _check_files(evaluation)
        made = edit.files.get(str(DELTA_FILE)) == file_sha256(delta_file)
        return made and evaluation.inputs["edit"] == edit.digest
    return False


def read_metrics() -> dict[str, Any]:
    """The metrics of the last run, with their intervals and magnitudes if they are here."""
    metrics = json.loads(METRICS_FILE.read_bytes())
    details = json.loads(DETAILS_FILE.read_bytes()) if DETAILS_FILE.is_file() else {}
    for state, values in details.items():
        metrics[state] |= values
    return metrics


def read_timings(steps: Iterable[str]) -> dict[str, Cost]:
    """The cost of each step's pieces when they were computed, of the steps that have run.

    Raises:
        IntegrityError: the file of a step is damaged.
    """
    return {step: _read_manifest(step).cost for step in steps if _step_file(step).exists()}


def _step_file(step: str) -> Path:
    return STEP_FILES.get(step, Path("artifacts/steps", f"{step}.json"))


def _read_manifest(step: str) -> Manifest:
    path = _step_file(step)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise IntegrityError(
            f"{path} is missing, so the step {step} is not finished: run it first."
        ) from None
    except ValidationError:
        raise IntegrityError(f"{path} is damaged: run the step {step} again.") from None


def _check_files(manifest: Manifest) -> None:
    for name, digest in manifest.files.items():
        path = Path(name)
        if not path.is_file() or file_sha256(path) != digest:
            raise IntegrityError(
                f"{name} is missing or is not what the step {manifest.step} wrote: delete it and "
                "run that step again, or fetch it (dvc pull)."
            )
