"""How good and how fast a model is: text, perplexity, generation speed, sizes, and the machine that ran it."""

from skink.evaluation.corpus import Documents, Split, Tokenizer, standard_library, text_files, token_windows
from skink.evaluation.machine import Machine, machine, peak_memory
from skink.evaluation.perplexity import Perplexity, held_out_perplexity, perplexity
from skink.evaluation.sizes import parameter_bytes, parameter_count
from skink.evaluation.speed import GenerationTarget, HuggingFaceTarget, Speed, Spread, measure_generation

__all__ = [
    "Documents",
    "GenerationTarget",
    "HuggingFaceTarget",
    "Machine",
    "Perplexity",
    "Speed",
    "Split",
    "Spread",
    "Tokenizer",
    "held_out_perplexity",
    "machine",
    "measure_generation",
    "parameter_bytes",
    "parameter_count",
    "peak_memory",
    "perplexity",
    "standard_library",
    "text_files",
    "token_windows",
]
