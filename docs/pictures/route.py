# SPDX-License-Identifier: BSD-3-Clause
"""Which path a call takes: csrc/route.cpp, describe.cpp, cpu/dispatch.cpp and cuda/select.cpp in their order."""

from canvas import Picture

TOP = 114  # of the first questions
MAIN = 500  # left edge of the questions of CUDA


def draw() -> Picture:
    picture = Picture(
        960,
        570,
        "Which path a call takes",
        "On a CPU, few queries take a path of their own, others the kernels in which a lane is a query. On CUDA, "
        "16-bit calls up to head_dim 128 take tensor cores, float32 and float64 plain kernels, wider heads "
        "PyTorch's attention or the formula. More than four batch dimensions after merging take the formula.",
    )
    picture.text(24, 34, "Which path a call takes", 15, bold=True)
    picture.text(24, 54, "explain() asks the same functions", 12, "soft")
    picture.box(310, 24, 170, 40, "gated_attention(...)", "query", 13)
    _cpu(picture)
    _cuda(picture)
    _kernels(picture)
    _formula(picture)
    return picture


def _question(picture: Picture, x: float, y: float, text: str, width: float = 210) -> None:
    picture.box(x, y, width, 46, text, "plain", 12)


def _cpu(picture: Picture) -> None:
    picture.arrow([(310, 44), (290, 44), (290, 76), (129, 76), (129, TOP)], "plain")
    picture.text(140, TOP - 8, "tensors on a CPU", 12, "query-ink", bold=True)
    _question(picture, 24, TOP, "batch dimensions left after|merging: more than four?")
    picture.arrow([(129, TOP + 46), (129, 214)], "plain")
    picture.text(138, 190, "no", 12, "soft")
    _question(picture, 24, 214, "queries of a key head: at most|4, or 8 of head_dim 64 or more?")
    picture.arrow([(76, 260), (76, 312)], "plain")
    picture.text(68, 290, "yes", 12, "soft", "end")
    picture.arrow([(184, 260), (184, 312)], "plain")
    picture.text(192, 290, "no", 12, "soft")
    picture.box(24, 312, 100, 62, "few queries:|a lane is a|dimension", "value", 12)
    picture.box(134, 312, 100, 62, "a lane is|a query", "value", 12)
    picture.text(129, 396, "in AVX-512 BF16, AVX-512,|AVX2 or portable code", 12, "soft", "middle")


def _cuda(picture: Picture) -> None:
    picture.arrow([(480, 44), (500, 44), (500, 76), (596, 76), (596, TOP)], "plain")
    picture.text(608, TOP - 8, "tensors on CUDA", 12, "query-ink", bold=True)
    _question(picture, MAIN, TOP, "head_dim of the query|above 128?", 192)
    picture.arrow([(596, TOP + 46), (596, 214)], "plain")
    picture.text(605, 190, "no", 12, "soft")
    _question(picture, MAIN, 214, "batch dimensions left after|merging: more than four?", 192)
    picture.arrow([(692, TOP + 23), (724, TOP + 23)], "plain")
    picture.text(706, TOP + 16, "yes", 11, "soft", "middle")
    asked = 'masked_rows "zero", one head_dim,|a bias without mask or gradient,|not deterministic, no torch.func?'
    picture.box(724, TOP - 8, 222, 62, asked, "plain", 11)
    picture.arrow([(760, TOP + 54), (760, 237), (692, 237)], "plain")
    picture.text(768, 206, "no", 12, "soft")
    picture.arrow([(868, TOP + 54), (868, 214)], "plain")
    picture.text(876, 190, "yes", 12, "soft")
    picture.box(792, 214, 152, 62, "PyTorch's attention,|then gate_output", "gate", 12)


def _kernels(picture: Picture) -> None:
    picture.arrow([(596, 260), (596, 312)], "plain")
    picture.text(605, 290, "no", 12, "soft")
    _question(picture, MAIN, 312, "dtype? head_dim of|query and value?", 192)
    for x, when, name in (
        (330, "float32, float64", "plain kernel:|multiply-adds"),
        (534, "16 bits", "tensor cores"),
        (738, "16 bits, odd layout|or scale", "general kernel|on tensor cores"),
    ):
        middle = x + 62
        bend = [(596, 358), (596, 384), (middle, 384), (middle, 428)] if middle != 596 else [(596, 358), (596, 428)]
        picture.arrow(bend, "plain")
        picture.text(middle + 8, 403, when, 11.5, "soft")
        picture.box(x, 428, 124, 46, name, "key", 12)


def _formula(picture: Picture) -> None:
    picture.box(276, 206, 150, 62, "the formula, which|allocates Q x K", "bias", 12)
    picture.arrow([(234, TOP + 23), (351, TOP + 23), (351, 206)], "plain")
    picture.text(242, TOP + 16, "yes", 12, "soft")
    picture.arrow([(MAIN, 237), (426, 237)], "plain")
    picture.text(MAIN - 8, 230, "yes", 12, "soft", "end")
    picture.arrow([(MAIN, 335), (351, 335), (351, 268)], "plain")
    picture.text(MAIN - 8, 328, "above 128, or", 11.5, "soft", "end")
    picture.text(MAIN - 8, 352, "16 bits below sm_80", 11.5, "soft", "end")
    said = "Also the formula: a backward with create_graph=True, torch.func's derivatives, forward mode."
    picture.text(24, 510, said, 12, "soft")
    picture.text(24, 530, "No elements or no keys: zeros, and no kernel.", 12, "soft")
    picture.text(
        24, 550, "The CUDA kernels pass their tests in an emulator; they have not run on a GPU.", 12, "gate-ink", bold=True
    )
