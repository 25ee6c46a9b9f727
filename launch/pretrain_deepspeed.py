"""Pretrain under DeepSpeed: torchrun --nproc_per_node=2 -m launch.pretrain_deepspeed --deepspeed FILE.json."""

from launch.engines.deepspeed.entry import main
from launch.loop.job import end_with

if __name__ == "__main__":
    end_with(main)
