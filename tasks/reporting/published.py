"""Published results, for comparison with ours: the paper's, and those of a later one."""

from collections.abc import Mapping
from dataclasses import dataclass

from memit.hyperparameters import short_name


@dataclass(frozen=True)
class Published:
    """One row of a published table; metrics that it does not report are None."""

    score: float
    efficacy: float
    paraphrase: float
    neighborhood: float | None
    """On zsRE: specificity."""
    entropy: float | None = None
    reference: float | None = None
    seconds: float | None = None
    """For 10,000 edits on an A6000."""


SOURCES = {
    10_000: "Meng et al. (2023), section 5",
    2_000: "arXiv 2605.26670, all facts in one batch",
}
"""Of the tables, by the number of edits."""

TABLES: Mapping[tuple[str, str, int], Mapping[str, Published]] = {
    ("counterfact", "gpt-j-6b", 10_000): {
        "unedited": Published(22.4, 15.2, 17.7, 83.5, 622.4, 29.4),
        "ft_w": Published(67.6, 99.4, 77.0, 46.9, 293.9, 15.9, 1_716),
        "mend": Published(23.1, 15.7, 18.5, 83.0, 618.4, 31.1, 98),
        "rome": Published(50.3, 50.2, 50.4, 50.2, 589.6, 3.3, 44_248),
        "memit": Published(85.8, 98.9, 88.6, 73.7, 619.9, 40.1, 26_773),
    },
    ("counterfact", "gpt-neox-20b", 10_000): {
        "unedited": Published(23.7, 16.8, 18.3, 81.6, 620.4, 29.3),
        "memit": Published(82.0, 97.2, 82.2, 70.8, 606.4, 36.9),
    },
    ("zsre", "gpt-j-6b", 10_000): {
        "unedited": Published(26.4, 26.4, 25.8, 27.0),
        "ft_w": Published(42.1, 69.6, 64.8, 24.1),
        "mend": Published(20.0, 19.4, 18.6, 22.4),
        "rome": Published(2.6, 21.0, 19.6, 0.9),
        "memit": Published(50.7, 96.7, 89.7, 26.6),
    },
    ("counterfact", "gpt-j-6b", 2_000): {
        "memit": Published(90.2, 99.83, 94.34, 79.13, 620.7, 41.0),
        "alphaedit": Published(90.1, 99.77, 94.56, 78.79, 619.7, 41.1),
    },
    ("counterfact", "gpt2-xl", 2_000): {
        "memit": Published(85.7, 99.22, 92.19, 70.97, 623.4, 41.3),
        "alphaedit": Published(85.1, 99.57, 92.72, 69.40, 617.8, 41.4),
    },
    ("counterfact", "meta-llama-3-8b-instruct", 2_000): {
        "memit": Published(91.5, 99.80, 88.33, 87.50, 632.8, 32.1),
        "alphaedit": Published(85.9, 95.30, 77.12, 87.37, 632.0, 30.0),
    },
    ("counterfact", "qwen2.5-7b-instruct", 2_000): {
        "memit": Published(92.0, 99.88, 94.41, 83.20, 625.3, 32.9),
        "alphaedit": Published(91.9, 99.88, 94.03, 83.38, 625.1, 32.7),
    },
}
"""By data set, the last part of the model's name, and the number of edits; S of the later paper is
the harmonic mean of its three."""


def published(data_set: str, model: str, records: int) -> Mapping[str, Published]:
    """Published rows by method; empty unless this model was edited with as many records."""
    return TABLES.get((data_set, short_name(model), records), {})
