"""What happens to queries, keys and values between their projection and attention, in one kernel on CUDA.

Semantics
---------
``qkv[t]`` holds Hq query heads, Hkv key heads and Hkv value heads of D elements each. For each head n of
queries and keys, with the weight w of its kind (no weights: xn = x)::

    xn[d]       = round(w[d] * round(x[d] / sqrt(mean_d(x[d]^2) + eps)))
    y[i]        = round(xn[i] * cos[p, i] - xn[i + D/2] * sin[p, i])          p = positions[t], i in [0, D/2)
    y[i + D/2]  = round(xn[i + D/2] * cos[p, i] + xn[i] * sin[p, i])

and for s = slot_mapping[t], page = s // G, g = s % G::

    query[t, n] = y                                                     (queries)
    k_pages[page, g, n] = y,  v_pages[page, g, n] = value head n        (keys, values; nothing if s = -1)

`round` is to the dtype of qkv; cosine, sine and all between are fp32. The rotation rounds once, where torch
rounds each product when it is given 16-bit cosines. A LoRA delta, expanded already, is added to qkv first,
see `add_expanded`.

Layout: rows of qkv lie at any distance; pages [P, G, Hkv, D] at any distance too (views of a pool), the
inside of a page without gaps. Grid: (tokens, blocks of heads), a block has heads of one kind only. Every
token reads ``cos_sin[positions[t]]``: padded tokens have slot -1 and position 0. No token: nothing is
launched.

Source: Su et al., 2021, "RoFormer"; the norms of single heads are Qwen3's.
"""

from __future__ import annotations

from torch import Tensor

from lora_serve.kernels._triton import begin_early, ceil_div, early_launch, jit, next_power_of_2, tl
from lora_serve.kernels.expanded_delta import add_expanded, expanded_tensors
from lora_serve.kernels.lora_delta import LoRADelta

# One warp a program: its shuffles need no barrier, and one token alone still spreads over many programs. A
# prefill has programs enough, and would wait for their launches.
_ELEMENTS_OF_A_WARP = 512
_MOST_DECODE_TOKENS = 512
_WARPS_OF_A_PREFILL = 4


@jit
def rotate_planes(
    first: tl.tensor,
    second: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:
    """Norm and rotation of heads [heads, planes] that are already loaded, in halves, 0 beyond D/2.

    Weights are fp32, or None: no norm. The two halves of the result have the dtype of the input.
    """
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    if w1 is not None:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        # Products of two 16-bit numbers are exact in fp32, so each of these lines rounds twice, as in torch.
        a = (w1 * (a * scale).to(first.dtype).to(tl.float32)).to(first.dtype).to(tl.float32)
        b = (w2 * (b * scale).to(first.dtype).to(tl.float32)).to(first.dtype).to(tl.float32)
    return tl.fma(a, cos, -(b * sin)).to(first.dtype), tl.fma(b, cos, a * sin).to(first.dtype)


@jit
def _load_halves(
    source: tl.tensor,
    delta: tl.tensor,
    in_delta: tl.tensor,
    lora_slot: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    HALF: tl.constexpr,
) -> tl.tensor:
    """Both halves of heads, after their delta where there is one, which starts at `in_delta`."""
    first = tl.load(source + at, mask=mask, other=0.0)
    second = tl.load(source + at + HALF, mask=mask, other=0.0)
    if delta is not None:
        first = add_expanded(first, delta + in_delta + at, mask, lora_slot)
        second = add_expanded(second, delta + in_delta + at + HALF, mask, lora_slot)
    return first, second


@jit
def _rotate_heads(
    source: tl.tensor,
    delta: tl.tensor,
    in_delta: tl.tensor,
    lora_slot: tl.tensor,
    destination: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    n: tl.tensor,
    i: tl.tensor,
    num_heads: tl.tensor,
    D: tl.constexpr,
) -> None:
    """Heads n [heads, 1] below num_heads, planes i [1, planes]; heads lie D apart on both sides."""
    HALF: tl.constexpr = D // 2
    at = n * D + i
    mask = (n < num_heads) & (i < HALF)
    first, second = _load_halves(source, delta, in_delta, lora_slot, at, mask, HALF)
    w1 = None
    w2 = None
    if weight is not None:
        w1 = tl.load(weight + i, mask=i < HALF, other=0.0).to(tl.float32)
        w2 = tl.load(weight + i + HALF, mask=i < HALF, other=0.0).to(tl.float32)
    first, second = rotate_planes(first, second, w1, w2, cos, sin, eps, D)
    tl.store(destination + at, first, mask=mask)
    tl.store(destination + at + HALF, second, mask=mask)


@jit
def _copy_heads(
    source: tl.tensor,
    delta: tl.tensor,
    in_delta: tl.tensor,
    lora_slot: tl.tensor,
    destination: tl.tensor,
    n: tl.tensor,
    i: tl.tensor,
    num_heads: tl.tensor,
    D: tl.constexpr,
) -> None:
    HALF: tl.constexpr = D // 2
    at = n * D + i
    mask = (n < num_heads) & (i < HALF)
    first, second = _load_halves(source, delta, in_delta, lora_slot, at, mask, HALF)
    tl.store(destination + at, first, mask=mask)
    tl.store(destination + at + HALF, second, mask=mask)


@jit(do_not_specialize=["mapping_ptr"])
def _norm_rotary_store_kernel(
    qkv: tl.tensor,
    delta: tl.tensor,
    mapping_ptr: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    slot_mapping: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    query: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    eps: tl.tensor,
    qkv_stride: tl.tensor,
    query_stride: tl.tensor,
    k_page_stride: tl.tensor,
    v_page_stride: tl.tensor,
    G: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    HALF: tl.constexpr = D // 2
    Q_BLOCKS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    KV_BLOCKS: tl.constexpr = (HKV + HEADS - 1) // HEADS
    t = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    heads = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF_BLOCK)[None, :]

    lora_slot = t
    if delta is not None:
        lora_slot = tl.load(mapping_ptr + t)
    in_delta = t * ((HQ + 2 * HKV) * D)
    begin_early(EARLY)
    row = qkv + t * qkv_stride
    slot = tl.load(slot_mapping + t)
    page = slot // G
    in_page = (slot - page * G) * (HKV * D)
    num_stored = tl.where(slot < 0, 0, HKV)  # no head of a token without a slot is read or written
    if block < Q_BLOCKS + KV_BLOCKS:
        cos_row = cos_sin + tl.load(positions + t) * D + i
        cos = tl.load(cos_row, mask=i < HALF, other=0.0)
        sin = tl.load(cos_row + HALF, mask=i < HALF, other=0.0)
        if block < Q_BLOCKS:
            n = block * HEADS + heads
            to_queries = query + t * query_stride
            _rotate_heads(
                *(row, delta, in_delta, lora_slot, to_queries),
                *(q_weight, cos, sin, eps, n, i, HQ, D),
            )
        else:
            n = (block - Q_BLOCKS) * HEADS + heads
            to_keys = k_pages + page * k_page_stride + in_page
            _rotate_heads(
                *(row + HQ * D, delta, in_delta + HQ * D, lora_slot, to_keys),
                *(k_weight, cos, sin, eps, n, i, num_stored, D),
            )
    else:
        n = (block - Q_BLOCKS - KV_BLOCKS) * HEADS + heads
        to_values = v_pages + page * v_page_stride + in_page
        start = (HQ + HKV) * D
        _copy_heads(row + start, delta, in_delta + start, lora_slot, to_values, n, i, num_stored, D)


def norm_rotary_store(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    out: Tensor | None = None,
    delta: LoRADelta | None = None,
) -> Tensor:
    """Normalise and rotate queries and keys, and store keys and values into their pages.

    Parameters
    ----------
    qkv
        [T, (Hq + 2 Hkv) * D] on CUDA, fp32, fp16 or bf16; neighbouring elements of a row lie side by side.
        Its query part is changed, unless ``out`` is given.
    positions
        [T] int64, each in [0, M).
    cos_sin
        [M, D] fp32, contiguous: D/2 cosines, then D/2 sines, of each position.
    slot_mapping
        [T] int64: page * G + offset in the page, all different; -1 = key and value are not stored.
    k_pages, v_pages
        [P, G, Hkv, D] of the dtype of ``qkv``, pages at any distance, each without gaps; written in place.
        D is even, 256 at most.
    q_weight, k_weight
        [D] of the dtype of ``qkv``, of the norms of single heads; both None = no norm.
    eps
        Added to the mean square.
    out
        [T, Hq, D] for the queries, heads without gaps. None = they take the place of the query part of
        ``qkv``: no memory is asked for, and the lines that were read are the ones written.
    delta
        What adapters add to ``qkv``, expanded already. None = nothing.

    Returns
    -------
    Tensor
        [T, Hq, D], the queries: ``out``, or a view of ``qkv``, with the last two axes contiguous and tokens
        at the distance of the rows of ``qkv``. FlashInfer asks for a contiguous last axis only.

    Raises
    ------
    ValueError
        Shapes, dtypes or strides are not these.

    Notes
    -----
    Runs on the current stream. Positions and slots are not checked, for that would wait for the device.
    """
    num_tokens, page_size, num_kv_heads, head_dim, num_heads = check_rotary_store(
        qkv, positions, cos_sin, slot_mapping, k_pages, v_pages, q_weight, k_weight
    )
    out = check_queries(qkv, out, (num_tokens, num_heads, head_dim))
    added = expanded_tensors(delta, qkv)
    if num_tokens == 0:
        return out
    half_block = next_power_of_2(head_dim // 2)
    num_warps = 1 if num_tokens <= _MOST_DECODE_TOKENS else _WARPS_OF_A_PREFILL
    heads = min(max(1, num_warps * _ELEMENTS_OF_A_WARP // (2 * half_block)), next_power_of_2(num_heads))
    blocks = ceil_div(num_heads, heads) + 2 * ceil_div(num_kv_heads, heads)
    strides = (qkv.stride(0), out.stride(0), k_pages.stride(0), v_pages.stride(0))
    _norm_rotary_store_kernel[(num_tokens, blocks)](
        *(qkv, *added, positions, cos_sin, slot_mapping, k_pages, v_pages, out, q_weight, k_weight, eps),
        *strides,
        G=page_size,
        HQ=num_heads,
        HKV=num_kv_heads,
        D=head_dim,
        HEADS=heads,
        HALF_BLOCK=half_block,
        num_warps=num_warps,
        **early_launch(qkv),
    )
    return out


def check_queries(qkv: Tensor, out: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
    """``out`` for the queries [T, Hq, D], or a view of ``qkv`` where it is None."""
    if out is None:
        return qkv[:, : shape[1] * shape[2]].view(shape)
    if out.shape != shape or out.dtype != qkv.dtype or out.stride()[1:] != (shape[2], 1):
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} with strides {out.stride()}, expected {shape} "
            f"{qkv.dtype}, heads without gaps"
        )
    return out


def check_rotary_store(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[int, int, int, int, int]:
    """T, G, Hkv, D and Hq; raises as `norm_rotary_store` does."""
    if k_pages.dim() != 4 or k_pages.shape != v_pages.shape or qkv.dim() != 2:
        raise ValueError(
            f"qkv is {tuple(qkv.shape)}, k_pages {tuple(k_pages.shape)}, v_pages {tuple(v_pages.shape)}, "
            "expected [T, (Hq + 2 Hkv) * D] and twice [P, G, Hkv, D]"
        )
    _, page_size, num_kv_heads, head_dim = k_pages.shape
    num_tokens, width = qkv.shape
    num_heads, rest = divmod(width - 2 * num_kv_heads * head_dim, head_dim)
    if rest or num_heads < 1 or head_dim % 2 or head_dim > 256 or qkv.stride(1) != 1:
        raise ValueError(
            f"qkv is {tuple(qkv.shape)} with strides {qkv.stride()}, expected a contiguous last axis of "
            f"query heads and 2 x {num_kv_heads} heads of {head_dim} elements, even and at most 256"
        )
    inside = (num_kv_heads * head_dim, head_dim, 1)
    if k_pages.stride()[1:] != inside or v_pages.stride()[1:] != inside:
        raise ValueError(
            f"the pages' strides are {k_pages.stride()} and {v_pages.stride()}, expected (any, {inside[0]}, "
            f"{inside[1]}, 1): a page has no gaps"
        )
    weights = [weight for weight in (q_weight, k_weight) if weight is not None]
    if len(weights) == 1 or any(weight.shape != (head_dim,) for weight in weights):
        raise ValueError(f"q_weight and k_weight must be both None or both [{head_dim}]")
    if any(tensor.dtype != qkv.dtype for tensor in (k_pages, v_pages, *weights)):
        raise ValueError(f"pages and weights must have the dtype of qkv, {qkv.dtype}")
    if positions.shape != (num_tokens,) or slot_mapping.shape != (num_tokens,):
        raise ValueError(
            f"positions are {tuple(positions.shape)}, slot_mapping {tuple(slot_mapping.shape)}, expected "
            f"twice ({num_tokens},)"
        )
    if cos_sin.dim() != 2 or cos_sin.shape[1] != head_dim or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin is {tuple(cos_sin.shape)}, expected [positions, {head_dim}] contiguous")
    return num_tokens, page_size, num_kv_heads, head_dim, num_heads
