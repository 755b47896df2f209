"""Intrinsics and the macros of instruction sets have their own headers, which agree on what they define."""

import re
from pathlib import Path

import pytest

import llmc

KERNELS = Path(llmc.__file__).parent / "kernels"
PORTABLE = KERNELS / "simd_portable.h"
SETS = sorted(set(KERNELS.glob("simd_*.h")) - {PORTABLE})

_INTRINSIC = re.compile(r"\b(immintrin|arm_neon|_mm\d*_\w+|__m\d+\w*|v[a-z]+q?_(?:\w+_)?[fsu]\d+)\b")
_MACRO = re.compile(r"__(?:AVX|ARM_FEATURE|F16C|FMA)\w*")
_NAME = re.compile(r"^(?:inline \w+ |constexpr int |using portable::)(\w+)", re.MULTILINE)


def using(pattern: re.Pattern[str]) -> set[Path]:
    return {file for file in KERNELS.iterdir() if pattern.search(file.read_text(encoding="utf-8"))}


def test_intrinsics_stand_in_the_headers_of_instruction_sets_alone() -> None:
    assert using(_INTRINSIC) == set(SETS)


def test_simd_h_alone_asks_for_the_instruction_set() -> None:
    assert using(_MACRO) == {KERNELS / "simd.h"}


@pytest.mark.parametrize("header", SETS, ids=lambda path: path.stem)
def test_a_header_defines_what_the_portable_one_does(header: Path) -> None:
    portable, found = (set(_NAME.findall(file.read_text(encoding="utf-8"))) for file in (PORTABLE, header))
    assert {"dot", "nearest", "kStoredAbove"} < portable
    assert found - {"dot_signed"} == portable
