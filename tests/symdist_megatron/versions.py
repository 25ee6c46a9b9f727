"""What the installed megatron-core has, found without importing it."""

from importlib.metadata import version

from packaging.version import Version

VERSION = Version(version("megatron-core"))
GROUPED = Version("0.17") > VERSION
"""Experts in two weights, by the grouped_gemm package."""
IDENTIFIED = Version("0.19") <= VERSION
"""Whether Megatron tells saved groups apart by their peaks, too."""
JOINT = Version("0.17") <= VERSION
"""The projections down of multi-head latent attention in one weight."""
