"""Disturb the whole experiment at random and check that nothing is lost: `make chaos`.

    python -m tests.acceptance.chaos [--kills 100] [--seed 0] [--size default|small] [--write]

An undisturbed run is the reference. Then the experiment is started again and again and killed with
SIGKILL, its children with it, until it has ended; and the same from the beginning until there were
that many kills. The other faults follow. Exits with 1 if anything was wrong; `--write` puts the
tables into `docs/reliability.md`.
"""

import argparse
import atexit
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import tests
from flows.service.server import free_port, server_options, wait_for
from memit.errors import IntegrityError
from memit.files.tensors import load_metadata
from tasks.engine.artifacts import PARTIAL
from tasks.engine.results import STEPS
from tasks.engine.workers import WORKERS
from tests.acceptance.project import ROOT, TINY, Project, hear_interrupts, server

PHASES = ("start", *STEPS)
"""Phases of a run; the start is that of Python and Prefect, before the first step."""
SIZES: dict[str, dict[str, Any]] = {"default": {}, "small": TINY}
PATIENCE = 1_200.0
"""Seconds after which a run counts as hanging."""
STOPPED_WITHIN = 10.0
"""Seconds that a run may take to stop when it is asked to."""
LOST_WITHIN = 60.0
"""Seconds that a run may go on without Prefect's server."""
TABLES = ROOT / "docs" / "reliability.md"
MARK = "<!-- written by make chaos -->"


# --- an observed run ------------------------------------------------------------------------------


class Attempt:
    """A run of the experiment with its own process group, and its output so far."""

    popen: ClassVar[Any] = subprocess.Popen
    """What starts it."""

    def __init__(
        self,
        project: Project,
        program: Sequence[str] = ("-m", "flows", "experiment"),
        **environment: str,
    ) -> None:
        self.project = project
        self.output_file = Path(tempfile.mkstemp(suffix=".txt", dir=project.path.parent)[1])
        self.began = time.time()
        with open(self.output_file, "wb") as file:
            self.process = self.popen(
                [sys.executable, *program],
                cwd=project.path,
                # Two runs at once, or other work on the machine: threads that spin would starve.
                env={**project.environment, "OMP_WAIT_POLICY": "passive", **environment},
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=hear_interrupts,
            )
        atexit.register(self.abandon)

    @property
    def output(self) -> str:
        """Everything that it has printed."""
        return self.output_file.read_text(encoding="utf-8", errors="replace")

    @property
    def phase(self) -> str:
        """The phase that its output shows."""
        steps = len(re.findall(r"^✓ \d", self.output, re.MULTILINE))
        locks = self.project.path / ".cache" / "locks"
        if steps == 0 and not (locks.is_dir() and locks.stat().st_mtime > self.began):
            return "start"
        return PHASES[min(steps + 1, len(PHASES) - 1)]

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait_for(self, phase: str) -> bool:
        """Wait for a phase or a later one; False if it ended before."""
        while PHASES.index(self.phase) < PHASES.index(phase):
            if not self.runs:
                return False
            time.sleep(0.02)
        return self.runs

    def wait_seconds(self, seconds: float) -> bool:
        """Let it run for some time; False if it ended before."""
        deadline = time.time() + seconds
        while time.time() < deadline and self.runs:
            time.sleep(0.01)
        return self.runs

    def abandon(self) -> None:
        """Kill it where this process ends first."""
        if self.runs:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to it and all of its children."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, patience: float = PATIENCE) -> int:
        """Wait for its end; gives its exit status, and kills it if it hangs."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


def durations(output: str) -> dict[str, float]:
    """Seconds of each step, from the output of a run."""
    return {name: float(s) for name, s in re.findall(r"^✓ \d+/\d+ (\w+) +([\d.]+) s", output, re.M)}


# --- the files of a project -----------------------------------------------------------------------


def records(project: Project) -> dict[str, tuple[int, int]]:
    """The file of each piece's record, by its key: another one means computed again."""
    folder = project.path / ".cache" / "records"
    files = [path for path in folder.glob("*") if not path.name.endswith(PARTIAL)]
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def interrupted_pieces(project: Project) -> set[str]:
    """Keys of the pieces in progress when the run was killed, by the locks that it left.

    The lock files are removed, so that those of the next kill can be distinguished.
    """
    left = list((project.path / ".cache" / "locks").glob("*.lock"))
    for path in left:
        path.unlink()
    keys = {path.stem for path in left if re.fullmatch(r".*-[0-9a-f]{64}", path.stem)}
    return keys - set(records(project))


def trained_steps(project: Project) -> int:
    """Steps of the small model's training that a checkpoint holds."""
    for path in (project.path / ".cache" / "unfinished").rglob("checkpoint-*.safetensors"):
        try:
            return len(json.loads(load_metadata(path)["losses"]))
        except IntegrityError:
            return 0
    return 0


def last_kept(project: Project) -> float:
    """When something was last kept, a piece or a checkpoint."""
    kept = [ns / 1e9 for _, ns in records(project).values()]
    unfinished = (project.path / ".cache" / "unfinished").rglob("checkpoint-*.safetensors")
    return max([*kept, *(path.stat().st_mtime for path in unfinished)], default=0.0)


def strays(project: Project) -> list[str]:
    """Files that a finished run must not leave."""
    found = [
        path
        for pattern in (f"*{PARTIAL}", "*.tmp", ".cache/unfinished/**/*", ".cache/locks/*.lock")
        for path in project.path.rglob(pattern)
        if ".prefect" not in path.parts and ".git" not in path.parts
    ]
    return sorted(str(path.relative_to(project.path)) for path in found if path.is_file())


def empty(project: Project, *, keep_model: bool) -> None:
    """Take a project back to its beginning; the trained model may stay in the cache."""
    for name in ("artifacts", "evaluation", "report", "mlartifacts"):
        shutil.rmtree(project.path / name, ignore_errors=True)
    for name in ("metrics.json", "timings.json", "dvc.lock", "mlflow.db"):
        (project.path / name).unlink(missing_ok=True)
    cache = project.path / ".cache"
    for folder in (*cache.glob("pieces/*"), cache / "unfinished"):
        if not (keep_model and folder.name == "model"):
            shutil.rmtree(folder, ignore_errors=True)
    for record in cache.glob("records/*"):
        if not (keep_model and b"held_out.txt" in record.read_bytes()):
            record.unlink()


# --- the chaos ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    phase: str
    pieces: int
    """That were in progress."""
    seconds: float
    """Since something was last kept: what is done again, at most."""


@dataclass
class Chaos:
    """An undisturbed run, a folder for disturbed ones, and the findings."""

    folder: Path
    random: Random
    reference: Project
    expected: dict[str, float]
    """Seconds of each phase."""
    kills: list[Kill] = field(default_factory=list)
    cases: list[tuple[str, str, str]] = field(default_factory=list)
    """Fault, what was checked, and the result."""
    faults: list[str] = field(default_factory=list)
    """Everything that was wrong."""

    def __post_init__(self) -> None:
        self.results = self.reference.results()

    def project(self, name: str, *, finished: bool) -> Project:
        """A copy of the reference; unless finished, only its trained model is kept."""
        project = self.reference.copy(self.folder / name)
        if not finished:
            empty(project, keep_model=True)
        return project

    def expect_success(self, attempt: Attempt, where: str) -> None:
        """Wait for the end of a run that must succeed."""
        if attempt.end() != 0:
            self.faults.append(f"{where} ended with {attempt.output[-2000:]}")

    def check(self, project: Project, where: str) -> list[str]:
        """What is wrong with what a finished run left."""
        found = project.results()
        wrong = [
            f"{name} differs"
            for name in sorted(found.keys() | self.results.keys())
            if found.get(name) != self.results.get(name)
        ]
        wrong += [f"{name} is left over" for name in strays(project)]
        logged = project.mlflow_runs() if (project.path / "mlflow.db").exists() else []
        if [run for run in logged if run[1] == "active"] != [("FINISHED", "active")]:
            wrong.append(f"MLflow has the runs {logged}")
        if any(status == "RUNNING" for status, _ in logged):
            wrong.append(f"MLflow has a run that is RUNNING: {logged}")
        status = project.do("dvc", "status")
        if "up to date" not in status:
            wrong.append(f"dvc status: {status.strip()!r}")
        self.faults += [f"{where}: {one}" for one in wrong]
        return wrong

    # --- kills ------------------------------------------------------------------------------------

    def kill_until_done(self, count: int) -> None:
        """Rounds from an empty store, until there were so many kills."""
        project = self.project("killed", finished=False)
        rounds = 0
        while len(self.kills) < count:
            empty(project, keep_model=rounds > 0)
            rounds += 1
            self._round(project, rounds, count)

    def _round(self, project: Project, number: int, count: int) -> None:
        """Kill the run in phases of a plan, and let it end."""
        self.kill_in(self._plan(count - len(self.kills), first=number == 1), project)
        kept, steps = records(project), trained_steps(project)
        self.expect_success(Attempt(project), f"round {number}")
        self._compare(project, kept, steps)
        wrong = self.check(project, f"round {number}")
        log(f"round {number}: {len(self.kills)} kills, {wrong or 'as the reference'}")

    def kill_in(self, phases: Sequence[str], project: Project) -> None:
        """Kill a run in each of these phases, one run after another."""
        before, steps = records(project), trained_steps(project)
        for phase in phases:
            attempt = Attempt(project)
            if attempt.wait_for(phase) and attempt.wait_seconds(self._delay(phase)):
                self._kill(attempt)
            else:
                self.expect_success(attempt, f"a run to be killed in {phase}")
            before, steps = self._compare(project, before, steps)

    def _plan(self, most: int, *, first: bool) -> list[str]:
        """Phases in which to kill, in their order; more often where the run is longer."""
        weights = [self.expected[phase] ** 0.5 for phase in PHASES]
        if not first:
            weights[PHASES.index("model")] = 1.0  # it is trained only once
        more = self.random.choices(PHASES, weights, k=len(PHASES) // 2)
        plan = [*PHASES, *more, *(["model"] * 6 if first else [])]
        return sorted(self.random.sample(plan, min(most, len(plan))), key=PHASES.index)

    def _delay(self, phase: str) -> float:
        longest = self.expected[phase]
        return self.random.uniform(0.0, min(longest, 40.0) if phase == "model" else longest)

    def _kill(self, attempt: Attempt) -> None:
        phase = attempt.phase
        attempt.kill()
        lost = interrupted_pieces(attempt.project)
        since = max(last_kept(attempt.project), attempt.began)
        self.kills.append(Kill(phase, len(lost), time.time() - since if lost else 0.0))
        if len(lost) > WORKERS:
            self.faults.append(f"{len(lost)} pieces were in progress in {phase}")
        log(f"kill {len(self.kills)} in {phase}, {len(lost)} pieces in progress")

    def _compare(
        self, project: Project, before: dict[str, tuple[int, int]], steps: int
    ) -> tuple[dict[str, tuple[int, int]], int]:
        """What is kept now; everything that was kept before must still be the very same."""
        now, trained = records(project), trained_steps(project)
        again = [key for key, identity in before.items() if now.get(key) != identity]
        if again:
            self.faults.append(f"{len(again)} pieces that were kept were computed again")
        unfinished = list((project.path / ".cache" / "unfinished").glob("model-*/*"))
        if trained < steps and unfinished:  # what has ended is forgotten
            self.faults.append(f"training went back from step {steps} to {trained}")
        return now, trained

    # --- other faults -----------------------------------------------------------------------------

    def case(self, fault: str, looked_at: str, work: Callable[[], str]) -> None:
        """Run a case and keep its result, unless it added faults."""
        before = len(self.faults)
        result = work()
        wrong = self.faults[before:]
        self.cases.append((fault, looked_at, f"**{len(wrong)} wrong**" if wrong else result))
        log(f"{fault}: {wrong or result}")

    def resumed(self, fault: str, disturb: Callable[[Project], str]) -> str:
        """Disturb a project; an undisturbed run must end with the reference's results then."""
        project = self.project(re.sub(r"\W+", "-", fault), finished=False)
        result = disturb(project)
        self.expect_success(Attempt(project), f"{fault}: going on")
        self.check(project, fault)
        return result

    def stop(self, sent: signal.Signals, status: int, count: int, project: Project) -> str:
        """Ask runs to stop at random moments."""
        longest = 0.0
        for number in range(count):
            attempt = Attempt(project)
            phase = self.random.choice(PHASES)
            if attempt.wait_for(phase) and attempt.wait_seconds(self._delay(phase)):
                phase = attempt.phase
                asked = time.time()
                attempt.process.send_signal(sent)
                ended = attempt.end(60.0)
                longest = max(longest, time.time() - asked)
                # At its very end Python lets the signal itself end it: the same to a shell.
                if ended not in (status, -sent) or "Traceback" in attempt.output:
                    self.faults.append(f"{sent.name} in {phase}: {ended}, {attempt.output[-2000:]}")
            else:
                self.expect_success(attempt, f"{sent.name} {number}")
        if longest > STOPPED_WITHIN:
            self.faults.append(f"{sent.name} took {longest:.1f} s")
        return f"exit status {status} within {longest:.1f} s, {count} times"

    def fail_writing(self, error: str, count: int, project: Project) -> str:
        """Runs on a disk that fails after a random number of writes."""
        program = str(ROOT / "tests" / "acceptance" / "failing_disk.py")
        for _ in range(count):
            calls = int(10 ** self.random.uniform(0, 2.5))
            attempt = Attempt(project, (program, error, str(calls)))
            status = attempt.end()
            if "Traceback" in attempt.output or (status == 0) != ("error:" not in attempt.output):
                self.faults.append(f"{error} after {calls}: {status}, {attempt.output[-2000:]}")
            partial_files = [name for name in strays(project) if name.endswith(PARTIAL)]
            if error == "ENOSPC" and partial_files:
                self.faults.append(f"{error} after {calls} left {partial_files}")
        return f"one sentence and exit status 2, {count} times; then the same bytes"

    def share_store(self, one: Project | None = None) -> str:
        """Two runs in two directories that share a cache; the first may have begun to fill it."""
        one, two = one or self.project("one", finished=False), self.project("two", finished=False)
        attempts = [Attempt(project, DVC_ROOT=str(one.path)) for project in (one, two)]
        seen: dict[str, set[tuple[int, int]]] = {}
        while any(attempt.runs for attempt in attempts):
            for key, identity in records(one).items():
                seen.setdefault(key, set()).add(identity)
            time.sleep(0.05)
        for attempt in attempts:
            self.expect_success(attempt, "two runs at once")
        twice = [key for key, identities in seen.items() if len(identities) > 1]
        if twice:
            self.faults.append(f"two runs at once computed {len(twice)} pieces twice")
        for project in (one, two):
            if project.results() != self.results:
                self.faults.append(f"two runs at once: {project.path.name} differs")
        if one.mlflow_runs() != [("FINISHED", "active")]:
            self.faults.append(f"two runs at once logged {one.mlflow_runs()}")
        return (
            f"{len(seen)} pieces, each computed once; both end with the same bytes; one MLflow run"
        )

    def share_directory(self) -> str:
        """Two runs in the same directory."""
        project = self.project("both", finished=False)
        for attempt in [Attempt(project), Attempt(project)]:
            self.expect_success(attempt, "two runs in a directory")
        self.check(project, "two runs in a directory")
        return "the second waits for the first and finds everything done"

    def lose_server(self, count: int, project: Project) -> str:
        """Kill Prefect's server while runs need it."""
        longest = 0.0
        for number in range(count):
            home = self.folder / f"server-{number}"
            with mortal_server(home) as (address, process):
                attempt = Attempt(project, PREFECT_API_URL=address)
                phase = self.random.choice(PHASES[1:-1])
                if attempt.wait_for(phase):
                    attempt.wait_seconds(self._delay(phase))
                died = time.time()
                os.killpg(process.pid, signal.SIGKILL)
                status = attempt.end(300.0)
                longest = max(longest, time.time() - died)
            if status not in (0, 2) or "Traceback" in attempt.output:
                self.faults.append(f"server lost in {phase}: {status}, {attempt.output[-2000:]}")
        if longest > LOST_WITHIN:
            self.faults.append(f"a run went on for {longest:.0f} s without Prefect's server")
        return f"one sentence and exit status 2, after {longest:.0f} s at most; then the same bytes"

    def lose_mlflow(self) -> str:
        """Run with a store that is no store; log when it is back."""
        project = self.project("mlflow", finished=False)
        (project.path / "mlflow.db").mkdir()
        attempt = Attempt(project)
        status = attempt.end()
        if status != 0 or "warning: MLflow at" not in attempt.output:
            self.faults.append(f"MLflow gone: {status}, {attempt.output[-2000:]}")
        (project.path / "mlflow.db").rmdir()
        return self._log_again(project, "MLflow gone")

    def lock_mlflow(self) -> str:
        """Run while another process holds the store; log when it is free."""
        project = self.project("locked", finished=False)
        with closing(sqlite3.connect(project.path / "mlflow.db", isolation_level=None)) as store:
            store.execute("create table held (x)")
            store.execute("drop table held")
            store.execute("begin exclusive")
            attempt = Attempt(project)
            status = attempt.end()
        if status != 0 or "locked" not in attempt.output:
            self.faults.append(f"MLflow locked: {status}, {attempt.output[-2000:]}")
        return self._log_again(project, "MLflow locked")

    def _log_again(self, project: Project, where: str) -> str:
        project.do(sys.executable, "-m", "flows", "report")
        project.do("dvc", "commit", "--quiet", "--force", "report")
        self.check(project, where)
        return "a warning, exit status 0, the same bytes; the next `report` logs the run"

    def damage(self, times: int, files: int) -> str:
        """Damage files of the cache and of the results; run again."""
        project = self.project("damaged", finished=True)
        done: Counter[str] = Counter()
        for _ in range(times):
            for path in self._some_files(project, files):
                done[damage_file(path, self.random)] += 1
            for path in (project.path / "dvc.lock", project.path / ".dvc" / "tmp" / "rwlock"):
                if path.exists():  # DVC writes them in place, so that a kill can tear them
                    content = path.read_bytes()
                    path.write_bytes(content[: self.random.randrange(len(content))])
                    done["torn file of DVC"] += 1
            self.expect_success(Attempt(project), f"after damage {dict(done)}")
            self.check(project, f"after damage {dict(done)}")
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
        return f"the same bytes after {times} runs with {sum(done.values())} files damaged: {kinds}"

    def _some_files(self, project: Project, count: int) -> list[Path]:
        found = [
            path
            for name in (".cache", "artifacts", "evaluation", "report")
            for path in sorted((project.path / name).rglob("*"))
            if path.is_file()
        ]
        return self.random.sample(found, count)


def damage_file(path: Path, random: Random) -> str:
    """Damage a file as a bad disk or an absent mind would; gives the kind of damage."""
    kind = random.choice(("bit flipped", "truncated", "emptied", "deleted", "foreign"))
    content = bytearray(path.read_bytes())
    if random.random() < 0.5:  # else what it is linked to is damaged, too
        path.unlink()
        path.write_bytes(content)
    if kind == "bit flipped" and content:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)
    elif kind == "truncated":
        path.write_bytes(content[: random.randrange(len(content) + 1)])
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "deleted":
        path.unlink()
    else:
        others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
        path.write_bytes(random.choice(others).read_bytes() if others else b"something else")
    return kind


@contextmanager
def mortal_server(home: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Prefect server of its own that may be killed: its address and its process."""
    port = free_port(0)
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", *server_options(port), "--no-ui"],
        env={**os.environ, "PREFECT_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}/api"
    try:
        wait_for(f"{address}/health", process, "Prefect's server", home)
        yield address, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def undisturbed(folder: Path, api: str, size: str) -> tuple[Project, dict[str, float]]:
    """A finished run, and the seconds of its phases."""
    project = Project(folder / "reference", api, changes=SIZES[size])
    attempt = Attempt(project)
    attempt.wait_for("model")
    expected = {"start": time.time() - attempt.began}
    if attempt.end() != 0:
        raise SystemExit(attempt.output)
    expected |= durations(attempt.output)
    log("reference, seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in expected.items()))
    return project, expected


# --- output ---------------------------------------------------------------------------------------


def log(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def kill_table(kills: Sequence[Kill]) -> list[str]:
    """Kills of each phase, and what they cost."""
    lines = [
        "| step | kills | pieces in progress, at most | seconds done again, median | at most |",
        "|---|---:|---:|---:|---:|",
    ]
    for phase in PHASES:
        of = [kill for kill in kills if kill.phase == phase]
        if of:
            seconds = sorted(kill.seconds for kill in of)
            lines.append(
                f"| {phase} | {len(of)} | {max(kill.pieces for kill in of)} "
                f"| {seconds[len(seconds) // 2]:.1f} | {seconds[-1]:.1f} |"
            )
    return lines


def case_table(cases: Sequence[tuple[str, str, str]]) -> list[str]:
    """The other faults."""
    rows = [f"| {fault} | {looked_at} | {result} |" for fault, looked_at, result in cases]
    return ["| fault | looked at | result |", "|---|---|---|", *rows]


def write_tables(chaos: Chaos, what: str) -> None:
    """Write the findings into the document."""
    head = TABLES.read_text(encoding="utf-8").partition(MARK)[0]
    verdict = "nothing was wrong" if not chaos.faults else f"{len(chaos.faults)} things were wrong"
    lines = [
        f"{len(chaos.kills)} kills, {what}: {verdict}.",
        "",
        *kill_table(chaos.kills),
        "",
        *case_table(chaos.cases),
    ]
    TABLES.write_text(head + MARK + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def disturb(chaos: Chaos, kills: int, save: Callable[[], None]) -> None:
    """Try every fault in turn; `save` is called after each."""
    chaos.kill_until_done(kills)
    save()
    same = "results, stray files, MLflow, DVC after going on"

    def case(fault: str, looked_at: str, work: Callable[[], str]) -> None:
        chaos.case(fault, looked_at, work)
        save()

    def resumed(fault: str, looked_at: str, disturb: Callable[[Project], str]) -> None:
        case(fault, f"{looked_at}; {same}", partial(chaos.resumed, fault, disturb))

    resumed("SIGINT (Ctrl-C)", "status, seconds", partial(chaos.stop, signal.SIGINT, 130, 3))
    resumed("SIGTERM", "status, seconds", partial(chaos.stop, signal.SIGTERM, 143, 3))
    resumed("disk full (ENOSPC)", "message", partial(chaos.fail_writing, "ENOSPC", 3))
    resumed("read-only (EROFS)", "message", partial(chaos.fail_writing, "EROFS", 3))
    case("two runs, one store", "records, results, MLflow", chaos.share_store)
    case("two runs, one directory", same, chaos.share_directory)
    resumed("Prefect's server dies", "message", partial(chaos.lose_server, 2))
    case("MLflow's store is gone", same, chaos.lose_mlflow)
    case("MLflow's store is locked", same, chaos.lock_mlflow)
    case("files damaged at random", same, partial(chaos.damage, 4, 20))


def main(arguments: Sequence[str]) -> int:
    """Run it all; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.chaos")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = tests.session = Path(name)
        with server(folder / "prefect") as api:
            reference, expected = undisturbed(folder, api, given.size)
            chaos = Chaos(folder, Random(given.seed), reference, expected)
            what = f"seed {given.seed}, the experiment of size `{given.size}`"
            save = partial(write_tables, chaos, what) if given.write else lambda: None
            disturb(chaos, given.kills, save)
    print("\n".join([*kill_table(chaos.kills), "", *case_table(chaos.cases), "", *chaos.faults]))
    return 1 if chaos.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
