"""bench/kernels/static.py: the instructions it counts are those that a program executes, and a worse estimate fails."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def static(bench):
    return bench("static")


def run(bench, lines, constants=None, repeats=1, outer_repeats=1):
    text = "".join(f"        /*{16 * i:04x}*/   {line} ;  /* 0x0 */\n" for i, line in enumerate(lines))
    code = bench("sass").parse(text)
    return bench("sass_executed").executed(code, constants or {}, {"SR_CTAID.X": 7}, repeats, outer_repeats)


def test_loop_runs_as_often_as_its_argument_says(bench):
    lines = ["LDC R2, c[0x0][0x210]", "MOV R3, RZ", "IADD3 R3, R3, 0x4, RZ", "ISETP.GE.AND P0, PT, R3, R2, PT",
             "@!P0 BRA 0x20", "EXIT"]  # fmt: skip
    for limit, trips in ((0, 1), (4, 1), (5, 2), (400, 100)):
        counts, unknown = run(bench, lines, {0x210: limit})
        assert counts["IADD3"] == trips and counts.total() == 3 + 3 * trips and not unknown


# what nvcc makes of an unsigned division: the float unit's reciprocal, and two corrections
DIVISION = [
    "LDC R4, c[0x0][0x210]", "LDC R5, c[0x0][0x214]", "I2F.U32.RP R0, R5", "MUFU.RCP R0, R0",
    "IADD3 R2, R0, 0xffffffe, RZ", "F2I.FTZ.U32.TRUNC.NTZ R3, R2", "MOV R2, RZ", "IMAD.MOV R7, RZ, RZ, -R3",
    "IMAD R7, R7, R5, RZ", "IMAD.HI.U32 R3, R3, R7, R2", "IMAD.HI.U32 R3, R3, R4, RZ", "IADD3 R2, -R3, RZ, RZ",
    "IMAD R2, R5, R2, R4", "ISETP.GE.U32.AND P0, PT, R2, R5, PT", "@P0 IMAD.IADD R2, R2, 0x1, -R5",
    "@P0 IADD3 R3, R3, 0x1, RZ", "ISETP.GE.U32.AND P0, PT, R2, R5, PT", "@P0 IADD3 R3, R3, 0x1, RZ",
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), [(0, 1), (7, 7), (8191, 5), (2**31 - 1, 3), (4_000_000_000, 17), (12, 65_536)])
def test_division_of_integers(bench, a, b):
    lane = bench("sass").Lane({0x210: a, 0x214: b}, {})
    text = "".join(f"        /*{16 * i:04x}*/   {line} ;  /* 0x0 */\n" for i, line in enumerate(DIVISION))
    for instruction in bench("sass").parse(text).values():
        holds = lane.test(instruction.guard) if instruction.guard else True
        if holds:
            bench("sass_integers").step(lane, instruction, known=True)
    assert lane.at["R3"] == a // b


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("IADD3 R0, P0, -R2, R3, RZ", (5 - 300) % 2**32),
        ("IMAD R0, R2, -R3, R3", (300 * -5 + 5) % 2**32),
        ("LEA R0, R2, R3, 0x6", 5 + (300 << 6)),
        ("LEA.HI R0, R4, R3, RZ, 0x6", 5 + (0x80000001 >> 26)),
        ("LEA.HI.SX32 R0, R4, R3, 0x6", (5 + (-0x7FFFFFFF >> 26)) % 2**32),
        ("SHF.R.S32.HI R0, RZ, 0x1f, R4", 2**32 - 1),
        ("SHF.R.U32.HI R0, RZ, 0x1f, R4", 1),
        ("SHF.L.U64.HI R0, R4, 0x4, R3", 5 << 4 | 8),
        ("SHF.R.U64 R0, R4, 0x4, R3", 5 << 28 | 0x8000000),
        ("LOP3.LUT R0, R2, 0xf0, RZ, 0xc0, !PT", 300 & 0xF0),
        ("LOP3.LUT R0, R2, R3, R4, 0x96, !PT", 300 ^ 5 ^ 0x80000001),
        ("LOP3.LUT R0, RZ, R2, RZ, 0x33, !PT", ~300 % 2**32),
        ("PRMT R0, R4, 0x5410, R3", 5 << 16 | 1),
        ("SGXT R0, R3, 0x3", (5 - 8) % 2**32),
        ("SEL R0, R2, R3, !PT", 5),
        ("VIMNMX R0, R2, R4, PT", 0x80000001),
        ("VIMNMX.U32 R0, R2, R4, PT", 300),
        ("IABS R0, R4", 0x7FFFFFFF),
        ("IMAD.WIDE R0, R4, 0x2, RZ", 2),
        ("FADD R0, R2, R3", None),
        ("LDG.E R0, [R2.64]", None),
    ],
)
def test_integer_instructions(bench, line, expected):
    lane = bench("sass").Lane({}, {})
    lane.at |= {"R0": 1, "R2": 300, "R3": 5, "R4": 0x80000001}
    (instruction,) = bench("sass").parse(f"        /*0000*/   {line} ;  /* 0x0 */\n").values()
    bench("sass_integers").step(lane, instruction, known=True)
    assert lane.at["R0"] == expected


def test_borrow_and_comparison_of_two_words(bench):
    lines = ["MOV R2, 0x5", "MOV R3, 0x1", "IADD3 R4, P0, R2, -0x6, RZ", "IADD3.X R5, R3, -0x1, RZ, P0, !PT"]
    lines += ["ISETP.GE.U32.AND P1, PT, R4, R2, PT", "ISETP.GE.AND.EX P1, PT, R5, R3, PT, P1"]
    lane = bench("sass").Lane({}, {})
    text = "".join(f"        /*{16 * i:04x}*/   {line} ;  /* 0x0 */\n" for i, line in enumerate(lines))
    for instruction in bench("sass").parse(text).values():
        bench("sass_integers").step(lane, instruction, known=True)
    # 0x1_00000005 - 6 = 0xffffffff: no carry, so the upper word is 1 + 0xffffffff + 0
    assert (lane.at["R4"], lane.at["R5"]) == (2**32 - 1, 0) and lane.at["P1"] == 0


def test_data_dependent_loop_runs_as_told_and_slow_path_does_not(bench):
    lines = ["LDG.E R2, [R4.64]", "ISETP.NE.AND P0, PT, R2, RZ, PT", "@P0 BRA 0x40", "CALL.REL.NOINC 0x80",
             "IADD3 R3, R3, 0x1, RZ", "ISETP.NE.AND P1, PT, R2, RZ, PT", "@P1 BRA 0x40", "EXIT", "EXIT"]  # fmt: skip
    counts, unknown = run(bench, lines, repeats=5)
    assert counts["IADD3"] == 5 and not counts["CALL.REL.NOINC"] and unknown == 2
    left_at_its_top = ["LDG.E R2, [R4.64]", "ISETP.NE.AND P0, PT, R2, RZ, PT", "@P0 BRA 0x50", "IADD3 R3, R3, 0x1, RZ",
                       "BRA 0x10", "EXIT"]  # fmt: skip
    assert run(bench, left_at_its_top, repeats=5)[0]["ISETP.NE.AND"] == 5


def test_loop_around_a_loop_has_a_number_of_its_own(bench):
    load = ["LDG.E R2, [R4.64]", "ISETP.NE.AND P0, PT, R2, RZ, PT"]
    body = ["FADD R3, R3, R2", "MUFU.EX2 R3, R3", "@P0 BRA 0x30", "FMUL R3, R3, R2"]
    ends_below = [*load, "FADD R5, R5, R5", *body, "@P0 BRA 0x20", "EXIT"]
    counts, _ = run(bench, ends_below, repeats=5, outer_repeats=3)
    assert (counts["MUFU.EX2"], counts["FMUL"]) == (15, 3)
    ends_at_its_top = [*load, "@!P0 BRA 0x80", *body, "BRA 0x20", "EXIT"]
    counts, _ = run(bench, ends_at_its_top, repeats=5, outer_repeats=3)
    assert (counts["MUFU.EX2"], counts["FMUL"]) == (10, 2)  # left at the third visit of its top
    two_ways_back = [*load, "FADD R3, R3, R2", "@P0 BRA 0x20", "FMUL R3, R3, R2", "@P0 BRA 0x20", "EXIT"]
    assert run(bench, two_ways_back, repeats=5, outer_repeats=3)[0]["FMUL"] == 5


def test_formula(static):
    gpu = static.GPUS["H200"]
    # 168 registers, 8 warps: one program of 8 warps fits the registers, not two
    assert static._resident(168, 1024, 8, gpu) == 1 and static._resident(128, 1024, 8, gpu) == 2
    assert static._resident(32, 100_000, 4, gpu) == 2 and static._resident(16, 0, 1, gpu) == 32
    counts = static.Counter({"HGMMA.64x256x16.F32.BF16": 4, "HMMA.16816.F32.BF16": 2, "FFMA": 9})
    # 64 x 256 x 16 products by 4 warps together; 16 x 8 x 16 by one
    seconds = (4 * 2 * 64 * 256 * 16 / 4 / 790 + 2 * 2 * 16 * 8 * 16 / (790 * 0.62)) / 1e12
    assert static._tensor_seconds(counts, 1, gpu) == pytest.approx(seconds)


def test_every_case_launches(static, bench):
    for name, work in bench("static_cases").WORK.items():
        found = static.launches(work.run, (9, 0), compiles=False, processors=132)
        assert found, name
        assert work.bytes <= 1.01 * sum(map(static._bytes, found)), f"{name}: the floor is more than the launches move"


def test_worse_estimate_fails(static, bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(static, "WORK", {"patchify": bench("static_cases").WORK["patchify"]})
    file = tmp_path / "new.json"
    assert static.main(["--json", str(file)]) == 0
    facts = json.loads(file.read_text())
    estimate = facts["ops"]["patchify"]
    assert estimate["spilled"] == [0] and estimate["ratio"] >= 1 and facts["measured"] is False
    for factor, code in ((1.0, 0), (0.95, 0), (0.8, 1)):
        old = facts | {"ops": {"patchify": estimate | {"us": factor * estimate["us"]}}}
        (tmp_path / "old.json").write_text(json.dumps(old))
        assert static.main(["--against", str(tmp_path / "old.json")]) == code
    assert "worse: patchify" in capsys.readouterr().out


def test_arguments_lie_where_the_machine_code_reads_them(static):
    kernel = SimpleNamespace(src=SimpleNamespace(signature={"x": "*bf16", "n": "i32", "B": "constexpr", "f": "fp32"}),
                             metadata=SimpleNamespace(num_warps=4))  # fmt: skip
    launch = static.Launch(None, kernel, {"x": None, "n": -2, "B": 64, "f": 0.5}, (10, 1, 1))
    elf = "".join(
        f"Ordinal : {o:#x}\tOffset  : {a:#x}\tSize    : {s:#x}\n" for o, a, s in ((1, 8, 4), (0, 0, 8), (2, 12, 4))
    )
    elf += "EIATTR_PARAM_CBANK\n\tFormat:\tEIFMT_SVAL\n\tValue:\t0xc 0x2100210 \n"
    words = static._constants(launch, elf)
    assert words[0] == 128 and words[0xC] == 10 and words[0x210] == 0 and words[0x214] == 1
    assert words[0x218] == 2**32 - 2 and 0x21C not in words
