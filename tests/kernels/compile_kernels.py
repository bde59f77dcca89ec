"""Compile every Triton kernel for the GPUs we support, without a GPU; print registers and spills.

    python tests/kernels/compile_kernels.py [80 90 100]

for these architectures: all variants for sm_90 and compile_gluon.py's, the common ones for the others. Not in the
tests' own process, which interprets the kernels. Fails where the common forward kernel spills on sm_90.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sbeval.kernels import stick_breaking_triton as kernels

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FLOAT32 = {"BIAS", "REMAINDER", "DREMAINDER", "DBIAS", "STATE", "DELTA"}
INT32 = {"STOP", "REACH", "CU_SEQLENS", "BLOCKS", "FORWARD_BLOCKS", "STARTS", "LENGTHS"}
KERNELS = {"forward": kernels.forward_kernel, "query": kernels.query_kernel, "key": kernels.key_kernel}
ARCHITECTURES = (80, 90, 100)
# bytes of stack that are no spill worth the name
STACK = 16


def variants(architecture: int) -> list[tuple[torch.dtype, int, bool]]:
    """(dtype, head size, packed): the common sizes, and on sm_90 all code paths and the largest head."""
    found = [
        (torch.bfloat16, 64, False),
        (torch.bfloat16, 128, True),
        (torch.bfloat16, 256, False),
        (torch.float16, 50, True),
        (torch.float32, 64, True),
        (torch.float32, 256, False),
    ]
    return found if architecture == 90 else found[:2]


def compile_one(name: str, dtype: torch.dtype, dim: int, packed: bool, architecture: int) -> Any:
    """Compile one kernel as the launcher would; the result has the cubin and its shared memory."""
    kernel = KERNELS.get(name, kernels.forward_kernel)
    options = kernels.tiles(name, dim, dtype)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    decode = name == "decode"
    constants: dict[str, Any] = {
        "GROUP": 2, "PACK": 2 if decode else 1, "D": dim, "CURRENT": 0, "VARLEN": packed and not decode,
        "BOUNDED": packed and decode, "SPLIT": decode, "SKIP": True, "EXACT": dtype == torch.float32,
        "FORWARD_M": kernels.tiles("forward", dim, dtype)["BLOCK_M"], **options,
    }  # fmt: skip
    absent = {"RESIDUAL"} if dtype == torch.float32 or decode else set()
    absent |= set() if packed else {"CU_SEQLENS", "BLOCKS", "FORWARD_BLOCKS", "SLOTS", "STARTS", "LENGTHS", "BIAS"}
    absent |= {"CU_SEQLENS", "BLOCKS", "STOP"} if decode else {"STARTS", "LENGTHS"}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    constants |= dict.fromkeys(absent & set(kernel.arg_names))
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale", "epsilon"):
            signature[name] = "fp32"
        elif name.isupper():
            signature[name] = "*" + _type(name, dtype, decode)
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.startswith("stride") and dim % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)


def _type(name: str, dtype: torch.dtype, decode: bool) -> str:
    if name in FLOAT32 or (decode and name == "O"):
        return "fp32"
    return "i32" if name in INT32 else "i64" if name == "SLOTS" else NAMES[dtype]


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


def measured(case: tuple[str, int, torch.dtype, int, bool]) -> tuple[int, int, int]:
    """Registers, bytes of stack and shared memory of a kernel."""
    name, architecture, dtype, dim, packed = case
    compiled = compile_one(name, dtype, dim, packed, architecture)
    return *usage(compiled.asm["cubin"]), compiled.metadata.shared


def main() -> None:
    print(f"{'kernel':16} {'sm':>3} {'dtype':14} {'D':>3} packed registers stack shared")
    architectures = [int(name) for name in sys.argv[1:]] or ARCHITECTURES
    cases = [
        (name, architecture, *variant)
        for name in ("forward", "query", "key", "decode")
        for architecture in architectures
        for variant in variants(architecture)
    ]
    with ProcessPoolExecutor() as pool:
        for case, (registers, stack, shared) in zip(cases, pool.map(measured, cases), strict=True):
            name, architecture, dtype, dim, packed = case
            variant = f"{name:16} {architecture:>3} {dtype!s:14} {dim:>3} {packed!s:6}"
            print(f"{variant} {registers:>9} {stack:>5} {shared:>6}", flush=True)
            if case[:4] == ("forward", 90, torch.bfloat16, 64) and stack > STACK:
                sys.exit(f"forward has {stack} bytes of stack on sm_90, more than {STACK}: it spills")
    if 90 in architectures:
        subprocess.run([sys.executable, Path(__file__).with_name("compile_gluon.py")], check=True)


if __name__ == "__main__":
    main()
