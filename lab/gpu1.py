import sys, time, itertools, torch, dataclasses, statistics as st
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
import uta_fx
from uta_fx.bench.inputs import INPUTS, SHAPES
from uta_fx.attention import operator_arguments, pool_blocks, reorder_tokens, sparse_attention
from uta_fx.bench.attention import time_interleaved, _operation, _relative_error
from uta_fx.policies import LowDelta
from uta_fx.kernels import ops, triton_scores, triton_attention
from uta_fx.kernels.triton_attention import Tile

torch.set_grad_enabled(False)
print(torch.cuda.get_device_name(), torch.__version__)


def med(calls, n=7):
    t = time_interleaved(calls, n, "cuda")
    return {k: st.median(v) for k, v in t.items()}


for name in sys.argv[1].split(","):
    shape = SHAPES[name]
    t0 = time.time()
    q, k, v = INPUTS["structured"](shape, "cuda", torch.bfloat16, 0)
    cfg = uta_fx.Config(density=0.1)
    (oq, ok, ov), inv = reorder_tokens(q, k, v, cfg, shape.grid)
    sel = pool_blocks(oq, ok, ov, cfg, shape.dim**-0.5)
    args = LowDelta().arguments(sel)

    def dense():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    calls = {"dense": dense}
    torch.compiler.reset()
    for d in (0.1, 0.25):
        c = dataclasses.replace(cfg, density=d)
        whole = torch.compile(_operation(c, shape.grid), dynamic=False)
        inorder = torch.compile(
            _operation(dataclasses.replace(c, reorder="none"), None), dynamic=False
        )
        a = operator_arguments(dataclasses.replace(sel, density=d), ok, ov, c)
        notail = [x[:, :, :0] if i in range(5, 10) else x for i, x in enumerate(a)]
        nolist = [torch.zeros_like(x) if i == 4 else x for i, x in enumerate(a)]
        calls |= {
            f"whole {d}": lambda w=whole: w(q, k, v),
            f"in order {d}": lambda w=inorder: w(oq, ok, ov),
            f"kernels {d}": lambda a=a: ops.sparse_attention(*a),
            f"listed {d}": lambda a=notail: ops.sparse_attention(*a),
            f"tail {d}": lambda a=nolist: ops.sparse_attention(*a),
        }
        print(
            name,
            d,
            "error",
            _relative_error(whole(q, k, v), q, k, v, shape.dim**-0.5),
            f"{time.time() - t0:.0f}s",
            flush=True,
        )
    calls["stats"] = lambda: ops.block_statistics(ok, ov, 64)
    tiles = [
        Tile(block_m=m, block_n=n, num_warps=w, num_stages=s)
        for m, n, w, s in [
            (128, 64, 8, 3),
            (128, 64, 4, 3),
            (128, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 64, 4, 4),
            (128, 128, 8, 3),
            (64, 128, 4, 3),
            (128, 32, 4, 3),
            (256, 64, 8, 3),
        ]
    ]
    for t in tiles:
        for g in (2, 4):
            c = lambda t=t, g=g: triton_scores.block_scores(*args[:-1], g, tile=t)
            try:
                c()
            except Exception as e:
                print("fails", t, g, str(e)[:80])
                continue
            calls[f"scores {g} {t.block_m}x{t.block_n} w{t.num_warps} s{t.num_stages}"] = c
    m = med(calls, 5)
    for n_, x in m.items():
        print(f"{name:14s} {n_:30s} {x:8.3f} ms {m['dense'] / x:7.2f}", flush=True)
    from torch.profiler import profile, ProfilerActivity

    for d in (0.1,):
        f = calls[f"in order {d}"]
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(3):
                f()
            torch.cuda.synchronize()
        ev = sorted(p.key_averages(), key=lambda e: -e.device_time_total)
        for e in ev[:24]:
            print(f"  {e.device_time_total / 3e3:8.3f} ms x{e.count // 3} {e.key[:90]}")
    del q, k, v, oq, ok, ov, sel, args, calls, a, notail, nolist
    torch.cuda.empty_cache()
    print(f"{time.time() - t0:.0f}s")
