"""Attention that is one operator: of libraries, of ATen, and FlexAttention.

The libraries need a GPU: what stands here in their place has their schemas and runs on a CPU.
"""

import math
import re
import types
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import uta_fx
from uta_fx import Config
from uta_fx.backend import plan_of
from uta_fx.export.program import sparsify_program
from uta_fx.study.models import MODELS
from uta_fx.study.models import SMALL as MODEL_SIZE

SMALL = {"min_tokens": 128, "block_q": 32, "block_kv": 32, "reorder": "none"}
BATCH, LENGTH, HEADS, DIM = 2, 160, 4, 16

SCHEMAS = {
    # flash_attn 2.8
    "flash_attn::_flash_attn_forward": "(Tensor q, Tensor k, Tensor v, float dropout_p,"
    " float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right,"
    " float softcap, Tensor? alibi_slopes, bool return_softmax)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # flash_attn_3
    "flash_attn_3::_flash_attn_forward": "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None,"
    " Tensor? v_new=None, Tensor? qv=None, Tensor? out_=None, Tensor? cu_seqlens_q=None,"
    " Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None,"
    " Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None,"
    " Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None,"
    " Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None,"
    " Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None,"
    " float? softmax_scale=None, bool causal=False, SymInt window_size_left=-1,"
    " SymInt window_size_right=-1, SymInt attention_chunk=0, float softcap=0.0,"
    " bool rotary_interleaved=True, Tensor? scheduler_metadata=None, SymInt num_splits=1,"
    " bool? pack_gqa=None, SymInt sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)",
    # xformers 0.0.34
    "xformers_flash::flash_fwd": "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor? seqused_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float p,"
    " float softmax_scale, bool is_causal, SymInt window_left, SymInt window_right,"
    " bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)",
    "xformers_flash3::flash_fwd": "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, Tensor? descale_q=None,"
    " Tensor? descale_k=None, Tensor? descale_v=None, Tensor? block_table=None,"
    " bool use_kvsplit=False, SymInt window_left=-1, SymInt window_right=-1) -> (Tensor, Tensor)",
    # flash-attn 2 of the Hub, in a library that is named after its build
    "_flash_attn2_9c6dd5d::_flash_attn_forward": "(Tensor q, Tensor k, Tensor v, float dropout_p,"
    " float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right,"
    " float softcap, Tensor? alibi_slopes, bool return_softmax)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # the same of tokens of all samples one after another
    "flash_attn::_flash_attn_varlen_forward": "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p,"
    " float softmax_scale, bool causal) -> (Tensor, Tensor, Tensor, Tensor)",
    # nobody's
    "mylib::fancy_attn": "(Tensor q, Tensor k, Tensor v) -> Tensor",
}
libraries = []


def stand_in(name, schema):
    """Register what computes plain attention over ``[B, L, H, D]``, whatever else is asked for."""
    library = torch.library.Library(name.partition("::")[0], "FRAGMENT")
    libraries.append(library)  # unregistered when collected
    library.define(name.partition("::")[2] + schema)
    overload = torch._C.parse_schema(name + schema)
    names = [argument.name for argument in overload.arguments]

    def outputs(out):
        others = [out.new_zeros(BATCH, HEADS, LENGTH) for _ in overload.returns[1:]]
        return (out, *others) if others else out

    def attend(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        scale = given.get("softmax_scale")
        q, k, v = (x.transpose(-3, -2) for x in args[:3])
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        return outputs(out.transpose(-3, -2).contiguous())

    def fake(q, k, v, *args, **kwargs):
        return outputs(q.new_empty((*q.shape[:-1], v.shape[-1])))

    library.impl(name.partition("::")[2], attend, "CPU")
    torch.library.register_fake(name, fake, lib=library)


for _name, _schema in SCHEMAS.items():
    stand_in(_name, _schema)


@torch.library.custom_op(
    "sageattention_sm90::qk_int8_sv_f8_accum_f32_attn", mutates_args=("output",)
)
def of_sage(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    query_scale: torch.Tensor, key_scale: torch.Tensor, tensor_layout: int, is_causal: int,
    qk_quant_gran: int, sm_scale: float, return_lse: int,
) -> torch.Tensor:  # fmt: skip
    """As sageattention 2.2 has it: of integers, and into an argument."""
    q, k, v = (x.float().transpose(1, 2) for x in (query * query_scale, key * key_scale, value))
    output.copy_(F.scaled_dot_product_attention(q, k, v, scale=sm_scale).transpose(1, 2))
    return query_scale.new_empty(0)


of_sage.register_fake(lambda query, *_: query.new_empty(0, dtype=torch.float32))


class Attention(nn.Module):
    """Self-attention behind projections, ``[B, L, H, D]`` handed to an operator."""

    def __init__(self, attend, kv_heads=HEADS):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(32, HEADS * DIM)
        self.k, self.v = (nn.Linear(32, kv_heads * DIM) for _ in range(2))
        self.attend = attend

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, DIM)) for f in (self.q, self.k, self.v))
        return self.attend(q * 2, k * 2, v)


def tokens():
    return torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(0))


def flash_2(q, k, v, causal=False, window=-1, softcap=0.0):
    op = torch.ops.flash_attn._flash_attn_forward
    return op(q, k, v, 0.0, 0.3, causal=causal, window_size_left=window, window_size_right=window,
              softcap=softcap, alibi_slopes=None, return_softmax=False)[0]  # fmt: skip


def flash_2_of_the_hub(q, k, v):
    op = torch.ops._flash_attn2_9c6dd5d._flash_attn_forward
    return op(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False)[0]


def flash_3(q, k, v, **options):
    op = torch.ops.flash_attn_3._flash_attn_forward.default
    return op(q, k, v, softmax_scale=0.3, pack_gqa=True, num_splits=2, **options)[0]


def xformers_flash(q, k, v):
    op = torch.ops.xformers_flash.flash_fwd.default
    length = q.shape[1]
    return op(
        q, k, v, None, None, None, length, length, 0.0, 0.3, False, -1, -1, False, None
    )[0]  # fmt: skip


def xformers_flash_3(q, k, v):
    op = torch.ops.xformers_flash3.flash_fwd.default
    length = q.shape[1]
    return op(q, k, v, None, None, None, None, length, length, 0.0, 0.3, False)[0]


def diffusers_flash_3(q, k, v):
    """Registered by diffusers itself, with ``device_types="cuda"``."""
    from diffusers.models.attention_dispatch import _wrapped_flash_attn_3

    return _wrapped_flash_attn_3(q=q, k=k, v=v, softmax_scale=0.3, causal=False)[0]


def aten_on_the_cpu(q, k, v):
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return op(q, k, v, 0.0, False, scale=0.3)[0].transpose(1, 2)


def flex(q, k, v, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, scale=0.3, enable_gqa=True, **options).transpose(1, 2)


def plain(q, k, v):
    """What all of them compute."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True).transpose(1, 2)


FORMS = (
    flash_2,
    flash_2_of_the_hub,
    flash_3,
    xformers_flash,
    xformers_flash_3,
    aten_on_the_cpu,
    flex,
)


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "kv_heads"),
    [*((form, HEADS) for form in FORMS), *((form, 2) for form in (flash_2, flex))],
)
def test_an_operator_is_found_and_density_one_leaves_its_result(form, kv_heads):
    """To rounding; and nothing of it is left in the graph. Heads may share keys."""
    x, left, outputs = tokens(), [], {}

    def look(gm, _):
        left.extend(node for node in gm.graph.nodes if "flash" in str(node.target))
        left.extend(gm.graph.find_nodes(op="call_function", target=flex_hop))
        return gm.forward

    torch._dynamo.register_backend(look, name="look")
    flex_hop = torch.ops.higher_order.flex_attention
    try:
        for density in (1.0, 0.3):
            torch._dynamo.reset()
            options = {**SMALL, "density": density, "inner": "look"}
            module = Attention(form, kv_heads)
            compiled = torch.compile(module, backend="uta", fullgraph=True, options=options)
            outputs[density] = compiled(x)
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("look")
    expected = Attention(plain, kv_heads)(x)
    torch.testing.assert_close(outputs[1.0], expected, rtol=0, atol=2e-6)
    assert not left and not torch.equal(outputs[0.3], outputs[1.0])


def test_the_operator_of_diffusers_is_found():
    """It runs on a GPU alone: on meta tensors."""
    module = Attention(diffusers_flash_3).to("meta")
    (site,) = uta_fx.explain(module, tokens().to("meta"), config=Config(**SMALL)).sites
    assert site.sparse and site.shape == (BATCH, HEADS, LENGTH, DIM)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_flash_attention_forward", (None, None, LENGTH, LENGTH, 0.0, False, False)),
        ("_efficient_attention_forward", (None, None, None, None, None, 0.0, 0)),
    ],
)
def test_the_kernels_of_aten_are_found(name, arguments):
    """They run on a GPU alone: on meta tensors."""
    op = getattr(torch.ops.aten, name)
    module = Attention(lambda q, k, v: op(q, k, v, *arguments, scale=0.3)[0]).to("meta")
    (site,) = uta_fx.explain(module, tokens().to("meta"), config=Config(**SMALL)).sites
    assert site.sparse and site.shape == (BATCH, HEADS, LENGTH, DIM)


@torch.no_grad()
def test_a_library_s_operator_is_found_after_export():
    """Where it stands as an overload."""
    module, x = Attention(flash_2).eval(), tokens()
    program = torch.export.export(module, (x,))
    sparse, sites = sparsify_program(program, plan_of(Config(**SMALL, density=1.0)))
    assert [site.sparse for site in sites] == [True]
    torch.testing.assert_close(sparse.module()(x), module(x), rtol=0, atol=2e-6)


def causal(q, k, v):
    return flash_2(q, k, v, causal=True)


def windowed(q, k, v):
    return flash_2(q, k, v, window=64)


def capped(q, k, v):
    return flash_2(q, k, v, softcap=30.0)


def descaled(q, k, v):
    return flash_3(q, k, v, k_descale=torch.ones(BATCH, HEADS))


def packed(q, k, v):
    ends = torch.tensor([0, LENGTH], dtype=torch.int32)
    op = torch.ops.flash_attn._flash_attn_varlen_forward
    return op(q[0], k[0], v[0], ends, ends, LENGTH, LENGTH, 0.0, 0.3, False)[0][None]


def with_log_sum_exp(q, k, v):
    out, lse, *_ = torch.ops.flash_attn_3._flash_attn_forward(q, k, v)
    return out, lse


def flex_with_log_sum_exp(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, return_lse=True)


def flex_scored(q, k, v):
    return flex(q, k, v, score_mod=lambda score, b, h, i, j: score - (i - j).abs())


def flex_masked(q, k, v):
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, LENGTH, LENGTH, device="cpu")
    return flex(q, k, v, block_mask=mask)


def unknown(q, k, v):
    return torch.ops.mylib.fancy_attn(q, k, v)


def sage(q, k, v):
    scales = [x.abs().amax() / 127 for x in (q, k)]
    q, k = ((x / scale).round().to(torch.int8) for x, scale in zip((q, k), scales, strict=True))
    out = torch.empty_like(v)
    of_sage(q, k, v, out, *scales, 0, 0, 3, 0.3, 0)
    return out


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (sage, "sageattention_sm90::qk_int8_sv_f8_accum_f32_attn is not known to be plain"),
        (causal, "is causal"),
        (windowed, "flash_attn::_flash_attn_forward has window_size_left"),
        (capped, "flash_attn::_flash_attn_forward has softcap"),
        (descaled, "flash_attn_3::_flash_attn_forward has k_descale"),
        (with_log_sum_exp, "another output of flash_attn_3::_flash_attn_forward is used"),
        (flex_with_log_sum_exp, "another output of FlexAttention is used"),
        (flex_scored, "FlexAttention has a score_mod"),
        (flex_masked, "FlexAttention has a block mask"),
        (unknown, "mylib::fancy_attn is not known to be plain attention"),
        (packed, "flash_attn::_flash_attn_varlen_forward has cu_seqlens_q"),
    ],
)
def test_an_operator_that_does_more_stays_dense_and_says_why(form, reason):
    """One site each; the graph still computes what it did."""
    module, x = Attention(form), tokens()
    (site,) = uta_fx.explain(module, x, config=Config(**SMALL)).sites
    assert not site.sparse and re.match(reason, site.reason), site.reason
    assert site.kind == "self"
    assert site.shape == (1 if form is packed else BATCH, HEADS, LENGTH, DIM)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="uta", options={**SMALL, "inner": "eager"})
        torch.testing.assert_close(compiled(x), module(x))


def memory_efficient_attention(q, k, v, bias, p, scale):
    """As xFormers dispatches it where there is no bias."""
    assert bias is None and not p
    length, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    op = torch.ops.xformers_flash.flash_fwd
    lengths, window = (length, k.shape[1]), {"window_left": -1, "window_right": -1}
    return op(
        q, k, v, None, None, None, *lengths, 0.0, scale, False, **window,
        return_softmax=False, block_tables=None,
    )[0]  # fmt: skip


def flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, return_attn_probs):
    """As flash-attn's, in whose graph an operator stands."""
    assert not (dropout_p or causal or return_attn_probs) and window_size == (-1, -1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    op = torch.ops.flash_attn._flash_attn_forward
    return op(q, k, v, 0.0, scale, False, -1, -1, 0.0, None, False)[0]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["flex", "flash", "xformers", "_native_math"])
@pytest.mark.parametrize("name", ["Wan I2V", "CogVideoX 5B"])
def test_the_backends_of_diffusers_lead_to_the_same(backend, name, monkeypatch):
    """By its dispatcher: cross-attention is one of these operators too, and stands in no way.

    To the roundings of a small model's two layers.
    """
    from diffusers.models import attention_dispatch

    xops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention_dispatch, "xops", xops)
    monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_attn_func)
    entry = next(entry for entry in MODELS if entry.name == name)
    model, arguments = entry.build(), entry.arguments()
    dense = model(**arguments, return_dict=False)[0]
    for part in model.modules():
        if hasattr(getattr(part, "processor", None), "_attention_backend"):
            part.processor._attention_backend = attention_dispatch.AttentionBackendName(backend)
    sites = uta_fx.explain(model, **arguments, config=MODEL_SIZE).sites
    assert Counter(site.kind for site in sites) == entry.sites(model.config)
    videos = [site for site in sites if site.kind != "cross"]
    assert [(site.sparse, site.reordered) for site in videos] == [(True, "once")] * len(videos)
    torch._dynamo.reset()
    options = {"min_tokens": 48, "block_q": 16, "block_kv": 16, "density": 1.0, "inner": "eager"}
    compiled = torch.compile(model, backend="uta", fullgraph=True, options=options)
    output = compiled(**arguments, return_dict=False)[0]
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-6 * float(dense.abs().max()))


def test_what_an_operator_costs_is_counted():
    """As SDPA's is, though torch's counter does not know it."""
    counts = set()
    for form in (plain, flash_2, flex, unknown):
        explanation = uta_fx.explain(Attention(form), tokens(), config=Config(**SMALL))
        assert not explanation.notes
        counts.add((explanation.flops, explanation.attention_flops))
    attention = 4 * BATCH * HEADS * LENGTH * LENGTH * DIM
    projections = 3 * 2 * BATCH * LENGTH * 32 * HEADS * DIM
    assert counts == {(attention + projections, attention)}


def test_video_is_followed_through_an_operator():
    """The second layer's tokens come out of the first one's operator."""

    class Layers(nn.Module):
        def __init__(self, attend):
            super().__init__()
            self.patch = nn.Conv3d(3, 32, 1)
            self.layers = nn.ModuleList([Attention(attend), Attention(attend)])
            self.out = nn.Linear(HEADS * DIM, 32)

        def forward(self, video):
            x = self.patch(video).flatten(2).transpose(1, 2)
            for layer in self.layers:
                x = x + self.out(layer(x).flatten(2))
            return x

    config = Config(min_tokens=128, block_q=32, block_kv=32)
    for form in (flash_2, flex):
        sites = uta_fx.explain(Layers(form), torch.randn(1, 3, 4, 6, 8), config=config).sites
        assert [(site.sparse, site.grid) for site in sites] == [(True, (4, 6, 8))] * 2
    assert math.prod(sites[0].grid) == sites[0].shape[2]
