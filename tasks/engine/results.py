"""The named results of the steps, and the manifest that says what each was made from.

Next to its results every step leaves ``artifacts/manifests/<step>.json``: the digests of its files
and the manifests that it was computed from. A later step checks both before it uses anything, so a
damaged file or one of another experiment is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from prefect.context import FlowRunContext
from pydantic import ValidationError

from memit.errors import IntegrityError
from memit.files.digests import file_sha256
from tasks.engine.artifacts import (
    Artifact,
    Value,
    cache_directory,
    describe,
    write_json,
    write_text,
)
from tasks.engine.cost import Cost, total_cost

STEPS = (
    "model",
    "requests",
    "prefixes",
    "statistics",
    "targets",
    "edit",
    "evaluation",
    "report",
)
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
EDIT = Path("artifacts/edit")
DELTA_FILE = EDIT / "delta.safetensors"
EDITED_WEIGHTS_FILE = EDIT / "weights.safetensors"
EDIT_FILE = EDIT / "edit.json"
EVALUATION = Path("evaluation")
PROMPTS_FILE = EVALUATION / "prompts.parquet"
GENERATIONS_FILE = EVALUATION / "generations.parquet"
FACTS_FILE = EVALUATION / "facts.csv"
METRICS_FILE = Path("metrics.json")
TIMINGS_FILE = Path("timings.json")
REPORT_FILES = tuple(
    Path("report", name) for name in ("metrics.png", "updates.png", "losses.png", "results.md")
)
MEND = Path("artifacts/mend")
MEND_NETWORK_FILE = MEND / "network.safetensors"
SERAC = Path("artifacts/serac")
SERAC_MODELS_FILE = SERAC / "models.safetensors"
MANIFESTS = Path("artifacts/manifests")
TIMINGS = Path("artifacts/timings")


class Manifest(Value):
    """What a step made, and from what."""

    step: str
    files: dict[str, str]
    """Path of each result, relative to the working directory, and its SHA-256."""
    inputs: dict[str, str]
    """Steps whose results were read, and the digests of their manifests."""

    @property
    def digest(self) -> str:
        """SHA-256 over everything that the step made and what it was made from."""
        canonical = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def file(self, path: Path) -> Artifact:
        """One of the results, as the input of a task."""
        return Artifact(
            path=str(path.absolute()), sha256=self.files[str(path)], size=path.stat().st_size
        )


def finish_step(
    step: str, files: Iterable[Path], inputs: Mapping[str, Manifest], costs: Sequence[Cost]
) -> Manifest:
    """Write down what a step made, from what, and what it cost. The last thing that a step does."""
    manifest = Manifest(
        step=step,
        files={str(path): describe(path).sha256 for path in sorted(files)},
        inputs={name: given.digest for name, given in sorted(inputs.items())},
    )
    _remove_stale(manifest)
    write_json(TIMINGS / f"{step}.json", total_cost(costs).model_dump())
    write_json(MANIFESTS / f"{step}.json", manifest.model_dump())
    _remember_flow_run(manifest)
    return manifest


def _remove_stale(manifest: Manifest) -> None:
    """Delete what the step wrote beside its results with other settings, unless it was changed."""
    folders = {Path(name).parent for name in manifest.files}
    with suppress(IntegrityError):
        for name, digest in _read_manifest(manifest.step).files.items():
            is_stale = name not in manifest.files and Path(name).parent in folders
            if is_stale and Path(name).is_file() and file_sha256(name) == digest:
                Path(name).unlink()


def flow_runs(manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """The Prefect flow run that last finished each step with these results, as far as known."""
    notes = {step: _flow_run_note(manifest) for step, manifest in manifests.items()}
    return {step: note.read_text() for step, note in notes.items() if note.exists()}


def _remember_flow_run(manifest: Manifest) -> None:
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        write_text(_flow_run_note(manifest), str(context.flow_run.id))


def _flow_run_note(manifest: Manifest) -> Path:
    return cache_directory() / "flow-runs" / manifest.digest


def upstream(*steps: str) -> dict[str, Manifest]:
    """The manifests of the steps that are read, after all of their files were checked.

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
                    f"those that lie here: run the step {manifest.step} again."
                )
    return manifests


def read_timings(steps: Iterable[str]) -> dict[str, Cost]:
    """What each step cost when its pieces were computed, as far as it has run.

    Raises:
        IntegrityError: a file with timings is damaged.
    """
    paths = {step: TIMINGS / f"{step}.json" for step in steps}
    return {step: _read_cost(step, path) for step, path in paths.items() if path.exists()}


def _read_cost(step: str, path: Path) -> Cost:
    try:
        return Cost.model_validate_json(path.read_bytes())
    except ValidationError:
        raise IntegrityError(f"{path} is damaged: run the step {step} again.") from None


def _read_manifest(step: str) -> Manifest:
    path = MANIFESTS / f"{step}.json"
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(
            f"{path} is missing, so the step {step} is not finished: run it first."
        ) from None
    except (ValidationError, UnicodeDecodeError):
        raise IntegrityError(f"{path} is damaged: run the step {step} again.") from None


def _check_files(manifest: Manifest) -> None:
    for name, digest in manifest.files.items():
        try:
            found = file_sha256(name)
        except FileNotFoundError:
            raise IntegrityError(
                f"{name} is missing: run the step {manifest.step} again, or fetch it (dvc pull)."
            ) from None
        if found != digest:
            raise IntegrityError(
                f"{name} is not what the step {manifest.step} wrote: delete it and run that step "
                "again, or fetch it (dvc checkout)."
            )
