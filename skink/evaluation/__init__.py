"""How good and how fast a model is: text, perplexity, questions, generation speed, sizes, and the machine."""

from skink.evaluation.answers import Accuracy, Difference, answer, paired
from skink.evaluation.corpus import Documents, Split, Tokenizer, standard_library, text_files, token_windows
from skink.evaluation.machine import Machine, machine, peak_memory
from skink.evaluation.perplexity import Perplexity, held_out_perplexity, perplexity
from skink.evaluation.questions import Question, Questions, multiple_choice
from skink.evaluation.sizes import parameter_bytes, parameter_count
from skink.evaluation.speed import GenerationTarget, HuggingFaceTarget, Speed, Spread, measure_generation

__all__ = [
    "Accuracy",
    "Difference",
    "Documents",
    "GenerationTarget",
    "HuggingFaceTarget",
    "Machine",
    "Perplexity",
    "Question",
    "Questions",
    "Speed",
    "Split",
    "Spread",
    "Tokenizer",
    "answer",
    "held_out_perplexity",
    "machine",
    "measure_generation",
    "multiple_choice",
    "paired",
    "parameter_bytes",
    "parameter_count",
    "peak_memory",
    "perplexity",
    "standard_library",
    "text_files",
    "token_windows",
]
