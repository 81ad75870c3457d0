"""The compiled-kernels table: says in a line what it needs, and reads what ptxas and Inductor say."""

import sys

import pytest

from benchmarks import flex_kernels

NAMED = [("triton_poi_fused_0", "x"), ("triton_tem_fused_1", "y")]


def test_without_triton_it_says_what_is_missing_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(flex_kernels, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["flex_kernels"])
    assert flex_kernels.main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "flex_kernels: needs triton: pip install --no-deps triton==3.6.0\n"


def test_only_kernels_made_from_templates_are_compiled():
    code = "\n".join(f"a = async_compile.triton('{name}', '''{text}''')" for name, text in NAMED)
    assert list(flex_kernels.sources(code)) == [("triton_tem_fused_1", "y")]


def test_what_ptxas_says_of_registers_and_spills_is_read():
    said = (
        "ptxas info    : Function properties for triton_tem\n"
        "    1504 bytes stack frame, 1200 bytes spill stores, 952 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 1504 bytes cumulative stack size\n"
    )
    assert flex_kernels.registers_and_spills(said) == (255, 2152)
    assert flex_kernels.registers_and_spills("ptxas info    : Used 96 registers\n") == (96, 0)
    with pytest.raises(ValueError, match="ptxas tells no registers"):
        flex_kernels.registers_and_spills("")
