"""Cut-down texts of compiled modules for TPU and CUDA, whose compilers the tests do not need."""

from pathlib import Path

from moe.dryrun.hlo import Module, parse


def read(name: str) -> Module:
    return parse((Path(__file__).parent / f"{name}.txt").read_text())
