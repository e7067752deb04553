"""`memit export`: an edited model, an adapter or a delta as a directory with a model card."""

import os
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from huggingface_hub import ModelCard

from flows.command.parameters import ModelSection
from memit.adapter import make_adapter
from memit.errors import ResourceError
from memit.files.atomic import temporary
from memit.language_model import DTYPES, LanguageModel
from memit.weight_delta import WeightDelta, check_rounded, check_weights
from tasks.engine.results import is_measured, read_metrics
from tasks.reporting.card import Kind, make_card


def export_edit(
    lm: LanguageModel | None,
    delta_file: Path,
    directory: Path,
    kind: Kind,
    dtype: str,
    license_: str | None,
) -> str:
    """Write an edit as a directory, atomically; gives a sentence about it.

    The model `lm` is edited if the weights are to be merged; the kind `delta` needs none.

    Raises:
        InputError: the delta cannot be an adapter.
        IntegrityError: it was made for another model.
        NumericsError: the dtype cannot represent the edited weights.
        ResourceError: there is not enough disk space.
    """
    delta = WeightDelta.load(delta_file)
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    said = f"saved {directory} in {dtype}" if kind == "merged" else f"saved {directory}"
    note = ""
    with temporary(directory) as partial:
        partial.mkdir()
        if lm is None:
            shutil.copyfile(delta_file, partial / "delta.safetensors")
        elif kind == "merged":
            _save_merged(lm, delta, partial, dtype)
        else:
            check_weights(delta, [(n, lm.parameter(n)) for n in delta.changes], lm.name)
            adapter = make_adapter(lm, delta)
            adapter.save(partial, lm.name, lm.revision)
            note = f"Rank {adapter.rank}, relative error of the factors {adapter.error:.1e}."
            said += f". {note}"
        metrics = read_metrics() if is_measured(delta_file) else None
        make_card(kind, delta.provenance, license_, metrics, note).save(partial / "README.md")
        for file in partial.glob("*.safetensors"):  # which safetensors lets nobody else read
            file.chmod((partial / "README.md").stat().st_mode)
        os.replace(partial, directory)  # replaces an empty directory, but no other
    return said


def _save_merged(lm: LanguageModel, delta: WeightDelta, directory: Path, dtype: str) -> None:
    delta.apply(lm)
    for name in delta.changes:
        check_rounded(lm.parameter(name), DTYPES[dtype], name)
    lm.model.to(dtype=DTYPES[dtype])  # pyright: ignore[reportCallIssue]
    needed = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    free = shutil.disk_usage(directory.parent).free
    if needed > free:
        raise ResourceError(
            f"the model takes {needed / 1e9:.1f} GB, and {directory.parent} has "
            f"{free / 1e9:.1f} GB free: choose another disk or a smaller dtype."
        )
    lm.model.save_pretrained(directory)
    lm.tokenizer.save_pretrained(directory)


def license_of(place: Path | None, section: ModelSection | None) -> str | None:
    """The licence of the model in a directory, or of that of params.yaml, as the card there
    or the package says; None: not known."""
    if section is not None and section.source == "package":
        with suppress(PackageNotFoundError):  # a delta is exported without the model
            return str(metadata(str(section.package)).json.get("license", "")).lower() or None
        return None
    if place is None and section is not None and section.source == "local":
        place = Path(str(section.path))
    if place is None:
        return None
    card = place / "README.md"
    return ModelCard.load(card).data.to_dict().get("license") if card.is_file() else None
