"""Pretrain under Megatron: torchrun --nproc_per_node=2 -m launch.pretrain_megatron --tensor-parallel 2."""

from launch.engines.megatron.entry import main_with_helpers
from launch.loop.job import end_with

if __name__ == "__main__":
    end_with(main_with_helpers)
