"""Full-width vectors for loops that do nothing but arithmetic.

On most CPUs with 512-bit vectors LLVM settles for 256 bits, which protects mixed code from lower
clocks. The loops here gain a third from the full width, so they ask for it.
"""

from numba import types
from numba.extending import intrinsic


@intrinsic
def use_wide_vectors(typingctx):
    """Called at the top of a compiled function: its loops may use the CPU's widest vectors."""

    def generate(context, builder, signature, arguments):
        attributes = builder.function.attributes
        # llvmlite knows attributes without a value only; its set of them prints any text. Should
        # that change, the loops are slower and nothing else.
        if isinstance(attributes, set):
            set.add(attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate
