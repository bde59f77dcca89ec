"""Compile every Triton kernel for the GPUs we support, without a GPU; print registers and spills.

    python tests/kernels/compile_kernels.py [80 90 100]

for these architectures: all variants for sm_90 and compile_gluon.py's, the common ones for the others. Not in the
tests' own process, which interprets the kernels. Fails where the common forward kernel spills on sm_90, and where
ptxas warns that it could not overlap matrix products with anything else (C75xx).
"""

import contextlib
import io
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sbeval.kernels import fire_triton, stick_breaking_decode, stick_breaking_triton

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# types of pointers that are not those of q
FLOAT32 = {"BIAS", "REMAINDER", "DREMAINDER", "DBIAS", "STATE", "DELTA", "PARTS", "REMAINDERS", "LEFT"}
FLOAT32 |= {"C", "RATE", "TABLE", "LSE", "DSUMS", "DRATE", "DC"}
INT32 = {"STOP", "REACH", "CU_SEQLENS", "BLOCKS", "FORWARD_BLOCKS", "STARTS", "LENGTHS"}
KERNELS: dict[str, tuple[ModuleType, str]] = {
    **{f"stick_breaking {name}": (stick_breaking_triton, name) for name in ("forward", "query", "key")},
    **{f"stick_breaking {name}": (stick_breaking_decode, name) for name in ("decode", "combine")},
    **{f"fire {name}": (fire_triton, name) for name in ("forward", "query", "key")},
}
ARCHITECTURES = (80, 90, 100)
# bytes of stack that are no spill worth the name
STACK = 16


@dataclass(frozen=True)
class Variant:
    """A kernel as some launch uses it. skip: with an epsilon, as in training."""

    kernel: str
    architecture: int
    dtype: torch.dtype = torch.bfloat16
    dim: int = 64
    packed: bool = False
    skip: bool = True

    def __str__(self) -> str:
        name = NAMES[self.dtype]
        flags = "".join(flag if on else "-" for flag, on in (("p", self.packed), ("s", self.skip)))
        return f"{self.kernel:24} {self.architecture:>3} {name} {self.dim:>3} {flags}"


def variants(kernel: str, architecture: int) -> list[Variant]:
    """The common sizes, and on sm_90 what else is launched in 16 bits, all code paths and the largest head."""
    common = Variant(kernel, architecture)
    found = [common, replace(common, dim=128, packed=True)]
    if architecture != 90:
        return found
    found += [replace(common, packed=True), replace(common, dim=128)]
    if kernel in ("stick_breaking forward", "stick_breaking decode"):
        found += [replace(variant, skip=False) for variant in found]
    found += [replace(common, dim=256), replace(common, dtype=torch.float16, dim=50, packed=True)]
    return found + [replace(common, dtype=torch.float32, packed=True), replace(common, dtype=torch.float32, dim=256)]


def constants(variant: Variant) -> dict[str, Any]:
    """What is a constant in the launch of a variant; absent tensors are None."""
    module, name = KERNELS[variant.kernel]
    bounded = variant.packed and name == "decode"
    found: dict[str, Any] = {
        "GROUP": 2, "D": variant.dim, "CURRENT": 0, "WIDTH": 64, "VARLEN": variant.packed,
        "SKIP": variant.skip, "EXACT": variant.dtype == torch.float32, "OVERLAP": variant.architecture >= 90,
    }  # fmt: skip
    if name in ("query", "key"):
        found["FORWARD_M"] = module.tiles("forward", variant.dim, variant.dtype)["BLOCK_M"]
    absent = {"RESIDUAL"} if variant.dtype == torch.float32 else set()
    absent |= set() if variant.packed else {"CU_SEQLENS", "BLOCKS", "FORWARD_BLOCKS", "SLOTS", "BIAS"}
    absent |= set() if bounded else {"STARTS", "LENGTHS"}
    absent |= set() if variant.skip else {"LEFT"}
    return found | dict.fromkeys(absent)


def compile_one(variant: Variant) -> tuple[Any, str]:
    """Compile a kernel as the launcher would; also returns what ptxas says of it."""
    module, name = KERNELS[variant.kernel]
    kernel = getattr(module, f"{name}_kernel")
    options = module.tiles(name, variant.dim, variant.dtype)
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    values = {key: value for key, value in (constants(variant) | options).items() if key in kernel.arg_names}
    signature, aligned = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument] = "constexpr"
        elif argument in ("scale", "epsilon"):
            signature[argument] = "fp32"
        elif argument.isupper():
            signature[argument] = "*" + _type(argument, variant.dtype)
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
            if argument.startswith("stride") and variant.dim % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    # from a cache nothing would be said
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled = triton.compile(source, target=GPUTarget("cuda", variant.architecture, 32), options=launch)
    return compiled, said.getvalue()


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument in FLOAT32:
        return "fp32"
    return "i32" if argument in INT32 else "i64" if argument == "SLOTS" else NAMES[dtype]


def measured(variant: Variant) -> tuple[int, int, int, str]:
    """Registers, bytes of stack and of shared memory of a kernel, and the warning that it is serialised."""
    compiled, said = compile_one(variant)
    registers, stack = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes stack frame", said)
    assert registers and stack, said
    serialised = re.search(r"^.*C75\d\d.*$", said, re.M)
    return int(registers[1]), int(stack[1]), compiled.metadata.shared, serialised[0] if serialised else ""


def main() -> None:
    print(f"{'kernel':24} {'sm':>3} type   D  registers stack shared   (p: packed, s: skips)")
    architectures = [int(name) for name in sys.argv[1:]] or ARCHITECTURES
    cases = [case for kernel in KERNELS for architecture in architectures for case in variants(kernel, architecture)]
    failures = []
    command = [sys.executable, str(Path(__file__).with_name("compile_gluon.py"))]
    gluon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if 90 in architectures else None
    with ProcessPoolExecutor() as pool:
        for variant, (registers, stack, shared, serialised) in zip(cases, pool.map(measured, cases), strict=True):
            print(f"{variant} {registers:>9} {stack:>5} {shared:>6} {serialised}", flush=True)
            if serialised:
                failures.append(f"{variant}: {serialised}")
            if variant == Variant("stick_breaking forward", 90) and stack > STACK:
                failures.append(f"{variant}: {stack} bytes of stack, more than {STACK}: it spills")
    if gluon:
        print(gluon.communicate()[0], end="")
        if gluon.returncode:
            failures.append("Gluon: see above")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
