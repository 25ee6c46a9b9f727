"""Outlines of transformers' models, from names, files and the cache: nothing in a file is fetched or run."""

import copy
import json
import re
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from huggingface_hub import constants
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from symdist.tools.cli import main
from symdist.tools.models.outlines import outline
from symdist.tools.preview import preview
from tests.attacks.hostile import RAW, attack, one_line, outcome, spoilt

SMALL = {
    **{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32, "hidden_size": 16},
    **{"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6, "torch_dtype": "bfloat16"},
    **{"hidden_act": "silu", "tie_word_embeddings": False, "transformers_version": "4.36.0.dev0"},
}
KEYS = ("num_hidden_layers", "head_dim", "layer_types", "text_config", "rope_scaling", "auto_map", "dtype", "id2label")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> NoReturn:
        pytest.fail("something was asked for over the network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(SMALL | changes))
    return path


def shapes(model: Any) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_every_causal_model_type_is_its_default_model_or_refused_in_a_line() -> None:
    built = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with torch.device("meta"):
                expected: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
        except Exception:
            with pytest.raises(ValueError, match=f"^{kind}: transformers cannot build {kind} by default") as caught:
                outline(kind)
            assert "\n" not in str(caught.value)
            continue
        model = outline(kind)
        built += 1
        assert type(model) is type(expected)
        assert shapes(model) == shapes(expected)
        assert {(each.dtype, each.device.type) for each in model.parameters()} == {(torch.float32, "meta")}
    assert built > 150


def test_a_file_a_folder_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    model = outline(path)
    assert shapes(model) == shapes(outline(str(tmp_path)))
    assert model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").shape == (4, 32, 16)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"no model in the local cache .* download its config\.json and give the path"):
        outline("some/mixture")
    repository = tmp_path / "cache" / "models--some--mixture"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    write(repository / "snapshots" / ("0" * 40))
    assert shapes(outline("some/mixture")) == shapes(model)


@pytest.mark.parametrize("kind", ["deepseek_v4", "gemma3n_text", "jamba", "longcat_flash", "mamba2", "rwkv", "xlstm"])
def test_fsdp2_lays_out_any_family(kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model = outline(kind)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    routed = preview(model, "adamw", mesh={"dp_shard": 8})
    assert {parameter.name for parameter in routed.parameters} == trainable == set(routed.evidence)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown type": (
        {"model_type": "nope"},
        "has no model type 'nope', and code that comes with",
    ),
    "no type": ({"model_type": None}, "names no model_type"),
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1,000,000,000 must be at most 2,000"),
    "layers of a part": ({"text_config": {"n_layer": 3000}}, "n_layer=3,000 must be at most 2,000"),
    "a type error": ({"hidden_size": "16"}, "transformers cannot build mixtral from it"),
    "sizes beyond all": ({"hidden_size": 2**62}, "transformers cannot build mixtral from it"),
    "a division": ({"num_attention_heads": 0}, "transformers cannot build mixtral from it"),
    "no language model": ({"model_type": "vit"}, "vit is no causal language model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        outline(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_modules_are_counted_whatever_asks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("symdist.tools.models.outlines._MOST_MODULES", 100)
    assert len(list(outline(write(tmp_path)).modules())) < 100
    with pytest.raises(ValueError, match="it has more than 100 modules"):
        outline(write(tmp_path, num_hidden_layers=20))
    # The count ends with the build.
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(200)))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for module in ("configuration_own", "modeling_own"):
        (tmp_path / f"{module}.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    own = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    elsewhere = {"AutoModelForCausalLM": "nobody/nothing--modeling_own.Own"}
    expected = shapes(outline(write(tmp_path)))
    for auto_map in (own, elsewhere):
        assert shapes(outline(write(tmp_path, auto_map=auto_map))) == expected
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        assert shapes(outline(write(tmp_path, **{key: "nobody/kernel"}))) == expected
    assert shapes(outline(write(tmp_path, quantization_config={"quant_method": "fp8"}, dtype="nope"))) == expected
    with pytest.raises(ValueError, match="code that comes with a model is not run"):
        outline(write(tmp_path, model_type="own", auto_map=own))
    assert not marker.exists()


@pytest.mark.parametrize("content", [*RAW, "folder", "none"])
def test_files_that_are_no_configuration(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    if content == "folder":
        path.mkdir()
    elif content != "none":
        path.write_bytes(RAW[content])
    error = outcome(lambda: main(["route", "--hf", str(path)]), tmp_path)
    one_line(error)
    assert str(path) in error


@pytest.mark.parametrize("batch", range(3))
def test_hostile_configurations(tmp_path: Path, batch: int) -> None:
    path = tmp_path / "config.json"

    def check(content: dict[str, Any]) -> None:
        path.write_text(json.dumps(content, default=str))
        one_line(outcome(lambda: main(["route", "--hf", str(path), "--recipe", "adamw"]), tmp_path))

    attack(spoilt(copy.deepcopy(SMALL), KEYS), check, batch=batch, cases=15)


def test_a_table_of_labels_is_not_made(tmp_path: Path) -> None:
    model = outline(write(tmp_path, num_labels=10**12))
    assert model.config.num_labels < 10
