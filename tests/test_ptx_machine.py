# SPDX-License-Identifier: BSD-3-Clause
"""The PTX interpreter itself, on kernels of a few instructions: what it computes, and what it does not let pass."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from ptx import parser
from ptx.counts import executed
from ptx.faults import Finding
from ptx.machine import Machine
from ptx.memory import GlobalMemory
from ptx.parser import Unsupported

THREADS, BLOCKS, SHARED = 64, 2, 1024
FRAME = """
.visible .entry kernel(
	.param .align 8 .b8 kernel_param_0[16]
)
.maxntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<40>;
	.reg .b64 	%rd<20>;

	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_0+8];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.lo.s32 	%r3, %r2, 64, %r1;
	mul.wide.u32 	%rd3, %r3, 4;
	add.s64 	%rd4, %rd1, %rd3;   // an element of the input for each thread
	add.s64 	%rd5, %rd2, %rd3;   // and of the output
	ld.global.b32 	%r4, [%rd4];
	shl.b32 	%r5, %r1, 2;
	add.s32 	%r5, %r5, 4096;     // a word of shared memory for each thread
	BODY
	st.global.b32 	[%rd5], %r6;
	ret;
}
"""


def run(body: str, given: np.ndarray | None = None) -> tuple[np.ndarray, Machine]:
    """What the threads store of %r6, having loaded `given` into %r4."""
    given = np.arange(BLOCKS * THREADS, dtype=np.uint32) if given is None else given.view(np.uint32)
    result = np.zeros(BLOCKS * THREADS, np.uint32)
    kernel = parser.parse(FRAME.replace("BODY", body))["kernel"]
    memory = GlobalMemory()
    for array, writable in ((given, False), (result, True)):
        memory.allow(array.ctypes.data, array.nbytes, writable)
    parameters = bytes((ctypes.c_uint64 * 2)(given.ctypes.data, result.ctypes.data))
    machine = Machine(kernel, parameters, range(BLOCKS), THREADS, SHARED, memory)
    machine.run()
    return result, machine


EXCHANGE = "st.shared.b32 [%r5], %r4; xor.b32 %r7, %r5, 128; {} ld.shared.b32 %r6, [%r7];"
COPY = """setp.lt.u32 %p1, %r1, 8; shl.b32 %r8, %r1, 4; add.s32 %r8, %r8, 4096; and.b64 %rd6, %rd1, -16;
    @%p1 cp.async.cg.shared.global [%r8], [%rd6], 16, LENGTH; cp.async.commit_group; WAIT ld.shared.b32 %r6, [4096];"""
FAULTS = {
    "race between warps": (EXCHANGE.format("bar.warp.sync -1;"), "a race at shared word"),
    "race within a warp": (
        "st.shared.b32 [%r5], %r4; xor.b32 %r7, %r5, 4; ld.shared.b32 %r6, [%r7]; bar.sync 0;",
        "a race at shared word",
    ),
    "two writers": ("mov.b32 %r6, 0; st.shared.b32 [4096], %r4;", "a race at shared word 0x1000: thread 1 writes it too"),
    "write after a read": (
        "st.shared.b32 [%r5], %r4; bar.sync 0; xor.b32 %r7, %r5, 128; ld.shared.b32 %r6, [%r7]; st.shared.b32 [%r5], 1;",
        "a race at shared word",
    ),
    "never written": ("ld.shared.b32 %r6, [%r5];", "never written"),
    "copy not waited for": (
        COPY.replace("LENGTH", "16").replace("WAIT", "cp.async.wait_group 1; bar.sync 0;"),
        "waits for a copy",
    ),
    "copy without a barrier": (
        COPY.replace("LENGTH", "16").replace("WAIT", "cp.async.wait_group 0;"),
        "a race at shared word",
    ),
    "shared end": ("st.shared.b32 [%r5+1024], %r4; mov.b32 %r6, 0;", "out of bounds"),
    "shared null": ("mov.b32 %r6, 0; st.shared.b32 [%r6], %r4;", "out of bounds"),
    "shared misaligned": ("mov.b32 %r6, 0; st.shared.v2.b32 [%r5+4], {%r4, %r4};", "misaligned shared access"),
    "global end": ("ld.global.b32 %r6, [%rd4+4];", "a read out of bounds of 4 bytes"),
    "global misaligned": ("ld.global.v2.b32 {%r6, %r7}, [%rd4];", "a misaligned access of 8 bytes"),
    "write to an input": ("mov.b32 %r6, 0; st.global.b32 [%rd4], %r6;", "a write out of bounds"),
    "output read before it is written": ("ld.global.b32 %r6, [%rd5];", "never written"),
    "two threads write": ("mov.b32 %r6, 0; st.global.b32 [%rd2], %r6;", "that another thread writes too"),
    "another thread's result": (
        "st.global.b32 [%rd5], %r4; xor.b64 %rd6, %rd5, 4; ld.global.b32 %r6, [%rd6];",
        "that another thread wrote in this launch",
    ),
    "part of a warp": (
        "setp.eq.u32 %p1, %r1, 40; mov.b32 %r6, 0; @%p1 shfl.sync.bfly.b32 %r6|%p2, %r4, 1, 31, -1;",
        "lanes of a warp are elsewhere",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_ends_the_run_with_its_place(fault):
    body, message = FAULTS[fault]
    with pytest.raises(Finding) as error:
        run(body)
    assert message in str(error.value)
    assert "kernel, line " in str(error.value)
    assert "of its PTX, `" in str(error.value)
    assert ": thread " in str(error.value)
    assert " of block " in str(error.value)


UNKNOWN = [
    "fancy.b32 %r6, %r4;",
    "add.sat.s32 %r6, %r4, 1;",
    "fma.rm.f32 %r6, %r4, %r4, %r4;",
    "ld.global.cv.b32 %r6, [%rd4];",
    "add.s32 %r6, %q4, 1;",
    "shfl.sync.bfly.b32 %r6|%p2, %r4, 1, 7199, -1;",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1,%r2,%r3,%r4},{%r1,%r2},{%r3},{%r1,%r2,%r3,%r4};",
    "bar.sync 1;",
]


@pytest.mark.parametrize("body", UNKNOWN)
def test_what_is_not_known_is_not_guessed(body):
    with pytest.raises(Unsupported):
        run(body + " mov.b32 %r6, 0;")


def test_barrier_between_makes_it_right():
    given = np.arange(128, dtype=np.uint32)
    assert (run(EXCHANGE.format("bar.sync 0;"))[0] == (given ^ 32)).all()
    within = "st.shared.b32 [%r5], %r4; xor.b32 %r7, %r5, 4; bar.warp.sync -1; ld.shared.b32 %r6, [%r7];"
    assert (run(within)[0] == (given ^ 1)).all()


@pytest.mark.parametrize(("length", "expected"), [("16", 7), ("4", 7), ("0", 0), ("%p1", 0)])
def test_copies_arrive_at_their_wait(length, expected):
    given = np.full(128, 7, np.uint32)
    assert (
        run(COPY.replace("LENGTH", length).replace("WAIT", "cp.async.wait_group 0; bar.sync 0;"), given)[0] == expected
    ).all()


def test_parameters_by_an_address_that_differs():
    pick = "mov.b64 %rd6, kernel_param_0; and.b32 %r7, %r1, 1; mul.wide.u32 %rd7, %r7, 8; add.s64 %rd6, %rd6, %rd7;"
    result = run(pick + "ld.param.u64 %rd8, [%rd6]; setp.eq.s64 %p1, %rd8, %rd1; selp.b32 %r6, 1, 2, %p1;")[0]
    assert (result.reshape(-1, 2) == (1, 2)).all()
    with pytest.raises(Finding, match="parameters out of bounds"):
        run(pick + "ld.param.u64 %rd8, [%rd6+8]; mov.b32 %r6, 0;")


def test_loops_and_branches_that_part():
    """Sums of 0 .. thread by a loop that every thread leaves at another time; then odd threads go another way."""
    body = """mov.b32 %r6, 0; mov.b32 %r7, 0;
    $L1: add.s32 %r6, %r6, %r7; add.s32 %r7, %r7, 1; setp.le.u32 %p1, %r7, %r1; @%p1 bra $L1;
    and.b32 %r8, %r1, 1; setp.eq.u32 %p2, %r8, 0; @%p2 bra $L2; add.s32 %r6, %r6, 1000; bra.uni $L3;
    $L2: add.s32 %r6, %r6, 2000;
    $L3: shfl.sync.bfly.b32 %r6|%p3, %r6, 1, 31, -1;"""
    thread = np.arange(128) % 64
    expected = thread * (thread + 1) // 2 + np.where(thread % 2, 1000, 2000)
    result, machine = run(body)
    assert (result == expected.reshape(-1, 2)[:, ::-1].reshape(-1)).all()
    assert machine.issued.max() == 64 * 2 + 32 * 2  # the loop: as often as the longest thread of each warp


def test_registers_begin_poisoned():
    assert (run("mov.b32 %r6, %r30;")[0] == 0xFFFFFFFF).all()


def test_registers_of_an_inner_scope_are_others():
    """As in what the compiler makes of __syncthreads_or."""
    body = """setp.eq.u32 %p1, %r1, 5; mov.b32 %r7, 3;
    { .reg .pred %p1; .reg .pred %p2; setp.ne.u32 %p1, %r1, 99; bar.red.or.pred %p2, 0, %p1; selp.b32 %r7, 7, 0, %p2; }
    selp.b32 %r6, %r7, 1, %p1;"""
    assert (run(body)[0] == np.where(np.arange(128) % 64 == 5, 7, 1)).all()


def half(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32).view(np.uint32)


FLOATS = np.random.default_rng(1).standard_normal(128).astype(np.float32)
ONE_MORE = np.nextafter(np.float32(1), np.float32(2))
COMPUTED = {
    "fma.rn.f32 %r6, %r4, %r4, 0f3F800000;": lambda x: (x.astype(np.float64) ** 2 + 1).astype(np.float32),
    "mul.rz.f32 %r6, %r4, 0f7F7FFFFF;": lambda x: np.where(
        np.abs(x) > 1, np.copysign(np.finfo(np.float32).max, x), x * np.finfo(np.float32).max
    ),
    "ex2.approx.ftz.f32 %r6, %r4;": np.exp2,
    "rcp.approx.ftz.f32 %r6, %r4;": lambda x: 1 / x,
    "max.f32 %r6, %r4, 0f7FC00000;": lambda x: x,
    "setp.gtu.f32 %p1, %r4, 0f00000000; selp.b32 %r6, 0f3F800000, 0f00000000, %p1;": lambda x: (x > 0).astype(np.float32),
    "cvt.rn.bf16x2.f32 %r7, %r4, %r4; and.b32 %r6, %r7, -65536;": lambda x: (
        (x.view(np.uint32) + 0x7FFF + (x.view(np.uint32) >> 16 & 1)) & 0xFFFF0000
    ).astype(np.uint32).view(np.float32),
}  # fmt: skip


@pytest.mark.parametrize("body", COMPUTED)
def test_arithmetic(body):
    with np.errstate(over="ignore"):
        result = run(body, FLOATS)[0].view(np.float32)
        np.testing.assert_allclose(result, COMPUTED[body](FLOATS), rtol=2e-7)


def test_fused_multiply_add_rounds_once():
    """1 + 2^-24 + 2^-60 is above the middle of two numbers, which float64 cannot tell."""
    tiny = np.full(128, 2.0**-30, np.float32)
    sum_of_powers = "fma.rn.f32 %r6, 0f33800000, 0f3F800000, 0f3F800000;"
    assert (run(sum_of_powers, tiny)[0].view(np.float32) == 1).all()  # a tie goes to even
    above = "add.f32 %r7, %r4, 0f3F800000; fma.rn.f32 %r6, 0f33800000, 0f3F800001, 0f3F800000;"
    assert (run(above, tiny)[0].view(np.float32) == ONE_MORE).all()


# Lane l gives row l % 16 and column half l / 16 of A, a matrix of 16 rows of 32 bytes in shared memory, at %r11; of B those
# of the 8x8 matrices that make its upper eight rows transposed, or its left eight columns, at %r21.
PLACES = """and.b32 %r10, %r1, 15; shl.b32 %r11, %r10, 5; and.b32 %r12, %r1, 16; add.s32 %r11, %r11, %r12;"""
UPPER_ROWS = """and.b32 %r20, %r1, 7; shl.b32 %r21, %r20, 5; shr.u32 %r22, %r1, 3; and.b32 %r22, %r22, 1;
    shl.b32 %r22, %r22, 4; add.s32 %r21, %r21, %r22;"""
LEFT_COLUMNS = "and.b32 %r20, %r1, 15; shl.b32 %r21, %r20, 5;"
PRODUCT = """
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r14, %r15, %r16, %r17}, [%r11+4096];
    ldmatrix.sync.aligned.m8n8.x2TRANS.shared.b16 {%r18, %r19}, [%r21+4096]; mov.b32 %r30, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r24, %r25, %r26, %r27}, {%r14, %r15, %r16, %r17}, {%r18, %r19},
        {%r30, %r30, %r30, %r30};"""


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_product_and_layouts(transposed):
    """Of a matrix with a part of itself, transposed or not, so that operands or rows and columns that are mixed up show."""
    matrix = np.random.default_rng(2).standard_normal((16, 16)).astype(np.float16)
    words = matrix.reshape(-1).view(np.uint32)
    stores = " ".join(f"@%p1 st.shared.b32 [{4096 + 4 * i}], {word};" for i, word in enumerate(words))
    loads = (LEFT_COLUMNS if transposed else UPPER_ROWS) + PRODUCT.replace("TRANS", ".trans" if transposed else "")
    result, lane = np.zeros((16, 8), np.float32), np.arange(32)
    for part in range(4):  # an accumulator at a time
        body = f"setp.eq.u32 %p1, %r1, 0; {stores} bar.sync 0; {PLACES} {loads} mov.b32 %r6, %r{24 + part};"
        result[lane // 4 + 8 * (part // 2), lane % 4 * 2 + part % 2] = run(body)[0][:32].view(np.float32)
    right = matrix[:, :8] if transposed else matrix[:8].T
    np.testing.assert_allclose(result, matrix.astype(np.float64) @ right.astype(np.float64), rtol=1e-5, atol=1e-5)


TF32 = """mov.b32 %r7, 0; mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r10, %r11, %r12, %r13}, {%r4, %r7, %r7, %r4},
    {%r4, %r7}, {%r7, %r7, %r7, %r7}; mov.b32 %r6, %r10;"""


def test_product_of_tf32_numbers():
    given = np.random.default_rng(3).standard_normal(128).astype(np.float32)
    with pytest.raises(Finding, match="no TF32 number"):
        run(TF32, given)
    rounded = (given.view(np.uint32) & 0xFFFFE000).view(np.float32)
    numbers = rounded.reshape(4, 8, 4).astype(np.float64)  # rows 0 to 7, columns 0 to 3; of the right factor the transpose
    expected = (numbers @ numbers.transpose(0, 2, 1))[:, :, ::2].reshape(-1)
    np.testing.assert_allclose(run(TF32, rounded)[0].view(np.float32), expected, rtol=1e-6, atol=1e-6)


def test_counts_of_a_loop_with_products():
    body = """mov.b32 %r6, 0; mov.b32 %r7, 0;
    $L1: mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r24, %r25, %r26, %r27}, {%r6, %r6, %r6, %r6}, {%r6, %r6},
        {%r6, %r6, %r6, %r6};
    add.s32 %r7, %r7, 1; setp.lt.u32 %p1, %r7, 5; @%p1 bra $L1;"""
    machine = run(body)[1]
    counts = executed(machine.kernel, machine.issued, 4)
    assert counts == (13, 5 * 4, 2)
    assert counts.around == pytest.approx(15 / 35)
