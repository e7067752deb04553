"""The task of the step `targets`: optimise targets in pieces; and targets that are kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from memit.errors import IntegrityError
from memit.files.tensors import load_tensors, save_tensors
from memit.hyperparameters import Hyperparameters
from memit.requests import EditRequest
from memit.targets import Targets, compute_targets
from tasks.engine.artifacts import Artifact, store_piece, write_json
from tasks.engine.cache import cached_task
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import advance

logger = logging.getLogger(__name__)


def target_settings(hyperparameters: Hyperparameters) -> Hyperparameters:
    """Only what the targets depend on; the rest is fixed, so that it changes no cache key."""
    at_block = hyperparameters.site == "block"
    return replace(
        hyperparameters,
        layers=hyperparameters.layers[-1:] if at_block else hyperparameters.layers,
        covariance_weight=1.0,
        key_average="nested",
        largest_update=Hyperparameters.largest_update,
    )


@cached_task("targets")
def optimise_targets(
    requests: Sequence[EditRequest],
    model: ModelReference,
    prefixes: Sequence[str],
    hyperparameters: Hyperparameters,
    token_budget: int,
    earlier: Artifact | None = None,
) -> Artifact:
    """Optimise the targets of some requests (Eqn. 16), in the model with `earlier` edits if any."""
    with loaded(model, earlier, shared=True) as lm:
        targets = compute_targets(
            lm, requests, prefixes, hyperparameters, token_budget=token_budget, progress=advance
        )
    return store_piece("targets", ".safetensors", targets.save)


# --- targets of facts that come and go ------------------------------------------------------------


@dataclass(frozen=True)
class StoredTargets:
    """Targets of facts that are or were in the list, optimised with the same inputs and code."""

    key: str
    """Of these inputs and code."""
    rows: Mapping[str, int]
    """The row of each fact, by its digest."""
    targets: Targets | None
    """None if there are no rows."""

    @staticmethod
    def load(path: Path, key: str) -> StoredTargets:
        """Read a file of `save`; what is damaged or has another key counts as empty."""
        try:
            tensors, metadata = load_tensors(path)
            facts = json.loads(metadata["facts"])
            if metadata["key"] == key:
                rows = {fact: row for row, fact in enumerate(facts)}
                return StoredTargets(key, rows, Targets(**tensors))
        except (IntegrityError, KeyError, TypeError) as error:
            if path.exists():
                logger.warning("%s All targets are optimised again.", error)
        return StoredTargets(key, {}, None)

    def with_pieces(
        self, plan: Sequence[Sequence[EditRequest]], pieces: Sequence[Artifact]
    ) -> StoredTargets:
        """With the targets of the pieces of a plan, in the order of the facts' digests."""
        if not pieces:
            return self
        found = [Targets.load(piece.checked()) for piece in pieces]
        whole = Targets.concatenate([*([self.targets] if self.targets else []), *found])
        facts = [*self.rows, *(request.digest for piece in plan for request in piece)]
        at = {fact: row for row, fact in reversed(list(enumerate(facts)))}  # the first row counts
        facts = sorted(at)
        rows = {fact: row for row, fact in enumerate(facts)}
        return StoredTargets(self.key, rows, whole.chosen([at[fact] for fact in facts]))

    def missing(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests whose targets are not stored."""
        return [request for request in requests if request.digest not in self.rows]

    def of(self, requests: Sequence[EditRequest]) -> Targets:
        """The targets of requests, in their order."""
        assert self.targets is not None
        return self.targets.chosen([self.rows[request.digest] for request in requests])

    def save(self, path: Path) -> None:
        """Write them as safetensors, without the facts' texts."""
        assert self.targets is not None
        metadata = {"key": self.key, "facts": json.dumps(list(self.rows))}
        save_tensors(self.targets.__dict__, path, metadata)


def plan_pieces(
    missing: Sequence[EditRequest], size: int, file: Path
) -> list[Sequence[EditRequest]]:
    """Which facts are optimised together, since the last bits of a target depend on that.

    The plan is kept in `file` until its targets are stored. If there is one of a run that was
    killed, its pieces with missing facts stay as they are, and the other facts are added.
    """
    wanted = {request.digest for request in missing}
    plan = [piece for piece in _read_plan(file) if any(r.digest in wanted for r in piece)]
    planned = {request.digest for piece in plan for request in piece}
    rest = [request for request in missing if request.digest not in planned]
    plan += [rest[first : first + size] for first in range(0, len(rest), size)]
    if plan:
        write_json(file, [[asdict(request) for request in piece] for piece in plan])
    return plan


def _read_plan(file: Path) -> list[Sequence[EditRequest]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [[EditRequest(**request) for request in piece] for piece in rows]
    except (OSError, ValueError, TypeError):  # there is none, or it is damaged
        return []
