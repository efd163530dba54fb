"""Vectors of 16 numbers as values inside kernels, for loops that a compiler would not vectorise by itself.

A kernel that keeps a few of them in local variables keeps them in registers across a loop, which numba's own vectoriser
never does for parts of arrays, because arrays might overlap; and rows that are gathered are short. Rows must be padded
to a multiple of ``LANES``. One vector is one register of AVX-512 in float32, and several of narrower machines.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

LANES = 16


class Vector(types.Type):
    """The numba type of a vector of ``LANES`` numbers of ``dtype``."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector{LANES}({dtype})")


def _vector_model(manager: Any, kind: Any) -> Any:
    return models.PrimitiveModel(manager, kind, ir.VectorType(manager.lookup(kind.dtype).get_value_type(), LANES))


register_model(Vector)(_vector_model)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    vector = context.get_value_type(Vector(kind.dtype))
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _load(typing_context: Any, array: Any, index: Any) -> Any:  # noqa: ARG001 - numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *arguments)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), generate


def _store(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:  # noqa: ARG001 - numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


def _splat(typing_context: Any, x: Any) -> Any:  # noqa: ARG001 - numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lane = ir.IntType(32)
        kind = context.get_value_type(signature.return_type)
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), arguments[0], lane(0))
        zeros = ir.Constant(ir.VectorType(lane, LANES), [0] * LANES)
        return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    return Vector(x)(x), generate


def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ARG001 - numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        vector = context.get_value_type(a)
        kind = ir.FunctionType(vector, [vector] * 3)
        function = builder.module.declare_intrinsic(f"llvm.fma.v{LANES}f{a.dtype.bitwidth}", (), kind)
        return builder.call(function, arguments)

    return a(a, a, a), generate


def _times(typing_context: Any, a: Any, b: Any) -> Any:  # noqa: ARG001 - numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.fmul(*arguments)

    return a(a, a), generate


def _plus(typing_context: Any, a: Any, b: Any) -> Any:  # noqa: ARG001 - numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.fadd(*arguments)

    return a(a, a), generate


def _larger(typing_context: Any, a: Any, b: Any) -> Any:  # noqa: ARG001 - numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return a(a, a), generate


def _total(typing_context: Any, a: Any) -> Any:  # noqa: ARG001 - numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        vector, scalar = context.get_value_type(a), context.get_value_type(a.dtype)
        name = f"llvm.vector.reduce.fadd.v{LANES}f{a.dtype.bitwidth}"
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(scalar, [scalar, vector]))
        return builder.call(function, [ir.Constant(scalar, -0.0), arguments[0]], fastmath=("reassoc",))

    return a.dtype(a), generate


def _row_sums(typing_context: Any, array: Any, index: Any) -> Any:  # noqa: ARG001 - numba's signature
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = arguments[1]
        indices = [builder.add(where, ir.Constant(where.type, row * LANES)) for row in range(LANES)]
        pointers = [_pointer(context, builder, signature.args[0], arguments[0], each) for each in indices]
        rows = [builder.load(pointer, align=array.dtype.bitwidth // 8) for pointer in pointers]
        # Neighbouring lanes of two vectors are added into one vector, until one is left: its lane r sums row r.
        while len(rows) > 1:
            rows = [_pairs(builder, *rows[i : i + 2]) for i in range(0, len(rows), 2)]
        return rows[0]

    return Vector(array.dtype)(array, types.intp), generate


def _pairs(builder: Any, first: Any, second: Any) -> Any:
    order = ir.VectorType(ir.IntType(32), LANES)
    halves = [
        builder.shuffle_vector(first, second, ir.Constant(order, list(range(start, 2 * LANES, 2)))) for start in (0, 1)
    ]
    return builder.fadd(*halves)


load: Any = intrinsic(_load)
"""``load(array, i)``: the vector array[i : i + LANES] of a one-dimensional contiguous array."""
store: Any = intrinsic(_store)
"""``store(array, i, vector)``: array[i : i + LANES] = vector."""
splat: Any = intrinsic(_splat)
"""``splat(x)``: the vector of copies of one number."""
fma: Any = intrinsic(_fma)
"""``fma(a, b, c)``: a * b + c by element, rounded once."""
times: Any = intrinsic(_times)
"""``times(a, b)``: a * b by element."""
plus: Any = intrinsic(_plus)
"""``plus(a, b)``: a + b by element."""
larger: Any = intrinsic(_larger)
"""``larger(a, b)``: a where a > b, else b."""
total: Any = intrinsic(_total)
"""``total(a)``: the sum of the elements, in an order that may differ between machines."""
row_sums: Any = intrinsic(_row_sums)
"""``row_sums(array, i)``: lane r is the sum of the r-th of ``LANES`` vectors that begin at number i."""
