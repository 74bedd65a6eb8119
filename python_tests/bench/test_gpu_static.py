"""The inspection of CUDA kernels reads reports and machine code rightly, and finds what must not be. Needs no nvcc."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_budgets as budgets  # noqa: E402
import gpu_code  # noqa: E402
import gpu_static  # noqa: E402
import sass  # noqa: E402

EX2 = budgets.EXPONENTIAL

# ---- Machine code for the tests: what nvdisasm prints, from lines such as "@P0 BRA L1" and "L1:".


def disassembly(*lines, name="kernel"):
    code = [f"\t.section\t.text.{name}", f".text.{name}:"]
    at = 0
    for line in lines:
        if line.endswith(":"):
            code.append(f".L_x_{line[1:-1]}:")
            continue
        line = re.sub(r"\bL(\d+)\b", r"`(.L_x_\1)", line)
        code.append(f"        /*{at:04x}*/                   {line} ;")
        at += 16
    return "\n".join(code)


def one(*lines):
    (function,) = sass.functions(disassembly(*lines))
    return function


def exponentials(count, first=50):
    return [f"MUFU.EX2 R{first + i}, R{first + i}" for i in range(count)]


# A turn of eight elements of 16 bits: one wide load, the reference, eight exponentials; a careful fallback with eight
# more and a reduction of its own; a row's edge that loads two bytes at a time; one thread's bookkeeping.
GOOD = [
    "S2R R0, SR_TID.X",
    "L1:",
    "@!P3 BRA L2",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "BRA L3",
    "L2:",
    *[f"@P4 LDG.E.U16 R{4 + i}, desc[UR4][R2.64+{2 * i:#x}]" for i in range(8)],
    "L3:",
    "LDG.E R12, desc[UR4][R14.64]",
    "HADD2.F32 R50, -RZ, R4.H0_H0",
    "FFMA R50, R50, R20, -R12",
    *exponentials(8),
    "SHFL.BFLY PT, R60, R50, 0x10, 0x1f",
    "FSETP.GT.AND P1, PT, R60, 1, PT",
    "@P1 BRA L4",
    "SHFL.BFLY PT, R61, R50, 0x10, 0x1f",
    *exponentials(8, first=70),
    "L4:",
    "FFMA R60, R50, R61, R60",
    "@P2 BRA L5",
    "MUFU.LG2 R60, R60",
    "DADD R62, R62, R60",
    "STG.E desc[UR4][R14.64], R60",
    "L5:",
    "IADD3 R1, R1, 0x1, RZ",
    "@P0 BRA L1",
    "EXIT",
]
STRAIGHT = 3 + 3 + 8 + 3 + 2 + 2  # without the edge, the fallback and the bookkeeping

HEADER = """
template <class T, bool kAligned>
struct OneWarp {
  static constexpr bool kOneWarp = true;
  static constexpr int kColumns = 16 / static_cast<int>(sizeof(T)), kRows = kAligned ? 1 : 2, kThreads = 128;
};
constexpr size_t kSlotBytes = 46 << 10;  // two stages
template <class T, template <class, bool> class Mapping, bool kAligned>
__global__ void __launch_bounds__(Mapping<T, kAligned>::kThreads, (2 + 2)) fused_kernel(const Arguments a) {
  work();
}
"""
ARGUMENTS = {"T": "half", "Mapping": "OneWarp", "kAligned": "true"}
BUDGET = budgets.Budget(
    "fused_kernel", registers=40, shared=256, instructions=4.0, wide_loads=True, other_loads=1, in_flight=1
)


@pytest.fixture
def inspected(monkeypatch):
    """Violations of machine code under a budget like the real ones."""
    monkeypatch.setattr(budgets, "BUDGETS", (BUDGET,))

    def look(lines=GOOD, registers=40, stack=0, shared=256, kernel="fused_kernel"):
        used = gpu_code.Resources(registers, stack, shared)
        facts = gpu_static.facts_of(
            one(*lines), "90", used, gpu_code.Kernel(kernel, ARGUMENTS), budgets.Constants(HEADER)
        )
        return gpu_static.violations(facts)

    return look


def changed(old, *new):
    at = GOOD.index(old)
    return [*GOOD[:at], *new, *GOOD[at + 1 :]]


# ---- Budgets.


def test_code_within_its_budget_passes(inspected):
    assert inspected() == []


LOAD, STEP = "LDG.E.128 R4, desc[UR4][R2.64]", "IADD3 R1, R1, 0x1, RZ"
TWO_BYTES = "LDG.E.U16 R13, desc[UR4][R14.64]"
REFERENCE = "LDG.E R12, desc[UR4][R14.64]"
NARROW = ["LDG.E.64 R4, desc[UR4][R2.64]", "LDG.E.64 R6, desc[UR4][R2.64+0x8]"]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (changed(STEP, "STL [R1], R5", "LDL R5, [R1]"), "expected 0 accesses to local memory (LDL, STL), found 2"),
        (changed("MUFU.EX2 R50, R50", *exponentials(9)), "expected at most 1 EX2 per element, found 2.00"),
        (changed(LOAD, *NARROW), "expected at least 1 16-byte loads per turn, found 0"),
        (changed(LOAD, *NARROW), "expected at least 1 16-byte loads in flight per thread, found 0"),
        (changed(REFERENCE, REFERENCE, TWO_BYTES), "narrower loads per turn, found LDG.E LDG.E.U16"),
        (changed(STEP, *[STEP] * 20), "expected at most 4 instructions per element, found 5.4"),
        (["S2R R0, SR_TID.X", *exponentials(8), "EXIT"], "expected a hot loop, found none"),
    ],
)
def test_what_the_machine_code_must_not_do_is_found(inspected, lines, found):
    (line, *_) = [line for line in inspected(lines) if found in line]
    assert line.startswith("fused_kernel<half, OneWarp, aligned> sm_90: expected ")
    assert line.count(": ") >= 2, "what to do comes last"


@pytest.mark.parametrize(
    ("used", "found"),
    [
        ({"registers": 41}, "expected at most 40 registers, found 41"),
        ({"shared": 257}, "expected at most 256 bytes of static shared memory, found 257"),
        ({"stack": 16}, "expected at most 0 bytes of stack, found 16"),
    ],
)
def test_more_resources_than_the_budget_are_found(inspected, used, found):
    (line,) = inspected(**used)
    assert found in line


def test_a_kernel_without_a_budget_is_an_error(inspected):
    (line,) = inspected(kernel="new_kernel")
    assert "expected a budget in bench/gpu_budgets.py, found none: add a line for new_kernel" in line


def test_spills_outside_the_hot_loop_may_be_allowed_but_not_inside(inspected, monkeypatch):
    monkeypatch.setattr(budgets, "BUDGETS", (budgets.Budget(**{**vars(BUDGET), "stack": 8}),))
    outside = ["STL [R1], R5", *GOOD]
    inside = changed("IADD3 R1, R1, 0x1, RZ", "STL [R1], R5")
    assert inspected(outside, stack=8) == []
    assert "local memory" in inspected(inside, stack=8)[0]


# ---- The hot loop.


def test_the_straight_way_leaves_out_the_fallback_the_edge_and_the_bookkeeping():
    hot = sass.hot_loop(one(*GOOD), EX2, 8)
    assert hot.counted(EX2) == 8
    assert [i.op for i in hot.global_loads] == ["LDG.E.128", "LDG.E"]
    assert len(hot.code) == STRAIGHT
    assert len(hot.busy) == STRAIGHT + 3
    assert hot.count("shuffle") == 1
    assert hot.count("fp64") == 0


def test_the_straight_way_adds_up_the_columns_of_a_row_that_a_branch_may_leave_out():
    sums = [f"FFMA R{90 + i}, R{50 + i}, R61, R{90 + i}" for i in range(8)]
    label = ["@P5 BRA L4", *["FSETP.NEU.AND P0, PT, R50, R61, PT"] * 5, "L4:"]
    turn = ["L1:", *exponentials(8), "SHFL.BFLY PT, R61, R50, 0x10, 0x1f", "@P2 BRA L3", *label, *sums, "L3:"]
    hot = sass.hot_loop(one(*turn, "@P0 BRA L1", "EXIT"), EX2, 8)
    assert hot.counted(re.compile("FFMA")) == 8, "leaving the row out is shorter, and not the ordinary case"
    assert len(hot.code) == 8 + 2 + 1 + 8 + 1, "looking for the label is for one warp of the row"
    assert len(hot.busy) == len(hot.code) + 5


def marked_turn():
    votes = ["@P5 BRA L6", *["FSET.BF.GT.AND R60, R50, R61, PT"] * 8, "VOTE.ANY R62, PT, P1", "REDUX.SUM UR4, R60"]
    careful = ["@P6 BRA L7", *exponentials(8, first=70), "L7:"]
    return changed(STEP, *votes, "L6:", *careful, STEP)


def test_votes_off_the_straight_way_are_counted_where_every_warp_marks():
    hot = sass.hot_loop(one(*marked_turn()), EX2, 8)
    assert len(hot.code) == STRAIGHT + 2
    assert len(hot.marking) == len(hot.busy) + 10, "the votes, and not the eight exponentials of another fallback"


def test_more_instructions_per_candidate_than_the_budget_are_found(inspected, monkeypatch):
    monkeypatch.setattr(budgets, "BUDGETS", (budgets.Budget(**{**vars(BUDGET), "marking": 4.4}),))
    assert inspected() == []
    (line,) = inspected(marked_turn())
    assert "expected at most 4.4 instructions per element where every warp marks, found 4.5" in line


def test_of_two_loops_with_enough_exponentials_the_cheaper_turn_is_the_hot_one():
    careful = [
        "L1:",
        "SHFL.BFLY PT, R60, R50, 0x10, 0x1f",
        *["FMNMX R1, R1, R2, PT"] * 9,
        *exponentials(8),
        "@P0 BRA L1",
    ]
    fast = ["L2:", *exponentials(8), "@P0 BRA L2"]
    for lines in ([*careful, *fast, "EXIT"], [*fast, *careful, "EXIT"]):
        assert len(sass.hot_loop(one(*lines), EX2, 8).code) == 9


def test_a_loop_with_too_few_exponentials_is_not_the_hot_one():
    inner = ["L2:", *exponentials(4), "@P1 BRA L2"]
    outer = ["L1:", *exponentials(4, first=80), *inner, "@P0 BRA L1", "EXIT"]
    assert sass.hot_loop(one(*outer), EX2, 8).counted(EX2) == 8
    with pytest.raises(sass.HotLoopError, match="expected a loop with 9 instructions"):
        sass.hot_loop(one(*outer), EX2, 9)


def test_branches_of_diverged_warps_are_not_followed_those_of_converged_ones_are():
    diverged = one("L1:", *exponentials(8), "BRA.DIV UR4, L2", "@P0 BRA L1", "EXIT", "L2:", "NOP", "BRA L1")
    assert diverged.blocks[0].next == [1]
    call = ["BRA.CONV UR4, L2", "CALL.REL.NOINC L3", "L2:"]
    converged = one("L1:", *call, *exponentials(8), "@P0 BRA L1", "EXIT", "L3:", "NOP")
    assert len(sass.hot_loop(converged, EX2, 8).code) == 1 + 8 + 1


def test_a_loop_over_shared_memory_is_reported_by_itself():
    sums = ["L2:", "LDS.128 R4, [R3]", *["FADD R4, R4, R5"] * 4, "@P1 BRA L2"]
    hot = sass.hot_loop(one("L1:", *exponentials(8), *sums, "@P0 BRA L1", "EXIT"), EX2, 8)
    assert [len(turn) for turn in hot.shared_loops] == [6]
    assert gpu_static.sum_cost(hot, rows=4) == 6
    assert gpu_static.sum_cost(hot, rows=2) == 3


def in_flight(*lines, pending=None):
    return sass.hot_loop(one("L1:", *lines, *exponentials(1), "@P0 BRA L1", "EXIT"), EX2, 1).loads_in_flight(
        16, pending
    )


def test_loads_are_in_flight_until_one_of_their_registers_is_named():
    loads = [f"LDG.E.128 R{4 * i}, desc[UR4][R100.64]" for i in range(1, 5)]
    uses = [f"HADD2.F32 R40, -RZ, R{4 * i + 3}.H0_H0" for i in range(1, 5)]
    assert in_flight(*loads, *uses) == 4
    assert in_flight(*[line for pair in zip(loads, uses, strict=True) for line in pair]) == 1
    assert in_flight(*uses, *loads) == 4, "loads for the next turn"
    assert in_flight(*(line.replace(".128", "") for line in loads), *uses) == 0, "narrow loads do not count"


def test_copies_are_in_flight_until_a_wait_that_lets_fewer_groups_pend():
    copies = ["LDGSTS.E.BYPASS.128 [R10], desc[UR4][R2.64]"] * 3
    assert in_flight("DEPBAR.LE SB0, 0x0", "LDS.128 R4, [R3]", *copies, "LDGDEPBAR") == 3
    assert in_flight("DEPBAR.LE SB0, 0x1", "LDS.128 R4, [R3]", *copies, "LDGDEPBAR") == 6
    either = ["@P1 BRA L2", "DEPBAR.LE SB0, 0x1", "BRA L3", "L2:", "DEPBAR.LE SB0, 0x0", "L3:", *copies, "LDGDEPBAR"]
    assert in_flight(*either, pending=1) == 6
    assert in_flight(*either, pending=0) == 3


# ---- Reports, names, headers.


def test_instructions_are_read_with_guard_and_width():
    text = """\t.section\t.text._Z1kv,"ax",@progbits
.text._Z1kv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R24, desc[UR4][R134.64+0x10] ;
        /*0030*/              @UP1 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
//--------------------- .nv.shared._Z1kv --------------------------
"""
    (function,) = sass.functions(text)
    load = function.code[2]
    assert function.name == "_Z1kv"
    assert [i.guard for i in function.code] == ["", "!P0", "", "UP1", ""]
    assert (load.bytes, load.kind, sorted(load.loaded)) == (16, "memory", [24, 25, 26, 27])
    assert [(loop.head, sorted(loop.blocks)) for loop in function.loops] == [(1, [1])]


def test_the_compilers_report_is_read_without_what_the_system_reserves():
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z1kv:
  REG:80 STACK:8 SHARED:1696 LOCAL:0 CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert gpu_code.resources(text, "90") == {"_Z1kv": gpu_code.Resources(80, 8, 672)}
    assert gpu_code.resources(text, "80") == {"_Z1kv": gpu_code.Resources(80, 8, 1696)}


def test_kernels_are_named_by_their_template_arguments():
    parameters = gpu_code.template_parameters(HEADER + "__global__ void plain_kernel(const Arguments a) {")
    assert parameters == {"fused_kernel": ["T", "Mapping", "kAligned"], "plain_kernel": []}
    name = "void sela::sinkhorn_cuda::fused_kernel<__nv_bfloat16, sela::sinkhorn_cuda::OneWarp, {}>(sela::Arguments)"
    aligned = gpu_code.kernel_of(name.format("true"), parameters)
    assert aligned.arguments == {"T": "bfloat16", "Mapping": "OneWarp", "kAligned": "true"}
    assert str(aligned) == "fused_kernel<bfloat16, OneWarp, aligned>"
    assert str(gpu_code.kernel_of(name.format("false"), parameters)) == "fused_kernel<bfloat16, OneWarp>"
    assert str(gpu_code.kernel_of("sela::plain_kernel(sela::Arguments)", parameters)) == "plain_kernel"


def test_constants_of_headers_follow_their_template_parameters():
    constants = budgets.Constants(HEADER)
    half, double = {"T": 2, "kAligned": 1}, {"T": 8, "kAligned": 0}
    names = ("kColumns", "kRows", "kThreads", "kOneWarp")
    assert [constants.value(name, half, "OneWarp") for name in names] == [8, 1, 128, 1]
    assert [constants.value(name, double, "OneWarp") for name in names] == [2, 2, 128, 1]
    assert constants.value("kSlotBytes", half) == 46 * 1024
    with pytest.raises(KeyError, match="expected constexpr kGone in struct OneWarp, found none"):
        constants.value("kGone", half, "OneWarp")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4 / 3", 6),
        ("a == 2 ? 5 : 6", 5),
        ("!(a > 1) || a % 2 == 1", 0),
        ("b && a < 3 ? 1 << 4 : a", 16),
    ],
)
def test_constant_expressions_are_those_of_c(text, value):
    assert budgets.Constants(f"constexpr int kIt = {text};").value("kIt", {"a": 2, "b": 1}) == value


def test_every_kernel_of_the_sources_has_a_budget_and_a_shape():
    text = "\n".join(path.read_text() for path in sorted((ROOT / "csrc/cuda").iterdir()))
    kernels = gpu_code.template_parameters(text)
    assert set(kernels) == {budget.kernel for budget in budgets.BUDGETS}
    constants = budgets.Constants(text)
    for work in budgets.WORK:
        assert budgets.shape(work.kernel, work.when, constants).threads % 32 == 0
        assert any(budget.covers(work.kernel, work.when) for budget in budgets.BUDGETS)


def test_every_shipped_architecture_has_its_limits():
    assert set(gpu_code.shipped_architectures()) <= set(budgets.MULTIPROCESSORS)


# ---- Occupancy and tables.


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        ("90", 128, 0, 128, 4),  # 65536 registers / (128 x 128)
        ("90", 129, 0, 128, 3),  # 136 per thread, in quarters of the file: 3 warps each
        ("90", 32, 0, 1024, 2),  # 64 warps
        ("90", 16, 0, 32, 32),  # 32 blocks
        ("90", 32, 48 * 1024, 128, 4),  # 228 KiB / 49 KiB
        ("86", 32, 48 * 1024, 128, 2),  # 100 KiB / 49 KiB
        ("75", 64, 0, 256, 4),
        ("75", 64, 64 * 1024 + 1, 256, 0),
    ],
)
def test_resident_blocks_are_those_of_the_occupancy_rules(arch, registers, shared, threads, blocks):
    assert gpu_static.resident_blocks(budgets.MULTIPROCESSORS[arch], registers, shared, threads) == blocks


def test_tables_are_replaced_between_their_marks_and_nothing_else_changes():
    text = "# Title\n\nprose\n"
    first = gpu_static.written(text, "Written by x, nvcc 13.0.88.\n\nold")
    assert first.startswith(text)
    assert gpu_static.compiler_of(first) == "13.0.88"
    second = gpu_static.written(first + "\nmore prose\n", "new")
    assert gpu_static.generated(second) == "new"
    assert "old" not in second
    assert second.endswith("\nmore prose\n")
    assert gpu_static.written(second, "new") == second


def test_the_tables_in_the_documents_are_those_of_the_shipped_architectures():
    part = gpu_static.generated((ROOT / "docs/gpu.md").read_text())
    (header,) = re.findall(r"^\| kernel \| (sm_.*) \|$", part, re.MULTILINE)
    assert header.split(" | ") == [f"sm_{arch}" for arch in gpu_code.shipped_architectures()]
    for budget in budgets.BUDGETS:
        assert f"`{budget.kernel}" in part


def test_a_missing_disassembler_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(gpu_code.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_code.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gpu_code.InspectionError, match="found none: pip install 'nvidia-cuda-cuobjdump>=13'"):
        gpu_code.find_program("cuobjdump")
