"""Compare optimizer stacks with equal tuning budgets: a learning-rate sweep per arm, then more seeds at its best rate.

python -m launch.study --config launch/configs/study.toml [--report | --dry-run]

Every run is a separate launch.pretrain. The same command continues a stopped study, even in the middle of a run.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess  # nosec B404
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.data import prepare
from launch.study.plan import RECORD, Run, Study, outcomes, parse
from launch.study.report import read_outcome, write
from symdist.tools.output import write_whole
from symdist.tools.texts import printable

CONFIG = "study-config.json"
OUTPUT = "output.log"
_ENTRY = "launch.pretrain"


class Runner:
    """Executes the runs of a study, `jobs` at a time, until none is left or a signal stops it.

    Args:
        study: The study to run.
        lock: File descriptor of the lock on the study's folder, which the runs inherit.
    """

    def __init__(self, study: Study, lock: int):
        from symdist.tools.tables import plain_console

        self.study, self._lock = study, lock
        self.failed: dict[str, Path] = {}
        self.stopped_by: int | None = None
        self._running: dict[Run, subprocess.Popen[bytes]] = {}
        self._console = plain_console(stderr=True)
        self._total = len(study.arms) * (len(study.multipliers) + len(study.seeds))
        self._before = self._done()
        self._started = time.monotonic()

    def go(self) -> None:
        """Execute the runs; afterwards `failed` has the logs of failed runs by name, and `stopped_by` the signal."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = [signal.signal(number, self._stop) for number in numbers]
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            bar = progress.add_task("starting", total=self._total, completed=self._before)
            try:
                while self._step():
                    progress.update(bar, completed=self._done(), description=self._left())
            finally:
                if self._running:
                    self._say(f"stopping {len(self._running)} runs, which save first")
                    self._end()
                for number, handler in zip(numbers, handlers, strict=True):
                    signal.signal(number, handler)

    def _step(self) -> bool:
        """Start as many runs as `jobs` allows and wait until one ends; return whether to continue."""
        due = [run for run in self._due() if run not in self._running]
        for run in due[: self.study.jobs - len(self._running)]:
            self._start(run)
            self._say(f"started {run.name}")
        ended: list[Run] = []
        while self._running and not ended:
            if self.stopped_by is not None:
                return False
            time.sleep(0.2)
            ended = self._collect()
        for run in ended:
            result = "failed" if run.name in self.failed else self._loss(run)
            self._say(f"[{self._done()}/{self._total}] {run.name}: {result}; {self._left()}")
        return bool(ended)

    def _say(self, text: str) -> None:
        self._console.print(printable(text), soft_wrap=True)

    def _due(self) -> Iterator[Run]:
        """Yield the runs that are left and can start now, in the order of the arms."""
        for arm, outcome in zip(self.study.arms, outcomes(self.study), strict=True):
            runs = self.study.sweep(arm) if outcome.best is None else self.study.further(arm, outcome.best)
            yield from (run for run in runs if not self.study.finished(run) and run.name not in self.failed)

    def _done(self) -> int:
        return sum(len(arm.sweep) + len(arm.further) for arm in outcomes(self.study))

    def _start(self, run: Run) -> None:
        study, folder = self.study, self.study.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECORD, json.dumps(study.record(run), indent=2) + "\n")
        write_whole(folder / CONFIG, json.dumps(dataclasses.asdict(study.config(run)), default=str))
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if not study.run.data.source.startswith("datasets:"):
            # Models are built from configurations alone, so nothing needs the Hugging Face Hub.
            environment["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={study.nproc}"]
        command += ["-m", _ENTRY, "--config", str(folder / CONFIG)]
        with (folder / OUTPUT).open("ab") as output:
            # A list of words and no shell: whatever a study's file says reaches torchrun as one word.
            self._running[run] = subprocess.Popen(  # nosec B603
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                # Ctrl-C reaches only the study, which then stops its runs; a run that outlives it keeps the lock.
                start_new_session=True,
                pass_fds=(self._lock,),
            )

    def _collect(self) -> list[Run]:
        ended = [run for run, process in self._running.items() if process.poll() is not None]
        for run in ended:
            del self._running[run]
            if not self._tidied(run):
                self.failed[run.name] = self.study.folder(run) / OUTPUT
        return ended

    def _tidied(self, run: Run) -> bool:
        """Return whether the run is finished; if so, delete its checkpoints, since only its log is needed."""
        finished = self.study.finished(run)
        if finished:
            shutil.rmtree(self.study.folder(run) / "checkpoints", ignore_errors=True)
        return finished

    def _end(self) -> None:
        for process in self._running.values():
            # torchrun passes the signal on to the ranks, which save a checkpoint.
            process.terminate()
        deadline = time.monotonic() + 90
        for run, process in self._running.items():
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self._tidied(run)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped_by = number

    def _loss(self, run: Run) -> str:
        outcome = read_outcome(self.study.folder(run), multiplier=run.multiplier, seed=run.seed)
        return "diverged" if outcome.diverged else f"loss {outcome.loss:.3f}, {outcome.seconds:.0f} s of training"

    def _left(self) -> str:
        done = self._done()
        if done == self._before:
            return "no run done yet"
        minutes = (time.monotonic() - self._started) / (done - self._before) * (self._total - done) / 60
        return f"about {minutes:.0f} min left"


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Lock the study's folder; raise ValueError if another study, or a run it left behind, holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another study, or a run that it started, is working in {folder}; wait for it or stop it"
            ) from None
        yield file.fileno()


def _list(study: Study) -> None:
    for arm, outcome in zip(study.arms, outcomes(study), strict=True):
        for run in study.sweep(arm):
            settings = " ".join(arm.settings(run.multiplier))
            print(printable(f"{run.name}{'  done' if study.finished(run) else ''}  {settings}"))
        for seed in study.seeds:
            at = "best" if outcome.best is None else f"{outcome.best:g}"
            done = any(run.seed == seed for run in outcome.further)
            print(f"{arm.key}/x{at}-seed{seed}{'  done' if done else ''}")
    runs_per_arm = len(study.multipliers) + len(study.seeds)
    print(
        f"{len(study.arms)} arms × ({len(study.multipliers)} + {len(study.seeds)}) = "
        f"{len(study.arms) * runs_per_arm} runs"
    )


def _execute(study: Study) -> int:
    with _locked(study.output) as lock:
        prepare(study.run.data, progress=lambda text: print(text, file=sys.stderr, flush=True))
        runner = Runner(study, lock)
        runner.go()
    if runner.stopped_by is None:
        _report(study)
    for name, log in runner.failed.items():
        print(printable(f"failed: {name}, see {log}"), file=sys.stderr)
    if runner.stopped_by is not None:
        print("stopped; the same command continues the study", file=sys.stderr)
        return 128 + runner.stopped_by
    return 1 if runner.failed else 0


def _report(study: Study) -> None:
    write(outcomes(study), study.output, settings=dataclasses.asdict(study))


def _refuse(message: str) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


def main(arguments: list[str]) -> int:
    """Run, list or report the study that the command line describes.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 on success, 1 if runs failed, 2 for an error that the user can fix, 128 plus the signal's
        number if a signal stopped it.
    """
    try:
        study = parse(arguments, description=__doc__)
        study.check()
        if study.report:
            _report(study)
            return 0
        study.check_stacks()
        for arm in study.arms:
            for multiplier in study.multipliers:
                for run in (*study.sweep(arm), *study.further(arm, multiplier)):
                    study.check_folder(run)
        if study.dry_run:
            _list(study)
            return 0
        return _execute(study)
    except ValueError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}")
    except KeyboardInterrupt:
        print("stopped before the first run; the same command continues the study", file=sys.stderr)
        return 128 + signal.SIGINT
