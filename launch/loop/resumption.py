"""Saving and resuming: checkpoints during training, the newest undamaged one after a restart, and rollbacks."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, NonNegativeInt, TypeAdapter, with_config
from typing_extensions import TypedDict

from launch.checkpoints.directory import check_mixing, newest_first, quarantine
from launch.checkpoints.manifest import (
    STRICT,
    CheckpointError,
    DamagedCheckpointError,
    by_path,
    read_json,
    write_json,
)
from launch.data import TokenLoader
from launch.loop.config import Config
from launch.loop.loss_spikes import SpikeJudge
from launch.records.run_log import RunLog
from launch.runtime.distributed import AllRanksError, Ranks
from launch.runtime.watchdog import Watchdog

_ALL = 1 << 30
_ROLLBACK = "rollback.json"
# What param groups hold of a run's progress; all else is what the user configured.
_PROGRESS = ("params", "rounding_step", "step")


@with_config(STRICT)
class _Data(TypedDict):
    position: NonNegativeInt
    fingerprint: str
    seed: int


@with_config(STRICT)
class _Counts(TypedDict):
    skipped_steps: NonNegativeInt
    spikes: NonNegativeInt


@with_config(STRICT)
class _Spikes(TypedDict):
    seen: list[FiniteFloat]


@with_config(STRICT)
class Job(TypedDict):
    """What a checkpoint holds of the loop.

    Attributes:
        step: Optimizer steps done.
        elapsed: Seconds of training.
        data: The position in the data, see `TokenLoader`.
        counts: Numbers of skipped steps and of spikes.
        spikes: The losses before, see `SpikeJudge`.
        skipped_in_a_row: Number of the last steps that were skipped.
        unvalidated: Whether a signal ended the validation of this step.
        settings: What another run that continues from here may have set otherwise.
    """

    step: NonNegativeInt
    elapsed: Annotated[FiniteFloat, Field(ge=0)]
    data: _Data
    counts: _Counts
    spikes: _Spikes
    skipped_in_a_row: NonNegativeInt
    unvalidated: bool
    settings: dict[str, Any]


@with_config(STRICT)
class _Rollback(TypedDict):
    count: NonNegativeInt
    step: NonNegativeInt
    position: NonNegativeInt


@contextlib.contextmanager
def keeping_options(groups: Callable[[], list[dict[str, Any]]], *, but: Collection[str] = ()) -> Iterator[None]:
    """Have param groups keep the options of this run while a checkpoint is loaded into their optimizer.

    Args:
        groups: Returns the param groups; loading may replace them.
        but: Options that are the checkpoint's.
    """
    theirs = {*_PROGRESS, *but}
    own = [{name: value for name, value in group.items() if name not in theirs} for group in groups()]
    try:
        yield
    finally:
        for group, options in zip(groups(), own, strict=True):
            group.update(options)


class DivergedError(AllRanksError):
    """The run still skips steps after all allowed rollbacks, or has no checkpoint to roll back to."""


class Resumable(ABC):
    """Base of a run: its progress, and how it is saved and restored; all ranks must call every method."""

    config: Config
    ranks: Ranks
    watchdog: Watchdog
    loader: TokenLoader

    def start_counting(self, spike_sigma: float) -> None:
        """Set all counters to the start of a run.

        Args:
            spike_sigma: Threshold for `SpikeJudge`; 0 turns it off.
        """
        self.step = 0
        self.elapsed = 0.0
        self.counts = {"skipped_steps": 0, "spikes": 0}
        self.spikes = SpikeJudge(spike_sigma)
        self.skipped_in_a_row = 0
        self.unvalidated = False
        self._rollbacks = 0

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings that a run may change when it continues from a checkpoint, JSON-serializable."""

    @abstractmethod
    def load_weights(self, path: Path) -> int:
        """Restore only the weights from the checkpoint at `path`.

        Returns:
            The step at which it was written.

        Raises:
            CheckpointError: On all ranks, if it cannot be read or holds other weights.
        """

    @abstractmethod
    def load(self, path: Path) -> dict[str, Any]:
        """Restore model, optimizer and schedule from the checkpoint at `path`.

        Returns:
            What `job` returned when the checkpoint was written.

        Raises:
            DamagedCheckpointError: On all ranks and before anything changes, if it cannot be read.
            CheckpointError: Likewise, if this run cannot continue from it.
            ValueError: Likewise.
        """

    @abstractmethod
    def save(self, *, wait: bool) -> Path:
        """Write a checkpoint of the current step.

        Args:
            wait: Whether the checkpoint must be written now; engines with `background` ignore it and start the write
                in the background, and `saved` reports its end.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: On all ranks, if it cannot be written; earlier checkpoints are unchanged.
        """

    @property
    def background(self) -> bool:
        """Whether `save` may return before the checkpoint is written."""
        return False

    def saved(self, *, wait: bool) -> tuple[Path, CheckpointError | None] | None:
        """Return the background checkpoint that ended since the last call, if any.

        Args:
            wait: Whether to wait for a checkpoint that is still being written.

        Returns:
            Its path and its error, or None in place of the error if it was written; None if no checkpoint ended.
        """
        return None

    def finished_checkpoints(self) -> list[Path]:
        """Return the run's finished checkpoints, newest first."""
        return newest_first(self.checkpoints)

    def check_mixing(self, path: Path) -> None:
        """Check that a run that continues from `path` would not mix with newer checkpoints in the same folder.

        Raises:
            ValueError: If the folder holds a newer checkpoint.
        """
        check_mixing(self.checkpoints, path)

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.config.output / "checkpoints"

    def job(self) -> dict[str, Any]:
        """Return the state of the loop that a checkpoint saves, a `Job`, the same on all ranks."""
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "data": self.loader.state_dict(),
            # A copy, since it may be written while training continues.
            "counts": dict(self.counts),
            "spikes": self.spikes.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "unvalidated": self.unvalidated,
            "settings": self.settings,
        }

    @property
    def num_kept(self) -> int:
        """How many checkpoints to keep: all of them while steps are being skipped, since a rollback may follow."""
        return self.config.keep if not self.skipped_in_a_row else _ALL

    def resume(self, log: RunLog) -> int | None:
        """Continue from the checkpoint that the configuration asks for.

        With "auto", or after torchrun restarted the ranks, this is the newest undamaged checkpoint; damaged ones are
        renamed. If the configuration names a checkpoint of another folder but this run has saved its own, it continues
        from its own. A run that starts from the beginning takes its weights from `from_weights`, if it is given.

        Returns:
            The checkpoint's step, or None if the run starts from the beginning.

        Raises:
            ValueError: On all ranks, if this run cannot continue from the checkpoint.
            CheckpointError: Likewise.
        """
        source, restarted = self.config.resume, self.ranks.restarts > 0
        if source is None and not restarted:
            self._begin(log)
            return None
        if source not in (None, "auto"):
            saved = self._from_rank_0(self.finished_checkpoints())
            if saved and (restarted or Path(source).resolve().parent != self.checkpoints.resolve()):
                log.say(f"--resume {source} is where this run began; it continues from the checkpoints it saved since")
                source = "auto"
        if source not in (None, "auto"):
            self.check_mixing(Path(source))
            self.watchdog.doing(f"loading {source}", slow=True)
            self._restore_progress(log, self.load(Path(source)))
        elif not self._load_newest(log):
            self._check_progress(log)
            log.say(f"no checkpoint in {self.checkpoints}: starting from the beginning")
            self._begin(log)
            return None
        self._follow_rollback(log)
        return self.step

    def _begin(self, log: RunLog) -> None:
        """Take weights alone from another run's checkpoint, if the configuration says so."""
        if self.ranks.rank == 0:
            with contextlib.suppress(OSError):
                (self.config.output / _ROLLBACK).unlink()
        if self.config.from_weights is not None:
            self.watchdog.doing(f"loading {self.config.from_weights}", slow=True)
            step = self.load_weights(self.config.from_weights)
            log.event(0, "start", f"the weights are those of step {step}, from {self.config.from_weights}")

    def _check_progress(self, log: RunLog) -> None:
        """Check that starting from the beginning would not silently lose what was saved."""
        lost = self.ranks.gather(log.saved_before(every=self.config.checkpoint_every))[0]
        if lost is not None and not self.config.start_over:
            raise AllRanksError(
                f"{self.checkpoints} has no whole checkpoint, but {lost}; find the checkpoints, or pass --start-over "
                "to begin again at step 0"
            )

    def _load_newest(self, log: RunLog) -> bool:
        """Load the newest undamaged checkpoint; return False if there is none."""
        while checkpoints := self._from_rank_0(self.finished_checkpoints()):
            self.watchdog.doing(f"loading {checkpoints[0]}", slow=True)
            try:
                self._restore_progress(log, self.load(checkpoints[0]))
            except DamagedCheckpointError as error:
                if self.ranks.rank == 0:
                    renamed = quarantine(checkpoints[0])
                    log.event(
                        self.step, "fallback", f"{error}; it is renamed {renamed.name}, and the one before is tried"
                    )
                self.ranks.gather(None)
                continue
            return True
        return False

    def _from_rank_0(self, paths: list[Path]) -> list[Path]:
        """Return rank 0's `paths` on all ranks."""
        return self.ranks.gather(paths)[0]

    def _restore_progress(self, log: RunLog, job: dict[str, Any]) -> None:
        self.step, self.elapsed = job["step"], job["elapsed"]
        self.loader.load_state_dict(job["data"])
        self.counts = dict(job["counts"])
        self.spikes.load_state_dict(job["spikes"])
        self.skipped_in_a_row = job["skipped_in_a_row"]
        self.unvalidated = job["unvalidated"]
        there, here = by_path(job["settings"]), by_path(self.settings)
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                log.event(self.step, "resume", f"{name}: {there.get(name)!r} there, {here.get(name)!r} here")

    def _follow_rollback(self, log: RunLog) -> None:
        """Restore the count of rollbacks, and the data position if the last rollback went to this step."""
        path = self.config.output / _ROLLBACK
        rollback = None
        if self.ranks.rank == 0 and path.exists():
            try:
                rollback = read_json(path, TypeAdapter(_Rollback))
            except CheckpointError as error:
                log.say(f"{error.args[0].split(';')[0]}: the count of rollbacks begins again")
        rollback = self.ranks.gather(rollback)[0]
        if rollback is not None:
            self._rollbacks = rollback["count"]
            if rollback["step"] == self.step:
                self.loader.position = rollback["position"]
                log.say(f"the run was rolled back to step {self.step}: it goes on with the data after those read then")

    def _checkpoint(self, log: RunLog, *, wait: bool) -> bool:
        """Save; log a failure, and raise it only if `wait` (at the end of the run). Return whether it is written."""
        self.watchdog.doing(f"step {self.step}, waiting for the checkpoint before", slow=True)
        self._log_saved(log, wait=True)
        self.watchdog.doing(f"step {self.step}, checkpoint", slow=True)
        try:
            path = self.save(wait=wait)
        except CheckpointError as error:
            log.event(self.step, "save_failed", str(error) if wait else f"{error}; the run continues")
            if wait:
                raise
            return False
        if wait:
            self._log_saved(log, wait=True, must=True)
        if wait or not self.background:
            log.event(self.step, "save", f"saved {path}")
        return wait or not self.background

    def _log_saved(self, log: RunLog, *, wait: bool, must: bool = False) -> None:
        """Log the end of a background checkpoint; raise its error if the checkpoint `must` have been written."""
        outcome = self.saved(wait=wait)
        if outcome is None:
            return
        path, error = outcome
        if error is not None:
            log.event(self.step, "save_failed", str(error) if must else f"{error}; the run continues")
            if must:
                raise error
        elif not must:
            log.event(self.step, "save", f"saved {path}")

    def _roll_back(self, log: RunLog) -> None:
        """Return to the newest checkpoint, and continue with the data after what was read so far."""
        last_step, position = self.step, self.loader.position
        counts = self.counts
        if self._rollbacks == self.config.rollbacks:
            raise DivergedError(
                f"step {last_step}: {self.skipped_in_a_row} steps in a row were skipped, and the run was rolled back "
                f"{self._rollbacks} times already (--rollbacks); give a lower --lr, or look at the data"
            )
        self._rollbacks += 1
        self.watchdog.doing(f"step {last_step}, waiting for the checkpoint before", slow=True)
        self._log_saved(log, wait=True)
        if not self._load_newest(log):
            raise DivergedError(
                f"step {last_step}: {self.skipped_in_a_row} steps in a row were skipped before there was any "
                "checkpoint to return to; give a lower --lr, or look at the data"
            )
        self.loader.position = position
        self.counts = counts
        self.skipped_in_a_row = 0
        # If a signal had ended that step's validation, it was made up for when the run went on.
        self.unvalidated = False
        if self.ranks.rank == 0:
            # In case the run is interrupted before its next checkpoint.
            rollback = {"count": self._rollbacks, "step": self.step, "position": position}
            with contextlib.suppress(OSError):
                write_json(self.config.output / _ROLLBACK, rollback)
        log.begin(self.step)
        log.event(last_step, "rollback", f"step {last_step}: back to step {self.step}, to continue with other data")
