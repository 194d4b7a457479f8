"""Loops over single tokens, compiled by numba: no matrix product does their work. Everything here is called by codec.py
and search.py; all release the GIL, so that threads may share the work.

Scores of a token with LANES query tokens are one vector of 16-bit integers, and so is a row of a look-up table. numba
would add them one by one; `add_rows` and `scaled_max` say in LLVM's terms what is meant. SCALE is what 1.0 is in the
tables; after `scaled_max` it is FINAL.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 32  # query tokens scored at a time
ROW = 2 * LANES  # bytes of their scores
SCALE = 8000  # so that similarities of 1.3 still fit after `scaled_max`
FACTOR = 3 << 12  # a factor of 1.0 in 16 bits
SHIFT = 12
FINAL = SCALE * FACTOR / (1 << SHIFT)
LONGEST = 1 << 10  # tokens of a passage
MOST_PARENTS = 256  # representatives that a byte can name

_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_VECTOR, _WIDE = ir.VectorType(_I16, LANES), ir.VectorType(ir.IntType(32), LANES)
_address, _int = types.intp, types.int64


def _load_row(builder, address):
    row = builder.load(builder.inttoptr(address, _VECTOR.as_pointer()))
    row.align = 2
    return row


def _store_row(builder, row, address):
    builder.store(row, builder.inttoptr(address, _VECTOR.as_pointer())).align = 2


@intrinsic
def add_rows(typing, base, tables, codes, n, target):
    """target[:] = base[:] + sum over m < n of tables[m, codes[m], :]; addresses, n even and above 0."""

    def generate(context, builder, signature, args):
        base, tables, codes, n, target = args
        constant = lambda value: ir.Constant(_I64, value)  # noqa: E731
        start, total = builder.block, _load_row(builder, base)
        loop, end = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        m, row = builder.phi(_I64), builder.phi(_VECTOR)
        m.add_incoming(constant(0), start)
        row.add_incoming(total, start)
        total = row
        for step in range(2):
            at = builder.add(m, constant(step))
            code = builder.load(builder.inttoptr(builder.add(codes, at), _I8.as_pointer()))
            index = builder.add(builder.shl(at, constant(8)), builder.zext(code, _I64))
            total = builder.add(total, _load_row(builder, builder.add(tables, builder.mul(index, constant(ROW)))))
        following = builder.add(m, constant(2))
        m.add_incoming(following, loop)
        row.add_incoming(total, loop)
        builder.cbranch(builder.icmp_signed("<", following, n), loop, end)
        builder.position_at_end(end)
        _store_row(builder, total, target)
        return context.get_dummy_value()

    return types.void(_address, _address, _address, _int, _address), generate


@intrinsic
def scaled_max(typing, best, row, factor):
    """best[:] = max(best[:], row[:] * factor >> SHIFT); addresses and a 16-bit factor."""

    def generate(context, builder, signature, args):
        best, row, factor = args
        wide = builder.sext(_load_row(builder, row), _WIDE)
        factor = builder.trunc(factor, ir.IntType(32))
        vector = ir.Constant(_WIDE, ir.Undefined)
        for lane in range(LANES):
            vector = builder.insert_element(vector, factor, ir.Constant(ir.IntType(32), lane))
        shift = ir.Constant(_WIDE, [SHIFT] * LANES)
        scaled = builder.trunc(builder.ashr(builder.mul(wide, vector), shift), _VECTOR)
        old = _load_row(builder, best)
        _store_row(builder, builder.select(builder.icmp_signed(">", scaled, old), scaled, old), best)
        return context.get_dummy_value()

    return types.void(_address, _address, _int), generate


@intrinsic
def prefetch(typing, address):
    """Ask for the cache line of an address, which will be read soon."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        builder.call(function, [pointer, *(ir.Constant(number, value) for value in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(_address), generate


@njit(nogil=True, cache=True)
def score_centroids(rows, coarse, offsets, sizes, centroids, scores):
    """Add the MaxSim of passages `rows` (n,) with up to LANES query tokens to scores (n,) int32, by centroids alone.

    coarse, offsets (N + 1, 2), sizes (N, 2): as codec.Codec.encode and passage_bytes say; centroids (C, LANES) int16.
    """
    best = np.empty(LANES, np.int16)
    for i in range(len(rows)):
        start = offsets[rows[i], 0]
        best[:] = -32768
        for at in range(start, start + 2 * np.int64(sizes[rows[i], 0]), 2):
            centroid = np.int64(coarse[at]) + 256 * np.int64(coarse[at + 1])
            scaled_max(best.ctypes.data, centroids.ctypes.data + centroid * ROW, FACTOR)
        for lane in range(LANES):
            scores[i] += best[lane]


@njit(nogil=True, cache=True)
def score_coarse(rows, coarse, offsets, sizes, M, centroids, table, factors, scores):
    """As score_centroids, by the coarse codes: table (M[0], 256, LANES) int16, factors (256,) of norms."""
    best, row = np.empty(LANES, np.int16), np.empty(LANES, np.int16)
    best_at, row_at = best.ctypes.data, row.ctypes.data
    for i in range(len(rows)):
        if i + 1 < len(rows):
            fetch(coarse, offsets[rows[i + 1], 0], offsets[rows[i + 1] + 1, 0])
        n, start = np.int64(sizes[rows[i], 0]), offsets[rows[i], 0]
        codes_at = coarse.ctypes.data + start + 3 * n
        best[:] = -32768
        for t in range(n):
            centroid = np.int64(coarse[start + 2 * t]) + 256 * np.int64(coarse[start + 2 * t + 1])
            add_rows(centroids.ctypes.data + centroid * ROW, table.ctypes.data, codes_at, M[0], row_at)
            scaled_max(best_at, row_at, factors[coarse[start + 2 * n + t]])
            codes_at += M[0]
        for lane in range(LANES):
            scores[i] += best[lane]


@njit(nogil=True, cache=True)
def score_fine(rows, coarse, fine, offsets, sizes, M, centroids, tables, fine_tables, follower_tables, factors, scores):
    """As score_coarse, by all codes of representatives and followers; factors (3, 256)."""
    found, best = np.empty((LONGEST, LANES), np.int16), np.empty(LANES, np.int16)
    row_of, best_at = found.ctypes.data, best.ctypes.data
    follower_at = row_of + (LONGEST - 1) * ROW
    for i in range(len(rows)):
        if i + 1 < len(rows):
            fetch(coarse, offsets[rows[i + 1], 0], offsets[rows[i + 1] + 1, 0])
            fetch(fine, offsets[rows[i + 1], 1], offsets[rows[i + 1] + 1, 1])
        passage = rows[i]
        n, followers = np.int64(sizes[passage, 0]), np.int64(sizes[passage, 1])
        start, parents = offsets[passage, 0], offsets[passage, 1]
        codes_at = coarse.ctypes.data + start + 3 * n
        fine_at = fine.ctypes.data + parents + 2 * followers  # after parents and norms
        best[:] = -32768
        for t in range(n):
            centroid = np.int64(coarse[start + 2 * t]) + 256 * np.int64(coarse[start + 2 * t + 1])
            token_at = row_of + t * ROW
            add_rows(centroids.ctypes.data + centroid * ROW, tables.ctypes.data, codes_at, M[0], token_at)
            add_rows(token_at, fine_tables.ctypes.data, fine_at, M[1], token_at)
            scaled_max(best_at, token_at, factors[1, coarse[start + 2 * n + t]])
            codes_at += M[0]
            fine_at += M[1]
        for t in range(followers):
            parent_at = row_of + np.int64(fine[parents + t]) * ROW
            add_rows(parent_at, follower_tables.ctypes.data, fine_at, M[2], follower_at)
            scaled_max(best_at, follower_at, factors[2, fine[parents + followers + t]])
            fine_at += M[2]
        for lane in range(LANES):
            scores[i] += best[lane]


@njit(inline="always")
def fetch(data, start, stop):
    """Prefetch data[start:stop], bytes."""
    for at in range(start, stop, 64):
        prefetch(data.ctypes.data + at)


@njit(nogil=True, cache=True, fastmath=True)
def fill_tables(codewords, edges, query, tables):
    """Dot products of codewords with a query, rounded: tables (M, 256, LANES) int16.

    codewords (M, 256, d), of which part m uses edges[m + 1] - edges[m] columns; query (D, LANES) fp32.
    """
    row = np.empty(LANES, np.float32)
    for m in range(len(codewords)):
        for k in range(codewords.shape[1]):
            row[:] = np.float32(32768.5)  # what is cut off is then rounded
            for j in range(edges[m + 1] - edges[m]):
                value = codewords[m, k, j]
                for lane in range(LANES):
                    row[lane] += value * query[edges[m] + j, lane]
            for lane in range(LANES):
                tables[m, k, lane] = np.int16(np.int32(row[lane]) - 32768)


@njit(nogil=True, cache=True)
def round_into(values, rounded):
    """The nearest 16-bit integers of values (C, LANES) fp32."""
    for i in range(len(values)):
        for lane in range(LANES):
            rounded[i, lane] = np.int16(np.int32(values[i, lane] + np.float32(32768.5)) - 32768)


@njit(nogil=True, cache=True)
def probe(lists, starts, probes, gains, seen, totals, found):
    """Passages in the probed lists of a block, and how much each promises.

    lists: passages of each list; starts (C + 1,): where a list begins; probes (Lq, P): the lists of each query token,
    the best first; gains (Lq, P): what a hit adds. A passage counts once a query token, by its best list.
    seen (block,) uint16 and totals (block,) int32, all 0 before and after; found: room for the passages.
    Returns the passages and their totals.
    """
    n = 0
    for q in range(len(probes)):
        stamp = np.uint16(q + 1)
        for j in range(probes.shape[1]):
            gain = gains[q, j]
            for at in range(starts[probes[q, j]], starts[probes[q, j] + 1]):
                passage = lists[at]
                if seen[passage] == 0:
                    found[n] = passage
                    n += 1
                if seen[passage] != stamp:
                    seen[passage] = stamp
                    totals[passage] += gain
    passages, promise = found[:n].copy(), np.empty(n, np.int32)
    for i in range(n):
        promise[i] = totals[passages[i]]
        totals[passages[i]] = 0
        seen[passages[i]] = 0
    return passages, promise


@njit(nogil=True, cache=True)
def representatives(vectors, offsets, similarity, parents):
    """Choose tokens that stand for the others of their passage: parents (T,), a token's own position if it is one.

    vectors (T, D) fp32 unit vectors; offsets (n + 1,) of the passages. Again and again the token with the most
    neighbours left, at cosine `similarity` or more, is taken with them, until nobody has any; then every token so
    covered goes to the nearest of the representatives.
    """
    for passage in range(len(offsets) - 1):
        start, n = offsets[passage], offsets[passage + 1] - offsets[passage]
        part = vectors[start : start + n]
        cosine = np.dot(part, part.T)
        near = cosine >= similarity
        neighbours = np.zeros(n, np.int64)
        for i in range(n):
            for j in range(n):
                neighbours[i] += near[i, j]
        left, chosen, n_chosen = np.ones(n, np.bool_), np.zeros(n, np.bool_), 0
        while n_chosen < MOST_PARENTS:
            best = -1
            for i in range(n):
                if left[i] and neighbours[i] > 1 and (best < 0 or neighbours[i] > neighbours[best]):
                    best = i
            if best < 0:
                break
            chosen[best] = True
            n_chosen += 1
            for j in range(n):
                if left[j] and near[best, j]:
                    left[j] = False
                    for k in range(n):
                        neighbours[k] -= near[j, k]
        for i in range(n):
            parents[start + i] = start + i
            if not left[i] and not chosen[i]:
                nearest = -1
                for j in range(n):
                    if chosen[j] and (nearest < 0 or cosine[i, j] > cosine[i, nearest]):
                        nearest = j
                parents[start + i] = start + nearest


@njit(nogil=True, cache=True, fastmath=True)
def quantise(vectors, books, edges, codes, rebuilt):
    """The nearest codeword of each part of each vector (product quantisation).

    vectors (n, D) fp32; books (M, 256, d), of which part m uses edges[m + 1] - edges[m] columns; writes codes (n, M)
    uint8 and the codewords themselves, rebuilt (n, D).
    """
    M, K, d = books.shape
    columns, halves, distances = np.empty((d, K), np.float32), np.empty(K, np.float32), np.empty(K, np.float32)
    for m in range(M):
        first, width = edges[m], edges[m + 1] - edges[m]
        halves[:] = 0
        for j in range(width):
            for k in range(K):
                columns[j, k] = books[m, k, j]
                halves[k] += np.float32(0.5) * columns[j, k] * columns[j, k]
        for i in range(len(vectors)):
            for k in range(K):
                distances[k] = halves[k]
            for j in range(width):
                value = vectors[i, first + j]
                for k in range(K):
                    distances[k] -= value * columns[j, k]
            least = distances[0]
            for k in range(K):
                least = min(least, distances[k])
            code = 0
            while distances[code] != least:
                code += 1
            codes[i, m] = code
            for j in range(width):
                rebuilt[i, first + j] = columns[j, code]
