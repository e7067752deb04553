"""Metrics of a user's own: the public functions of a Python file.

A metric gets a model, edited or not, records, and the padded tokens to run at a time, and gives a
number for each record, NaN where it has none.
"""

from collections.abc import Callable, Sequence
from inspect import isfunction
from pathlib import Path

from memit.editors.base import import_file
from memit.errors import InputError
from memit.evaluation import DETAILS
from memit.files.reading import check_file
from memit.language_model import LanguageModel
from memit.requests import Record

Metric = Callable[[LanguageModel, Sequence[Record], int], Sequence[float]]


def own_metrics(path: str) -> dict[str, Metric]:
    """The metrics that a file defines, by their names.

    Raises:
        InputError: it is no file, cannot be imported, or defines none; or one has a name that is
            read as an interval's.
    """
    check_file(path, "the metrics")
    module = import_file(Path(path).resolve())
    found = {
        name: value
        for name, value in vars(module).items()
        if isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    if not found:
        raise InputError(f"{path} defines no public function: a metric is one.")
    for name in found:
        if name.endswith(DETAILS):
            raise InputError(
                f"{path} defines the metric {name}, and names in {', '.join(DETAILS)} are those of "
                "intervals and magnitudes: give it another."
            )
    return found
