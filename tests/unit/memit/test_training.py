"""The training loop stops when it must; resuming is tested with what is trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memit.errors import NumericsError
from memit.training import Training, run_training, warmup


@pytest.mark.parametrize(
    ("loss", "steps"),
    [
        (lambda weight, _: weight.abs().sqrt().sum(), 1),  # its slope at 0 is infinite
        (lambda weight, _: weight.sum() * torch.inf, 1),
        (lambda weight, step: weight.sum() * 0 + 100.0 ** (step // 100), 105),
    ],
    ids=["gradient", "loss", "growth"],
)
def test_a_training_that_diverges_stops_with_its_losses_saved(
    tmp_path: Path, loss: Callable[[Tensor, int], Tensor], steps: int
) -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    training = Training("net", 200, tmp_path, largest_gradient=1.0)
    with pytest.raises(NumericsError, match="net-diverged"):
        run_training(training, network, optimizer, lambda step: loss(network.weight, step))
    losses = json.loads((tmp_path / "net-diverged.json").read_text())["losses"]
    assert len(losses) == steps
    assert [path.name for path in tmp_path.iterdir()] == ["net-diverged.json"]


def test_the_learning_rate_rises_and_stays() -> None:
    assert [warmup(4)(2.0, step) for step in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0]
    assert warmup(0)(2.0, 0) == 2.0
