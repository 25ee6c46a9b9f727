"""Configuration of a run under DeepSpeed, which also completes the user's DeepSpeed JSON; imports no DeepSpeed."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.loop.config import Config
from symdist.routing.recipes import Recipe, load_recipe
from symdist.toml_file import read_toml

TYPE = "SymDist"
"""The optimizer type that `symdist_deepspeed` registers with DeepSpeed."""

_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class DeepSpeedRun(Config):
    """A pretraining run under DeepSpeed; the JSON file must agree with these values, or omit them or say "auto"."""

    deepspeed: Path = Path(__file__).resolve().parents[2] / "configs" / "deepspeed" / "stage1.json"
    """Path of the DeepSpeed config, a JSON file."""
    trust_checkpoints: bool = False
    """Resume also from checkpoints that refer to other classes than DeepSpeed's own; loading one may run its code."""

    def check(self, *, ranks: int) -> None:
        """Check as `Config.check` does, and check the DeepSpeed JSON."""
        super().check(ranks=ranks)
        self.settings(ranks=ranks)

    def simulated(self, ranks: int) -> dict[str, Any] | None:
        """See `Config`; None at ZeRO stage 0, or for an optimizer that is not symdist's."""
        settings = self.settings(ranks=ranks)
        stage = zero_stage(settings)
        if settings["optimizer"]["type"] != TYPE or not stage:
            return None
        return {"mesh": {"dp_shard": ranks}, "zero": stage}

    def adjusted_recipe(self) -> Recipe:
        """See `Config`; the JSON file's own "lr" and "overrides" count as well."""
        recipe = super().adjusted_recipe()
        settings = self._read()
        self._fill_optimizer(settings)
        if settings["optimizer"]["type"] != TYPE:
            return recipe
        params = settings["optimizer"]["params"]
        return load_recipe(params["recipe"]).adjusted(lr=params.get("lr"), overrides=params["overrides"])

    def settings(self, *, ranks: int) -> dict[str, Any]:
        """Return the DeepSpeed config: the JSON file, with missing and "auto" values filled in from this configuration.

        Args:
            ranks: Number of ranks of the run.

        Raises:
            ValueError: If the file cannot be read, contradicts this configuration, or asks for sequence or tensor
                parallelism, which this job does not support.

        Example:
            >>> DeepSpeedRun(lr=0.01).settings(ranks=2)["optimizer"]["params"]["lr"]
            0.01
        """
        settings = self._read()
        split = f"--batch {self.batch} over {ranks} ranks × {self.accumulation} micro-batches"
        micro = self.batch // (ranks * self.accumulation)
        self._fill(settings, "train_batch_size", self.batch, f"--batch {self.batch}")
        self._fill(settings, "train_micro_batch_size_per_gpu", micro, split)
        self._fill(settings, "gradient_accumulation_steps", self.accumulation, f"--accumulation {self.accumulation}")
        # Without a value, newer releases of DeepSpeed clip at 1 and older ones not at all.
        self._fill(settings, "gradient_clipping", self.clip, f"--clip {self.clip}")
        self._fill_precision(settings)
        self._fill_optimizer(settings)
        # Never print: the job has its own log.
        settings.setdefault("steps_per_print", self.steps + 1)
        for name, size in (
            ("sequence_parallel_size", settings.get("sequence_parallel_size", 1)),
            ("tensor_parallel.autotp_size", _section(settings, "tensor_parallel").get("autotp_size", 0)),
        ):
            if size > 1:
                raise ValueError(
                    f"{self.deepspeed}: {name} is {size}, but this job splits data over all ranks and nothing else; "
                    "leave it out of the file"
                )
        return settings

    def _read(self) -> dict[str, Any]:
        if self.deepspeed.suffix != ".json":
            raise ValueError(f"DeepSpeed config {self.deepspeed} should be a JSON file whose name ends in .json")
        return read_toml(self.deepspeed, what="DeepSpeed config")

    def _fill(self, section: dict[str, Any], key: str, value: Any, option: str) -> None:
        """Fill in `value` if the file has none or "auto"; if it has another, refuse it and name the run's `option`."""
        if section.get(key, _AUTO) == _AUTO:
            section[key] = value
        elif section[key] != value:
            raise self._contradiction(key, section[key], option)

    def _contradiction(self, key: str, theirs: Any, option: str) -> ValueError:
        return ValueError(
            f"{self.deepspeed}: {key} is {theirs!r}, but the run has {option}; "
            f"make them agree, or leave {key} out of the file"
        )

    def _fill_precision(self, settings: dict[str, Any]) -> None:
        for key, on in (("bf16", self.precision == "bfloat16"), ("fp16", False)):
            if _section(settings, key).get("enabled") == _AUTO:
                settings[key]["enabled"] = on
        theirs = precision(settings)
        if self.precision not in (_AUTO, theirs):
            raise self._contradiction(
                "the precision (bf16, fp16, torch_autocast)", theirs, f"--precision {self.precision}"
            )

    def _fill_optimizer(self, settings: dict[str, Any]) -> None:
        optimizer = settings.setdefault("optimizer", {})
        if optimizer.setdefault("type", TYPE) != TYPE:
            if self.override or self.lr is not None:
                option = f"--override {self.override[0]}" if self.override else f"--lr {self.lr}"
                raise ValueError(
                    f"{self.deepspeed}: the optimizer is {optimizer['type']}, which has no recipe that "
                    f"{option} could change; give its options in the file"
                )
            if self.spike_sigma:
                raise ValueError(
                    f"{self.deepspeed}: the optimizer is {optimizer['type']}, which cannot skip a step for its loss; "
                    f"leave --spike-sigma {self.spike_sigma} out, or choose the type {TYPE}"
                )
            return
        params = optimizer.setdefault("params", {})
        self._fill(params, "nonfinite", self.nonfinite, f"--nonfinite {self.nonfinite}")
        if self.lr is not None:
            self._fill(params, "lr", self.lr, f"--lr {self.lr}")
        elif params.get("lr") == _AUTO:
            del params["lr"]
        lr = params.get("lr")
        if lr is not None and (isinstance(lr, bool | str) or not 0 < lr < math.inf):
            raise ValueError(f"{self.deepspeed}: lr is {lr!r}; it must be a positive number")
        if params.get("recipe", _AUTO) == _AUTO:
            params["recipe"] = self.recipe
        named, chosen = load_recipe(params["recipe"]), load_recipe(self.recipe)
        if _as_json(named.sections, named.patterns, named.schedules) != _as_json(
            chosen.sections, chosen.patterns, chosen.schedules
        ):
            raise self._contradiction("the recipe", named.name, f"--recipe {self.recipe}")
        overrides = params.get("overrides", _AUTO)
        params["overrides"] = overrides = {} if overrides == _AUTO else overrides
        for role, options in self.overrides().items():
            for name, value in options.items():
                theirs = overrides.setdefault(role, {}).setdefault(name, value)
                if _as_json(theirs) != _as_json(value):
                    raise self._contradiction(
                        f"the override of {role}.{name}", theirs, f"--override {role}.{name}={value}"
                    )


def precision(settings: Mapping[str, Any]) -> str:
    """Return the dtype of forward and backward in a DeepSpeed config: "float16", "bfloat16" or "float32"."""
    autocast = _section(settings, "torch_autocast")
    if _section(settings, "fp16").get("enabled"):
        return "float16"
    if _section(settings, "bf16").get("enabled") or _section(settings, "bfloat16").get("enabled"):
        return "bfloat16"
    return str(autocast.get("dtype", "bfloat16")).removeprefix("torch.") if autocast.get("enabled") else "float32"


def zero_stage(settings: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed config; 0 if it names none."""
    return int(_section(settings, "zero_optimization").get("stage", 0))


def loads_universal(settings: Mapping[str, Any]) -> bool:
    """Return whether a DeepSpeed config says to load universal checkpoints."""
    return bool(_section(settings, "checkpoint").get("load_universal", False))


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return settings.get(name) or {}


def _as_json(*values: Any) -> Any:
    """Return the values as JSON would store them, with lists in place of tuples."""
    return json.loads(json.dumps(values))
