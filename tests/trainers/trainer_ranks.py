"""What ranks run under accelerate and transformers.Trainer, which are told that there are accelerators for FSDP."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

import symdist
from tests.trainers import language
from tests.trainers.language import CLIP, RECIPES, ROWS, Sizes, Weights, loaded

LAYERS = {"dense": "Qwen3DecoderLayer", "experts": "Qwen3MoeDecoderLayer"}
# Without accelerators there is none to copy the weights of the first rank to.
FSDP1 = {"version": 1, "sync_module_states": False}
HOW: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "ddp": None,
    "fsdp1": FSDP1,
    "fsdp1 flat": FSDP1 | {"use_orig_params": False},
    "fsdp2": {"version": 2},
}
WRAPPED: dict[str, type] = {
    "alone": PreTrainedModel,
    "ddp": DistributedDataParallel,
    "fsdp1": FullyShardedDataParallel,
    "fsdp1 flat": FullyShardedDataParallel,
    "fsdp2": FSDPModule,
}


class Rows(Dataset):
    """Sequences, those of a step after those of the one before."""

    def __len__(self) -> int:
        return len(language.rows())

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": language.rows()[index], "labels": language.rows()[index]}


class SymDistFactory:
    """An optimizer that wants the model, as Trainer takes it: made without arguments, then given model and options."""

    def __call__(self, model: nn.Module, **options: Any) -> symdist.SymDist:
        return symdist.build_optimizer(model, **options)


@contextmanager
def launched() -> Iterator[None]:
    """As a launcher leaves a process; accelerate keeps what it was told for the life of one, and forgets it after."""
    told = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    if dist.is_initialized():
        rank, world = str(dist.get_rank()), str(dist.get_world_size())
        told |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    before = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(told)
    try:
        with language.exact():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def feign_accelerators() -> None:
    """FSDP is for these only: from here on accelerate believes in them, and everything still runs on the CPU."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerated(
    mesh: DeviceMesh, kind: str, recipe: str, version: int, model_first: bool = False, *, use_orig_params: bool = True
) -> Weights:
    """`Accelerator.prepare(model, optimizer)` under FSDP, or first the model and then its optimizer."""
    plugin: dict[str, Any] = {"use_orig_params": use_orig_params} if version == 1 else {}
    with launched():
        PartialState(cpu=True)
        feign_accelerators()
        accelerator = Accelerator(
            cpu=True,
            fsdp_plugin=FullyShardedDataParallelPlugin(
                fsdp_version=version,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=[LAYERS[kind]],
                cpu_ram_efficient_loading=False,
                sync_module_states=False,
                **plugin,
            ),
        )
        model = language.build(kind)
        if model_first:
            model = accelerator.prepare(model)
            optimizer = accelerator.prepare(symdist.build_optimizer(model, RECIPES[recipe]))
        else:
            model, optimizer = accelerator.prepare(model, symdist.build_optimizer(model, RECIPES[recipe]))
        share = slice(dist.get_rank(), None, dist.get_world_size())
        language.train(model, optimizer, lambda step: language.batch(step, share), backward=accelerator.backward)
        return weights_of(model)


def by_trainer(mesh: DeviceMesh, folder: str, kind: str, recipe: str, how: str, way: str) -> Weights:
    return run_trainer(folder, kind, recipe, how, way)


def run_trainer(folder: str, kind: str, recipe: str, how: str, way: str) -> Weights:
    """Trainer on the ranks there are; `how` is one of HOW, `way` how it is given the optimizer."""
    fsdp: dict[str, Any] = {}
    if HOW[how] is not None:
        fsdp = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": LAYERS[kind]} | HOW[how]}
    with launched():
        arguments = arguments_of(folder, **fsdp)
        if fsdp:
            feign_accelerators()
        return learned(language.build(kind, dtype_of(how)), arguments, recipe, way, WRAPPED[how])


def of_laid_out(mesh: DeviceMesh, folder: str, kind: str, recipe: str, sizes: Sizes, dtype: torch.dtype) -> Weights:
    """Trainer of a model that transformers has laid out before."""
    with launched():
        arguments = arguments_of(folder)
        return learned(loaded(Path(folder) / kind, sizes, dtype), arguments, recipe, "factory", FSDPModule)


def arguments_of(folder: str, **fsdp: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(Path(folder) / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=ROWS // (dist.get_world_size() if dist.is_initialized() else 1),
        max_steps=language.STEPS,
        lr_scheduler_type="linear",
        max_grad_norm=CLIP,
        average_tokens_across_devices=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **fsdp,
    )


def learned(model: Any, arguments: TrainingArguments, recipe: str, way: str, wrapped: type) -> Weights:
    chosen: dict[str, Any] = {"optimizer_cls_and_kwargs": (SymDistFactory, {"recipe": RECIPES[recipe]})}
    if way == "object":
        chosen = {"optimizers": (symdist.build_optimizer(model, RECIPES[recipe]), None)}
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), compute_loss_func=language.loss_of, **chosen)
    trainer.train()
    assert isinstance(trainer.model_wrapped, wrapped), type(trainer.model_wrapped)
    return weights_of(trainer.model_wrapped)


def dtype_of(how: str) -> torch.dtype:
    """FSDP1 knows no norm of gradients in float64, and Trainer wants it, be it for the log."""
    return torch.float32 if how.startswith("fsdp1") else torch.float64


def weights_of(model: nn.Module) -> Weights:
    whole = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False) if whole else nullcontext():
        return language.weights_of(model)
