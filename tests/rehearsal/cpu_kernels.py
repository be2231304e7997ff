"""What a CPU lacks of the kernels that Unsloth calls on a GPU: bitsandbytes' under their names for CUDA, and bfloat16 in Triton's interpreter."""

import ctypes
import dataclasses


def name_for_cuda(library):
    """Give bitsandbytes' functions for a CPU the names of those for a GPU, which Unsloth looks for and calls."""
    import torch

    def codes(code, packed, scales, out, block, count, _):
        library.cdequantize_blockwise_cpu_fp32(code, packed, scales, out, *map(long, (block, count)))

    def nf4(kind):
        unpack = getattr(library, f"cdequantize_blockwise_cpu_nf4_{kind}")

        def unpacked(_, packed, scales, out, block, count, __):
            unpack(packed, scales, out, long(block), long(1), long(count))

        return unpacked

    def product(kind, dtype):
        """One vector times a packed matrix."""

        def times(rows, _, columns, vector, packed, scales, *rest):
            _, out, *_, block, stream = rest
            weights = torch.empty(rows.value, columns.value, dtype=dtype)
            nf4(kind)(None, packed, scales, ctypes.c_void_p(weights.data_ptr()), block, long(weights.numel()), stream)
            at(out, rows.value, dtype).copy_(weights @ at(vector, columns.value, dtype))

        return times

    def long(number):
        return ctypes.c_longlong(getattr(number, "value", number))

    named = {"cdequantize_blockwise_fp32": codes}
    named |= {f"cdequantize_blockwise_{kind}_nf4": nf4(kind) for kind in ("fp16", "bf16", "fp32")}
    for kind, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        named[f"cgemm_4bit_inference_naive_{kind}"] = product(kind, dtype)
    for name, function in named.items():
        function.restype = None  # by which Unsloth knows a function of a library
        setattr(library, name, function)


def at(pointer, count, dtype):
    """The tensor of so many numbers that a pointer points to."""
    import torch

    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(pointer.value), dtype=dtype)


def interpret():
    """Let Triton's interpreter reckon with bfloat16, whose bits it takes for whole numbers (triton 3.6): in float32, rounded to the nearest.

    Like compiled kernels it does not look whether a whole number has become too large, which took a third of its time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, builder = interpreter._convert_float, interpreter.InterpreterBuilder

    def converted(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return wide(data)
        if (source, target) == (tl.float32, tl.bfloat16):
            return narrow(data)
        return convert(data, source, target, rounding)

    def widened(reckon):
        def reckoned(self, *given):
            *handles, last = given
            if handles[0].dtype.scalar != tl.bfloat16:
                return reckon(self, *given)
            found = last(*(wide(handle.data) for handle in handles))
            return interpreter.TensorHandle(found if found.dtype == bool else narrow(found), tl.bfloat16)

        return reckoned

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    interpreter._convert_float = converted
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, widened(getattr(builder, name)))
    builder.create_fma = lambda self, *three: self.ternary_op(*three, lambda left, right, more: left * right + more)


def wide(bits):
    """The float32 numbers that the bits of bfloat16 stand for."""
    import numpy

    return (bits.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)


def narrow(numbers):
    """The bits of the bfloat16 numbers next to these, halves to the even one."""
    import torch

    rounded = torch.from_numpy(numbers.astype("float32")).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy()
