"""The console script in this process."""

import pytest

from flows.command import cli, script


def memit(*words: str) -> int:
    """Run a command; gives its exit status."""
    with pytest.raises(SystemExit) as exit_:
        script.reporting(lambda: cli.app(list(words)))
    return int(exit_.value.code or 0)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed since the last time, on one line."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())
