"""What `memit tune` tries, how its trials compare, and the preset that it writes."""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from memit.errors import InputError
from memit.hyperparameters import AUTO, Hyperparameters, read_preset
from memit.model_shape import ModelShape
from tasks.tune import STAGES, Trial, draw_trials, positions, preset_text, trials_table, widths

START = Hyperparameters((4, 5, 6), 500.0, rate_unit="relative", learning_rate=0.1)
BEFORE = {"score": 0.0, "efficacy": 2.0, "neighborhood": 90.0, "perplexity": 40.0}


def _trial(score: float, neighborhood: float, perplexity: float = 41.0) -> Trial:
    metrics = {"score": score, "neighborhood": neighborhood, "perplexity": perplexity}
    metrics |= {"efficacy": 100.0, "paraphrase": score}
    return Trial(replace(START, covariance_weight=AUTO), 490.0, metrics)


@pytest.mark.parametrize("depth", [1, 2, 6, 30, 96])
def test_every_proposal_can_be_edited(depth: int) -> None:
    for propose in STAGES:
        for settings in propose(START, depth):
            layers = settings.layers
            assert layers == tuple(range(layers[0], layers[-1] + 1))
            assert settings.rate_unit == "relative"
            if "layers" in str(propose.__doc__).lower():
                assert layers[-1] <= max(depth - 2, 0)


def test_coarse_trials_cover_the_lower_part_and_share_targets_where_they_can() -> None:
    assert [one.layers[-1] for one in positions(START, 30)] == [3, 5, 9, 14, 18]
    assert {one.layers[-1] for one in widths(START, 30)} == {START.layers[-1]}


def test_what_must_stay_counts_before_the_score() -> None:
    good, careless, wordy = _trial(88, 84), _trial(95, 75), _trial(95, 89, perplexity=60)
    failed = Trial(START, failure="the edit moves away from its targets")
    ordered = sorted([failed, wordy, careless, good], key=lambda one: one.rank(BEFORE))
    assert ordered[-1] is good
    assert not any(one.keeps(BEFORE) for one in (careless, wordy, failed))
    lines = trials_table([failed, careless, good], BEFORE, "S 86.4").splitlines()
    rows = [line for line in lines if line.startswith("| 4–6")]
    assert "88.0" in rows[0]
    assert "95.0" in rows[1]
    assert "moves away" in rows[2]
    assert "S 86.4" in lines[-1]


def test_the_figure_has_a_line_for_each_trial_also_for_one_that_failed(tmp_path: Path) -> None:
    failed, good = Trial(START, failure="the edit moves away from its targets"), _trial(88, 84)
    heights = []
    for name, trials in (("one", [good]), ("both", [failed, good]), ("failed", [failed])):
        draw_trials(trials, BEFORE, tmp_path / name)
        heights.append(imread(tmp_path / name, format="png").shape[0])
    assert heights[0] == heights[2] < heights[1]


def test_the_preset_is_read_as_it_was_chosen(tmp_path: Path) -> None:
    shape = ModelShape(30, 576, 1_536, 0, "LlamaForCausalLM")
    best = _trial(91.25, 86)
    path = tmp_path / "preset.toml"
    path.write_text(preset_text("somebody/Model-1B", shape, best, BEFORE, 24), encoding="utf-8")
    found = read_preset(path)
    assert found.settings == best.settings
    assert found.fits(shape)
    assert found.models == ("model-1b",)
    assert "score 0.0 to 91.2" in found.checked


@pytest.mark.parametrize("text", ["layers: [1]", 'models = ["m"]', "[settings]\nlayer = 3"])
def test_a_file_that_is_no_preset_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "preset.toml"
    path.write_text(text)
    with pytest.raises(InputError, match="no preset"):
        read_preset(path)
