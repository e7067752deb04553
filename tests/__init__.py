"""Where tests find the project's files, the recorded run, and data sets beside the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"

session: Path
"""A folder that all processes of a test session share; the fixture of this name sets it."""
