"""Training under Megatron, whose schedules run the micro-batches and whose optimizer wraps symdist's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from pydantic import TypeAdapter
from torch import Tensor, nn

from launch.data import Corpus
from launch.engines.megatron import checkpoint
from launch.engines.megatron.config import MegatronRun
from launch.engines.megatron.model import bare, build_chunk, count_parameters
from launch.engines.megatron.router import MegatronRouterMonitor
from launch.loop.resumption import Job, keeping_options
from launch.loop.schedules import Schedule
from launch.loop.training import Training
from launch.records.run_log import RunLog
from launch.runtime.distributed import Ranks
from launch.runtime.watchdog import Watchdog
from symdist import SymDist
from symdist_megatron import get_symdist_optimizer


class MegatronTraining(Training):
    """A run whose model is a Megatron GPT; see `Training` for the arguments."""

    config: MegatronRun
    launcher = "megatron"

    def __init__(self, config: MegatronRun, corpus: Corpus, ranks: Ranks, watchdog: Watchdog):
        self.shape = config.shape()
        super().__init__(config, corpus, ranks, watchdog)

    def _build(self, outline: nn.Module) -> Any:
        config = self.config
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_parallel,
            pipeline_model_parallel_size=config.pipeline_parallel,
            expert_model_parallel_size=config.expert_parallel,
            expert_tensor_parallel_size=config.expert_tensor,
        )
        self.dtype = torch.bfloat16 if self.low_precision else torch.float32
        vocabulary = self.corpus.vocabulary
        model = build_chunk(
            self.shape,
            config,
            self.dtype,
            vocabulary=vocabulary,
            whole=(lambda: self._make_model(seed=config.seed, device="cpu")) if self._drawn_whole() else None,
        )
        counted = count_parameters(model, padding=config.padded(vocabulary) - vocabulary)
        total, of_experts = self.ranks.sum(torch.tensor(counted, device=self.ranks.device)).tolist()
        unused = self.shape.experts - self.shape.top_k
        self.parameters = total
        self.active_parameters = total - (of_experts // self.shape.experts * unused if self.shape.experts else 0)
        self._build_optimizer(model)
        for module in model.modules():
            if (head := getattr(module, "output_layer", None)) is not None:
                head.register_forward_hook(self._see_logits)
        return model

    def _see_logits(self, module: Any, inputs: Any, output: Any) -> None:
        """Measure the logits of this rank's part of the vocabulary, without padding rows."""
        logits = output[0]
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        self.measures.logits.see(logits[..., : max(0, self.corpus.vocabulary - first)])

    def _drawn_whole(self) -> bool:
        if self.ranks.device.type == "cuda":
            return super()._drawn_whole()
        if self.config.initialize == "sharded":
            # On the CPU all ranks use the same generator state, and would initialize the same experts.
            raise ValueError("--initialize sharded needs GPUs under Megatron; leave the option out on the CPU")
        return True

    def _build_optimizer(self, model: Any) -> None:
        schedules = self._schedules()
        if "default" not in schedules:
            raise ValueError(
                f"recipe {self.recipe.name!r} has no [schedule.default], the only schedule that Megatron's scheduler "
                "can follow; add one to the recipe"
            )
        schedule = schedules["default"]
        self._ignored_schedules = sorted(set(schedules) - {"default"})
        config = self.config
        _, lr = self.recipe.at_rate(None)
        decay = float((self.recipe.options("matrix") or {}).get("weight_decay", 0.0))
        self.optimizer = get_symdist_optimizer(
            OptimizerConfig(
                optimizer="symdist",
                min_lr=lr * schedule.final,
                weight_decay=decay,
                clip_grad=config.clip,
                bf16=self.dtype == torch.bfloat16,
                params_dtype=self.dtype,
                use_distributed_optimizer=config.distributed_optimizer,
                overlap_param_gather=config.overlap,
            ),
            [model],
            recipe=self.recipe,
            vocabulary=self.corpus.vocabulary,
            nonfinite=config.nonfinite,
            # None of Megatron's own overrides: the recipe says which parameters have weight decay.
            config_overrides={},
        )
        self.scheduler = build_scheduler(self.optimizer, schedule, lr=lr, decay=decay, total=config.steps)

    def _watch(self) -> MegatronRouterMonitor:
        return MegatronRouterMonitor(self.model, moe_layers=self.shape.moe_layers, experts=self.shape.experts)

    def _data_share(self) -> tuple[int, int]:
        return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    def run(self, log: RunLog) -> dict[str, Any] | None:
        """See `Training`."""
        if self._ignored_schedules:
            log.say(
                f"Megatron's scheduler has one schedule for all parameters, [schedule.default] of {self.recipe.name}; "
                f"ignored: [schedule.{'], [schedule.'.join(self._ignored_schedules)}]"
            )
        return super().run(log)

    def _gradients(self) -> Tensor:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        count = self.config.accumulation
        batches = (next(self.loader).to(self.ranks.device) for _ in range(count))
        losses = self._forward(batches, count=count, backward=True)
        return torch.stack([loss.mean() for loss in losses]).mean()

    def _losses(self, tokens: Tensor) -> Tensor:
        return self._forward(iter([tokens]), count=1, backward=False)[0]

    def _forward(self, batches: Iterator[Tensor], *, count: int, backward: bool) -> list[Tensor]:
        """Return this rank's share of every next token's loss, batch by batch, so that ranks can average.

        Only the last pipeline stage knows the losses; it returns them times the number of stages, the others zero.
        """
        config = self.config
        micro = config.batch // (self.data_ranks * config.accumulation)
        stages = config.pipeline_parallel
        losses = get_forward_backward_func()(
            forward_step_func=_step,
            data_iterator=batches,
            model=self.model,
            num_microbatches=count,
            seq_length=config.sequence,
            micro_batch_size=micro,
            forward_only=not backward,
        )
        if not losses:
            return [torch.zeros(micro, config.sequence, device=self.ranks.device)] * count
        return [loss * stages for loss in losses]

    def _update(self) -> tuple[Tensor | float | None, float]:
        stepping = self._clock()
        # The time includes Megatron's own work: norm, clipping, and gathering the updated weights.
        _, norm, _ = self.optimizer.step()
        seconds = self._clock() - stepping
        self.scheduler.step(1)
        return norm, seconds

    def validate(self) -> dict[str, float] | None:
        """See `Training`."""
        with self._gathered():
            return super().validate()

    @property
    def symdist(self) -> SymDist:
        """See `Training`."""
        return self.optimizer.joint_step.symdist

    @property
    def mesh(self) -> dict[str, int]:
        """See `Training`."""
        config = self.config
        return {
            "dp": config.data_ranks(self.ranks.world),
            "tp": config.tensor_parallel,
            "pp": config.pipeline_parallel,
            "ep": config.expert_parallel,
            "etp": config.expert_tensor,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """See `Training`; the layout is not part of it, so a checkpoint can be resumed at another layout."""
        return super().identity | {
            "launcher": "megatron",
            "rows": self.config.padded(self.corpus.vocabulary),
            "precision": str(self.dtype),
            "distributed_optimizer": self.config.distributed_optimizer,
        }

    def load(self, path: Path) -> dict[str, Any]:
        """See `Training`."""
        with keeping_options(lambda: self.optimizer.param_groups):
            job = checkpoint.load(
                path, model=bare(self.model), optimizer=self.optimizer, identity=self.identity, job=TypeAdapter(Job)
            )
        # Megatron's scheduler counts from one.
        self.scheduler.num_steps = 1
        self.scheduler.step(job["step"])
        return job

    def load_weights(self, path: Path) -> int:
        """See `Training`."""
        return checkpoint.load_weights(path, model=bare(self.model), optimizer=self.optimizer)

    def save(self, *, wait: bool) -> Path:
        """See `Training`; the checkpoint is always written before this returns."""
        with self._gathered():
            return checkpoint.save(
                self.checkpoints,
                self.step,
                model=bare(self.model),
                optimizer=self.optimizer,
                job=self.job(),
                identity=self.identity,
                keep=self.num_kept,
                keep_every=self.config.keep_every,
                checksums=self.config.checksums,
            )

    def _summary(self, measures: dict[str, float]) -> dict[str, Any]:
        config = self.config
        return super()._summary(measures) | {
            "megatron_core": megatron.core.__version__,
            "precision": str(self.dtype).removeprefix("torch."),
            "data_parallel": self.data_ranks,
            "tensor_parallel": config.tensor_parallel,
            "pipeline_parallel": config.pipeline_parallel,
            "expert_parallel": config.expert_parallel,
            "expert_tensor_parallel": config.expert_tensor,
            "distributed_optimizer": config.distributed_optimizer,
        }

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Have all updated weights in place; with `overlap`, Megatron gathers them only in the next forward pass."""
        if not self.config.overlap:
            yield
            return
        self.model.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            self.model.enable_forward_pre_hook()


def build_scheduler(
    optimizer: Any, schedule: Schedule, *, lr: float, decay: float, total: int
) -> OptimizerParamScheduler:
    """Build a Megatron scheduler that gives the same learning rates as `schedule`.

    Megatron counts steps from one. Linear and cosine decay both use its "WSD" style (warmup, stable, decay), which sets
    separately when the decay begins.

    Args:
        optimizer: Megatron's optimizer.
        schedule: The schedule to reproduce.
        lr: The base learning rate.
        decay: The weight decay, which stays constant.
        total: Number of steps of the run.
    """
    start = schedule.warmup if schedule.shape == "cosine" else max(float(schedule.warmup), schedule.constant * total)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=lr * schedule.final,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=total + 1,
        lr_decay_style="constant" if schedule.shape == "constant" else "WSD",
        wsd_decay_steps=total - start,
        lr_wsd_decay_style="linear" if schedule.shape == "linear" else "cosine",
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=total,
        wd_incr_style="constant",
    )
    scheduler.step(1)
    return scheduler


def _step(batches: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    """Run one micro-batch; return the stage's output, and the function that turns the last stage's into a loss."""
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
    output = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return output, _mean


def _mean(losses: Tensor) -> tuple[Tensor, Tensor]:
    return losses.mean(), losses.detach()
