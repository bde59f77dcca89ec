"""Compile every Triton kernel for the GPUs we support, without a GPU; print registers and spills.

    python tests/kernels/compile_kernels.py [80 90 100] [--first]

for these architectures, all variants or the first. A process of its own, since the tests' interprets the kernels.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sbeval.kernels import stick_breaking_triton as kernels

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FLOAT32 = {"REMAINDER", "DREMAINDER", "DK", "DV"}
INT32 = {"COUNT", "TICKET", "CU_SEQLENS", "BLOCKS", "KEY_BLOCKS"}
ARCHITECTURES = (80, 90, 100)


def variants() -> list[tuple[torch.dtype, int, bool]]:
    """(dtype, head size, packed): all code paths, the common sizes, the largest head."""
    return [
        (torch.bfloat16, 64, False),
        (torch.bfloat16, 128, True),
        (torch.bfloat16, 256, False),
        (torch.float16, 50, True),
        (torch.float32, 64, True),
        (torch.float32, 256, False),
    ]


def compile_one(kernel: Any, dtype: torch.dtype, dim: int, packed: bool, architecture: int) -> Any:
    """Compile one kernel as the launcher would; the result has the cubin and its shared memory."""
    options = kernels.tiles(dim, dtype, backward=kernel is kernels.backward_kernel)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants: dict[str, Any] = {
        "GROUP": 2, "D": dim, "CURRENT": 0, "VARLEN": packed, "EXACT": dtype == torch.float32, **options,
    }  # fmt: skip
    if not packed:
        constants |= dict.fromkeys({"CU_SEQLENS", "BLOCKS", "KEY_BLOCKS"} & set(kernel.arg_names))
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale", "log2_epsilon"):
            signature[name] = "fp32"
        elif name.isupper():
            signature[name] = "*" + ("fp32" if name in FLOAT32 else "i32" if name in INT32 else NAMES[dtype])
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.startswith("stride") and dim % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (where spills go) by the bundled cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def main() -> None:
    print(f"{'kernel':16} {'sm':>3} {'dtype':14} {'D':>3} packed registers stack shared")
    architectures = [int(name) for name in sys.argv[1:] if name.isdigit()] or ARCHITECTURES
    chosen = variants()[:1] if "--first" in sys.argv else variants()
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        for dtype, dim, packed in chosen:
            for architecture in architectures:
                compiled = compile_one(kernel, dtype, dim, packed, architecture)
                registers, stack = usage(compiled.asm["cubin"])
                variant = f"{kernel.__name__:16} {architecture:>3} {dtype!s:14} {dim:>3} {packed!s:6}"
                print(f"{variant} {registers:>9} {stack:>5} {compiled.metadata.shared:>6}", flush=True)


if __name__ == "__main__":
    main()
