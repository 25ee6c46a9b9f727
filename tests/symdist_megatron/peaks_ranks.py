"""In test ranks: a run resumed under another config, and the rates of every matrix that Megatron's scheduler makes."""

import copy
import tempfile
from typing import Any

from tests.symdist_megatron.how import How
from tests.symdist_megatron.models import build, keep_written_results, optimizer_config

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.device_mesh import DeviceMesh

from symdist_megatron import get_symdist_optimizer

RECIPE: dict[str, Any] = {
    "default": {"rule": "muon", "lr": 0.1, "weight_decay": 0.1},
    "embedding": {"rule": "row_norm", "lr": 0.3},
    "other": {"rule": "adamw", "lr": 0.01},
}
STEPS = 3
Rates = dict[str, float]


class Run:
    """A model's optimizer and scheduler, by a peak and a decay, and peaks of some parameters' own."""

    def __init__(self, how: How, told: dict[str, Any], **flags: bool):
        _, self.chunks = build(how)
        lr, decay = told["lr"], told["decay"]
        overrides = {ParamKey(name=name): {"max_lr": peak, "min_lr": peak / 10} for name, peak in told["peaks"].items()}
        config = optimizer_config(how, lr=lr, min_lr=lr / 10, weight_decay=decay)
        self.optimizer = get_symdist_optimizer(
            config, self.chunks, recipe=RECIPE, layer_wise=how.layer_wise, config_overrides=overrides
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=lr,
            min_lr=lr / 10,
            lr_warmup_steps=2,
            lr_decay_steps=told["total"],
            lr_decay_style="linear",
            start_wd=decay,
            end_wd=decay,
            wd_incr_steps=told["total"],
            wd_incr_style="constant",
            **flags,
        )

    def train(self, steps: int) -> Rates:
        """The rate and the decay of every matrix in the last of some steps."""
        for _ in range(steps):
            for chunk in self.chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad.fill_(0.25)
            self.scheduler.step(1)
            self.optimizer.step()
        return {
            f"{name} {option}": group[option]
            for group in self.optimizer.joint_step.symdist.param_groups
            for name in group["param_names"]
            for option in ("lr", "weight_decay")
        }

    def sharded(self, form: str, *, loading: bool) -> Any:
        metadata = {"distrib_optim_sharding_type": form, "chained_optim_avoid_prefix": True}
        model = self.chunks[0]
        while hasattr(model, "module"):
            model = model.module
        weights = model.sharded_state_dict(metadata=metadata)
        return self.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)


def resumed(
    mesh: DeviceMesh, how: How, form: str | None, first: dict[str, Any], then: dict[str, Any], flags: dict[str, bool]
) -> dict[str, Rates]:
    """Rates one step after resuming: of the run that was saved had it gone on, of the new config, and as resumed.

    `form` is one of Megatron's of distributed checkpoints, or None for what `state_dict` gives.
    """
    keep_written_results()
    run = Run(how, first)
    run.train(STEPS)
    scheduler = copy.deepcopy(run.scheduler.state_dict())
    folder: list[Any] = [tempfile.mkdtemp() if mesh.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    if form is None:
        state = copy.deepcopy(run.optimizer.state_dict())
    else:
        dist_checkpointing.save({"optimizer": run.sharded(form, loading=False)}, folder[0])
    found = {"checkpoint": run.train(1)}
    run = Run(how, then)
    run.scheduler.step(STEPS)
    found["config"] = run.train(1)
    run = Run(how, then, **flags)
    if form is not None:
        state = dist_checkpointing.load({"optimizer": run.sharded(form, loading=True)}, folder[0])["optimizer"]
    run.optimizer.load_state_dict(state)
    run.scheduler.load_state_dict(scheduler)
    return found | {"resumed": run.train(1)}
