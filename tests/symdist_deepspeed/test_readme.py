"""What the page on DeepSpeed prints runs as printed."""

import json
from collections.abc import Callable

from tests.ranks import Ranks
from tests.symdist_deepspeed import language
from tests.test_docs import blocks

PAGE = "docs/engines/deepspeed.md"


def test_one_word_and_one_import(worlds: Callable[[int], Ranks]) -> None:
    code = next(block for block in blocks(PAGE, "python") if "symdist_deepspeed" in block)
    config = json.loads(blocks(PAGE, "json")[0])
    for losses, rules in worlds(2).run(2, language.printed, code, config):
        assert losses[2] < losses[0]
        assert rules["model.layers.0.mlp.gate.weight"] == "left_spectral"
        assert rules["model.embed_tokens.weight"] == "row_norm"
