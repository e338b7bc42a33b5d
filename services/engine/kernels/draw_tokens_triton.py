# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Sampling on CUDA: a row's vocabulary is split among programs, and every pass over it is one launch.

Truncation needs no sort. A token's key is the bits of its distance below the best (a non-negative float, so they are in
order), and the key where top-k or top-p ends is found four bits a pass: each program adds up its tokens below fifteen
pivots. What is kept are all tokens below that key, and of those at it as many as still fit, in order of their ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.engine.kernels.draw_tokens import Draws

BLOCK = 4096
PIVOTS = 16  # the first is the digit 0
DIGITS = 8


def draw_tokens_triton(
    logits: torch.Tensor, draws: Draws, out: torch.Tensor, *, cuts_k: bool = True, cuts_p: bool = True
) -> None:
    """See `draw_tokens`."""
    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("rows must be dense")
    if num_rows == 0:
        return
    splits = triton.cdiv(vocab_size, BLOCK)
    shape = {"SPLITS": splits, "SPLITS_POW2": triton.next_power_of_2(splits)}
    grid = (splits, num_rows)

    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(num_rows, *sizes, dtype=dtype, device=logits.device)

    best, best_ids = new(splits), new(splits, dtype=torch.int32)
    _best[grid](logits, best, best_ids, logits.stride(0), vocab_size, SPLITS=splits, BLOCK=BLOCK)
    # By search: the key found so far (one entry a pass), tokens and mass below each pivot, and what is left of ties.
    keys = new(2, DIGITS + 1, dtype=torch.int32)
    counts, masses = new(2, 2, splits, PIVOTS), new(2, 2, splits, PIVOTS)
    ends, ties = new(2), new(splits, dtype=torch.int32)
    searches = [search for search, is_on in enumerate((cuts_k, cuts_p)) if is_on]
    row = (logits, draws.temperature, draws.floor, draws.top_k, draws.top_p, best)
    for search in searches:
        for digit in range(DIGITS):
            _count[grid](
                *row,
                keys,
                counts,
                masses,
                ends,
                logits.stride(0),
                vocab_size,
                IS_TOP_P=search == 1,
                FOLLOWS_TOP_K=cuts_k,
                DIGIT=digit,
                PIVOTS=PIVOTS,
                LAST=DIGITS,
                BLOCK=BLOCK,
                **shape,
            )
    if searches:
        _ties[grid](
            *row,
            keys,
            counts,
            masses,
            ends,
            ties,
            logits.stride(0),
            vocab_size,
            CUTS_K=cuts_k,
            CUTS_P=cuts_p,
            PIVOTS=PIVOTS,
            LAST=DIGITS,
            BLOCK=BLOCK,
            **shape,
        )
    scores, ids = new(splits, dtype=torch.float64), new(splits, dtype=torch.int32)
    _draw[grid](
        *row,
        draws.keys,
        keys,
        ends,
        ties,
        scores,
        ids,
        logits.stride(0),
        vocab_size,
        CUTS=bool(searches),
        LAST=DIGITS,
        BLOCK=BLOCK,
        **shape,
    )
    _choose[(num_rows,)](draws.temperature, best, best_ids, scores, ids, out, **shape)


@triton.jit
def _best(logits, best, best_ids, stride, vocab_size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of a part (NaN if it has one), and its first place."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    v = split * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + v, mask=v < vocab_size, other=float("-inf")).to(tl.float32)
    is_broken = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x == x, x, float("-inf"))
    top = tl.max(x, 0)
    tl.store(best_ids + row * SPLITS + split, split * BLOCK + tl.argmax(x, 0))
    tl.store(best + row * SPLITS + split, tl.where(is_broken, float("nan"), top))


@triton.jit
def _row_best(best, row, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr):
    """The largest logit of a row, and whether it is a number."""
    s = tl.arange(0, SPLITS_POW2)
    parts = tl.load(best + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    top = tl.max(tl.where(parts == parts, parts, float("-inf")), 0)
    is_broken = tl.max((parts != parts).to(tl.int32), 0) > 0
    return top, (is_broken == 0) & (tl.abs(top) < float("inf"))


@triton.jit
def _scaled(logits, temperature, floor, row, v, stride, vocab_size, top):
    """Distances to the best over the temperature, -inf below the floor."""
    x = tl.load(logits + row * stride + v, mask=v < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.div_rn(x - top, tl.zeros_like(x) + tl.maximum(tl.load(temperature + row), 1e-5))
    return tl.where(x < tl.load(floor + row), float("-inf"), x)


@triton.jit
def _key(x):
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _sums(at, p, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr, PIVOTS: tl.constexpr):
    """Over all parts of a row, by pivot."""
    s = tl.arange(0, SPLITS_POW2)[:, None]
    return tl.sum(tl.load(at + s * PIVOTS + p[None, :], mask=s < SPLITS, other=0.0), 0)


@triton.jit
def _pick(numbers, p, digit):
    return tl.sum(tl.where(p == digit, numbers, 0.0), 0)


@triton.jit
def _end_of_top_k(
    keys, counts, masses, row, limit,
    LAST: tl.constexpr, PIVOTS: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """After the last pass: the key where top-k ends, how many at it are kept, and the mass of all that is."""
    p = tl.arange(0, PIVOTS)
    at = ((row * 2) * 2 + (LAST - 1) % 2) * SPLITS * PIVOTS
    count = _sums(counts + at, p, SPLITS, SPLITS_POW2, PIVOTS)
    mass = _sums(masses + at, p, SPLITS, SPLITS_POW2, PIVOTS)
    digit = tl.max(tl.where(count < limit, p, 0), 0)
    key = tl.load(keys + row * 2 * (LAST + 1) + LAST - 1) + digit
    num_ties = limit - _pick(count, p, digit)
    return key, num_ties, _pick(mass, p, digit) + num_ties * tl.exp(-key.to(tl.float32, bitcast=True))


@triton.jit
def _count(
    logits, temperature, floor, top_k, top_p, best, keys, counts, masses, ends, stride, vocab_size,
    IS_TOP_P: tl.constexpr, FOLLOWS_TOP_K: tl.constexpr, DIGIT: tl.constexpr, PIVOTS: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """One pass of one search: of this part, how many tokens are below each pivot, and how much mass they have.

    Passes write in turns to two places: others still read what the pass before left.
    """
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    search = row * 2 + IS_TOP_P
    limit = tl.load(top_k + row)
    share = tl.load(top_p + row)
    top, is_sound = _row_best(best, row, SPLITS, SPLITS_POW2)
    is_cut = (share < 1.0) if IS_TOP_P else (limit < vocab_size)
    if is_sound & is_cut & (tl.load(temperature + row) > 0.0):
        p = tl.arange(0, PIVOTS)
        found = 0
        if DIGIT > 0:
            at = (search * 2 + (DIGIT - 1) % 2) * SPLITS * PIVOTS
            if IS_TOP_P:
                mass = _sums(masses + at, p, SPLITS, SPLITS_POW2, PIVOTS)
                if DIGIT == 1:
                    whole = _pick(mass, p, PIVOTS - 1)
                    if FOLLOWS_TOP_K:  # noqa: SIM102 - decided when compiled
                        if limit < vocab_size:
                            _, _, whole = _end_of_top_k(
                                keys, counts, masses, row, limit, LAST, PIVOTS, SPLITS, SPLITS_POW2
                            )
                    target = share * whole
                    if split == 0:
                        tl.store(ends + search, target)
                else:
                    target = tl.load(ends + search)
                goes_on = mass < target
            else:
                goes_on = _sums(counts + at, p, SPLITS, SPLITS_POW2, PIVOTS) < limit
            if DIGIT == 1:
                goes_on = goes_on & (p < 8)  # the others were beyond all keys
            found = tl.load(keys + search * (LAST + 1) + DIGIT - 1) + (
                tl.max(tl.where(goes_on, p, 0), 0) << (32 - 4 * DIGIT)
            )
        if split == 0:
            tl.store(keys + search * (LAST + 1) + DIGIT, found)
        v = split * BLOCK + tl.arange(0, BLOCK)
        x = _scaled(logits, temperature, floor, row, v, stride, vocab_size, top)
        # What lies beyond the vocabulary is at -inf, and no pivot that counts is above that key.
        key = _key(x)
        weight = tl.exp(x)
        out = (search * 2 + DIGIT % 2) * SPLITS * PIVOTS + split * PIVOTS
        for pivot in tl.static_range(PIVOTS):
            is_below = key >= 0
            if DIGIT > 0 or pivot < 8:
                is_below = key < found + (pivot << (28 - 4 * DIGIT))
            tl.store(counts + out + pivot, tl.sum(is_below.to(tl.float32), 0))
            tl.store(masses + out + pivot, tl.sum(tl.where(is_below, weight, 0.0), 0))


@triton.jit
def _ties(
    logits, temperature, floor, top_k, top_p, best, keys, counts, masses, ends, ties, stride, vocab_size,
    CUTS_K: tl.constexpr, CUTS_P: tl.constexpr, PIVOTS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """Where the kept tokens end: the key, how many of those at it are kept; and how many of those are in this part."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    top, is_sound = _row_best(best, row, SPLITS, SPLITS_POW2)
    end = 0x7FFFFFFF
    num_kept = 0.0
    if is_sound & (tl.load(temperature + row) > 0.0):
        p = tl.arange(0, PIVOTS)
        if CUTS_K:
            limit = tl.load(top_k + row)
            if limit < vocab_size:
                end, num_kept, _ = _end_of_top_k(keys, counts, masses, row, limit, LAST, PIVOTS, SPLITS, SPLITS_POW2)
        if CUTS_P:  # noqa: SIM102 - decided when compiled
            if tl.load(top_p + row) < 1.0:
                at = ((row * 2 + 1) * 2 + (LAST - 1) % 2) * SPLITS * PIVOTS
                mass = _sums(masses + at, p, SPLITS, SPLITS_POW2, PIVOTS)
                target = tl.load(ends + row * 2 + 1)
                digit = tl.max(tl.where(mass < target, p, 0), 0)
                # Rounding may leave the whole mass below the target: then all finite tokens are kept.
                key = tl.minimum(tl.load(keys + (row * 2 + 1) * (LAST + 1) + LAST - 1) + digit, 0x7F800000)
                weight = tl.exp(-key.to(tl.float32, bitcast=True))
                num_ties = tl.where(weight > 0.0, tl.ceil((target - _pick(mass, p, digit)) / weight), 0.0)
                num_kept = tl.where(key < end, num_ties, tl.where(key == end, tl.minimum(num_kept, num_ties), num_kept))
                end = tl.minimum(key, end)
        v = split * BLOCK + tl.arange(0, BLOCK)
        x = _scaled(logits, temperature, floor, row, v, stride, vocab_size, top)
        tl.store(ties + row * SPLITS + split, tl.sum((_key(x) == end).to(tl.int32), 0))
    if split == 0:
        tl.store(keys + row * 2 * (LAST + 1) + LAST, end)
        tl.store(ends + row * 2, num_kept)


@triton.jit
def _mix(x):
    """The splitmix64 finaliser, see noise.py."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _draw(
    logits, temperature, floor, top_k, top_p, best, noise_keys, keys, ends, ties, scores, ids, stride, vocab_size,
    CUTS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """The largest logit plus noise of the kept tokens of a part."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    top, is_sound = _row_best(best, row, SPLITS, SPLITS_POW2)
    if is_sound & (tl.load(temperature + row) > 0.0):
        lane = tl.arange(0, BLOCK)
        v = split * BLOCK + lane
        x = _scaled(logits, temperature, floor, row, v, stride, vocab_size, top)
        is_kept = x > float("-inf")
        if CUTS:
            key = _key(x)
            end = tl.load(keys + row * 2 * (LAST + 1) + LAST)
            s = tl.arange(0, SPLITS_POW2)
            before = tl.sum(tl.load(ties + row * SPLITS + s, mask=s < split, other=0), 0)
            is_tie = key == end
            rank = before + tl.cumsum(is_tie.to(tl.int32), 0)
            is_kept = is_kept & ((key < end) | (is_tie & (rank.to(tl.float32) <= tl.load(ends + row * 2))))
        noise_key = tl.load(noise_keys + row).to(tl.uint64, bitcast=True)
        bits = _mix(noise_key + (v + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
        uniform = ((bits >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16
        score = x.to(tl.float64) - tl.log(-tl.log(uniform))
        score = tl.where(is_kept, score, float("-inf"))
        tl.store(scores + row * SPLITS + split, tl.max(score, 0))
        tl.store(ids + row * SPLITS + split, split * BLOCK + tl.argmax(score, 0))


@triton.jit
def _choose(temperature, best, best_ids, scores, ids, out, SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr):
    """A row's token, from its parts."""
    row = tl.program_id(0).to(tl.int64)
    _, is_sound = _row_best(best, row, SPLITS, SPLITS_POW2)
    s = tl.arange(0, SPLITS_POW2)
    mask = s < SPLITS
    token = -1
    if is_sound:
        if tl.load(temperature + row) > 0.0:
            score = tl.load(scores + row * SPLITS + s, mask=mask, other=float("-inf"))
            token = tl.load(ids + row * SPLITS + tl.argmax(score, 0))
        else:
            part = tl.load(best + row * SPLITS + s, mask=mask, other=float("-inf"))
            token = tl.load(best_ids + row * SPLITS + tl.argmax(part, 0))
    tl.store(out + row, token)
