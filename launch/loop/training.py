"""The training loop: forward, backward, optimizer step, and validation, logs and checkpoints at their intervals."""

import dataclasses
import statistics
import time
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from launch.data import Corpus, TokenLoader, validation_batches
from launch.loop.config import Config
from launch.loop.metrics import Measures, flops_per_token, peak_flops
from launch.loop.resumption import Resumable
from launch.loop.schedules import Schedule
from launch.records.run_log import RunLog
from launch.records.run_metadata import describe
from launch.runtime.distributed import Ranks
from launch.runtime.watchdog import Watchdog
from symdist import SymDist
from symdist.diagnostics import RouterMonitor
from symdist.routing.recipes import Recipe
from symdist.tools.models import active_parameters, build
from symdist.tools.run_format import Summary

# Above this many parameters, `--initialize auto` has each rank initialize only its own shards.
_DRAWN_WHOLE = 200_000_000


def numbers(options: Mapping[str, Any], wanted: bool) -> dict[str, Any]:
    """Return the options that are numbers, or all others."""
    return {name: value for name, value in options.items() if (type(value) in (int, float)) == wanted}


class Training(Resumable):
    """A training run on all ranks; each engine's subclass builds the model and says how to step and save it.

    All ranks must create it, call its methods and read its properties together.

    Args:
        config: The run's configuration, already checked for this number of ranks.
        corpus: The token shards to train and validate on.
        ranks: The ranks of the run.
        watchdog: Ends the process if the run reports no progress to it for too long.

    Raises:
        ValueError: If the model cannot be built, or the corpus is too small for one step.
    """

    launcher: str
    """Name of the engine, for the records of the run."""

    def __init__(self, config: Config, corpus: Corpus, ranks: Ranks, watchdog: Watchdog):
        self.config, self.corpus, self.ranks, self.watchdog = config, corpus, ranks, watchdog
        self.recipe = self._load_recipe()
        self._make_model = partial(
            build,
            config.model,
            vocabulary=corpus.vocabulary,
            overrides=config.model_settings(),
        )
        outline = self._make_model(device="meta")
        self.parameters = sum(parameter.numel() for parameter in outline.parameters())
        self.active_parameters = active_parameters(outline)
        self.flops_per_token = flops_per_token(outline, active=self.active_parameters, sequence=config.sequence)
        watchdog.doing("building the model", slow=True)
        self.model = self._build(outline)
        watchdog.detail = lambda: "" if self.symdist is None else self.symdist.progress()
        # After the build, so that the monitor's hooks run after the hooks that sharding puts on the routers.
        self.monitor = self._watch()
        self.measures = Measures(ranks, self.symdist)
        self.data_rank, self.data_ranks = self._data_share()
        self.loader = TokenLoader(
            corpus.train,
            sequence=config.sequence,
            batch=config.batch // (self.data_ranks * config.accumulation),
            rank=self.data_rank,
            world=self.data_ranks,
            seed=config.seed,
            vocabulary=corpus.vocabulary,
        )
        if self.loader.windows < config.batch:
            raise ValueError(
                f"the corpus has {self.loader.windows} training sequences of {config.sequence} tokens, but a step "
                f"needs --batch {config.batch}; give more text or a smaller --batch"
            )
        self.start_counting(config.spike_sigma)
        self._step_times: list[float] = []
        self._optimizer_times: list[float] = []

    @abstractmethod
    def _build(self, outline: nn.Module) -> Any:
        """Return the sharded model, and create its optimizer; `outline` is the model on the meta device."""

    def _watch(self) -> RouterMonitor:
        """Return the monitor of the model's routers."""
        return RouterMonitor(self.model)

    def _data_share(self) -> tuple[int, int]:
        """Return this rank's number and the count among data-parallel ranks; here every rank is one."""
        return self.ranks.rank, self.ranks.world

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` marks the last one of the step."""
        (loss / self.config.accumulation).backward()

    @abstractmethod
    def _update(self) -> tuple[Tensor | float | None, float]:
        """Clip and step; return the gradient norm before clipping, if known, and the optimizer's seconds."""

    @property
    @abstractmethod
    def symdist(self) -> SymDist | None:
        """The SymDist optimizer; None if the run uses another optimizer."""

    @property
    @abstractmethod
    def mesh(self) -> dict[str, int]:
        """Sizes of the parallel dimensions by name, for the records of the run."""

    @property
    def low_precision(self) -> bool:
        """Whether forward and backward run in bfloat16."""
        precision = self.config.precision
        supported = self.ranks.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return precision == "bfloat16" or (precision == "auto" and supported)

    @property
    def skipped(self) -> int:
        """Number of steps that the optimizer or the engine skipped since this process started."""
        return 0 if self.symdist is None else self.symdist.skipped_steps

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a checkpoint must share with this run to be resumed from.

        Numbers among the options of a recipe, such as rates, are not among them: see `settings`.
        """
        config = self.config
        return {
            "model": config.model,
            "model_overrides": dict(config.model_overrides),
            "recipe": self._recipe_options(wanted=False),
            "corpus": self.corpus.fingerprint,
            "vocabulary": self.corpus.vocabulary,
            "sequence": config.sequence,
            "seed": config.seed,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """See `Resumable`."""
        config = self.config
        own = ("steps", "batch", "accumulation", "clip", "aux_loss", "z_loss", "nonfinite", "precision")
        return {name: getattr(config, name) for name in own} | {
            "recipe": self._recipe_options(wanted=True),
            "schedule": {key: dict(options) for key, options in self.recipe.schedules.items()},
        }

    def _recipe_options(self, *, wanted: bool) -> dict[str, dict[str, Any]]:
        """Return the options by role and pattern that are numbers, or all others; see `numbers`."""
        patterns = {f"patterns[{i}]": pattern for i, pattern in enumerate(self.recipe.patterns)}
        return {name: numbers(options, wanted) for name, options in {**self.recipe.sections, **patterns}.items()}

    def run(self, log: RunLog) -> dict[str, Any] | None:
        """Train to the last step, or until a signal asks the run to stop; all ranks must call it.

        Returns:
            The summary of the finished run, or None if it was stopped early.

        Raises:
            DivergedError: If the run would need more rollbacks than allowed, or has no checkpoint to return to.
            CheckpointError: If the last checkpoint cannot be written.
            ValueError: If the checkpoint it resumed from is past the last step.
        """
        config = self.config
        log.describe(
            describe(
                config,
                launcher=self.launcher,
                mesh=self.mesh,
                ranks=self.ranks.world,
                device=self._device_name(),
                parameters=self.parameters,
                active_parameters=self.active_parameters,
                optimizer=self.symdist,
            )
        )
        measures = self._validate(log) if self.unvalidated or self.step == config.steps else None
        if self.step == config.steps and measures is not None:
            # The run was interrupted between its last checkpoint and its summary.
            return self._summary(measures)
        while self.step < config.steps and not self.unvalidated:
            loss, norm, stopping = self._train_step(log)
            self._log_saved(log, wait=False)
            if config.rollback_after and self.skipped_in_a_row >= config.rollback_after:
                self._roll_back(log)
                continue
            log.advance(self.step)
            last = self.step == config.steps
            if self.step % config.log_every == 0 or last:
                log.step(self.step, "train", self._measures(loss, norm))
            if self.step % config.validate_every == 0 or last:
                self.unvalidated = stopping
                measures = None if stopping else self._validate(log)
                stopping = self.unvalidated
            due = config.checkpoint_every and self.step % config.checkpoint_every == 0
            # While steps are being skipped the weights do not change, so a rollback to them would be no use.
            if last or stopping:
                self._checkpoint(log, wait=True)
            elif due and not self.skipped_in_a_row:
                written = self._checkpoint(log, wait=False)
                # So that a signal that comes while a checkpoint is written does not wait for another one.
                stopping = self._asked_to_stop()
                if stopping and not written:
                    self._checkpoint(log, wait=True)
            if stopping:
                log.event(
                    self.step, "stop", f"stopped by a signal: saved step {self.step}; --resume auto continues from it"
                )
                return None
            if last:
                assert measures is not None
                return self._summary(measures)
        if self.unvalidated:
            log.event(self.step, "stop", f"stopped by a signal at step {self.step}, from which --resume auto continues")
            return None
        raise ValueError(
            f"the checkpoint is of step {self.step}, but the run ends at --steps {config.steps}; give more --steps"
        )

    def _train_step(self, log: RunLog) -> tuple[float, Tensor | float | None, bool]:
        """Take a step; return the loss over the whole batch, the gradient norm, and whether any rank should stop."""
        number = self.step + 1
        # The first step is slow: it compiles, and opens connections between ranks.
        self.watchdog.doing(f"step {number}, forward and backward", slow=not self._step_times)
        started = self._clock()
        self.model.train()
        if number % self.config.log_every == 0 or number == self.config.steps:
            self.measures.arm()
        # One all-reduce gives all ranks the loss and whether to stop.
        totals = torch.tensor([float(self._gradients()), float(self.ranks.stopping)], device=self.ranks.device)
        total, stopping = self.ranks.sum(totals.double()).tolist()
        loss = total / self.ranks.world
        spike = self.spikes.judge(loss)
        if spike:
            assert self.symdist is not None, "the configuration was checked"
            self.symdist.skip_next_step()
        self.watchdog.doing(f"step {number}, optimizer")
        skipped_before = self.skipped
        norm, seconds = self._update()
        if spike and self.symdist is not None:
            # If the engine skipped the step itself, the optimizer never ran and the request is still set.
            self.symdist.skip_next_step(False)
        self.step = number
        self._optimizer_times.append(seconds)
        self._step_times.append(self._clock() - started)
        self.elapsed += self._step_times[-1]
        self._count(log, loss, spike=spike, skipped=self.skipped > skipped_before)
        return loss, norm, stopping > 0

    def _count(self, log: RunLog, loss: float, *, spike: bool, skipped: bool) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self.counts["skipped_steps"] += 1
        if spike:
            self.counts["spikes"] += 1
            text = f"step {self.step}: a loss of {loss:.4g} is a spike; the step was skipped"
        else:
            text = f"step {self.step}: a gradient was not finite; the step was skipped"
        log.event(self.step, "spike" if spike else "nonfinite", text)

    def _gradients(self) -> Tensor:
        """Compute the gradients of a step; return this rank's loss, whose mean over ranks is the batch's loss."""
        config = self.config
        total = torch.zeros((), device=self.ranks.device)
        for micro in range(config.accumulation):
            tokens = next(self.loader).to(self.ranks.device)
            loss = self._losses(tokens).mean()
            total += loss.detach() / config.accumulation
            if self.monitor.layers:
                self.monitor.accumulate()
                if config.aux_loss or config.z_loss:
                    balance, z = self.monitor.losses()
                    loss = loss + config.aux_loss * balance + config.z_loss * z
            self._backward(loss, last=micro + 1 == config.accumulation)
        return total

    def _losses(self, tokens: Tensor) -> Tensor:
        """Return the loss of each next token in nats, `[batch, sequence]`, for `[batch, sequence + 1]` tokens."""
        logits = self.model(input_ids=tokens[:, :-1]).logits
        self.measures.logits.see(logits)
        return functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")

    def _measures(self, loss: float, norm: Tensor | float | None) -> dict[str, float]:
        config = self.config
        values = {"loss": loss}
        if norm is not None:
            values["gradient_norm"] = float(norm)
        speed = config.batch * config.sequence / statistics.median(self._step_times[-config.log_every :])
        values["tokens_per_second"] = speed
        if self._peak_flops is not None:
            values["mfu"] = speed * self.flops_per_token / (self.ranks.world * self._peak_flops)
        values["optimizer_share"] = self._optimizer_share(config.log_every)
        values["optimizer_ms"] = 1000 * statistics.median(self._optimizer_times[-config.log_every :])
        values |= {name: count for name, count in self.counts.items() if count}
        return values | self._router_measures() | self.measures.take()

    @cached_property
    def _peak_flops(self) -> float | None:
        return peak_flops(self.config.peak_tflops, self.ranks.device, low=self.low_precision)

    def _device_name(self) -> str:
        device = self.ranks.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def _router_measures(self) -> dict[str, float]:
        if not self.monitor.layers:
            return {}
        mean = self.monitor.summary(self.ranks.sum)["mean"]
        self.monitor.reset()
        return {f"router_{name}": value for name, value in mean.items()}

    def _optimizer_share(self, last: int) -> float:
        return statistics.median(self._optimizer_times[-last:]) / statistics.median(self._step_times[-last:])

    def _validate(self, log: RunLog) -> dict[str, float] | None:
        """Validate and log it, unless a signal asks the run to stop: then it is done when the run goes on."""
        measures = self.validate()
        self.unvalidated = measures is None
        if measures is not None:
            log.step(self.step, "validation", measures)
        return measures

    def _asked_to_stop(self) -> bool:
        """Whether a signal asked any rank to stop; all ranks must call it."""
        return self.ranks.most(float(self.ranks.stopping)) > 0

    @torch.no_grad()
    def validate(self) -> dict[str, float] | None:
        """Evaluate the model on the validation set; all ranks must call it.

        Returns:
            `loss`, the mean next-token loss in nats, and the routers' load measures, the same on all ranks. None if a
            signal asked any rank to stop meanwhile.
        """
        self.model.eval()
        self.monitor.reset()
        totals = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        config = self.config
        batches = validation_batches(
            self.corpus.validation,
            sequence=config.sequence,
            batch=config.batch // (self.data_ranks * config.accumulation),
            rank=self.data_rank,
            world=self.data_ranks,
            limit=config.validation_sequences,
        )
        for tokens, weight in batches:
            if self._asked_to_stop():
                return None
            self.watchdog.doing(f"step {self.step}, validation")
            losses = self._losses(tokens.to(self.ranks.device))
            weight = weight.to(losses)[:, None]
            totals += torch.stack([(losses * weight).sum().double(), weight.sum().double() * losses.shape[1]])
            if self.monitor.layers:
                self.monitor.accumulate()
        self.ranks.sum(totals)
        return {"loss": float(totals[0] / totals[1])} | self._router_measures()

    def _summary(self, measures: dict[str, float]) -> dict[str, Any]:
        config = self.config
        summary: Summary = {
            "model": config.model,
            "recipe": self.recipe.name,
            "steps": config.steps,
            "ranks": self.ranks.world,
            "tokens": config.steps * config.batch * config.sequence,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            **self._speeds(),
            "training_seconds": self.elapsed,
            "skipped_steps": self.counts["skipped_steps"],
            "spikes": self.counts["spikes"],
        }
        return {**summary, **{f"validation_{name}": value for name, value in measures.items()}}

    def _speeds(self) -> Summary:
        config = self.config
        if not self._step_times:
            # This process took no step; of earlier processes only the total time is known.
            return {"tokens_per_second": config.steps * config.batch * config.sequence / max(self.elapsed, 1e-9)}
        return {
            "tokens_per_second": config.batch * config.sequence / statistics.median(self._step_times),
            "optimizer_share": self._optimizer_share(len(self._step_times)),
            "optimizer_ms": 1000 * statistics.median(self._optimizer_times),
        }

    def _clock(self) -> float:
        self.ranks.synchronize()
        return time.perf_counter()

    def _load_recipe(self) -> Recipe:
        return self.config.adjusted_recipe()

    def _schedules(self) -> dict[str, Schedule]:
        tables = self.recipe.schedules or {"default": {"shape": "linear"}}
        try:
            schedules = {key: Schedule(**options) for key, options in tables.items()}
        except TypeError as error:
            raise ValueError(f"recipe {self.recipe.name!r}: [schedule] {error}") from None
        # A short trial run should not spend all its steps in the warmup.
        limit = self.config.steps // 4
        return {
            key: dataclasses.replace(schedule, warmup=min(schedule.warmup, limit))
            for key, schedule in schedules.items()
        }

    def _drawn_whole(self) -> bool:
        """Return whether every rank initializes the whole model."""
        initialize = self.config.initialize
        return initialize == "whole" or (initialize == "auto" and self.parameters <= _DRAWN_WHOLE)
