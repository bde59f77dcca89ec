"""Where things run and how fast that place is."""

import time

import torch

from sbeval.errors import InputError, choose

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# dense bfloat16 matrix products, TFLOP/s, by the vendor's datasheets
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "H800": 989, "L40S": 362, "B200": 2250}


def pick(name: str | None) -> torch.device:
    """The device called `name` (`cpu`, `cuda`, `cuda:1`); None is the GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    choose("device", kind, ("cpu", "cuda"))
    if colon and not (index.isascii() and index.isdigit()):
        raise InputError(f"unknown device {name!r}; a device is cpu, cuda or cuda:0, cuda:1, ...")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {name}: PyTorch {torch.__version__} sees no GPU here; leave --device out to run on cpu"
        )
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    return torch.device(name)


def pick_dtype(name: str | None, device: torch.device) -> str:
    """The dtype of matrix products: as named, by default bfloat16 on a GPU and float32 on a CPU."""
    if name is None:
        return "bfloat16" if device.type == "cuda" else "float32"
    return choose("dtype", name, DTYPES)


def describe(device: torch.device) -> str:
    """The device as a result table names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Context that runs matrix products in `dtype`."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def peak_flops(device: torch.device) -> float | None:
    """Datasheet FLOP/s of dense bfloat16 products; None where we know none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if key in name), None)


def measured_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of a matrix product of middling size, measured now in under a second, to estimate costs from."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    times: list[float] = []
    # the best of many: other work on the machine disturbs single ones
    while sum(times) < 0.3 or len(times) < 5:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
