"""Compile the kernels for GPUs that need not be there: `python tests/compile_kernels.py`, not in the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Compute capability, type of the products, what is optional and there (a bias of the choice, dead tokens, a loss), and
# the form of the layer: routed, shared, units, top-K, sigmoid, renormalise.
CASES: list[tuple[int, str, bool, tuple[int, int, int, int, bool, bool]]] = [
    (80, "fp32", True, (23, 1, 12, 4, True, False)),
    (90, "bf16", False, (23, 1, 12, 4, False, True)),
    (90, "bf16", True, (254, 2, 128, 8, True, True)),
    (90, "bf16", True, (1, 0, 1, 1, False, False)),
]
OPTIONAL = ("choice_bias_E", "alive_T", "grad_sums_VX")
PRODUCTS = ("narrow_TN", "inputs_TM", "grad_inputs_TM", "grad_narrow_TN")
OTHERS = {"experts_TK": "*i64", "alive_T": "*i1", "tokens": "i32", "routed_bias_stride": "i32"}


def compiled(kernel: Any, capability: int, dtype: str, optional: bool, constants: dict[str, Any]) -> bytes:
    """Machine code of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(PRODUCTS, f"*{dtype}") | OTHERS
    absent = {} if optional else dict.fromkeys(name for name in OPTIONAL if name in kernel.arg_names)
    constants = constants | absent
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    target = GPUTarget("cuda", capability, 32)
    code: bytes = triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": True}).asm["cubin"]
    return code


def main() -> None:
    """Compile every case, and print what is spilled into memory."""
    import triton

    from mome_dist.moe.triton.experts import LayerForm
    from mome_dist.moe.triton.kernels import backward_kernel, forward_kernel

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for capability, dtype, optional, numbers in CASES:
        form = LayerForm(*numbers)
        for kernel in (forward_kernel, backward_kernel):
            code = compiled(kernel, capability, dtype, optional, form._asdict() | form.blocks() | {"views": 4})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(code)
                file.flush()
                usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
            figures = dict(re.findall(r"([A-Z]+):(\d+)", usage.stdout))
            spilled = int(figures["STACK"]) + int(figures["LOCAL"])
            words = f"spills {spilled} bytes" if spilled else "spills nothing"
            print(f"{kernel.__name__} sm_{capability} {dtype} {numbers}: {figures['REG']} registers, {words}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
