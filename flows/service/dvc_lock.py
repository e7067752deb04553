"""Record results in `dvc.lock`, so that `dvc status` is clean and `dvc repro` skips stages."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from filecmp import cmp
from pathlib import Path

from dvc.repo import Repo, lock_repo
from dvc.utils.serialize import YAMLFileCorruptedError
from dvc.utils.strictyaml import YAMLValidationError

from flows.command.parameters import USERS_FILES, Parameters, read_parameters
from flows.command.script import console
from memit.errors import InputError
from tasks.engine.artifacts import cache_directory, copy_file
from tasks.engine.results import STEPS, Manifest, flow_runs
from tasks.reporting.tracking import origin_tags

LOCK = Path("dvc.lock")
RWLOCK = Path(".dvc/tmp/rwlock")
"""DVC writes both in place, so a killed process can leave part of one."""
RESULTS = (Path("artifacts"), Path("evaluation"), Path("report"))
REMEDIES = {
    "not a git repository": "run `git init`, or `dvc config core.no_scm true`, and then ",
    "is outside of": "use a directory instead of the link (`dvc cache dir` uses other disks) and ",
}
"""What helps if DVC's message contains these words."""


def users_files(parameters: Parameters) -> dict[str, tuple[int, int]]:
    """Size and time of change of the user's files that the parameters name."""
    named = (key.split(".") for key in USERS_FILES)
    paths = [getattr(getattr(parameters, section), name) for section, name in named]
    files = [file for path in filter(None, paths) for file in (Path(path), *Path(path).rglob("*"))]
    stats = {str(file): file.stat() for file in files if file.exists()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def commit_stages(
    parameters: Parameters, stages: Sequence[str], read: Mapping[str, tuple[int, int]]
) -> bool:
    """Record finished stages in `dvc.lock` (`dvc commit`); whether that was done. `read` are the
    `users_files` before the run.

    Does nothing if DVC itself runs the flow, outside of a DVC project, and if the run's parameters
    or files are not those that are here now, which DVC would record.
    """
    if "DVC_STAGE" in os.environ or not (Path(".dvc").is_dir() and Path("dvc.yaml").exists()):
        return False
    if not matches_params_file(parameters):
        console.print(
            "[yellow]note:[/] the parameters are not those of params.yaml, so dvc.lock does not "
            "record these results; `dvc checkout` restores those that it does record."
        )
        return False
    if users_files(parameters) != read:
        console.print(
            "[yellow]note:[/] files that params.yaml names were changed during the run, so "
            "dvc.lock does not record these results: run it again."
        )
        return False
    _delete_torn_rwlock()
    error = _commit(stages)
    if isinstance(error, YAMLFileCorruptedError | YAMLValidationError) and LOCK.exists():
        error = _commit_to_new_lock(STEPS[: STEPS.index(stages[-1]) + 1]) and error
    if error:
        said = " ".join(str(error).split()) or type(error).__name__
        remedy = next((remedy for words, remedy in REMEDIES.items() if words in said), "")
        console.print(
            f"[yellow]warning:[/] DVC did not record the results ({said}); they are complete: "
            f"{remedy}run `dvc commit -f`."
        )
    return not error


def _commit_to_new_lock(stages: Sequence[str]) -> Exception | None:
    """Commit to a new `dvc.lock`, since the old one is torn; restore that if it fails.

    The old one is kept in `.cache/`: it may record stages of the user's own.
    """
    kept = cache_directory() / "dvc.lock"
    copy_file(LOCK, kept)
    LOCK.unlink()
    error = _commit(stages)
    if error:
        copy_file(kept, LOCK)
    return error


def _delete_torn_rwlock() -> None:
    """DVC, which lists its running processes there, fails while the file is not JSON."""
    try:
        json.loads(RWLOCK.read_bytes())
    except FileNotFoundError:
        pass
    except ValueError:
        RWLOCK.unlink(missing_ok=True)


def _delete_damaged_copies(cache: Path) -> None:
    """Delete copies of the results from DVC's cache that do not match their digest.

    Results are links into it, so damage to one is damage to the copy, and DVC would link a new
    result to that copy without checking it again.
    """
    for path in (path for folder in RESULTS for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        copy = cache / digest[:2] / digest[2:]
        if copy.exists() and not copy.samefile(path) and not cmp(path, copy, shallow=False):
            copy.unlink()


def _commit(stages: Sequence[str]) -> Exception | None:
    """What goes wrong in DVC; None on success."""
    logging.getLogger("dvc").setLevel(logging.CRITICAL)
    try:
        with Repo() as repo, lock_repo(repo):
            _delete_damaged_copies(Path(repo.cache.local.path))
            # As `dvc commit --force` does for one stage; both files are read and written once.
            named = {stage.addressing: stage for stage in repo.stage.load_file()}
            changed = [named[name] for name in stages if named[name].changed()]
            for stage in changed:
                stage.save()
                stage.commit()
            if changed:
                changed[0].dvcfile.dump_stages(changed, update_pipeline=False)
    except Exception as error:  # whatever it is, the results are there
        return error
    return None


def origin(parameters: Parameters, manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """Tags that identify where results come from; without `dvc.lock` if it records others."""
    tags = origin_tags(flow_runs(manifests))
    if not matches_params_file(parameters):
        tags.pop("dvc.lock", None)
    return tags


def matches_params_file(parameters: Parameters) -> bool:
    """Whether the parameters are those of `params.yaml`: a deployment can override them."""
    try:
        in_file = read_parameters()
    except InputError:
        return False
    # No result depends on the runner.
    return parameters.model_copy(update={"runner": in_file.runner}) == in_file
