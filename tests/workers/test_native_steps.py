"""Who takes compiled code on a CPU rank, and that a layer answers the same without it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from argosy.kernels import cpu_steps
from argosy.workers.attention.base import AttentionMetadata, AttentionShape
from argosy.workers.attention.native_backend import NativeBackend
from argosy.workers.attention.torch_backend import TorchBackend
from argosy.workers.native_steps import cpu_backend
from argosy.workers.quantization.base import LinearLayer, UnquantizedMethod

needs_compiler = pytest.mark.skipif(cpu_steps.open_cpu_steps(torch.float32) is None, reason="no C compiler here")


def _finished(weight: torch.Tensor, *, eager: bool) -> LinearLayer:
    """A product as a rank that starts has it."""
    method, layer = UnquantizedMethod(), LinearLayer()
    method.create(layer, weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    cpu_backend(nn.ModuleList([layer]), weight.dtype, eager)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    method.finish(layer)
    return layer


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_product_keeps_one_copy_of_its_weight(dtype: torch.dtype) -> None:
    """For few rows and for many; in 16 bits, an odd number of inputs is torch's."""
    torch.manual_seed(0)
    for num_in in (34, 33):
        weight = torch.randn(70, num_in).to(dtype)
        layer = _finished(weight, eager=False)
        compiled = dtype == torch.float32 or num_in % 2 == 0
        assert (layer.native is not None) == compiled
        if compiled:
            assert layer.weight is None
            assert layer.transposed_weight is None
        for num_tokens in (1, 40):
            x = torch.randn(num_tokens, num_in).to(dtype)
            torch.testing.assert_close(UnquantizedMethod().apply(layer, x), F.linear(x, weight), rtol=1e-2, atol=1e-2)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_compiled_where_there_is_a_compiler(dtype: torch.dtype) -> None:
    """Else a rank would be right and half as fast, and nothing would say so."""
    if cpu_steps.open_cpu_steps(dtype) is None:
        pytest.skip("this processor has no code for the type")
    assert type(cpu_backend(nn.ModuleList(), dtype, False)) is NativeBackend


@pytest.mark.parametrize(("dtype", "eager"), [(torch.float32, True), (torch.float16, False)])
def test_enforce_eager_and_float16_are_torch_alone(dtype: torch.dtype, eager: bool) -> None:
    """So a doubt about compiled code is settled by a flag."""
    assert type(cpu_backend(nn.ModuleList(), dtype, eager)) is TorchBackend
    assert _finished(torch.zeros(64, 32, dtype=dtype), eager=eager).native is None


@needs_compiler
@pytest.mark.parametrize("special", [{"soft_cap": 5.0}, {"kv_scales": (0.5, 2.0)}, {"head_size": 8}, {}])
def test_what_compiled_attention_does_not_do_is_still_done(special: dict[str, object]) -> None:
    """Caps, scales and odd heads go the way they went before."""
    torch.manual_seed(0)
    size = 8 if "head_size" in special else 16
    shape = AttentionShape(**{"num_heads": 4, "num_kv_heads": 2, "head_size": size, "scale": 0.3, **special})  # type: ignore[arg-type]  # fields of it
    qkv, caches = torch.randn(2, 8 * size), [torch.randn(3, 4, 2, size) for _ in "kv"]
    steps = cpu_steps.open_cpu_steps(torch.float32)
    assert steps is not None
    answers = []
    for backend in (NativeBackend(steps), TorchBackend()):
        metadata = AttentionMetadata(
            num_rows=2, num_decode_rows=2, query_start_R1=torch.tensor([0, 1, 2]).int(),
            context_len_R=torch.tensor([6, 3]).int(), block_table_RB=torch.tensor([[0, 2], [1, 0]]).int(),
            slot_mapping_T=torch.tensor([9, 6]), max_query_len=1, max_context_len=6,
        )  # fmt: skip
        k_cache, v_cache = (cache.clone() for cache in caches)
        cos_sin = torch.randn(8, size, generator=torch.Generator().manual_seed(1))
        answers.append(
            backend.forward(qkv.clone(), torch.tensor([5, 2]), cos_sin, (k_cache, v_cache), metadata, shape, None)
        )
    torch.testing.assert_close(*answers)
