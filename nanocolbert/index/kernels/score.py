"""Scores of passages with a query, by look-ups: the lists that a query token probes, what passages promise, MaxSim.

Scores of a token with LANES query tokens are one vector of 16-bit integers, and so is a row of a look-up table. SCALE
is what 1.0 is in the tables; once scaled to unit length it is FINAL.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from nanocolbert.compute import compiled
from nanocolbert.index.kernels.compiled import ADDRESS, I8, I16, I32, I64, INT, hold, splat
from nanocolbert.index.knobs import LONGEST

LANES = 32  # query tokens scored at a time
ROW = 2 * LANES  # bytes of their scores
SCALE = 16000  # so that similarities up to 2 fit in 16 bits
ROUGH = 7  # bits that scores lose where a byte holds them
FACTOR = 1 << 14  # a factor of 1.0
FINAL = SCALE * FACTOR / (1 << 16)
GROUPS, BINS = 8, 4096  # see nearest_lists and probe

_VECTOR, _WIDE, _ROUGH = ir.VectorType(I16, LANES), ir.VectorType(I32, LANES), ir.VectorType(I8, LANES)


def _load_row(builder, address, kind=_VECTOR):
    row = builder.load(builder.inttoptr(address, kind.as_pointer()))
    row.align = kind.element.width // 8
    return row


def _store_row(builder, row, address):
    builder.store(row, builder.inttoptr(address, _VECTOR.as_pointer())).align = 2


def _sum_rows(builder, base, tables, codes, n, kind=_VECTOR):
    """base[:] + sum over m < n of tables[m, codes[m], :]; bytes stay within their range."""
    constant = lambda value: ir.Constant(I64, value)  # noqa: E731
    size = LANES * kind.element.width // 8
    if kind is _ROUGH:
        function = builder.module.declare_intrinsic(f"llvm.sadd.sat.v{LANES}i8", fnty=ir.FunctionType(kind, [kind] * 2))
        add = lambda a, b: builder.call(function, [a, b])  # noqa: E731
    else:
        add = builder.add
    start, first = builder.block, _load_row(builder, base, kind)
    loop, end = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    m, row = builder.phi(I64), builder.phi(kind)
    m.add_incoming(constant(0), start)
    row.add_incoming(first, start)
    total = row
    for step in range(2):
        at = builder.add(m, constant(step))
        code = builder.load(builder.inttoptr(builder.add(codes, at), I8.as_pointer()))
        index = builder.add(builder.shl(at, constant(8)), builder.zext(code, I64))
        total = add(total, _load_row(builder, builder.add(tables, builder.mul(index, constant(size))), kind))
    following = builder.add(m, constant(2))
    m.add_incoming(following, loop)
    row.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, n), loop, end)
    builder.position_at_end(end)
    return total


def _update_max(builder, best, row, factor):
    """best[:] = max(best[:], row[:] * factor >> 16): one instruction multiplies and shifts."""
    factors = splat(builder, builder.trunc(factor, I16), _VECTOR)
    product = builder.mul(builder.sext(row, _WIDE), builder.sext(factors, _WIDE))
    scaled = builder.trunc(builder.ashr(product, ir.Constant(_WIDE, [16] * LANES)), _VECTOR)
    old = _load_row(builder, best)
    _store_row(builder, builder.select(builder.icmp_signed(">", scaled, old), scaled, old), best)


@intrinsic
def add_rows(typing, base, tables, codes, n, target):
    """target[:] = base[:] + sum over m < n of tables[m, codes[m], :]; addresses, n even and above 0."""

    def generate(context, builder, signature, args):
        *parts, target = args
        _store_row(builder, _sum_rows(builder, *parts), target)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, ADDRESS, INT, ADDRESS), generate


@intrinsic
def add_rows_max(typing, base, tables, codes, n, best, factor):
    """best[:] = max(best[:], the sum that add_rows has * factor >> 16); addresses and a factor under 2^15."""

    def generate(context, builder, signature, args):
        *parts, best, factor = args
        _update_max(builder, best, _sum_rows(builder, *parts), factor)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, ADDRESS, INT, ADDRESS, INT), generate


@intrinsic
def add_rough_rows_max(typing, base, tables, codes, n, best, factor):
    """As add_rows_max, where base and tables are bytes, without their last ROUGH bits; best is not."""

    def generate(context, builder, signature, args):
        *parts, best, factor = args
        row = builder.sext(_sum_rows(builder, *parts, kind=_ROUGH), _VECTOR)
        _update_max(builder, best, builder.shl(row, ir.Constant(_VECTOR, [ROUGH] * LANES)), factor)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, ADDRESS, INT, ADDRESS, INT), generate


@intrinsic
def scaled_max(typing, best, row, factor):
    """best[:] = max(best[:], row[:] * factor >> 16); addresses and a factor under 2^15."""

    def generate(context, builder, signature, args):
        best, row, factor = args
        _update_max(builder, best, _load_row(builder, row), factor)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, INT), generate


@intrinsic
def two_bytes(typing, address):
    """The number that two bytes at an address are, the lower one first."""

    def generate(context, builder, signature, args):
        number = builder.load(builder.inttoptr(args[0], I16.as_pointer()))
        number.align = 1
        return builder.zext(number, I64)

    return types.int64(ADDRESS), generate


@intrinsic
def prefetch(typing, address):
    """Ask for the cache line of an address, which will be read soon."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        builder.call(function, [pointer, *(ir.Constant(number, value) for value in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(ADDRESS), generate


@compiled()
def score_coarse(rows, coarse, offsets, sizes, M, centroids, table, factors, scores):
    """Add the MaxSim of passages `rows` (n,) with up to LANES query tokens to scores (n,) int32, by coarse codes.

    coarse, offsets (N + 1, 2), sizes (N, 2): as codec.Codec.encode and passage_bytes say; M: bytes of a code.
    centroids (C, LANES), table (M[0], 256, LANES): what `rough` makes of similarities; factors (256,): what a byte of
    norm stands for.
    """
    best, last = np.empty(LANES, np.int16), np.int64(len(centroids) - 1)
    best_at = best.ctypes.data
    for i in range(len(rows)):
        if i + 1 < len(rows):
            fetch(coarse, offsets[rows[i + 1], 0], offsets[rows[i + 1] + 1, 0])
        n, start = np.int64(sizes[rows[i], 0]), offsets[rows[i], 0]
        centroids_of = coarse.ctypes.data + start
        codes_at = centroids_of + 3 * n
        best[:] = -32768
        for t in range(n):
            centroid_at = centroids.ctypes.data + min(two_bytes(centroids_of + 2 * t), last) * LANES
            factor = factors[coarse[start + 2 * n + t]]
            add_rough_rows_max(centroid_at, table.ctypes.data, codes_at, M[0], best_at, factor)
            codes_at += M[0]
        for lane in range(LANES):
            scores[i] += best[lane]


@compiled()
def score_fine(rows, coarse, fine, offsets, sizes, M, centroids, tables, fine_tables, follower_tables, factors, scores):
    """As score_coarse, by all codes of representatives and followers; factors (3, 256)."""
    found, best = np.empty((LONGEST, LANES), np.int16), np.empty(LANES, np.int16)
    row_of, best_at, last = found.ctypes.data, best.ctypes.data, np.int64(len(centroids) - 1)
    for i in range(len(rows)):
        if i + 1 < len(rows):
            fetch(coarse, offsets[rows[i + 1], 0], offsets[rows[i + 1] + 1, 0])
            fetch(fine, offsets[rows[i + 1], 1], offsets[rows[i + 1] + 1, 1])
        passage = rows[i]
        n, followers = np.int64(sizes[passage, 0]), np.int64(sizes[passage, 1])
        start, parents = offsets[passage, 0], offsets[passage, 1]
        centroids_of = coarse.ctypes.data + start
        codes_at = centroids_of + 3 * n
        fine_at = fine.ctypes.data + parents + 2 * followers  # after parents and norms
        best[:] = -32768
        for t in range(n):
            token_at = row_of + t * ROW
            centroid_at = centroids.ctypes.data + min(two_bytes(centroids_of + 2 * t), last) * ROW
            add_rows(centroid_at, tables.ctypes.data, codes_at, M[0], token_at)
            add_rows(token_at, fine_tables.ctypes.data, fine_at, M[1], token_at)
            scaled_max(best_at, token_at, factors[1, coarse[start + 2 * n + t]])
            codes_at += M[0]
            fine_at += M[1]
        for t in range(followers):
            parent_at = row_of + min(np.int64(fine[parents + t]), n - 1) * ROW
            factor = factors[2, fine[parents + followers + t]]
            add_rows_max(parent_at, follower_tables.ctypes.data, fine_at, M[2], best_at, factor)
            fine_at += M[2]
        for lane in range(LANES):
            scores[i] += best[lane]
    hold(found)


@njit(inline="always")
def fetch(data, start, stop):
    """Prefetch data[start:stop], bytes."""
    for at in range(start, stop, 64):
        prefetch(data.ctypes.data + at)


@compiled()
def wrong_passage(offsets, sizes, M):
    """The first passage whose sizes (n, 2) cannot be, or are not those that offsets (n + 1, 2) tell; n if none.

    M: bytes of a code, as codec.Codec.passage_bytes says.
    """
    for i in range(len(sizes)):
        n, followers = np.int64(sizes[i, 0]), np.int64(sizes[i, 1])
        coarse, fine = (M[0] + 3) * n, M[1] * n + (M[2] + 2) * followers
        is_right = n > 0 and n + followers < LONGEST
        is_right &= offsets[i + 1, 0] - offsets[i, 0] == coarse and offsets[i + 1, 1] - offsets[i, 1] == fine
        if not is_right:
            return i
    return len(sizes)


@compiled()
def rough(similarities):
    """Similarities, int16, rounded to bytes: half of what a look-up has to fetch."""
    flat, found = similarities.ravel(), np.empty(similarities.size, np.int8)
    for i in range(len(flat)):
        found[i] = min(127, (np.int32(flat[i]) + (1 << (ROUGH - 1))) >> ROUGH)
    return found.reshape(similarities.shape)


@compiled()
def nearest_lists(centroids, n_tokens, nprobe):
    """The nprobe centroids most similar to each of the first n_tokens query tokens.

    centroids (C, LANES) int16, nprobe at most C. Returns them, (n_tokens, nprobe) int64, the most similar first, and
    their similarities, int32. Only what reaches the nprobe-th highest of some maxima of groups is looked at.
    """
    C, size = len(centroids), min(len(centroids), GROUPS * nprobe)
    maxima = np.full((size, LANES), np.int16(-32768))
    for start in range(0, C, size):
        for i in range(min(size, C - start)):
            for lane in range(LANES):
                maxima[i, lane] = max(maxima[i, lane], centroids[start + i, lane])
    least = np.full(LANES, np.int16(32767))
    for token in range(n_tokens):
        least[token] = np.partition(maxima[:, token].copy(), size - nprobe)[size - nprobe]
    lists, similarities = np.zeros((n_tokens, nprobe), np.int64), np.full((n_tokens, nprobe), np.int32(-32769))
    for i in range(C):
        reached = False
        for lane in range(LANES):
            reached |= centroids[i, lane] >= least[lane]
        if not reached:
            continue
        for token in range(n_tokens):
            similarity, at = np.int32(centroids[i, token]), nprobe
            if similarity < least[token]:
                continue
            while at > 0 and similarities[token, at - 1] < similarity:
                if at < nprobe:
                    similarities[token, at], lists[token, at] = similarities[token, at - 1], lists[token, at - 1]
                at -= 1
            if at < nprobe:
                similarities[token, at], lists[token, at] = similarity, i
    return lists, similarities


@compiled()
def probe(lists, starts, probes, gains, may, states, n):
    """The n passages of a block, or a few more, that promise most by the lists they are in.

    lists: passages of each list; starts (C + 1,): where a list begins; probes (Lq, P): the lists of each query token,
    the best first; gains (Lq, P): what a hit adds. A passage counts once a query token, by its best list.
    may (size,): which passages may be found; states (2^16,) uint32, as lists are uint16, 0 before and after: what each
    promises, and in the upper 8 bits which token found it last.
    Returns the passages, in order, and what they promise.
    """
    lower = np.uint32((1 << 24) - 1)
    for q in range(len(probes)):
        stamp = np.uint32((q % 255 + 1) << 24)
        for j in range(probes.shape[1]):
            gain = np.uint32(gains[q, j])
            for at in range(starts[probes[q, j]], starts[probes[q, j] + 1]):
                state = states[lists[at]]
                if state & ~lower != stamp:
                    states[lists[at]] = np.uint32((state & lower) + gain) | stamp
    most = np.uint32(0)
    for i in range(len(may)):
        states[i] = states[i] & lower if may[i] else 0
        most = max(most, states[i])
    shift = 0
    while most >> shift >= BINS:
        shift += 1
    counts = np.zeros(BINS, np.int64)
    for i in range(len(may)):
        counts[states[i] >> shift] += 1
    least, total = BINS, 0
    while least > 1 and total < n:
        least -= 1
        total += counts[least]
    floor = max(1, least << shift)
    passages, promises, found = np.empty(total + counts[0], np.int64), np.empty(total + counts[0], np.int32), 0
    for i in range(len(may)):
        if states[i] >= floor:
            passages[found], promises[found] = i, states[i]
            found += 1
        states[i] = 0
    states[len(may) :] = 0  # what only a damaged list names
    return passages[:found], promises[:found]
