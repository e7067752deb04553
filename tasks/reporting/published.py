"""The paper's results for 10,000 edits, for comparison with ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memit.hyperparameters import short_name


@dataclass(frozen=True)
class Published:
    """One row of a table of the paper; metrics that it does not report are None."""

    score: float
    efficacy: float
    paraphrase: float
    neighborhood: float | None
    """On zsRE: specificity."""
    entropy: float | None = None
    reference: float | None = None
    seconds: float | None = None
    """For 10,000 edits on an A6000."""


RECORDS = 10_000
"""The number of edits in these tables."""

TABLES: Mapping[tuple[str, str], Mapping[str, Published]] = {
    ("counterfact", "gpt-j-6b"): {
        "unedited": Published(22.4, 15.2, 17.7, 83.5, 622.4, 29.4),
        "ft_w": Published(67.6, 99.4, 77.0, 46.9, 293.9, 15.9, 1_716),
        "mend": Published(23.1, 15.7, 18.5, 83.0, 618.4, 31.1, 98),
        "rome": Published(50.3, 50.2, 50.4, 50.2, 589.6, 3.3, 44_248),
        "memit": Published(85.8, 98.9, 88.6, 73.7, 619.9, 40.1, 26_773),
    },
    ("counterfact", "gpt-neox-20b"): {
        "unedited": Published(23.7, 16.8, 18.3, 81.6, 620.4, 29.3),
        "memit": Published(82.0, 97.2, 82.2, 70.8, 606.4, 36.9),
    },
    ("zsre", "gpt-j-6b"): {
        "unedited": Published(26.4, 26.4, 25.8, 27.0),
        "ft_w": Published(42.1, 69.6, 64.8, 24.1),
        "mend": Published(20.0, 19.4, 18.6, 22.4),
        "rome": Published(2.6, 21.0, 19.6, 0.9),
        "memit": Published(50.7, 96.7, 89.7, 26.6),
    },
}
"""By data set and the last part of the model's name (Meng et al., section 5)."""


def published(data_set: str, model: str, records: int) -> Mapping[str, Published]:
    """The paper's rows by method; empty unless it edited this model with as many records."""
    if records != RECORDS:
        return {}
    return TABLES.get((data_set, short_name(model)), {})
