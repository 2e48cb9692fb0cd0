"""Triton's interpreter, faster and stricter: what it computes again for each operation is computed once.

A kernel of these tests is tens of thousands of operations on a few elements: nearly all of the time goes into what
surrounds them. All of this changes Triton in this process alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def prepare_interpreter() -> None:
    """Change Triton's interpreter; import Triton with TRITON_INTERPRET set before."""
    from triton.runtime import interpreter

    _list_the_language_once(interpreter)
    _replace_the_language_once(interpreter)
    _share_types(interpreter.tl.core, interpreter.InterpreterBuilder)
    _take_equal_types_as_they_are(interpreter.tl, type(interpreter.interpreter_semantic))
    _reduce_and_widen_at_once(interpreter)
    _check_overflow(type(interpreter.interpreter_semantic))


def widen_vector_tiles(replace: Callable[[Any, str, Any], None]) -> None:
    """Where the heuristic chooses a GEMV, give it tiles of 32 and 64 columns: a program costs the interpreter the same
    whatever its tile, and GPUs get tiles of 2 to 8 columns. Tiles change no bit of the result."""
    from quarkconv.kernels import pipeline
    from quarkconv.kernels.options import choose_launch_options
    from quarkconv.kernels.tables import GemvOptions, VectorTile

    def wide(*arguments: Any, **options: Any) -> Any:
        found = choose_launch_options(*arguments, **options)
        return GemvOptions(VectorTile(32, 4), VectorTile(64, 8)) if isinstance(found, GemvOptions) else found

    replace(pipeline, "choose_launch_options", wide)


def _list_the_language_once(interpreter: Any) -> None:
    """Whenever a jitted function calls another, the interpreter lists the members of its language to replace those that
    are built in, which they are no longer; and it makes a table of dtypes for each operation."""
    language = interpreter.tl
    is_built_in = language.core.is_builtin
    numpy_dtype = interpreter._get_np_dtype
    semantic = interpreter.interpreter_semantic

    @functools.cache
    def built_in(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_built_in(member)]

    def replace_built_in(package: Any, _: Any, scope: Any) -> None:
        names = built_in(package)
        if not is_built_in(getattr(package, names[-1])):  # all of them are replaced at the same time
            return
        for name in names:
            member = getattr(package, name)
            if is_built_in(member):
                scope.set_attr(package, name, interpreted(member))

    @functools.cache
    def interpreted(member: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return member(*arguments, **options)

        return call

    @functools.cache
    def dtype_of_elements(element: Any) -> Any:
        return numpy_dtype(element)

    def cached_numpy_dtype(found: Any) -> Any:
        return numpy_dtype(found) if found.scalar.is_ptr() else dtype_of_elements(found.scalar)

    for package in (language, language.core, language.math, language.tensor, language.core.tensor_descriptor_base):
        built_in(package)
    interpreter._patch_builtin = replace_built_in
    interpreter._get_np_dtype = cached_numpy_dtype


def _replace_the_language_once(interpreter: Any) -> None:
    """A jitted function that another calls finds the language replaced; the interpreter restores it after the kernel,
    and not after each function."""
    language = interpreter.tl
    replace = interpreter._patch_lang
    replaced: set[str] = set()

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc]
        def restore(self) -> None:
            replaced.clear()
            super().restore()

    def replace_language(function: Any) -> Any:
        values = function.__globals__.values()
        names = {value.__name__ for value in values if value is language or value is language.core}
        scope = Scope()
        if not names <= replaced:
            scope._changes = replace(function)._changes
            replaced.update(names)
        return scope

    interpreter._patch_lang = replace_language


def _share_types(core: Any, builder: type[Any]) -> None:
    """Tensors of one shape share it, and blocks of one type are one object; nothing changes either."""
    blocks: dict[Any, Any] = {}

    def block_type(element: Any, shape: Any) -> Any:
        if element.is_ptr():  # these have no hash
            return core.block_type(element, shape)
        key = element, tuple(shape)
        if key not in blocks:
            blocks[key] = core.block_type(element, shape)
        return blocks[key]

    @functools.cache
    def shape_and_size(shape: tuple[int, ...]) -> tuple[Any, Any]:
        size = 1
        for length in shape:
            size *= length
        return core.tuple([core.constexpr(length) for length in shape]), core.constexpr(size)

    def new_tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shape_and_size(tuple(kind.shape) if kind.is_block() else ())

    core.block_type.with_element_ty = lambda self, element: block_type(element, self.shape)
    builder.get_block_ty = lambda _, element, shape: block_type(element, shape)
    core.tensor.__init__ = new_tensor


def _take_equal_types_as_they_are(language: Any, semantic: type[Any]) -> None:
    """Operands of one shape are not broadcast, and those of one type are not cast either."""
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    settled = (language.int32, language.int64, language.float32)

    def checked(self: Any, left: Any, right: Any, *arguments: Any, **options: Any) -> Any:
        tensors = isinstance(left, language.tensor) and isinstance(right, language.tensor)
        if tensors and left.shape is right.shape and left.dtype is right.dtype and left.dtype in settled:
            return left, right
        return check(self, left, right, *arguments, **options)

    def broadcasted(self: Any, left: Any, right: Any) -> Any:
        return (left, right) if left.shape is right.shape else broadcast(self, left, right)

    semantic.binary_op_type_checking_impl = checked
    semantic.broadcast_impl_value = broadcasted


def _reduce_and_widen_at_once(interpreter: Any) -> None:
    """Reductions by exclusive or, of which sorting consists, and BF16 as float32 take one operation of NumPy."""
    import numpy as np

    language, reduce, convert = interpreter.tl, interpreter.ReduceOps.apply_impl, interpreter._convert_float

    def reduced(self: Any, operands: Any) -> Any:
        if self.combine_fn != language.standard._xor_combine:
            return reduce(self, operands)
        (operand,) = operands
        found = np.bitwise_xor.reduce(operand.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, operand.dtype)

    def converted(values: Any, source: Any, destination: Any, rounding: Any) -> Any:
        if (source, destination) != (language.bfloat16, language.float32):
            return convert(values, source, destination, rounding)
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    interpreter.ReduceOps.apply_impl = reduced
    interpreter._convert_float = converted


def _check_overflow(semantic: type[Any]) -> None:
    """Sums, differences and products of integers must not overflow. The interpreter computes this in its own
    operations, half of all there are, and then drops the result: its option `debug` is off."""
    import numpy as np

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, left: Any, right: Any, operation: Any) -> None:
        kind = left.type.scalar
        if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        name = operation.__name__
        exact = operations[name](left.handle.data, right.handle.data, dtype=np.int64)
        low, high = kind.get_int_min_value(), kind.get_int_max_value()
        assert low <= exact.min(), f"{kind} overflows in {name}"
        assert exact.max() <= high, f"{kind} overflows in {name}"

    semantic.binary_op_sanitize_overflow_impl = check
