"""The generator of mutants: every rule finds its places and nothing else; equivalents are matched by what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"mutants_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


rules = loaded("rules")

KERNEL = """
// A comment with __syncthreads(); and a < b
#include <x.h>
namespace sela {
constexpr int kWidth = 8;  // columns

template <class A, int R = (1 < 2)>
__device__ A total(A x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__global__ void __launch_bounds__(kMany < 3 ? 1 : 2) add_kernel(const Arguments a) {
  const int64_t tiles = (a.rows + kTile - 1) / kTile;
#if defined(__CUDA_ARCH__)
  asm("nothing < here");
#else
  float s = 0.0f;
#endif
  for (int64_t row = first; row < last; row += step) {
    s += a.x[row * a.stride + c] * 1.5f;
  }
  __syncthreads();
  if (threadIdx.x == 0 && !done) atomicAdd(a.sum + at(1, 2), value);
  const float best = s > kLow ? s : -kLow;
  copy_async_wait<1>();
  half ^= 1;
}
}  // namespace sela
"""


def edits(rule, text=KERNEL):
    return [(m.before, m.after) for m in rules.mutants("x.cuh", text) if m.rule == rule]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("barrier removed", [("__syncthreads();", ";")]),
        ("barrier for a part", [("__syncthreads();", "if (threadIdx.x != 0) __syncthreads();")]),
        ("wait removed", [("copy_async_wait<1>();", ";")]),
        ("wait too weak", [("copy_async_wait<1>();", "copy_async_wait<1 + 1>();")]),
        ("loop stride", [("row += step) {", "row += 2 * step) {")]),
        ("remainder", []),
        ("tail of a division", [("(a.rows + kTile - 1) / kTile;", "(a.rows) / kTile;")]),
        ("and, or", [("if (threadIdx.x == 0 && !done)", "if (threadIdx.x == 0 || !done)")]),
        ("negation lost", [("&& !done)", "&& done)")]),
        ("sign", [(": -kLow;", ": kLow;")]),
        ("lane mask", [("(0xffffffffu,", "((0xffffffffu >> 1),")]),
        ("exchange removed", [("x += __shfl_xor_sync(0xffffffffu, x, step);", "x += (x);")]),
        ("reduction starts late", [("= kWarp / 2;", "= kWarp / 2 / 2;")]),
        ("reduction stops early", [("step > 0;", "step > 1;")]),
        ("atomic made plain", [("atomicAdd(a.sum + at(1, 2), value);", "*(a.sum + at(1, 2)) += value;")]),
        ("comparison", [("threadIdx.x == 0", "threadIdx.x != 0"), ("s > kLow ?", "s >= kLow ?")]),
        ("loop bound", [("row < last;", "row <= last;"), ("row < last;", "row < last - 1;")]),
        ("loop start", [("row = first;", "row = first + step;")]),
        (
            "condition forced",
            [
                ("if (threadIdx.x == 0 && !done)", "if (false && (threadIdx.x == 0 && !done))"),
                ("if (threadIdx.x == 0 && !done)", "if (true || (threadIdx.x == 0 && !done))"),
            ],
        ),
        ("choice forced", [("s > kLow ?", "(false && (s > kLow)) ?"), ("s > kLow ?", "(true || (s > kLow)) ?")]),
        ("constant", [("* 1.5f", "* (2 * 1.5f)"), ("kWidth = 8;", "kWidth = 9;")]),
        (
            "index",
            [("a.x[row * a.stride + c]", "a.x[0]"), ("a.x[row * a.stride + c]", "a.x[row * a.stride + c + 1]")],
        ),
        ("name swapped", [("a.x[row *", "a.x[first *")]),
    ],
)
def test_a_rule_applies_at_its_places_and_nowhere_else(rule, expected):
    found = edits(rule)
    assert len(found) == len(expected), found
    for piece, replaced in expected:
        assert any(piece in before and before.replace(piece, replaced) == after for before, after in found), found


def test_a_name_is_swapped_only_for_one_that_the_function_has():
    assert ("y[i] = q;", "y[q] = q;") in edits("name swapped", "void f() {\n  int q;\n  y[i] = q;\n}\n")
    assert edits("name swapped", "void f() {\n  int p;\n  y[i] = p;\n}\n") == []


def test_statements_with_an_effect_are_lost_and_declarations_are_not():
    lost = [before for before, _ in edits("statement lost")]
    assert [line for line in lost if line.startswith("half")] == ["half ^= 1;"]
    assert any("atomicAdd" in line for line in lost)
    assert any(line.startswith("s +=") for line in lost)
    assert not any("tiles" in line or "return" in line or "float" in line for line in lost)


def test_a_mutant_changes_its_own_line_only():
    before = KERNEL.split("\n")
    for mutant in rules.mutants("x.cuh", KERNEL):
        after = mutant.apply(KERNEL).split("\n")
        changed = [k + 1 for k, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert changed == [mutant.line], mutant.name


def test_mutants_name_the_function_they_are_in():
    by_rule = {mutant.rule: mutant.function for mutant in rules.mutants("x.cuh", KERNEL)}
    assert by_rule["lane mask"] == "total"
    assert by_rule["barrier removed"] == "add_kernel"


def test_comments_templates_and_what_only_nvcc_sees_are_left_alone():
    touched = {mutant.before for mutant in rules.mutants("x.cuh", KERNEL)}
    assert not any(word in line for line in touched for word in ("comment", "template", "asm", "include", "bounds"))


def test_the_same_source_gives_the_same_mutants_in_the_same_order():
    assert rules.mutants("x.cuh", KERNEL) == rules.mutants("x.cuh", KERNEL)


def test_parallel_faults_are_all_kept_and_of_the_others_some_per_file():
    text = KERNEL.replace("  half ^= 1;\n", "  half ^= 1;\n  __syncthreads();\n  x = 1;\n  y = 2;\n  z = 3;\n")
    found = rules.mutants("x.cuh", text)
    kept = rules.chosen(found, 1)
    assert [m.rule for m in kept].count("barrier removed") == 2
    assert [m.rule for m in kept].count("statement lost") == 1
    assert rules.chosen(found, 0) == found


def entry(**other):
    return {
        "rule": "barrier removed",
        "function": "add_kernel",
        "line": "__syncthreads();",
        "becomes": ";",
        "reason": "for a test",
        **other,
    }


def test_an_equivalent_is_found_wherever_its_line_has_moved_to():
    moved = KERNEL.replace("namespace sela {\n", "namespace sela {\n\n// more\n\n").replace(
        "__syncthreads();\n", "__syncthreads();  // because\n"
    )
    listed = rules.Equivalents([entry()])
    for text in (KERNEL, moved):
        found = rules.mutants("x.cuh", text)
        assert [m.rule for m in found if listed.reason(m)] == ["barrier removed"]
        assert listed.unmatched(found) == []


def test_an_entry_that_fits_no_mutant_is_told():
    listed = rules.Equivalents([entry(), entry(function="gone_kernel")])
    assert listed.unmatched(rules.mutants("x.cuh", KERNEL)) == [
        ("barrier removed", "gone_kernel", "__syncthreads();", ";")
    ]


@pytest.mark.parametrize("entries", [[entry(reason=" ")], [entry(), entry()]])
def test_an_entry_without_a_reason_or_given_twice_is_refused(entries):
    with pytest.raises(ValueError, match="once and with a reason"):
        rules.Equivalents(entries)


def test_every_listed_equivalent_fits_a_mutant_of_the_kernels():
    folder = HERE.parents[1] / "csrc" / "cuda"
    found = [
        mutant
        for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cuh")])
        for mutant in rules.mutants(path.name, path.read_text(encoding="utf-8"))
    ]
    assert len(found) > 100
    assert rules.Equivalents.read(rules.EQUIVALENTS).unmatched(found) == []
