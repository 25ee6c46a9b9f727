"""transformers.Trainer and accelerate with a DeepSpeed config: what ranks run."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.symdist_deepspeed import language
from tests.symdist_deepspeed.engines import Config, connect, over_ranks

STEPS = 6


class Tokens(Dataset):
    """The batches of the other tests, row by row; of one rank, or of all."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world, self.rows = rank, world, language.BATCH // world

    def __len__(self) -> int:
        return STEPS * self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = language.tokens(index // self.rows, self.rank, self.world)[index % self.rows]
        return {"input_ids": row, "labels": row}


def forget() -> None:
    """Both libraries keep what they were told for the life of the process."""
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def trained(mesh: DeviceMesh, folder: str, settings: Config) -> tuple[list[float], str, float]:
    """Losses that Trainer logs, the optimizer that DeepSpeed drives, and the last rate."""
    connect()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    # First: after the arguments of stage 3 transformers would build it in parts.
    model = language.model()
    arguments = TrainingArguments(
        output_dir=str(Path(folder) / "trainer"),
        deepspeed=settings,
        use_cpu=True,
        per_device_train_batch_size=language.BATCH // dist.get_world_size(),
        max_steps=STEPS,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train()
    engine = trainer.model_wrapped
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = losses, type(engine.basic_optimizer).__name__, float(engine.get_lr()[0])
    engine.destroy()
    forget()
    return found


def accelerated(mesh: DeviceMesh, settings: Config) -> tuple[list[float], str]:
    """Mean losses under accelerate, and the optimizer that DeepSpeed drives."""
    connect()
    # As `accelerate launch --use_deepspeed` does.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    model = language.model()
    # Without GPUs accelerate takes each process for the only one, and leaves the data to us.
    rows = Tokens(rank=dist.get_rank(), world=dist.get_world_size())
    loader = DataLoader(rows, batch_size=language.BATCH // dist.get_world_size(), shuffle=False)
    engine, _, loader = accelerator.prepare(model, DummyOptim(model.parameters(), lr=0.01), loader)
    losses = []
    for batch in loader:
        loss = engine(**batch).loss
        accelerator.backward(loss)
        losses.append(over_ranks(loss))
    found = losses, type(engine.basic_optimizer).__name__
    engine.destroy()
    forget()
    return found
