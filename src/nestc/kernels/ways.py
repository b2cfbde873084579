"""Families with other parameters than the usual ones: by the name that holds the parameters, and around a family."""

from __future__ import annotations

from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine, Family
from nestc.kernels.choices import conv_choice, gemm_choice
from nestc.kernels.conv import ConvFamily, conv_ways
from nestc.kernels.gemm import GemmFamily, gemm_ways


def named(name: str, region: Region) -> Family | None:
    """The parametrised family of this name; None if there is none, or if it does not lower `region`."""
    conv, gemm = conv_choice(name), gemm_choice(name)
    family = ConvFamily(conv) if conv is not None else GemmFamily(gemm) if gemm is not None else None
    return family if family is not None and family.refusal(region) is None else None


def parametrised(family: Family) -> bool:
    """Whether some parameter of a family is not what the rule says."""
    return isinstance(family, ConvFamily | GemmFamily) and bool(family.choice.text)


def around(family: Family, region: Region, machine: CpuMachine) -> tuple[Family, ...]:
    """Families that differ from `family` in one parameter; none where it has no parameters."""
    if isinstance(family, ConvFamily):
        return conv_ways(region, machine, family)[1:]
    if isinstance(family, GemmFamily):
        return gemm_ways(region, machine, family)[1:]
    return ()
