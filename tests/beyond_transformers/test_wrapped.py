"""Whatever a model is wrapped in, and in whatever order: its parameters have the same names, roles, rules and views."""

import pytest

from tests.beyond_transformers import wrapped_ranks
from tests.beyond_transformers.wrapped_ranks import MODELS, WRAPPERS
from tests.ranks import Ranks

pytest.importorskip("transformers")


# What each shows in parameter names; those that are left out change none.
MARKS = {
    "compiled": "_orig_mod",
    "checkpointed": "_checkpoint_wrapped_module",
    "DDP": "module",
    "FSDP1": "_fsdp_wrapped_module",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_routing_sees_through(ranks: Ranks, wrapper: str) -> None:
    for found in ranks.run(2, wrapped_ranks.routed, wrapper):
        for name, (parameters, classes, described) in found.items():
            marks = {mark for word, mark in MARKS.items() if word in wrapper and wrapper != "compiled in place"}
            words = {word for parameter in parameters for word in parameter.split(".")}
            assert words & set(MARKS.values()) == marks, name
            plain = MODELS[name]()
            assert classes >= wrapped_ranks.classes(plain), name
            assert described == wrapped_ranks.described(plain), name
