"""Products inside kernels, from what the compilers for TPUs and GPUs print of them."""

import pytest

from videollm_mod_jax.training import hlo

PAIRS = 1024 * 1025 // 2
PRODUCT = 2 * (2 * 8) * PAIRS * 128
"""Of queries with keys: 2 sequences of 8 heads, the causal half, 128 numbers each."""

SPLASH = """
HloModule m

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

ENTRY %main (q: bf16[2,8,1024,128], k: bf16[2,2,1024,128], v: bf16[2,2,1024,128], m: s8[1,2,2], l: f32[2,8,1,1024]) -> bf16[1024,1024] {
  %q = bf16[2,8,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,2,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[2,2,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %m = s8[1,2,2]{2,1,0} parameter(3)
  %l = f32[2,8,1,1024]{3,2,1,0} parameter(4)
  %kernel.1 = RESULT custom-call(%m, %m, %q, %k, %v, /*index=5*/%l), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, metadata={op_name="jit(f)/jit(_splash_attention)/NAME/pallas_call" stack_frame_id=5}, backend_config={"custom_call_config":{"body":"TUzvUgFNTElS"}}
  %first = bf16[1024,128]{1,0} bitcast(%q)
  ROOT %after = bf16[1024,1024]{1,0} dot(%first, %first), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""  # noqa: E501

AFTER = 2 * 1024 * 1024 * 128
"""Of the product behind the kernel, which stands on the line after a closing brace."""

FORWARD = "(f32[2,512,128], bf16[2,8,1024,128], f32[2,8,1024,128])"
DQ = "(f32[2,512,128], bf16[2,8,1024,128])"
DKV = "(f32[2,512,128], f32[2,512,128], bf16[2,2,1024,128], bf16[2,2,1024,128])"
FUSED = "(f32[2,512,128], bf16[2,2,8,1024,128], bf16[2,2,1024,128], bf16[2,2,1024,128])"


def splash(name, result):
    return hlo.cost(SPLASH.replace("NAME", name).replace("RESULT", result))


@pytest.mark.parametrize(
    ("name", "result", "products"),
    [
        ("splash_mha_fwd_residuals", FORWARD, 2),
        ("splash_mha_dq_no_residuals", DQ, 3),
        ("splash_mha_dkv_no_residuals", DKV, 4),
        ("splash_mha_dkv_no_residuals", FUSED, 5),
    ],
)
def test_splash_counts_the_causal_half_of_its_products(name, result, products):
    cost = splash(name, result)
    assert cost.flops == products * PRODUCT + AFTER
    assert cost.unknown_kernels == ()


def test_a_kernel_that_nobody_knows_is_named():
    cost = splash("ragged_paged_attention", FORWARD)
    assert cost.flops == AFTER
    name = "jit(f)/jit(_splash_attention)/ragged_paged_attention/pallas_call"
    assert cost.unknown_kernels == (f"tpu_custom_call ({name})",)


CUDA = """
HloModule m

ENTRY %main (q: bf16[2,1024,8,128], k: bf16[2,1024,2,128], w: bf16[128,32], x: bf16[64,128]) -> bf16[64,32] {
  %q = bf16[2,1024,8,128]{3,2,1,0} parameter(0)
  %k = bf16[2,1024,2,128]{3,2,1,0} parameter(1)
  %w = bf16[128,32]{1,0} parameter(2)
  %x = bf16[64,128]{1,0} parameter(3)
  %attention = (bf16[2,8,1024,128]{3,1,2,0}, f32[2,8,1024]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxTAIL", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "1024", "1024"]}, "mask_type": "CAUSAL"}}
  %sorted = (s32[64]{0}, s32[64]{0}) custom-call(%x), custom_call_target="__cub$DeviceRadixSort"
  %product = (bf16[64,32]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %out = bf16[64,32]{1,0} get-tuple-element(%product), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(("tail", "products"), [("", 2), ("Backward", 5)])
def test_kernels_of_cuda_libraries_count(tail, products):
    cost = hlo.cost(CUDA.replace("TAIL", tail))
    assert cost.flops == products * PRODUCT + 2 * 64 * 32 * 128
    assert cost.unknown_kernels == ()


def test_prefill_behind_a_cache_counts_all_pairs():
    cost = hlo.cost(CUDA.replace("TAIL", "").replace('"1024", "1024"]', '"16", "1024"]'))
    assert cost.flops == 2 * 2 * (2 * 8) * 16 * 1024 * 128 + 2 * 64 * 32 * 128
