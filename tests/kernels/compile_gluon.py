"""Compile the Gluon kernels for sm_90a without a GPU, as compile_kernels does the others; print registers and spills.

Fails where ptxas says that it serialises wgmma (warnings C7510 and on).
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sbeval.kernels import stick_breaking_hopper

FLOAT32 = {"BIAS", "REMAINDER"}
INT32 = {"STOP", "TICKET", "CU_SEQLENS", "BLOCKS", "STOP_BLOCKS"}
PACKING = ("CU_SEQLENS", "BLOCKS", "STOP_BLOCKS")
# head size, packed and with a bias; skipping is on, as it is by default
CASES = [(dim, whole) for dim in (64, 128) for whole in (False, True)]


def _descriptor(dtype: str, block: list[int]) -> str:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return f"tensordesc<{dtype}{block},{layout!r}>"


def compile_forward(dim: int, whole: bool) -> Any:
    kernel, dtype = stick_breaking_hopper.forward_kernel, "fp16" if whole else "bf16"
    config = stick_breaking_hopper.CONFIGS[dim]
    constants: dict[str, Any] = {
        "GROUP": 2,
        "D": dim,
        "CURRENT": 0,
        "VARLEN": whole,
        "SKIP": True,
        "LOOK": 16,
        **config,
    }
    constants |= {} if whole else dict.fromkeys((*PACKING, "BIAS"))
    keys = _descriptor(dtype, [1, 8, 4, 2, dim])
    types = {"q_desc": _descriptor(dtype, [1, 64, 1, dim]), "k_desc": keys, "v_desc": keys}
    types |= {name: "fp32" for name in ("scale", "epsilon")}
    types |= (
        {"OUT": f"*{dtype}", "RESIDUAL": f"*{dtype}"} | dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(INT32, "*i32")
    )
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values()) if type_.startswith("*")}
    options = {"num_warps": 4, "maxnreg": stick_breaking_hopper.REGISTERS[config["NWG"]]}
    source = GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def assembled(ptx: str) -> str:
    """What ptxas says of it."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(tool), "-v", "--gpu-name=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        return str(subprocess.run(command, check=True, capture_output=True, text=True).stderr)


def measured(case: tuple[int, bool]) -> tuple[str, str, str, int, list[str]]:
    """Registers, bytes of stack and of stores to it, shared memory, and warnings that wgmma is serialised."""
    compiled = compile_forward(*case)
    said = assembled(compiled.asm["ptx"])
    use = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert use is not None and registers is not None, said
    return registers[1], use[1], use[2], compiled.metadata.shared, re.findall(r"C75\d\d", said)


def main() -> None:
    print(f"{'Gluon, sm_90a':16} {'D':>3} packed registers stack spilled shared")
    with ProcessPoolExecutor() as pool:
        for (dim, whole), found in zip(CASES, pool.map(measured, CASES), strict=True):
            registers, stack, spilled, shared, warnings = found
            print(f"{'forward':16} {dim:>3} {whole!s:6} {registers:>9} {stack:>5} {spilled:>7} {shared:>6}", flush=True)
            if warnings:
                sys.exit(f"ptxas serialises wgmma in forward, D = {dim}: {' '.join(sorted(set(warnings)))}")


if __name__ == "__main__":
    main()
