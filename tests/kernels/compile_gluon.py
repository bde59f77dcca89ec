"""Compile the Gluon kernels for sm_90a without a GPU, as compile_kernels does the others; print registers and spills.

Fails where ptxas says that it serialises wgmma (warnings C7510 and on).
"""

import contextlib
import io
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sbeval.kernels import stick_breaking_hopper, stick_breaking_hopper_backward

FLOAT32 = {"BIAS", "REMAINDER", "DBIAS", "DELTA", "PARTS"}
INT32 = {"STOP", "TICKET", "DQ_COUNT", "CU_SEQLENS", "BLOCKS", "PLAN", "TILES"}
INT64 = {"STATE", "BY_LENGTH"}
PACKING = ("CU_SEQLENS", "BLOCKS", "BY_LENGTH", "TILES")
KERNELS = {
    "forward": (stick_breaking_hopper.forward_kernel, stick_breaking_hopper.CONFIGS),
    "backward": (stick_breaking_hopper_backward.backward_kernel, stick_breaking_hopper_backward.CONFIGS),
}
# head size, packed and with a bias; skipping is on, as it is by default
CASES = [(name, dim, whole) for name in KERNELS for dim in (64, 128) for whole in (False, True)]


def _descriptor(dtype: str, block: list[int], bits: int = 16) -> str:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=len(block))
    return f"tensordesc<{dtype}{block},{layout!r}>"


def compile_one(name: str, dim: int, whole: bool) -> Any:
    """Compile a kernel as the launcher would."""
    kernel, configs = KERNELS[name]
    dtype = "fp16" if whole else "bf16"
    constants = {"GROUP": 2, "D": dim, "CURRENT": 0, "VARLEN": whole, "SKIP": True, "LOOK": 16, **configs[dim]}
    constants |= {"PARTS": None} if whole else dict.fromkeys((*PACKING, "BIAS", "DBIAS"))
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = dict.fromkeys(("scale", "epsilon"), "fp32")
    types |= dict.fromkeys(("q_desc", "do_desc", "out_desc", "residual_desc"), _descriptor(dtype, [1, 64, 1, dim]))
    types["dq_desc"] = _descriptor("fp32", [dim, 32], 32)
    types |= dict.fromkeys(("k_desc", "v_desc"), _descriptor(dtype, [1, 8, 4, 2, dim]))
    types |= dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(INT32, "*i32") | dict.fromkeys(INT64, "*i64")
    types |= dict.fromkeys((x for x in kernel.arg_names if x.isupper() and x not in types), f"*{dtype}")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, type_) in enumerate(signature.items())
        if type_.startswith("*") or name.startswith("stride")
    }
    groups = configs[dim].get("NWG", 2)
    options = {"num_warps": 4, "maxnreg": stick_breaking_hopper.REGISTERS[groups]}
    source = GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def measured(case: tuple[str, int, bool]) -> tuple[str, str, str, int, list[str]]:
    """Registers, bytes of stack and of stores to it, shared memory, and warnings that wgmma is serialised."""
    # from a cache nothing would be said
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = compile_one(*case)
    said = log.getvalue()
    use = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert use is not None and registers is not None, said
    return registers[1], use[1], use[2], compiled.metadata.shared, re.findall(r"C75\d\d", said)


def main() -> None:
    print(f"{'Gluon, sm_90a':16} {'D':>3} packed registers stack spilled shared")
    with ProcessPoolExecutor() as pool:
        for (name, dim, whole), found in zip(CASES, pool.map(measured, CASES), strict=True):
            registers, stack, spilled, shared, warnings = found
            print(f"{name:16} {dim:>3} {whole!s:6} {registers:>9} {stack:>5} {spilled:>7} {shared:>6}", flush=True)
            if warnings:
                sys.exit(f"ptxas serialises wgmma in {name}, D = {dim}: {' '.join(sorted(set(warnings)))}")


if __name__ == "__main__":
    main()
