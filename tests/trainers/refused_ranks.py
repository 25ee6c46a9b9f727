"""What ranks run of what is refused: an optimizer object for DeepSpeed, and one flat parameter for a whole unit."""

import logging
import os
from collections.abc import Callable
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import symdist
from tests.trainers import language
from tests.trainers.language import RECIPES, ROWS
from tests.trainers.trainer_ranks import Rows, accelerated, launched, run_trainer

# It would compile C++ for a minute, and speeds up nothing here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.ERROR)


def told(run: Callable[[], Any]) -> str:
    """Of the ValueError."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def by_deepspeed(mesh: DeviceMesh, stage: int) -> str:
    with launched():
        connect()
        model = language.build("dense", torch.float32)
        optimizer = symdist.build_optimizer(model, RECIPES["spectral"])

        def run() -> None:
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage))[0]
            tokens = language.batch(0)
            engine.backward(language.loss_of(engine(input_ids=tokens), tokens))
            engine.step()

        return told(run)


def by_accelerate(mesh: DeviceMesh, stage: int) -> str:
    with launched():
        connect()
        # As `accelerate launch --use_deepspeed` does; it is for accelerators, and takes the CPU for one.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        del os.environ["ACCELERATE_USE_CPU"]
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(stage)))
        model = language.build("dense", torch.float32)
        optimizer = symdist.build_optimizer(model, RECIPES["spectral"])
        loader = DataLoader(Rows(), batch_size=ROWS // dist.get_world_size())

        def run() -> None:
            engine, stepped, batches = accelerator.prepare(model, optimizer, loader)
            tokens = next(iter(batches))["input_ids"]
            accelerator.backward(language.loss_of(engine(input_ids=tokens), tokens))
            stepped.step()

        try:
            return told(run)
        finally:
            unset_hf_deepspeed_config()


def flat(mesh: DeviceMesh, way: str, folder: str) -> str:
    """`use_orig_params=False`."""

    def wrapped() -> None:
        model: nn.Module = language.build("dense")
        model = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
        symdist.build_optimizer(model, RECIPES["spectral"])

    ways = {
        "wrapped": wrapped,
        "prepared": lambda: accelerated(mesh, "dense", "spectral", 1, use_orig_params=False),
        "model prepared first": lambda: accelerated(
            mesh, "dense", "spectral", 1, model_first=True, use_orig_params=False
        ),
        "trainer": lambda: run_trainer(folder, "dense", "spectral", "fsdp1 flat", "factory"),
    }
    return told(ways[way])


def wrapped_later(mesh: DeviceMesh) -> str:
    return told(lambda: accelerated(mesh, "dense", "spectral", 1))


def connect() -> None:
    """Let DeepSpeed use the ranks that are there."""
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def config(stage: int) -> dict[str, Any]:
    """As users write it who want to give an optimizer of their own."""
    return {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
