"""Short vectors as values inside numba kernels: as many numbers as 64 bytes hold, one register with AVX-512.

A kernel that keeps a few of them in local variables keeps them in registers across a loop, which numba's own
vectoriser never does for parts of arrays, because arrays might overlap. Processors with shorter registers use several.
Arrays are read and written at an offset in numbers along their last axis, whose size must be a multiple of ``WIDTH``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

BYTES = 64


def width(dtype: np.dtype[Any]) -> int:
    """Numbers of ``dtype`` in one vector."""
    return BYTES // dtype.itemsize


class Lanes(types.Type):
    """The numba type of one vector of ``dtype``."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.count = BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        element = ir.FloatType() if lanes.dtype == types.float32 else ir.DoubleType()
        super().__init__(manager, lanes, ir.VectorType(element, lanes.count))


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: Any) -> Any:
    base = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())


def _load_form(typing_context: Any, array: Any, offset: Any) -> Any:  # noqa: ARG001 - numba's signature
    lanes = Lanes(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _address(context, builder, signature.args[0], arguments[0], arguments[1], context.get_value_type(lanes))
        return builder.load(where, align=array.dtype.bitwidth // 8)

    return lanes(array, types.intp), generate


def _store_form(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:  # noqa: ARG001
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _address(context, builder, signature.args[0], arguments[0], arguments[1], arguments[2].type)
        builder.store(arguments[2], where, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


def _splat_form(typing_context: Any, x: Any) -> Any:  # noqa: ARG001
    lanes = Lanes(x)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        vector = context.get_value_type(lanes)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[0], ir.Constant(ir.IntType(32), 0))
        order = ir.Constant(ir.VectorType(ir.IntType(32), lanes.count), [0] * lanes.count)
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), order)

    return lanes(x), generate


def _fma_form(typing_context: Any, x: Any, y: Any, z: Any) -> Any:  # noqa: ARG001
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        vector = arguments[0].type
        name = f"llvm.fmuladd.v{x.count}f{x.dtype.bitwidth}"
        kind = ir.FunctionType(vector, [vector] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)

    return x(x, x, x), generate


def _times_form(typing_context: Any, x: Any, y: Any) -> Any:  # noqa: ARG001
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.fmul(*arguments)

    return x(x, x), generate


def _sums_form(typing_context: Any, array: Any, offset: Any) -> Any:  # noqa: ARG001 - numba's signature
    lanes = Lanes(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = context.get_value_type(lanes)
        index = arguments[1].type
        offsets = [builder.add(arguments[1], ir.Constant(index, row * lanes.count)) for row in range(lanes.count)]
        places = [_address(context, builder, signature.args[0], arguments[0], each, vector) for each in offsets]
        rows = [builder.load(place, align=array.dtype.bitwidth // 8) for place in places]
        # Neighbouring lanes of two vectors are added into one vector, until one is left: its lane r sums row r.
        while len(rows) > 1:
            rows = [_pairs(builder, *rows[i : i + 2]) for i in range(0, len(rows), 2)]
        return rows[0]

    return lanes(array, types.intp), generate


def _pairs(builder: Any, first: Any, second: Any) -> Any:
    count = first.type.count
    order = ir.VectorType(ir.IntType(32), count)
    halves = [
        builder.shuffle_vector(first, second, ir.Constant(order, list(range(start, 2 * count, 2)))) for start in (0, 1)
    ]
    return builder.fadd(*halves)


load: Any = intrinsic(_load_form)
"""``load(array, i)``: the vector that begins at number i of a contiguous array."""
store: Any = intrinsic(_store_form)
"""``store(array, i, vector)``: the opposite."""
splat: Any = intrinsic(_splat_form)
"""``splat(x)``: x in every lane."""
fma: Any = intrinsic(_fma_form)
"""``fma(x, y, z)``: x * y + z."""
times: Any = intrinsic(_times_form)
"""``times(x, y)``: x * y."""
row_sums: Any = intrinsic(_sums_form)
"""``row_sums(array, i)``: lane r is the sum of the r-th vector from number i on, as many vectors as there are lanes."""
