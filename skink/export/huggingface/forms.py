"""Which class of ours a model becomes, and which of transformers' Auto classes loads it."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from skink.errors import ModelError
from skink.graph.program import Program


@dataclass(frozen=True)
class Form:
    """One class of ours.

    Args:
        name: of the class.
        module: where it is, below this package.
        auto: the name of the Auto class that loads it.
        sources: the name of transformers' table of the classes that it stands in for.
        task: what the hub calls what it does.
    """

    name: str
    module: str
    auto: str
    sources: str
    task: str

    @property
    def model_class(self) -> Any:
        """The class."""
        return getattr(import_module(f"skink.export.huggingface.{self.module}"), self.name)

    @property
    def encodes(self) -> bool:
        """Whether it sees all tokens at once."""
        return self.module == "encoders"


DECODER = Form(
    "SkinkForCausalLM", "modeling", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "text-generation"
)
HEADLESS = Form("SkinkModel", "encoders", "AutoModel", "MODEL_MAPPING_NAMES", "feature-extraction")
ANSWERS = Form(
    "SkinkForQuestionAnswering",
    "encoders",
    "AutoModelForQuestionAnswering",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "question-answering",
)

# A class of transformers that stands in several tables becomes the first.
FORMS = (
    DECODER,
    Form(
        "SkinkForMaskedLM",
        "encoders",
        "AutoModelForMaskedLM",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "fill-mask",
    ),
    Form(
        "SkinkForSequenceClassification",
        "encoders",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "text-classification",
    ),
    Form(
        "SkinkForTokenClassification",
        "encoders",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "token-classification",
    ),
    ANSWERS,
    HEADLESS,
)


def named_form(config: PreTrainedConfig) -> Form | None:
    """The form that a Skink configuration says its folder holds; None where it says nothing of it."""
    names = config.architectures or []
    return next((form for form in FORMS if form.name in names), None)


def form_of(program: Program, config: PreTrainedConfig) -> Form:
    """What a program becomes: what it came from, or by its results where it came from no class of transformers.

    Args:
        program: a full-sequence graph.
        config: the source model's.
    """
    named = named_form(config)
    if named is not None:
        return named
    source = str(program.origin.get("class", ""))
    for form in FORMS:
        if source in getattr(modeling_auto, form.sources).values() and fits(form, program):
            return form
    return next((form for form in (HEADLESS, ANSWERS) if fits(form, program)), DECODER)


def fits(form: Form, program: Program) -> bool:
    """Whether a program gives what a form returns."""
    wanted: tuple[str, ...] = form.model_class.outputs
    return program.outputs[: len(wanted)] == wanted


def refuse_other_kind(model_class: type, config: PreTrainedConfig, program: Program) -> None:
    """Refuse a program that was saved as, or is of, another kind of model than `model_class`.

    Raises:
        ModelError: MODEL-005.
    """
    form = named_form(config)
    ours = {base.__name__ for base in model_class.__mro__}
    other = form is not None and form.name not in ours
    wanted: tuple[str, ...] = getattr(model_class, "outputs", ())
    if not other and program.outputs[: len(wanted)] == wanted:
        return
    right = form if other else next((entry for entry in FORMS[1:] if fits(entry, program)), None)
    by = f"load it with {right.auto} or skink.load." if right is not None else "load it with skink.load."
    raise ModelError(
        "MODEL-005",
        f"the model is no {model_class.__name__}.",
        why=f"it was saved as {form.name}." if other and form else f"its graph returns {', '.join(program.outputs)}.",
        fix=by,
    )
