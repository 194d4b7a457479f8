"""Product quantisation: the nearest codewords of vectors' parts, and codewords that move to what they stand for."""

from functools import reduce

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from nanocolbert.compute import compiled
from nanocolbert.index.kernels.compiled import ADDRESS, CODEWORDS, F32, I32, I64, INT, hold, shuffle, splat

STRIP = 64  # codewords whose distances are in registers at a time: 8 of the 16 that AVX2 has
GROUPED = 16  # see subtract_products

_STRIP = ir.VectorType(F32, STRIP)


def _strips(builder, addresses, body):
    """Call body(*strips) for the STRIPs at these addresses of CODEWORDS numbers each, one strip after the other."""
    for start in range(0, 4 * CODEWORDS, 4 * STRIP):
        body(*(builder.add(address, ir.Constant(I64, start)) for address in addresses))


def _load_strip(builder, address, kind=_STRIP):
    strip = builder.load(builder.inttoptr(address, kind.as_pointer()))
    strip.align = 4
    return strip


def _fold(builder, strips, folded=()):
    """The least numbers of some strips, and of what is folded, GROUPED of them: of those that are GROUPED apart."""
    least = lambda a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b)  # noqa: E731
    total = reduce(least, strips)
    while total.type.count > GROUPED:
        half = total.type.count // 2
        halves = ([ir.Constant(I32, at) for at in range(start, start + half)] for start in (0, half))
        total = least(*(shuffle(builder, total, places) for places in halves))
    return reduce(least, folded, total)


def _reduce(builder, numbers, name):
    """The least or the highest of numbers: name fmin or fmax."""
    kind = ir.FunctionType(F32, [numbers.type])
    function = builder.module.declare_intrinsic(f"llvm.vector.reduce.{name}.v{numbers.type.count}f32", fnty=kind)
    return builder.call(function, [numbers], fastmath=("nnan",))


@intrinsic
def subtract_products(typing, base, columns, factors, n, target, minima):
    """target[:] = base[:] - sum over j < n of factors[j] * columns[j, :]; returns the least of target.

    Addresses of fp32 numbers, rows of CODEWORDS; n above 0. Sums of a strip stay in registers until they are whole.
    minima: GROUPED numbers, each the least of those that are GROUPED apart in target.
    """

    def generate(context, builder, signature, args):
        base, columns, factors, n, target, minima = args
        found = []

        def sum_up(base, columns, target):
            start, first = builder.block, _load_strip(builder, base)
            loop, end = builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            j, total = builder.phi(I64), builder.phi(_STRIP)
            factor = builder.load(
                builder.inttoptr(builder.add(factors, builder.shl(j, ir.Constant(I64, 2))), F32.as_pointer())
            )
            column = _load_strip(builder, builder.add(columns, builder.mul(j, ir.Constant(I64, 4 * CODEWORDS))))
            product = builder.fmul(splat(builder, factor, _STRIP), column, flags=("contract",))
            less = builder.fsub(total, product, flags=("contract",))
            following = builder.add(j, ir.Constant(I64, 1))
            for phi, before, after in (j, ir.Constant(I64, 0), following), (total, first, less):
                phi.add_incoming(before, start)
                phi.add_incoming(after, loop)
            builder.cbranch(builder.icmp_signed("<", following, n), loop, end)
            builder.position_at_end(end)
            builder.store(less, builder.inttoptr(target, _STRIP.as_pointer())).align = 4
            # stored at once: else LLVM keeps strips to fold later, more of them than AVX2 has registers for
            found.append(_fold(builder, [less], found[-1:]))
            builder.store(found[-1], builder.inttoptr(minima, found[-1].type.as_pointer())).align = 4

        _strips(builder, (base, columns, target), sum_up)
        return _reduce(builder, found[-1], "fmin")

    return types.float32(ADDRESS, ADDRESS, ADDRESS, INT, ADDRESS, ADDRESS), generate


@intrinsic
def least_sum(typing, a, b):
    """The least of a[:] + b[:], CODEWORDS fp32 numbers each; addresses."""

    def generate(context, builder, signature, args):
        found = []
        add = lambda a, b: found.append(builder.fadd(_load_strip(builder, a), _load_strip(builder, b)))  # noqa: E731
        _strips(builder, args, add)
        return _reduce(builder, _fold(builder, found), "fmin")

    return types.float32(ADDRESS, ADDRESS), generate


@intrinsic
def nth_lowest(typing, numbers, n):
    """The n-th lowest, counted from 1, of GROUPED fp32 numbers at an address: by how many are lower than each."""

    def generate(context, builder, signature, args):
        kind, counts = ir.VectorType(F32, GROUPED), ir.VectorType(I32, GROUPED)
        vector, lower = _load_strip(builder, args[0], kind), ir.Constant(counts, [0] * GROUPED)
        for at in range(GROUPED):
            other = shuffle(builder, vector, [ir.Constant(I32, at)] * GROUPED)
            lower = builder.add(lower, builder.zext(builder.fcmp_ordered("<", other, vector), counts))
        within = builder.icmp_signed("<", lower, splat(builder, builder.trunc(args[1], I32), counts))
        return _reduce(builder, builder.select(within, vector, ir.Constant(kind, [-1e30] * GROUPED)), "fmax")

    return types.float32(ADDRESS, INT), generate


def _which(sign, width):
    """An intrinsic: which of `width` fp32 numbers at an address are `sign` a limit, one bit each."""

    @intrinsic
    def which(typing, numbers, limit):
        def generate(context, builder, signature, args):
            vector = _load_strip(builder, args[0], ir.VectorType(F32, width))
            bits = builder.fcmp_ordered(sign, vector, splat(builder, args[1], vector.type))
            return builder.zext(builder.bitcast(bits, ir.IntType(width)), I64)

        return types.uint64(ADDRESS, types.float32), generate

    return which


at_most, few_below, few_equal = _which("<=", STRIP), _which("<", GROUPED), _which("==", GROUPED)


@intrinsic
def trailing_zeros(typing, bits):
    """Where the lowest bit of a number above 0 is."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def position(typing, distances, value):
    """Where a value is first among CODEWORDS distances, fp32, at an address; it must be there."""

    def generate(context, builder, signature, args):
        wanted, start = splat(builder, args[1], _STRIP), builder.block
        loop, end = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(I64)
        strip = _load_strip(builder, builder.add(args[0], builder.shl(at, ir.Constant(I64, 2))))
        bits = builder.bitcast(builder.fcmp_ordered("==", strip, wanted), I64)
        at.add_incoming(ir.Constant(I64, 0), start)
        at.add_incoming(builder.add(at, ir.Constant(I64, STRIP)), loop)
        builder.cbranch(builder.icmp_unsigned("==", bits, ir.Constant(I64, 0)), loop, end)
        builder.position_at_end(end)
        return builder.add(at, builder.cttz(bits, ir.Constant(ir.IntType(1), 1)))

    return types.int64(ADDRESS, types.float32), generate


@compiled(fastmath=True)
def first_codewords(vectors, edges, chances, codewords):
    """Codewords (M, 256, d) to begin k-means of each part with, far from each other (k-means++, SODA 2007).

    vectors (n, D) fp32, chances (M, 256) uniform in [0, 1): a vector is taken with a chance that grows with its squared
    distance to the nearest codeword so far.
    """
    n = len(vectors)
    distances, to_last = np.empty(n, np.float32), np.empty(n, np.float32)
    for m in range(len(codewords)):
        part = vectors[:, edges[m] : edges[m + 1]].T.copy()  # (d, n)
        distances[:] = 1
        for k in range(codewords.shape[1]):
            wanted = chances[m, k] * distances.sum()
            chosen, total = 0, np.float64(distances[0])
            while total < wanted and chosen < n - 1:
                chosen += 1
                total += distances[chosen]
            to_last[:] = 0
            for j in range(len(part)):
                word = codewords[m, k, j] = part[j, chosen]
                for i in range(n):
                    to_last[i] += (part[j, i] - word) ** 2
            for i in range(n):
                distances[i] = to_last[i] if k == 0 else min(distances[i], to_last[i])


@compiled()
def quantise(vectors, columns, coarse, fine, coarse_edges, fine_edges, within, n_candidates, codes, rebuilt):
    """Codewords for the parts of each vector, and for the finer parts of what those leave over.

    vectors (n, D) fp32, columns (D,): these in the order of the parts; coarse (P, CODEWORDS, d) and fine (Q, CODEWORDS,
    e): codewords, of which part m has columns edges[m] to edges[m + 1] - 1; within (P + 1,): the fine parts that part m
    is made of. Of the n_candidates coarse codewords nearest to a part that one is taken whose fine codewords leave
    least over.
    Writes codes (n, P + Q) uint8, and the codewords themselves: rebuilt (2, n, D), the coarse ones, and both.
    """
    P, n = len(coarse), len(vectors)
    rows, halves = transpose(coarse, coarse_edges)
    fine_rows, fine_halves = transpose(fine, fine_edges)
    nearest, errors = np.empty((n, n_candidates), np.uint8), np.empty((n, n_candidates), np.float32)
    found, error = np.empty((n, 1), np.uint8), np.empty((n, 1), np.float32)
    for m in range(P):
        first, stop = coarse_edges[m], coarse_edges[m + 1]
        left = np.empty((n, stop - first), np.float32)
        for i in range(n):
            for j in range(stop - first):
                left[i, j] = vectors[i, columns[first + j]]
        find_nearest(left, 0, stop - first, rows[m], halves[m], nearest, errors)
        for part in range(within[m], within[m + 1] if n_candidates > 1 else 0):
            begin, width = fine_edges[part] - first, fine_edges[part + 1] - fine_edges[part]
            words = coarse[m, :, begin : begin + width]
            add_errors(left, begin, words, fine_rows[part], fine_halves[part], nearest, errors)
        for i in range(n):
            code = nearest[i, errors[i].argmin()]
            codes[i, m] = code
            for j in range(stop - first):
                word = coarse[m, code, j]
                rebuilt[0, i, columns[first + j]] = rebuilt[1, i, columns[first + j]] = word
                left[i, j] -= word
        for part in range(within[m], within[m + 1]):
            begin, width = fine_edges[part], fine_edges[part + 1] - fine_edges[part]
            find_nearest(left, begin - first, width, fine_rows[part], fine_halves[part], found, error)
            for i in range(n):
                codes[i, P + part] = found[i, 0]
                for j in range(width):
                    rebuilt[1, i, columns[begin + j]] += fine[part, found[i, 0], j]


@compiled()
def find_nearest(vectors, first, width, columns, halves, nearest, errors):
    """The codewords nearest to a part of each vector, in any order.

    vectors (n, D), of which `width` columns from `first` on; columns (d, CODEWORDS), halves (CODEWORDS,): of the
    codewords, as `transpose` says. Writes nearest (n, N) uint8, N under GROUPED, and errors (n, N): half the squared
    distances, less what all share.
    """
    N, distances, minima = nearest.shape[1], zeros(1)[0], np.empty(GROUPED, np.float32)
    found, places = np.empty(GROUPED, np.float32), np.empty(GROUPED, np.uint8)
    distances_at, minima_at = distances.ctypes.data, minima.ctypes.data
    for i in range(len(vectors)):
        part_at = vectors[i, first:].ctypes.data
        least = subtract_products(halves.ctypes.data, columns.ctypes.data, part_at, width, distances_at, minima_at)
        if N == 1:
            nearest[i, 0], errors[i, 0] = position(distances_at, least), least
            continue
        limit, n = nth_lowest(minima_at, N), 0  # few but the N nearest are within
        found[:] = np.inf
        for start in range(0, CODEWORDS, STRIP):
            bits = at_most(distances_at + 4 * start, limit)
            while bits:
                place = start + trailing_zeros(bits)
                bits &= bits - np.uint64(1)
                found[n], places[n] = distances[place], place
                n += 1
                if n == GROUPED:  # no room for more
                    take_lowest(found, places, errors[i], nearest[i])
                    found[:N], places[:N], n = errors[i], nearest[i], N
                    found[N:] = np.inf
        take_lowest(found, places, errors[i], nearest[i])
    hold((distances, minima))


@njit(inline="always")
def take_lowest(numbers, places, lowest, places_of_lowest):
    """Copy the n lowest of GROUPED numbers, and their places, to lowest (n,) and places_of_lowest (n,)."""
    limit = nth_lowest(numbers.ctypes.data, len(lowest))
    bits, equal = few_below(numbers.ctypes.data, limit), few_equal(numbers.ctypes.data, limit)
    for j in range(len(lowest)):
        if not bits:
            bits = equal
        at = trailing_zeros(bits)
        bits &= bits - np.uint64(1)
        lowest[j], places_of_lowest[j] = numbers[at], places[at]


@compiled()
def add_errors(vectors, first, words, columns, halves, nearest, errors):
    """Add to errors (n, N) what the best codeword of a fine part leaves over of that part of each vector.

    vectors (n, D), the part from `first` on; words (CODEWORDS, e): of the coarse codewords, what they have of the part;
    columns, halves: of the fine ones, as find_nearest; nearest (n, N): the coarse codewords tried.
    Half the squared distance of codeword f to x - c, less what all f share, is (f.f / 2 + c.f) - x.f: a row of a table
    for each c, and a row for each x.
    """
    width = words.shape[1]
    table, row, nothing, minima, negative = zeros(CODEWORDS), zeros(1), zeros(1), np.empty(GROUPED, np.float32), -words
    table_at, row_at, nothing_at = table.ctypes.data, row.ctypes.data, nothing.ctypes.data
    columns_at, halves_at, minima_at = columns.ctypes.data, halves.ctypes.data, minima.ctypes.data
    for code in range(CODEWORDS):
        negative_at, row_of_code = negative.ctypes.data + 4 * width * code, table_at + 4 * CODEWORDS * code
        subtract_products(halves_at, columns_at, negative_at, width, row_of_code, minima_at)
    for i in range(len(vectors)):
        subtract_products(nothing_at, columns_at, vectors[i, first:].ctypes.data, width, row_at, minima_at)
        for c in range(nearest.shape[1]):
            errors[i, c] += least_sum(row_at, table_at + 4 * CODEWORDS * np.int64(nearest[i, c]))
    hold((table, row, nothing, minima, negative))


@compiled()
def refine(words, edges, codes, left):
    """Move codewords (M, CODEWORDS, d) by the mean of what is left over of vectors (n, D) with their codes (n, M)."""
    M = len(words)
    counts, shifts = np.zeros((M, CODEWORDS), np.int64), np.zeros(words.shape)
    for i in range(len(left)):
        for m in range(M):
            code = codes[i, m]
            counts[m, code] += 1
            for j in range(edges[m], edges[m + 1]):
                shifts[m, code, j - edges[m]] += left[i, j]
    for m in range(M):
        for code in range(CODEWORDS):
            for j in range(words.shape[2]):
                shifts[m, code, j] /= max(1, counts[m, code])
                words[m, code, j] += shifts[m, code, j]
    for i in range(len(left)):
        for m in range(M):
            for j in range(edges[m], edges[m + 1]):
                left[i, j] -= shifts[m, codes[i, m], j - edges[m]]


@compiled(fastmath=True)
def transpose(words, edges):
    """Codewords (M, CODEWORDS, d) as columns (M, d, CODEWORDS), and halves of their squares (M, CODEWORDS)."""
    M, width = len(words), words.shape[2]
    columns, halves = zeros(M * width).reshape(M, width, CODEWORDS), zeros(M)
    for m in range(M):
        for j in range(edges[m + 1] - edges[m]):
            for k in range(CODEWORDS):
                columns[m, j, k] = words[m, k, j]
                halves[m, k] += np.float32(0.5) * words[m, k, j] * words[m, k, j]
    return columns, halves


@compiled()
def zeros(n):
    """Zeros (n, CODEWORDS), fp32, that begin with a cache line: no vector loaded of them lies in two."""
    room = np.zeros(n * CODEWORDS + 16, np.float32)
    first = -room.ctypes.data // 4 % 16
    return room[first : first + n * CODEWORDS].reshape(n, CODEWORDS)
