"""What git knows of the project."""

import subprocess


def git(*arguments: str) -> str:
    """What git says, or nothing."""
    command = ["git", *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout.strip()


def commit_of(*paths: str) -> str:
    """The last commit that changed some files; empty if git does not know them."""
    commit = git("log", "-1", "--format=%H", "--", *paths)
    return f"{commit} and changes" if commit and git("status", "--short", "--", *paths) else commit
