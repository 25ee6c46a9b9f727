"""The job under Megatron: the losses of the FSDP2 job at any layout, resumption at another one, and refusals."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.engines.megatron import entry
from launch.engines.megatron.config import MegatronRun
from launch.loop.config import parse_as
from launch.loop.dry_run import dry_run
from symdist.tools.report import report
from symdist.tools.run_log import read_run
from tests.launch.runs import ROOT, finished, lines, options, stop, trained, validated, warm, write_corpus

# Not by importing it: the stand-ins for CUDA would have to come before.
if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

STEPS = 16
CONFIGS = ROOT / "launch" / "configs" / "megatron"
RANKS = 16
"""What the configs in CONFIGS are for."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
MICRO_BATCHES = {1: "4", 2: "2"}
"""Micro-batches a step at so many data-parallel ranks: each of one sequence, over which auxiliary losses are taken."""
LAYOUTS = {
    "data": (2,),
    "experts": (2, "--expert-parallel", "2", "--overlap"),
    "tensor": (1, "--tensor-parallel", "2"),
    "pipeline": (1, "--pipeline-parallel", "2", "--no-distributed-optimizer"),
}


def arguments(corpus: Path, output: Path, layout: str, *more: str) -> list[str]:
    """Of a run whose model has the same weights as that of the FSDP2 job: its norms, too, are by head."""
    data, *own = LAYOUTS[layout]
    losses = ("--model", "qwen3-moe-tiny", "--aux-loss", "0.01", "--z-loss", "0.001")
    micro = ("--accumulation", MICRO_BATCHES[int(data)])
    return [
        "-m",
        "launch.pretrain_megatron",
        *options(corpus, output, steps=STEPS),
        *losses,
        *micro,
        *map(str, own),
        *more,
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FSDP2 job, from start to end."""
    output = tmp_path_factory.mktemp("runs") / "fsdp"
    _, _, *words = arguments(corpus, output, "data")
    done = warm("launch.pretrain", *words)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The job at a layout, from start to end, run once."""
    folder = tmp_path_factory.mktemp("whole")

    def run(layout: str) -> Path:
        output = folder / layout
        if not output.exists():
            more = ("--checkpoint-every", "6", "--keep", "2")
            words = arguments(corpus, output, layout, *more)
            # One of them by torchrun.
            done = finished([*TORCHRUN, *words]) if layout == "data" else warm(*words[1:])
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("this machine has no CUDA") == 1
        return output

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_router_measures_are_those_of_fsdp2(
    reference: Path, whole: Callable[[str], Path], layout: str
) -> None:
    ours, theirs = lines(whole(layout)), lines(reference)
    assert len(ours) == len(theirs) == STEPS + 2
    for mine, its in zip(ours, theirs, strict=True):
        # Roles and strategies differ with the layout.
        assert [name for name in mine if "/" not in name] == [name for name in its if "/" not in name]
        assert (mine["step"], mine["kind"]) == (its["step"], its["kind"])
        assert mine["loss"] == pytest.approx(its["loss"], abs=1e-3)
        assert mine["router_z"] == pytest.approx(its["router_z"], rel=1e-2)
    first = theirs[0]
    # Later on, rounding may send a token to another expert.
    assert {name: ours[0][name] for name in first if name.startswith("router_")} == pytest.approx(
        {name: first[name] for name in first if name.startswith("router_")}, abs=1e-4
    )
    assert ours[0]["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-4)
    assert theirs[-2]["loss"] < first["loss"] - 0.5


def test_report_and_checkpoints(reference: Path, whole: Callable[[str], Path]) -> None:
    output = whole("tensor")
    mine, theirs = read_run(output).summary, read_run(reference).summary
    assert set(theirs) < set(mine)
    for name in ("model", "recipe", "tokens", "parameters", "active_parameters", "ranks"):
        assert mine[name] == theirs[name]
    assert (mine["tensor_parallel"], mine["data_parallel"], mine["precision"]) == (2, 1, "float32")
    report([output, reference], output=output / "report.html", picture=output / "curves.png")
    folder = output / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000012", "step-00000016"]


def test_a_checkpoint_is_gone_on_from_at_another_layout(
    corpus: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    path = whole("experts") / "checkpoints" / "step-00000012"
    done = warm(*arguments(corpus, tmp_path / "other", "tensor", "--resume", str(path))[1:])
    assert done.returncode == 0, done.stderr
    there, here = trained(whole("experts")), trained(tmp_path / "other")
    assert sorted(here) == list(range(13, STEPS + 1))
    for step, (loss, norm) in here.items():
        assert (loss, norm) == (pytest.approx(there[step][0], abs=1e-3), pytest.approx(there[step][1], rel=2e-2))
    assert validated(tmp_path / "other")[STEPS] == pytest.approx(validated(whole("experts"))[STEPS], abs=1e-3)
    more = ("--resume", str(path), "--seed", "1")
    done = warm(*arguments(corpus, tmp_path / "seed", "tensor", *more)[1:])
    assert "seed is 42 in the checkpoint but 1 in this run" in done.stderr


def test_sigterm_saves_and_auto_resume_repeats_every_step_exactly(
    corpus: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    more = ("--resume", "auto", "--checkpoint-every", "2")
    command = [*TORCHRUN, *arguments(corpus, tmp_path / "stopped", "pipeline", *more)]
    stop(command, tmp_path / "stopped", nice=5)
    assert 3 <= max(trained(tmp_path / "stopped")) < STEPS
    newest = max((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    next(newest.glob("__1_*")).unlink()
    done = finished(command)
    assert done.returncode == 0, done.stderr
    assert f"{newest} is damaged" in done.stderr
    assert trained(tmp_path / "stopped") == trained(whole("pipeline"))
    assert validated(tmp_path / "stopped") == validated(whole("pipeline"))


@pytest.mark.parametrize(
    ("told", "ranks", "message"),
    [
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, 6, "needs a multiple of 4 ranks, there are 6"),
        ({"expert_parallel": 4}, 2, "--expert-tensor-parallel 1 × --expert-parallel 4 .* multiple of 4 ranks"),
        ({"tensor_parallel": 8}, 8, "--tensor-parallel 8 does not divide the 4 attention heads"),
        ({"tensor_parallel": 4, "model": "qwen3-tiny"}, 4, "does not divide the 2 key/value heads"),
        ({"pipeline_parallel": 3, "batch": 12}, 3, "--pipeline-parallel 3 does not divide the 4 layers"),
        ({"expert_parallel": 16}, 16, "--expert-parallel 16 does not divide the 8 experts"),
        ({"tensor_parallel": 2, "sequence": 31}, 2, "does not divide the 31 tokens of a sequence"),
        ({"tensor_parallel": 2, "make_vocab_size_divisible_by": 1}, 2, "the 1 rows that --make-vocab-size"),
        ({"model": "qwen3-tiny", "expert_parallel": 2}, 2, "qwen3-tiny has no experts to divide"),
        ({"batch": 6}, 4, "--batch 6 does not split over 4 ranks × 1 .* take a multiple of 4"),
        ({"overlap": True, "distributed_optimizer": False}, 2, "--overlap needs the distributed optimizer"),
        ({"pipeline_parallel": 0}, 2, "--pipeline-parallel is 0: input should be greater than or equal to 1"),
        ({"lr": 0.0}, 2, r"--lr is 0\.0: input should be greater than 0"),
        ({"model": "gemma3-tiny"}, 2, "family 'gemma3_text', only olmoe, qwen3, qwen3-moe, gpt-oss"),
        ({"model_overrides": {"clip_qkv": "8.0"}}, 2, "clip_qkv is 8.0, which olmoe under Megatron does not support"),
    ],
)
def test_what_cannot_run_is_refused(told: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MegatronRun(**told).check(ranks=ranks)


def test_the_batch_splits_over_data_parallel_ranks_alone() -> None:
    run = MegatronRun(tensor_parallel=4, batch=4)
    run.check(ranks=8)
    assert run.data_ranks(8) == 2
    assert run.padded(300) == run.padded(384) == 384


@pytest.mark.parametrize("missing", ["megatron", "GPUs"])
def test_it_says_what_is_missing(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: missing == "GPUs")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    if missing == "megatron":
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["pretrain_megatron"])
    assert entry.main() == 2
    expected = "pip install 'symdist[megatron]'" if missing == "megatron" else "Megatron needs CUDA"
    assert expected in capsys.readouterr().err


def test_configs_are_for_two_nodes_of_eight() -> None:
    told = {path.stem: parse_as(MegatronRun, ["--config", str(path)]) for path in CONFIGS.glob("*.toml")}
    assert sorted(told) == ["gpt-oss", "olmoe"]
    for run in told.values():
        run.check(ranks=RANKS)
        # No rows are added to what the papers' models have.
        assert run.padded(run.data.vocabulary) == run.data.vocabulary
    assert told["olmoe"].batch * told["olmoe"].sequence == 163_840
    assert told["gpt-oss"].batch * told["gpt-oss"].sequence == 65_536
    assert (told["olmoe"].steps, told["gpt-oss"].steps) == (30_000, 60_000)


def test_a_dry_run_shows_the_plan_of_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NNODES", "1")
    monkeypatch.setenv("NPROC", "8")
    options = "--model qwen3-moe-tiny --recipe olmoe --tensor-parallel 2 --pipeline-parallel 2 --expert-parallel 2"
    dry_run(parse_as(MegatronRun, [*options.split(), "--expert-tensor-parallel", "1", "--output", str(tmp_path / "r")]))
    shown = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.weight" in shown
    assert "tp 2 × pp 2 × ep 2 × etp 1 × dp 2" in shown
    assert "nothing was started" in shown


def test_configs_become_megatrons() -> None:
    """In a process of its own, since it imports Megatron."""
    done = finished([sys.executable, "-c", SAY_SIZES, *map(str, sorted(CONFIGS.glob("*.toml")))])
    assert done.returncode == 0, done.stderr
    sizes = [json.loads(line) for line in done.stdout.splitlines()]
    assert sizes == [
        [12, 2048, 64, 8, 64, 16, 4, 2048, False, False, 2, 8, 1, True],
        [12, 2048, 16, 16, 128, 32, 8, 1024, True, True, 1, 8, 1, False],
    ]


SAY_SIZES = """
import json, sys
from launch.engines.megatron import on_cpu
on_cpu.install()
import torch
from launch.loop.config import parse_as
from launch.engines.megatron.config import MegatronRun
from launch.engines.megatron.model import transformer_config
for path in sys.argv[1:]:
    run = parse_as(MegatronRun, ["--config", path])
    made = transformer_config(run.shape(), run, torch.bfloat16)
    print(json.dumps([
        made.num_layers, made.hidden_size, made.num_attention_heads, made.num_query_groups, made.kv_channels,
        made.num_moe_experts, made.moe_router_topk, made.moe_ffn_hidden_size, made.qk_layernorm,
        made.moe_router_pre_softmax, made.tensor_model_parallel_size, made.expert_model_parallel_size,
        made.expert_tensor_parallel_size, made.sequence_parallel,
    ]))
"""
