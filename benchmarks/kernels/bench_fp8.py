"""FP8 products and roundings against the limits of the card: `python benchmarks/kernels/bench_fp8.py [part ...]`.

Prints a JSON line a measurement and a table last; `--out FILE` appends the lines to a file. Parts: few (1 to 16 tokens,
read speed), many (cuBLAS by row and by tensor, Triton by row and by block), rounding (with norm or gate).
"""

# ruff: noqa: B023 - every closure here is called within the turn of the loop that made it
import argparse

import torch
from bench_kernels import LINEARS, rand
from timing import Report, copies_for, microseconds
from torch import Tensor

from argosy.kernels import activation, fp8_gemm, fp8_gemv, fp8_ops, fp8_quantize, fp8_reference, ops, rms_norm
from argosy.kernels.fp8_reference import Fp8Rows, Fp8Weight, Rounding

BF16 = torch.bfloat16
LAYERS = {name: shape for name, shape in LINEARS.items() if name.startswith("8b") and "head" not in name}


def random_weight(num_out: int, num_in: int, block: tuple[int, int] | None = None) -> Fp8Weight:
    return fp8_reference.quantize_weight(rand(num_out, num_in) / 64, block)


def weights_of(num_out: int, num_in: int, block: tuple[int, int] | None, at_most: int) -> list[Fp8Weight]:
    """Enough copies that none is found in a cache; the same numbers, since making them takes longer than measuring."""
    first = random_weight(num_out, num_in, block)
    count = copies_for(num_out * num_in, at_most)
    return [Fp8Weight(first.values_OI.clone(), first.scale.clone(), block) for _ in range(count)]


def few(report: Report) -> None:
    """The fused kernel at its sizes, and cuBLAS over rounded activations with everything that it needs around it."""
    for name, (num_in, num_out, gated) in LAYERS.items():
        adds, norm = name.endswith((" o", "down")), rand(num_in)
        for block in (None, (128, 128)):
            weights = weights_of(num_out, num_in, block, 30)
            for tokens in (1, 8, 16):
                x = rand(tokens, num_in)
                residual = rand(tokens, num_out) if adds else None
                rounding = Rounding(block[1] if block else 0)

                def fused(w: Fp8Weight) -> object:
                    return fp8_gemv.fused_linear(
                        x, w, norm_weight_I=None if adds else norm, residual_TO=residual, gated=gated
                    )

                def rounded(w: Fp8Weight) -> object:
                    if adds:
                        return residual.add_(fp8_ops.linear(fp8_ops.quantize_rows(x, rounding), w, None, BF16))
                    y = fp8_ops.linear(fp8_ops.norm_and_quantize(x, norm, 1e-6, rounding), w, None, BF16)
                    return ops.silu_and_mul(y) if gated else y

                for label, run in {"fp8_gemv": fused, "round + product": rounded}.items():
                    us, spread = microseconds([lambda w=w, run=run: run(w) for w in weights])
                    case = f"{name} {num_in}x{num_out} tokens {tokens}{' blocks' if block else ''}"
                    report.add(label, case, us, spread, TBps=round(num_in * num_out / us / 1e6, 2))


def by_tensor(rows: Fp8Rows, weight: Fp8Weight) -> Tensor:
    """cuBLAS with one scale a side."""
    return torch._scaled_mm(
        rows.values_TI, weight.values_OI.t(), scale_a=rows.scale_TG[:1, :1], scale_b=weight.scale[:1].view(1, 1),
        out_dtype=BF16, use_fast_accum=True,
    )  # fmt: skip


def by_block(rows: Fp8Rows, weight: Fp8Weight) -> Tensor:
    """cuBLAS with scales by group of 128 and by block of 128 x 128, where torch and the card have it."""
    scale_b = weight.scale.t()
    return torch._scaled_mm(
        rows.values_TI, weight.values_OI.t(), scale_a=rows.scale_TG, scale_b=scale_b, out_dtype=BF16
    )


def many(report: Report) -> None:
    """Products alone."""
    for name, (num_in, num_out, _) in LAYERS.items():
        by_row, blocks = (weights_of(num_out, num_in, block, 8) for block in (None, (128, 128)))
        for tokens in (32, 64, 128, 256, 512, 2048, 8192):
            x = rand(tokens, num_in)
            rows, grouped = (fp8_quantize.quantize(x, Rounding(group)) for group in (0, 128))
            runs = {
                "cublas by row": (by_row, lambda w: fp8_gemm.library_linear(rows, w, None, BF16)),
                "cublas by tensor": (by_row, lambda w: by_tensor(rows, w)),
                "triton by row": (by_row, lambda w: fp8_gemm.triton_linear(rows, w, None, BF16)),
                "triton by block": (blocks, lambda w: fp8_gemm.triton_linear(grouped, w, None, BF16)),
                "cublas by block": (blocks, lambda w: by_block(grouped, w)),
            }
            for label, (weights, run) in runs.items():
                try:
                    us, spread = microseconds([lambda w=w: run(w) for w in weights], replays=3)
                except Exception as error:  # not every torch and card has each
                    print("skipped", label, name, tokens, " ".join(str(error).split())[:200], flush=True)
                    continue
                report.add(
                    label, f"{name} {num_in}x{num_out} tokens {tokens}", us, spread,
                    TFLOPs=round(2 * tokens * num_in * num_out / us / 1e6, 1),
                    TBps=round(num_in * num_out / us / 1e6, 2),
                )  # fmt: skip


def rounding(report: Report) -> None:
    """Each beside the kernel that writes 16 bits instead."""
    weight = rand(4096)
    for tokens in (1, 64, 256, 8192):
        x, residual, wide = rand(tokens, 4096), rand(tokens, 4096), rand(tokens, 28672)
        kept = Rounding()
        cases = {
            "round 4096": lambda: fp8_quantize.quantize(x, kept),
            "add, norm, round 4096": lambda: fp8_ops.norm_and_quantize(x, weight, 1e-6, kept, residual),
            "add, norm 4096": lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-6),
            "gate, round 2 x 14336": lambda: fp8_ops.gate_and_quantize(wide, kept),
            "gate 2 x 14336": lambda: activation.silu_and_mul(wide),
            "gate, round by 128, 2 x 14336": lambda: fp8_ops.gate_and_quantize(wide, Rounding(128)),
        }
        for name, run in cases.items():
            us, spread = microseconds([run], launches=50, replays=3)
            report.add("rounding", f"{name} tokens {tokens}", us, spread)


PARTS = {"few": few, "many": many, "rounding": rounding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts; all without")
    parser.add_argument("--out", help="append the JSON lines to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report(arguments.out)
    for part in arguments.parts or PARTS:
        PARTS[part](report)
        torch.cuda.empty_cache()
    report.table()


if __name__ == "__main__":
    main()
