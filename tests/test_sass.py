"""How many instructions a thread goes through, found in a listing as cuobjdump prints it."""

import pytest

pytest.importorskip("triton", reason="its cuobjdump")

from bench.sass import Code

# A load, a loop of which one way stores what was loaded, a way out before it, and one after it.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @P1  EXIT ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/              @P0  BRA 0x80 ;
        /*0050*/                   FFMA R4, R4, R4, R8 ;
        /*0060*/                   FFMA R4, R4, R4, R8 ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0090*/              @!P2 BRA 0x30 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
"""


def test_ways_go_through_what_they_must_and_no_further():
    code = Code(LISTING)
    assert code.count("LDG") == 2
    assert code.through({"LDG.E.128": 1}).total() == 3
    assert code.through({"LDG.E.128": 2}).total() == 8  # around the store
    whole = code.through({"LDG.E.128": 2, "STG.E.128": 1})
    assert (whole.total(), whole["FFMA"]) == (11, 2)
    assert code.through({"STG.E.128": 2}).total() == 18  # twice around
    assert code.around({"LDG.E.128": 1}).total() == 4
    assert code.around({"LDG.E.128": 1, "STG.E.128": 1}).total() == 7


def test_there_may_be_no_such_way():
    code = Code(LISTING)
    assert code.through({"STS.128": 1}) is None
    assert code.around({"LDG.E.128": 2}) is None
    assert code.around({"LDG.E.128": 1, "STG.E.128": 1}, without=("FFMA",)) is None
