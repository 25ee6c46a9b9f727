"""Text and token corpora for pretraining: prepared once, then loaded per rank, with resumption.

`prepare` turns a source of text into token shards on disk; `TokenLoader` and `validation_batches` read windows of these
shards for one rank.
"""

from launch.data.corpus import Corpus
from launch.data.errors import DataError
from launch.data.loader import TokenLoader, validation_batches
from launch.data.prepare import DataConfig, prepare, prepare_on_ranks, survey
from launch.data.shards import ShardWriter, read_shard, write_shard
from launch.data.tokenizer import END_OF_TEXT, load_tokenizer

__all__ = [
    "END_OF_TEXT",
    "Corpus",
    "DataConfig",
    "DataError",
    "ShardWriter",
    "TokenLoader",
    "load_tokenizer",
    "prepare",
    "prepare_on_ranks",
    "read_shard",
    "survey",
    "validation_batches",
    "write_shard",
]
