"""Operations of matrix products that hide in calls of kernels, which XLA counts as nothing.

Read are cuBLAS products, cuDNN's fused attention (CUDA) and Splash attention (TPU, from
`jax.experimental.pallas.ops.tpu.splash_attention`). A multiply-add is two operations.
"""

import math
import re

from videollm_mod_jax.training.hlo_text import Computation, Instruction, arrays, sizes_of

_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
_CUDNN_ATTENTION = "__cudnn$fmha"
_MOSAIC = "tpu_custom_call"

# Products of queries with keys, or as large, that a kernel computes: forward the scores and the
# weighted values; backward the scores anew and four gradients. Without the fused kernel Splash
# computes the scores and their gradient twice: once for dq, once for dk and dv.
_FORWARD, _BACKWARD, _DQ, _DKV = 2, 5, 3, 4

# Move, mark, sort or draw; no products.
_WITHOUT_PRODUCTS = re.compile(
    r"AllocateBuffer|AssumeGatherIndicesInBound|GatherScatterIndicesBitpacked|"
    r"MoveToHost|MoveToDevice|PinToDevice\w*|Pin|Unpin|"
    r"CreateBuffer|Sharding|SPMD\w*|TopK|X64\w*|xla\.gpu\.ext\.\w+|__gpu\$TopK|__cub\$\w+|"
    r"cu_threefry2x32\w*|annotate_device_placement|SliceToDynamic|PadToStatic"
)


def kernel_flops(within: Computation, call: Instruction) -> int | None:
    """Operations of a `custom-call`; None where it is unknown, and may hold products.

    ```
    splash_mha_fwd, q bf16[2,8,1024,128], k bf16[2,2,1024,128]
        2 products of 2 * 8 * (1024 * 1025 / 2) pairs with 128 numbers each
    ```

    Attention with as many keys as queries is taken for causal: the pairs on and below the diagonal
    count. Kernels compute whole blocks along it, so they do somewhat more.
    """
    target = kernel_target(call)
    if target in _CUBLAS:
        lhs = sizes_of(within.instructions[call.operands[0]].shape)
        contracted = _numbers(call.attributes, "lhs_contracting_dimensions")
        return 2 * math.prod(sizes_of(call.shape)) * math.prod(lhs[i] for i in contracted)
    if target.startswith(_CUDNN_ATTENTION):
        B, H, T, U = _numbers(call.attributes, "dimensions")
        width = sizes_of(within.instructions[call.operands[0]].shape)[-1]
        products = _BACKWARD if target.endswith("Backward") else _FORWARD
        return products * 2 * B * H * _pairs(T, U) * width
    if target == _MOSAIC:
        kernel = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", kernel_name(call))
        return kernel and _splash_flops(within, call, kernel[1])
    return 0 if _WITHOUT_PRODUCTS.fullmatch(target) else None


def kernel_target(call: Instruction) -> str:
    """What runs a `custom-call`."""
    return re.search(r'custom_call_target="([^"]*)"', call.attributes)[1]


def kernel_name(call: Instruction) -> str:
    """Where a `custom-call` comes from in the traced program; its own name if nobody says."""
    traced = re.search(r'metadata=\{[^}]*op_name="([^"]*)"', call.attributes)
    return traced[1] if traced else call.name


def _splash_flops(within: Computation, call: Instruction, kernel: str) -> int:
    """Operands begin with tables of the mask in int8 or int32, then q [.., H, T, E] and k, v."""
    floats = [
        sizes
        for shape in (within.instructions[name].shape for name in call.operands)
        for _, sizes, _ in arrays(shape)
        if shape.startswith(("bf16", "f32", "f16")) and len(sizes) >= 2
    ]
    (*heads, T, width), (*_, U, _) = floats[:2]
    products = {"fwd": _FORWARD, "dq": _DQ, "dkv": _DKV}[kernel]
    # The fused kernel leaves dq as well, one partial sum per block of keys.
    if kernel == "dkv" and any(
        len(sizes) == len(heads) + 3 and sizes[-2:] == (T, width)
        for _, sizes, _ in arrays(call.shape)
    ):
        products = _BACKWARD
    return products * 2 * math.prod(heads) * _pairs(T, U) * width


def _pairs(queries: int, keys: int) -> int:
    return queries * (queries + 1) // 2 if queries == keys else queries * keys


def _numbers(attributes: str, key: str) -> list[int]:
    """The first list of that name in a kernel's settings: `"dimensions": ["2", "8"]`."""
    found = re.search(rf'"{key}": ?\[([^\]]*)\]', attributes)
    return [int(number) for number in re.findall(r"\d+", found[1])]
