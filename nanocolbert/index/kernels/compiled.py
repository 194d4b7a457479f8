"""How the loops are compiled, and what several of them share.

All loops release the GIL, so that threads may share the work. numba's own would add vectors up one number after the
other; the intrinsics say in LLVM's terms what is meant. Addresses are trusted: what can be told in O(passages) is
checked before the first search (segments.py), and numbers among the codes are bounded in the loops.

Compiled code is kept on disk, and made anew when the file that it stands in changes: an intrinsic lies beside the loops
that take it. After a change of `shuffle`, `splat` or `hold`, which two files take, remove kernels/__pycache__.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

CODEWORDS = 256  # of a part
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
ADDRESS, INT = types.intp, types.int64


def shuffle(builder, vector, places):
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, len(places)), places))


def splat(builder, value, kind):
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return shuffle(builder, one, [ir.Constant(I32, 0)] * kind.count)


@intrinsic
def hold(typing, arrays):
    """Does nothing, after the last use of the addresses of these arrays: numba would free them before it."""
    return types.void(arrays), lambda context, builder, signature, args: context.get_dummy_value()
