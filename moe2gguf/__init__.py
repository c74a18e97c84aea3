"""moe2gguf: a dense LLaMA-family model becomes a sparse Mixtral-architecture GGUF file.

The command line is a thin layer over these functions; each is documented where it is defined. Neither torch nor
llama.cpp is imported before a function needs it.
"""

from moe2gguf.errors import Moe2GgufError
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.inspect import Inspection, inspect
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.verify import Verification, verify
from moe2gguf.llama.chat import Chat
from moe2gguf.llama.generate import Generation, generate
from moe2gguf.measure.check import Check, compare_with_dense
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.convert import Conversion, convert, plan_conversion
from moe2gguf.recipes.options import CalibrationOptions, MethodOptions, Options
from moe2gguf.recipes.plan import Plan
from moe2gguf.recipes.quantize import Quantization, plan_quantization, quantize

__all__ = [
    "CalibrationOptions",
    "Chat",
    "Check",
    "Conversion",
    "GGUFFile",
    "Generation",
    "Inspection",
    "MethodOptions",
    "Moe2GgufError",
    "Options",
    "Plan",
    "Quantization",
    "TypeOptions",
    "Verification",
    "compare_with_dense",
    "convert",
    "generate",
    "inspect",
    "plan_conversion",
    "plan_quantization",
    "quantize",
    "read_gguf",
    "verify",
]
