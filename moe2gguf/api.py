"""What the package exports, as `moe2gguf.NAME`; docs/reference/python.md documents all of it."""

from moe2gguf.errors import Moe2GgufError
from moe2gguf.experts.heal.settings import HealSettings
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.inspect import Inspection, inspect
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.set_used import set_used
from moe2gguf.gguf.verify import Verification, verify
from moe2gguf.llama.chat import Chat
from moe2gguf.llama.generate import Generation, generate
from moe2gguf.llama.serving import Way, list_ways
from moe2gguf.measure.bench import Bench, Timing, bench
from moe2gguf.measure.check import Check, compare_with_dense
from moe2gguf.measure.compare import CompareSettings
from moe2gguf.measure.expert_usage import ExpertUse, measure_expert_usage
from moe2gguf.measure.imatrix import Collection, collect_imatrix
from moe2gguf.measure.needed_experts import NeededExperts, measure_needed_experts
from moe2gguf.measure.on_the_fly import compare_types as compare
from moe2gguf.measure.publish import Publication, PublishSettings, publish
from moe2gguf.measure.results import Comparison
from moe2gguf.measure.shrink import ShrinkSettings, Shrunk, Wish, shrink
from moe2gguf.quant.rules import TypeOptions
from moe2gguf.recipes.convert import Conversion, convert, plan_conversion
from moe2gguf.recipes.densify import Densified, densify
from moe2gguf.recipes.heal import Healing, HealText, heal
from moe2gguf.recipes.merge import merge
from moe2gguf.recipes.merge_options import Donor, Merge, MergeOptions
from moe2gguf.recipes.options import CalibrationOptions, MethodOptions, Options
from moe2gguf.recipes.plan import Plan
from moe2gguf.recipes.prune import PruneOptions, Pruning, prune
from moe2gguf.recipes.quantize import Quantization, plan_quantization, quantize
from moe2gguf.recipes.views import Views, write_views

__all__ = [
    "Bench",
    "CalibrationOptions",
    "Chat",
    "Check",
    "Collection",
    "CompareSettings",
    "Comparison",
    "Conversion",
    "Densified",
    "Donor",
    "ExpertUse",
    "GGUFFile",
    "Generation",
    "HealSettings",
    "HealText",
    "Healing",
    "Inspection",
    "Merge",
    "MergeOptions",
    "MethodOptions",
    "Moe2GgufError",
    "NeededExperts",
    "Options",
    "Plan",
    "PruneOptions",
    "Pruning",
    "Publication",
    "PublishSettings",
    "Quantization",
    "ShrinkSettings",
    "Shrunk",
    "Timing",
    "TypeOptions",
    "Verification",
    "Views",
    "Way",
    "Wish",
    "bench",
    "collect_imatrix",
    "compare",
    "compare_with_dense",
    "convert",
    "densify",
    "generate",
    "heal",
    "inspect",
    "list_ways",
    "measure_expert_usage",
    "measure_needed_experts",
    "merge",
    "plan_conversion",
    "plan_quantization",
    "prune",
    "publish",
    "quantize",
    "read_gguf",
    "set_used",
    "shrink",
    "verify",
    "write_views",
]
