"""Loops over single tokens, compiled by numba: no matrix product does their work. Everything here is called by codec.py
and search.py; all release the GIL, so that threads may share the work.

Scores of a token with LANES query tokens are one vector of 16-bit integers, and so is a row of a look-up table. numba
would add them one by one; the intrinsics say in LLVM's terms what is meant. SCALE is what 1.0 is in the tables; once
scaled to unit length it is FINAL.

Addresses are trusted: search.py and codec.py check all that can be told in O(passages) before the first search, and
numbers among the codes are bounded here.
"""

from functools import reduce

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from nanocolbert.index.knobs import LONGEST

LANES = 32  # query tokens scored at a time
ROW = 2 * LANES  # bytes of their scores
SCALE = 16000  # so that similarities up to 2 fit in 16 bits
ROUGH = 7  # bits that scores lose where a byte holds them
FACTOR = 1 << 14  # a factor of 1.0
FINAL = SCALE * FACTOR / (1 << 16)
GROUPS, BINS = 8, 4096  # see nearest_lists and probe
MOST_PARENTS = 256  # representatives that a byte can name
CODEWORDS = 256  # of a part
STRIP = 64  # of them, those whose distances are in registers at a time: 8 of the 16 that AVX2 has
GROUPED = 16  # see subtract_products

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR, _WIDE = ir.VectorType(_I16, LANES), ir.VectorType(_I32, LANES)
_ROUGH, _STRIP = ir.VectorType(_I8, LANES), ir.VectorType(_F32, STRIP)
_address, _int = types.intp, types.int64


def compiled(**options):
    """Compile a function that releases the GIL, and keep it on disk, where there is a folder that can be written to."""

    def compile(function):
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no such folder
            return njit(nogil=True, **options)(function)

    return compile


def _load_row(builder, address, kind=_VECTOR):
    row = builder.load(builder.inttoptr(address, kind.as_pointer()))
    row.align = kind.element.width // 8
    return row


def _store_row(builder, row, address):
    builder.store(row, builder.inttoptr(address, _VECTOR.as_pointer())).align = 2


def _shuffle(builder, vector, places):
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, len(places)), places))


def _splat(builder, value, kind):
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return _shuffle(builder, one, [ir.Constant(_I32, 0)] * kind.count)


def _sum_rows(builder, base, tables, codes, n, kind=_VECTOR):
    """base[:] + sum over m < n of tables[m, codes[m], :]; bytes stay within their range."""
    constant = lambda value: ir.Constant(_I64, value)  # noqa: E731
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
    m, row = builder.phi(_I64), builder.phi(kind)
    m.add_incoming(constant(0), start)
    row.add_incoming(first, start)
    total = row
    for step in range(2):
        at = builder.add(m, constant(step))
        code = builder.load(builder.inttoptr(builder.add(codes, at), _I8.as_pointer()))
        index = builder.add(builder.shl(at, constant(8)), builder.zext(code, _I64))
        total = add(total, _load_row(builder, builder.add(tables, builder.mul(index, constant(size))), kind))
    following = builder.add(m, constant(2))
    m.add_incoming(following, loop)
    row.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, n), loop, end)
    builder.position_at_end(end)
    return total


def _update_max(builder, best, row, factor):
    """best[:] = max(best[:], row[:] * factor >> 16): one instruction multiplies and shifts."""
    factors = _splat(builder, builder.trunc(factor, _I16), _VECTOR)
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

    return types.void(_address, _address, _address, _int, _address), generate


@intrinsic
def add_rows_max(typing, base, tables, codes, n, best, factor):
    """best[:] = max(best[:], the sum that add_rows has * factor >> 16); addresses and a factor under 2^15."""

    def generate(context, builder, signature, args):
        *parts, best, factor = args
        _update_max(builder, best, _sum_rows(builder, *parts), factor)
        return context.get_dummy_value()

    return types.void(_address, _address, _address, _int, _address, _int), generate


@intrinsic
def add_rough_rows_max(typing, base, tables, codes, n, best, factor):
    """As add_rows_max, where base and tables are bytes, without their last ROUGH bits; best is not."""

    def generate(context, builder, signature, args):
        *parts, best, factor = args
        row = builder.sext(_sum_rows(builder, *parts, kind=_ROUGH), _VECTOR)
        _update_max(builder, best, builder.shl(row, ir.Constant(_VECTOR, [ROUGH] * LANES)), factor)
        return context.get_dummy_value()

    return types.void(_address, _address, _address, _int, _address, _int), generate


@intrinsic
def scaled_max(typing, best, row, factor):
    """best[:] = max(best[:], row[:] * factor >> 16); addresses and a factor under 2^15."""

    def generate(context, builder, signature, args):
        best, row, factor = args
        _update_max(builder, best, _load_row(builder, row), factor)
        return context.get_dummy_value()

    return types.void(_address, _address, _int), generate


def _strips(builder, addresses, body):
    """Call body(*strips) for the STRIPs at these addresses of CODEWORDS numbers each, one strip after the other."""
    for start in range(0, 4 * CODEWORDS, 4 * STRIP):
        body(*(builder.add(address, ir.Constant(_I64, start)) for address in addresses))


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
        halves = ([ir.Constant(_I32, at) for at in range(start, start + half)] for start in (0, half))
        total = least(*(_shuffle(builder, total, places) for places in halves))
    return reduce(least, folded, total)


def _reduce(builder, numbers, name):
    """The least or the highest of numbers: name fmin or fmax."""
    kind = ir.FunctionType(_F32, [numbers.type])
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
            j, total = builder.phi(_I64), builder.phi(_STRIP)
            factor = builder.load(
                builder.inttoptr(builder.add(factors, builder.shl(j, ir.Constant(_I64, 2))), _F32.as_pointer())
            )
            column = _load_strip(builder, builder.add(columns, builder.mul(j, ir.Constant(_I64, 4 * CODEWORDS))))
            product = builder.fmul(_splat(builder, factor, _STRIP), column, flags=("contract",))
            less = builder.fsub(total, product, flags=("contract",))
            following = builder.add(j, ir.Constant(_I64, 1))
            for phi, before, after in (j, ir.Constant(_I64, 0), following), (total, first, less):
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

    return types.float32(_address, _address, _address, _int, _address, _address), generate


@intrinsic
def least_sum(typing, a, b):
    """The least of a[:] + b[:], CODEWORDS fp32 numbers each; addresses."""

    def generate(context, builder, signature, args):
        found = []
        add = lambda a, b: found.append(builder.fadd(_load_strip(builder, a), _load_strip(builder, b)))  # noqa: E731
        _strips(builder, args, add)
        return _reduce(builder, _fold(builder, found), "fmin")

    return types.float32(_address, _address), generate


@intrinsic
def nth_lowest(typing, numbers, n):
    """The n-th lowest, counted from 1, of GROUPED fp32 numbers at an address: by how many are lower than each."""

    def generate(context, builder, signature, args):
        kind, counts = ir.VectorType(_F32, GROUPED), ir.VectorType(_I32, GROUPED)
        vector, lower = _load_strip(builder, args[0], kind), ir.Constant(counts, [0] * GROUPED)
        for at in range(GROUPED):
            other = _shuffle(builder, vector, [ir.Constant(_I32, at)] * GROUPED)
            lower = builder.add(lower, builder.zext(builder.fcmp_ordered("<", other, vector), counts))
        within = builder.icmp_signed("<", lower, _splat(builder, builder.trunc(args[1], _I32), counts))
        return _reduce(builder, builder.select(within, vector, ir.Constant(kind, [-1e30] * GROUPED)), "fmax")

    return types.float32(_address, _int), generate


def _which(sign, width):
    """An intrinsic: which of `width` fp32 numbers at an address are `sign` a limit, one bit each."""

    @intrinsic
    def which(typing, numbers, limit):
        def generate(context, builder, signature, args):
            vector = _load_strip(builder, args[0], ir.VectorType(_F32, width))
            bits = builder.fcmp_ordered(sign, vector, _splat(builder, args[1], vector.type))
            return builder.zext(builder.bitcast(bits, ir.IntType(width)), _I64)

        return types.uint64(_address, types.float32), generate

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
        wanted, start = _splat(builder, args[1], _STRIP), builder.block
        loop, end = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_I64)
        strip = _load_strip(builder, builder.add(args[0], builder.shl(at, ir.Constant(_I64, 2))))
        bits = builder.bitcast(builder.fcmp_ordered("==", strip, wanted), _I64)
        at.add_incoming(ir.Constant(_I64, 0), start)
        at.add_incoming(builder.add(at, ir.Constant(_I64, STRIP)), loop)
        builder.cbranch(builder.icmp_unsigned("==", bits, ir.Constant(_I64, 0)), loop, end)
        builder.position_at_end(end)
        return builder.add(at, builder.cttz(bits, ir.Constant(ir.IntType(1), 1)))

    return types.int64(_address, types.float32), generate


@intrinsic
def hold(typing, arrays):
    """Does nothing, after the last use of the addresses of these arrays: numba would free them before it."""
    return types.void(arrays), lambda context, builder, signature, args: context.get_dummy_value()


@intrinsic
def two_bytes(typing, address):
    """The number that two bytes at an address are, the lower one first."""

    def generate(context, builder, signature, args):
        number = builder.load(builder.inttoptr(args[0], _I16.as_pointer()))
        number.align = 1
        return builder.zext(number, _I64)

    return types.int64(_address), generate


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


@compiled()
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


@compiled()
def choose_groups(similarities, n_tried):
    """Which vectors are to be compared with each group of centroids; similarities (n, G) fp32 to the groups.

    Returns the vectors (n * n_tried,) of each group, one group after the other, and where these begin, (G + 1,).
    """
    n, G = similarities.shape
    chosen, starts = np.empty((n, n_tried), np.int64), np.zeros(G + 1, np.int64)
    for i in range(n):
        for t in range(n_tried):
            best = similarities[i].argmax()
            similarities[i, best] = -np.inf
            chosen[i, t] = best
            starts[best + 1] += 1
    starts = starts.cumsum()
    rows, at = np.empty(n * n_tried, np.int64), starts[:-1].copy()
    for i in range(n):
        for group in chosen[i]:
            rows[at[group]] = i
            at[group] += 1
    return rows, starts


@compiled(fastmath=True)
def keep_best(similarities, rows, members, best, nearest):
    """Update the best centroid of some vectors, best (n,) fp32 and nearest (n,), by another group of centroids.

    similarities (k, c) of the vectors `rows` (k,) to the centroids `members` (c,).
    """
    for i in range(len(rows)):
        highest = similarities[i, 0]
        for j in range(1, len(members)):
            highest = max(highest, similarities[i, j])
        if highest > best[rows[i]]:
            best[rows[i]] = highest
            for j in range(len(members)):
                if similarities[i, j] == highest:
                    nearest[rows[i]] = members[j]


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
