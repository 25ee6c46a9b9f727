"""A plan says beforehand what a step then does: every collective of every rank, to the byte; and costs, on any mesh."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from symdist.diagnostics.memory import peak_bytes
from symdist.exchange import HARDWARE, CountingTransport, ExchangeOptions, Hardware
from symdist.routing.recipes import RecipeLike
from symdist.tools.cli import main
from symdist.tools.megatron import MegatronMesh
from symdist.tools.models import build
from symdist.tools.plan import StepPlan, parse_mesh, plan_step, smaller_meshes
from symdist.tools.simulate import simulate
from tests import plan_ranks
from tests.ranks import Ranks

MESHES = ("dp=4", "dp=2,tp=2", "dp_replicate=2,dp=2", "dp=2,ep=2")
CASES = [(model, mesh) for model in ("olmoe-tiny", "qwen3-moe-tiny") for mesh in MESHES]
CASES += [("olmoe-tiny", "tp=4"), ("qwen3-moe-tiny", "ep=2,tp=2"), ("olmoe-tiny", "dp=3")]
ALL_WAVES = 1 << 30
EVEN = plan_ranks.EVEN


def expected(
    model: str, recipe: RecipeLike, mesh: str, communication_dtype: torch.dtype | None, bucket_bytes: int
) -> list:
    """Of every rank, every collective."""
    found = []
    with simulate(
        model,
        recipe,
        mesh=parse_mesh(mesh),
        exchange={"communication_dtype": communication_dtype, "bucket_bytes": bucket_bytes, "hardware": EVEN},
    ) as planned:
        for rank in range(planned.ranks):
            counting = CountingTransport()
            planned.step(counting, rank=rank)
            found.append([(moved.kind, moved.size, moved.sent) for moved in counting.log])
    return found


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_the_wire_carries_what_the_plan_says(ranks: Ranks, model: str, mesh: str) -> None:
    sizes = parse_mesh(mesh)
    planned = expected(model, "small-moe", mesh, None, ALL_WAVES)
    world = math.prod(sizes.values())
    assert ranks.run(world, plan_ranks.on_the_wire, model, "small-moe", sizes, None, ALL_WAVES) == planned
    assert sum(sent for of_rank in planned for _, _, sent in of_rank) > 0


@pytest.mark.parametrize(
    ("recipe", "communication_dtype", "bucket_bytes"),
    [
        ("small-moe", torch.bfloat16, ALL_WAVES),
        ("small-moe", None, 1 << 16),
        ("muon", None, ALL_WAVES),
        # What remembers travels as it is.
        ("aro", torch.bfloat16, ALL_WAVES),
        ("normuon", None, 1 << 16),
        ("aurora", None, ALL_WAVES),
        ("scion", None, ALL_WAVES),
        (plan_ranks.SECTIONS, None, ALL_WAVES),
    ],
)
def test_in_bfloat16_in_waves_and_with_another_recipe(
    ranks: Ranks, recipe: RecipeLike, communication_dtype: torch.dtype | None, bucket_bytes: int
) -> None:
    mesh = "dp=2,tp=2"
    given = (communication_dtype, bucket_bytes)
    planned = expected("olmoe-tiny", recipe, mesh, *given)
    assert ranks.run(4, plan_ranks.on_the_wire, "olmoe-tiny", recipe, parse_mesh(mesh), *given) == planned
    if bucket_bytes < ALL_WAVES:
        assert len(planned[0]) > len(expected("olmoe-tiny", recipe, mesh, None, ALL_WAVES)[0])


def test_a_plan_adds_up() -> None:
    found = plan_step("olmoe-tiny", "small-moe", mesh={"dp_shard": 4}, alternatives=True)
    assert found.looked_at == found.ranks == 4
    roles = {role.role: role for role in found.roles}
    assert {"embedding", "head", "router", "attention_q", "expert_gate_up", "norm"} <= set(roles)
    assert roles["embedding"].costs.sent == 0
    assert roles["embedding"].strategies == {"reduce": 1}
    with simulate("olmoe-tiny", "small-moe", mesh={"dp_shard": 4}) as planned:
        sent = []
        for rank in range(4):
            counting = CountingTransport()
            planned.step(counting, rank=rank)
            sent.append(counting.sent)
    assert found.busiest.sent == max(sent)
    assert found.mean_sent == pytest.approx(sum(sent) / 4)
    assert 1 <= found.balance < 1.2
    waiting = found.busiest.collectives * found.hardware.latency
    assert found.communication_seconds == pytest.approx(found.busiest.sent / found.hardware.bandwidth + waiting)
    seconds = found.busiest.flops / found.hardware.flops
    assert found.hardware.flops / found.hardware.half_flops * seconds <= found.compute_seconds < seconds
    assert 0 < found.share < 1
    ours, gathered, exchanged, adamw = found.alternatives
    assert ours.sent < gathered.sent
    assert 0 < exchanged.sent < gathered.sent
    assert adamw.sent == 0


@pytest.mark.parametrize("model", ["qwen3-0.6b", "gemma3-1b", "olmoe-1b-7b", "gpt-oss-small"])
@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_owners_are_balanced_on_the_papers_models(model: str, ranks: int) -> None:
    recipe = {"gemma3-1b": "gemma3", "qwen3-0.6b": "qwen3"}.get(model, "olmoe")
    # Where products are slow; where they are fast, sending a matrix away to even out the work can cost more than it.
    found = plan_step(model, recipe, mesh={"dp_shard": ranks}, exchange={"hardware": EVEN})
    # Where one matrix is more than a rank's share, nothing that keeps it whole is better balanced.
    assert found.balance <= max(1.1, found.indivisible * 1.001)


def test_the_largest_meshes_are_planned() -> None:
    found = plan_step("qwen3-235b-a22b", "olmoe", mesh={"dp_shard": 64, "ep": 8, "tp": 8})
    assert found.ranks == 4096
    assert found.busiest.peak_bytes < 4e9
    gathered = plan_step("qwen3-235b-a22b", "olmoe", mesh={"dp_shard": 8}, alternatives=True).alternatives[1]
    assert found.busiest.sent < gathered.sent / 10


def test_the_documents_figures_are_those_of_their_command() -> None:
    text = " ".join((Path(__file__).resolve().parents[1] / "docs/results.md").read_text().split())
    said = re.search(
        r" a rank sends (\d+) MB \((\d+) MB in bfloat16\) in (\d+) collectives, where gathering every matrix would "
        r"send ([\d.]+) GB in (\d+)\.",
        text,
    )
    assert said is not None
    assert "symdist plan --model olmoe-1b-7b --mesh dp=64,tp=8 --recipe olmoe --compare" in text
    mesh = {"dp_shard": 64, "tp": 8}
    found = plan_step("olmoe-1b-7b", "olmoe", mesh=mesh, alternatives=True)
    halved = plan_step("olmoe-1b-7b", "olmoe", mesh=mesh, exchange={"communication_dtype": "bfloat16"})
    gathered = found.alternatives[1]
    figures = (found.busiest.sent / 1e6, halved.busiest.sent / 1e6, found.busiest.collectives)
    figures += (gathered.sent / 1e9, gathered.collectives)
    assert [float(each) for each in said.groups()] == [
        round(x, 1 if x < 20 and i == 3 else 0) for i, x in enumerate(figures)
    ]


@pytest.mark.parametrize(
    ("model", "recipe", "mesh", "zero"),
    [
        ("olmoe-1b-7b", "small-moe", {"dp_shard": 64}, None),
        ("olmoe-tiny", "muon", {"dp_replicate": 2, "dp_shard": 2}, None),
        ("olmoe-tiny", "olmoe", {"dp_shard": 2, "tp": 2}, None),
        ("qwen3-moe-tiny", "aro", {"dp_shard": 2, "ep": 2}, None),
        ("qwen3-0.6b", "normuon", {"dp_shard": 4}, 1),
        ("gemma3-1b", "gemma3", {"dp_shard": 16}, 3),
    ],
)
def test_the_estimate_of_memory_is_what_a_step_holds(
    model: str, recipe: str, mesh: dict[str, int], zero: int | None
) -> None:
    with simulate(model, recipe, mesh=mesh, zero=zero) as planned:
        held, estimated = [], []
        for rank in sorted({0, 1, planned.ranks - 1}):
            estimated.append(planned.on_rank(rank).peak_bytes)
            step = partial(planned.step, CountingTransport(), rank=rank)
            held.append(peak_bytes(step, device="meta"))
    assert max(estimated) == pytest.approx(max(held), rel=0.2)


@pytest.mark.parametrize(("model", "ranks"), [("olmoe-1b-7b", 64), ("qwen3-0.6b", 8)])
def test_buffers_stay_within_the_budget(model: str, ranks: int) -> None:
    waves = []
    for budget in (2e9, 1e9, 5e8):
        found = plan_step(model, "muon", mesh={"dp_shard": ranks}, exchange={"bucket_bytes": int(budget)})
        assert found.busiest.peak_bytes <= budget
        waves.append(found.waves)
    assert waves == sorted(waves)
    assert waves[0] < waves[-1]


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    main(
        "plan --model olmoe-tiny --mesh dp=8,tp=2 --override router.rule=row_norm --communication-dtype "
        "bfloat16 --compare "
        f"--json {file} --picture {picture}".split()
    )
    shown = capsys.readouterr().out
    assert "olmoe-tiny, recipe small-moe, dp_shard 8 × tp 2" in shown
    assert "all-gather of every matrix" in shown
    written = json.loads(file.read_text())
    assert written["ranks"] == 16
    assert {role["role"]: role["rules"] for role in written["roles"]}["router"] == ["row_norm"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_products_in_bfloat16_are_timed_at_their_own_speed() -> None:
    hardware = Hardware(bandwidth=1e9, flops=1e9, model_flops=1e9, half_flops=4e9)
    found = [
        plan_step(
            "olmoe-tiny",
            {"matrix": {"rule": "muon", "lr": 0.1, "precision": precision}, "default": {"rule": "adamw", "lr": 0.1}},
            mesh={"dp_shard": 4},
            exchange={"hardware": hardware},
        ).busiest
        for precision in ("float32", "bfloat16")
    ]
    assert found[0].compute_seconds == pytest.approx(found[0].flops / 1e9)
    assert found[1].compute_seconds == pytest.approx(found[1].flops / 4e9)


ONE = MegatronMesh(vocabulary_multiple=1)


@pytest.mark.parametrize(
    "model", ["gpt-oss-tiny", "gemma3-tiny", "deepseek-v3-tiny", "olmoe-tiny", "qwen3-tiny", "qwen3-moe-tiny"]
)
def test_a_megatron_job_passes_no_weight_over(model: str) -> None:
    whole = build(model, device="meta")
    with simulate(whole, "small-moe", mesh=ONE) as simulated:
        found = sum(math.prod(spec.layout.shape) for spec in simulated.specs(0))
        biases = [group for group in simulated.groups if group["role"] == "router_bias"]
    assert found == sum(parameter.numel() for parameter in whole.parameters())
    assert len(biases) == (model == "gpt-oss-tiny")


def test_a_megatron_job_with_an_unknown_weight_is_refused() -> None:
    whole = build("qwen3-tiny", device="meta")
    with torch.device("meta"):
        whole.model.layers[1].self_attn.indexer = torch.nn.Linear(4, 4)
    words = r"not known how a Megatron job holds self_attn\.indexer\.weight"
    recipe = {"default": {"rule": "adamw", "lr": 0.1}}
    with pytest.raises(ValueError, match=words), simulate(whole, recipe, mesh=ONE):
        pass


@pytest.mark.parametrize("extra", ["", " --no-distributed-optimizer"])
def test_a_megatron_job_is_planned_by_its_sizes(extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(f"plan --model qwen3-moe-tiny --megatron tp=2,pp=2,ep=2,etp=1,dp=4{extra}".split())
    shown = capsys.readouterr().out
    assert "qwen3-moe-tiny, recipe small-moe, tp 2 × pp 2 × ep 2 × etp 1 × dp 4" in shown
    assert "the most of all ranks" in shown
    assert "for what its pipeline stage has" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--megatron tp=8,dp=1", "8 tensor-parallel ranks do not divide the 4 key and value heads"),
        ("--megatron tp=2,pp=9", "pp=9 stages are more than the 4 layers"),
        ("--megatron tp=1,ep=16,dp=16", "ep=16 does not divide the 8 experts"),
        ("--megatron tp=1,ep=4,dp=2", "etp × ep = 1 × 4 does not divide"),
        ("--megatron tp=2,etp=1,dp=2", "etp=1 without ep must be tp=2"),
        ("--megatron tp=6,ep=2,etp=4,dp=4", "overlap unevenly"),
        ("--megatron tp=2,dp=0", "dp=0 must be positive"),
        ("--megatron fsdp=2", "'fsdp=2' should be NAME=SIZE"),
        ("--megatron dp=2 --mesh dp=2", "either --mesh"),
        ("--mesh dp=2 --no-distributed-optimizer", "is for --megatron"),
        ("--megatron dp=2 --zero 1", "leave these out"),
        ("", "either --mesh"),
        ("--mesh dp=4,pp=2", "'pp=2' should be NAME=SIZE"),
        ("--mesh dp=0", "'dp=0' should be NAME=SIZE"),
        ("--mesh dp=4,dp_shard=2", "'dp_shard=2' should be NAME=SIZE, with each name once"),
        ("--mesh dp=4 --bucket-mb 0", "bucket_mb"),
        ("--mesh dp=4 --recipe nothing", "nothing"),
        ("--mesh dp=4 --model nothing", "nothing"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(
    options: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in options else ["--model", "olmoe-tiny"]
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *model, *options.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_meshes_are_halved_along_data_parallelism() -> None:
    assert smaller_meshes({"dp_shard": 8, "tp": 2}) == [{"dp_shard": 2, "tp": 2}, {"dp_shard": 4, "tp": 2}]
    assert smaller_meshes({"tp": 3}) == []


def test_the_hardware_decides_strategies_and_gives_times() -> None:
    def planned(hardware: object) -> StepPlan:
        mesh = {"dp_replicate": 2, "dp_shard": 2}
        return plan_step("olmoe-tiny", "olmoe", mesh=mesh, exchange={"hardware": hardware})

    slow, fast = (Hardware(bandwidth=b, flops=60e12, model_flops=400e12) for b in (1e6, 1e15))
    moved = [sum(role.strategies.get("owner", 0) for role in planned(speed).roles) for speed in (slow, fast)]
    assert moved[0] == 0 < moved[1]
    h100, b200 = planned("h100"), planned("b200")
    assert h100.hardware == HARDWARE["h100"]
    assert b200.model_seconds == pytest.approx(h100.model_seconds * 400 / 900)


@pytest.mark.parametrize(
    ("hardware", "words"),
    [("h1000", "'h1000' must be one of 'h100'"), ({"bandwidth": 1}, "must be one of")],
)
def test_unknown_hardware_is_refused(hardware: object, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ExchangeOptions.of({"hardware": hardware})


def test_speeds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="bandwidth=0 must be positive"):
        Hardware(bandwidth=0, flops=1, model_flops=1)
