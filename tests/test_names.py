"""The vocabulary: of words that were given up, none is left in code, recipes, configurations or documents."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("symdist", "integrations", "launch", "tests", "docs")
KINDS = (".py", ".md", ".toml", ".json", ".sh", ".sbatch", ".cfg")
# The golden data speak the published code's language.
EXEMPT = {Path(__file__).resolve(), ROOT / "tests" / "golden" / "reference.json"}
# By what stands in their place now. A name that PyTorch has too is looked for in the form that was ours alone.
GONE = {
    "strategy": r"placement=|[\"']placement[\"']|PLACEMENTS|\bSymDist\.placements|optimizer\.placements\(",
    "as_stored, transposed": r"view[\"']?\s*[:=]\s*[\"'](rows|columns)[\"']",
    "skip_zero_grad_rows": r"stale_rows",
    "cautious_weight_decay": r"cautious_decay",
    "adjust_lr, match_rms_adamw, ns_steps": r"match_rms\b(?!_)|muon_scale|MuonScale",
    "sinkhorn_steps": r"[\"']rounds[\"']|\brounds:",
    "process_group, replicate_group, pipeline_group": (
        r"SymDist\([^)]*\b(world|replicas)=|clip_grad_norm_\([^)]*stages=|options\[\"(world|replicas)\"\]"
    ),
    "communication_dtype, bucket_bytes": r"exchange_dtype|exchange-dtype|wave_bytes|WAVE_BYTES|wave_mb",
    "param_names": r"group\[[\"']names[\"']\]",
    "residual_stage": r"share[\"']?\s*[:=]\s*[\"']stage[\"']|matrix\.share=stage",
    "skip_next_step, progress, trace_collectives, assignments": r"\.skip_next\(|\brehears|optimizer\.(where|routing)\(",
    "override, overrides": r"(?<!git )--set [a-z]+\.|\"--set\"|\*\*overrides",
    "Assignment, EngineAssignment, UnitAssignment": r"\bRouted\b",
    "ExternalStateSymDist, state_tensors, ENGINE_STATE_NAMES": r"BorrowedState|homes=|\bSLOTS\b",
    "ParamSpec, with_defaults": r"\bMember\b|complete_group",
    "ParamSite, ResidualStage, StageSlot, StageContribution, StagePlan": r"\bSite\b|\bInStage\b|\bShare\(|\bStages\(",
    "split_kind, SplitKind, unaligned, to_stored": r"\bSeen\b|[\"']torn[\"']|stored_form|\.seen\(",
    "DimSplit, MatrixAxis, shard_group, num_replicas": r"import .*\bSplit\b|layout\.(cells|replicas?)\b",
    "Range, sole_owner, column_blocks, rank_order": r"layout\.(sole|across|order)\b",
    "StepInputs, StepOutputs, RootObserver": r"\b(Made|Begin|Done|Note)\(|import .*\bGiven\b",
    "Gather, Scatter, Redistribution": r"\bShip\b|\bReturn\(|RunRoute|\bRoute\(layout",
    "RuleCost, shard_cost, unit_cost, unit_flops": r"\bAsked\b|ask_piece|ask_unit|unit_work",
    "answer_locally, run_rule": r"\.alone\(\)|alone_but_for_stages|answer_alone",
    "_WaveRun, _WaveContext": r"_Flight|take_off|\.cruise\(",
    "StepProgress, PendingCollective": r"\bTrail\b|\bMark\b",
    "TorchTransport, CountingTransport, CollectiveRecord, CollectiveCounter": (
        r"Collectives\(\)|\bCounting\(|\bMoved\b|\bWire\("
    ),
    "Megatron's": r"WholeStep|\b_Twins\b|\bHeld\(|\bStepped\b|\b_Bound\b|\bDescribed\b|\bHomes\b|find_home",
    "simulate, baselines": r"\bpretend|yardstick",
    "on_all_ranks, AllRanksError, DivergedError, quarantine": r"import .*\btogether\b|\bDiverged\b|set_aside",
}


def texts() -> dict[Path, str]:
    found = {
        path: path.read_text()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in KINDS and "__pycache__" not in path.parts
    }
    found |= {path: path.read_text() for path in ROOT.iterdir() if path.suffix in (*KINDS, ".toml", ".cfg")}
    return {path: text for path, text in found.items() if path not in EXEMPT}


@pytest.mark.parametrize("now", GONE)
def test_what_was_renamed_is_renamed_everywhere(now: str) -> None:
    pattern = re.compile(GONE[now])
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_are_for() -> None:
    for line, now in (
        ('{"rule": "muon", "placement": "owner"}', "strategy"),
        ('view="rows"', "as_stored, transposed"),
        ("symdist plan --set router.lr=1", "override, overrides"),
        ("SymDist(groups, world=mesh)", "process_group, replicate_group, pipeline_group"),
    ):
        assert re.search(GONE[now], line)
