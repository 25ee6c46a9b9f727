"""What lets a run go on: checkpoints as it trains, the newest that is whole after a loss, and the way back from one."""

import contextlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from launch.checkpoints.directory import (
    CheckpointError,
    DamagedCheckpointError,
    check_mixing,
    newest_first,
    quarantine,
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


class DivergedError(AllRanksError):
    """A run goes on to leave out steps, however often it is taken back."""


class Resumable(ABC):
    """Where a run stands, and how that is saved and restored; every method is called by all ranks."""

    config: Config
    ranks: Ranks
    watchdog: Watchdog
    loader: TokenLoader

    def start_counting(self, spike_sigma: float) -> None:
        """Stand at the beginning."""
        self.step = 0
        self.elapsed = 0.0
        self.counts = {"skipped_steps": 0, "spikes": 0}
        self.spikes = SpikeJudge(spike_sigma)
        self.left_out_in_a_row = 0
        self._rollbacks = 0

    @abstractmethod
    def load(self, path: Path) -> dict[str, Any]:
        """Restore model, optimizer and schedule; what `job` gave when the checkpoint was written.

        Raises:
            DamagedCheckpointError: On all ranks and before anything changes, where it cannot be read.
            ValueError: Likewise, where this run cannot go on from it; or CheckpointError.
        """

    @abstractmethod
    def save(self, *, wait: bool) -> Path:
        """Write a checkpoint of the present step; without `wait` it may go on in the background, see `saved`.

        Raises CheckpointError on all ranks where it cannot be written; what was there before is as it was.
        """

    @property
    def background(self) -> bool:
        """Whether `save` may leave before the checkpoint is written."""
        return False

    def saved(self, *, wait: bool) -> tuple[Path, CheckpointError | None] | None:
        """A checkpoint that was written in the background since the last call, and what went wrong with it."""
        return None

    def found(self) -> list[Path]:
        """The run's finished checkpoints, newest first."""
        return newest_first(self.checkpoints)

    def check_mixing(self, path: Path) -> None:
        """ValueError where a run from `path` would mix with newer checkpoints beside it."""
        check_mixing(self.checkpoints, path)

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.config.output / "checkpoints"

    def job(self) -> dict[str, Any]:
        """What the loop must know to go on from here, JSON-able and the same on all ranks."""
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "data": self.loader.state_dict(),
            # A copy: it may be written while training goes on.
            "counts": dict(self.counts),
            "spikes": self.spikes.state_dict(),
            "left_out_in_a_row": self.left_out_in_a_row,
        }

    @property
    def kept(self) -> int:
        """How many checkpoints stay: all of them, where the last steps were left out and the run may be lost."""
        return self.config.keep if not self.left_out_in_a_row else _ALL

    def resume(self, log: RunLog) -> int | None:
        """Go on from the checkpoint that the configuration asks for; its step, or None where there is none.

        "auto", and a run whose ranks were started again, take the newest that is whole, and set damaged ones aside.
        Raises ValueError or CheckpointError, the same on all ranks, for a checkpoint that this run cannot go on from.
        """
        wanted, restarted = self.config.resume, self.ranks.restarts > 0
        if wanted is None and not restarted:
            return None
        if wanted not in (None, "auto"):
            own = self._agreed(self.found())
            if own and (restarted or Path(wanted).resolve().parent != self.checkpoints.resolve()):
                log.say(f"{wanted} is where this run began: it goes on from what it has saved since")
                wanted = "auto"
        if wanted not in (None, "auto"):
            self.check_mixing(Path(wanted))
            self.watchdog.doing(f"loading {wanted}", slow=True)
            self._go_on(self.load(Path(wanted)))
        elif not self._load_newest(log):
            log.say(f"no checkpoint in {self.checkpoints}: starting from the beginning")
            return None
        self._follow_rollback()
        return self.step

    def _load_newest(self, log: RunLog) -> bool:
        """Load the newest checkpoint that is whole; False where there is none."""
        while found := self._agreed(self.found()):
            self.watchdog.doing(f"loading {found[0]}", slow=True)
            try:
                self._go_on(self.load(found[0]))
            except DamagedCheckpointError as error:
                if self.ranks.rank == 0:
                    aside = quarantine(found[0])
                    log.event(self.step, "fallback", f"{error}: it is now {aside.name}, and the one before is tried")
                self.ranks.gather(None)
                continue
            return True
        return False

    def _agreed(self, paths: list[Path]) -> list[Path]:
        """What the first rank sees."""
        return self.ranks.gather(paths)[0]

    def _go_on(self, job: dict[str, Any]) -> None:
        self.step, self.elapsed = job["step"], job["elapsed"]
        self.loader.load_state_dict(job["data"])
        self.counts = dict(job["counts"])
        self.spikes.load_state_dict(job["spikes"])
        self.left_out_in_a_row = job["left_out_in_a_row"]

    def _follow_rollback(self) -> None:
        """Keep to where the last roll-back had led, if it led here, and to how many there were."""
        path = self.config.output / _ROLLBACK
        told = self.ranks.gather(json.loads(path.read_text()) if path.exists() else None)[0]
        if told is not None:
            self._rollbacks = told["count"]
            if told["step"] == self.step:
                self.loader.position = told["position"]

    def _checkpoint(self, log: RunLog, *, wait: bool) -> None:
        """Save; what goes wrong is told, and raised only where the run ends with it."""
        self.watchdog.doing(f"step {self.step}, waiting for the checkpoint before", slow=True)
        self._tell(log, wait=True)
        self.watchdog.doing(f"step {self.step}, checkpoint", slow=True)
        try:
            path = self.save(wait=wait)
        except CheckpointError as error:
            log.event(self.step, "save_failed", str(error) if wait else f"{error}; the run goes on")
            if wait:
                raise
            return
        if wait:
            self._tell(log, wait=True, must=True)
        if wait or not self.background:
            log.event(self.step, "save", f"saved {path}")

    def _tell(self, log: RunLog, *, wait: bool, must: bool = False) -> None:
        """Tell of a checkpoint that was being written in the background; raise its error where it `must` be there."""
        outcome = self.saved(wait=wait)
        if outcome is None:
            return
        path, error = outcome
        if error is not None:
            log.event(self.step, "save_failed", str(error) if must else f"{error}; the run goes on")
            if must:
                raise error
        elif not must:
            log.event(self.step, "save", f"saved {path}")

    def _roll_back(self, log: RunLog) -> None:
        """Go back to the newest checkpoint, and on with the data that follows what was read so far."""
        came, position = self.step, self.loader.position
        counts = self.counts
        if self._rollbacks == self.config.rollbacks:
            raise DivergedError(
                f"step {came}: {self.left_out_in_a_row} steps in a row were left out, and the run was taken back "
                f"{self._rollbacks} times already (--rollbacks); lower learning rates, or look at the data"
            )
        self._rollbacks += 1
        self.watchdog.doing(f"step {came}, waiting for the checkpoint before", slow=True)
        self._tell(log, wait=True)
        if not self._load_newest(log):
            raise DivergedError(
                f"step {came}: {self.left_out_in_a_row} steps in a row were left out before there was any checkpoint "
                "to go back to; lower learning rates, or look at the data"
            )
        self.loader.position = position
        self.counts = counts
        self.left_out_in_a_row = 0
        if self.ranks.rank == 0:
            # For a run that is lost before its next checkpoint.
            told = {"count": self._rollbacks, "step": self.step, "position": position}
            with contextlib.suppress(OSError):
                write_json(self.config.output / _ROLLBACK, told)
        log.begin(self.step)
        log.event(came, "rollback", f"step {came}: back to step {self.step}, and on with other data")
