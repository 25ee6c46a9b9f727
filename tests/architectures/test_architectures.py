"""Every causal language model of the installed transformers finds its rules, or one line says what to add."""

import importlib

import pytest
import transformers

from tests.architectures.models import MODEL_TYPES
from tests.architectures.survey import verdict
from tests.architectures.table import PAGE, page, version_of

# Architectures whose forward cannot be followed to its end at the default configuration: what it lacks.
NOT_FOLLOWED = {
    "blt": "patches depend on the values of logits",
    "deepseek_v2": "the configuration says nothing of how many experts a token gets",
    "gemma4_unified_assistant": "it needs the keys and values of another model",
    "xlnet": "it makes tensors on the CPU",
}


@pytest.fixture(scope="module")
def thorough(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--all"))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_routing_is_right_or_says_what_to_add(model_type: str, thorough: bool) -> None:
    found = verdict(model_type, thorough=thorough)
    assert found.status != "wrong", "\n".join(found.faults)
    if found.status == "not built":
        # The error is raised by transformers' code, or what it calls, not by ours.
        root = found.raised_by.partition(".")[0]
        assert root not in ("symdist", "tests"), found
        assert importlib.util.find_spec(root) is not None
    elif model_type not in NOT_FOLLOWED:
        assert not found.ended
        assert found.seen


def test_nearly_all_are_right(thorough: bool) -> None:
    built = [
        found for found in (verdict(each, thorough=thorough) for each in MODEL_TYPES) if found.status != "not built"
    ]
    right = [found for found in built if found.status == "right"]
    assert len(right) >= 0.95 * len(built)
    # Of what is judged, nearly all is judged by what the forward pass does, not by the classes of modules.
    assert sum(found.unseen for found in built) < 0.1 * sum(found.seen + found.unseen for found in built)


def test_the_page_is_what_the_command_makes(thorough: bool) -> None:
    made, stored = page(thorough=thorough), PAGE.read_text()
    if version_of(stored) == transformers.__version__:
        assert stored == made, "run python -m tests.architectures.table"
    else:
        assert version_of(made) == transformers.__version__
