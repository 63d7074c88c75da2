"""Which options of `recover` go together."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from skink.errors import OptionError

if TYPE_CHECKING:
    from skink.passes.recover.recover import Recover

ON_LOGITS = ("ce", "kl", "reverse_kl", "js")
WITHIN = ("hidden", "attention")
_OF_LORA = ("rank", "alpha", "dropout", "targets", "variant", "merge", "adapter")
# Layers train each by themselves, and no text is held out from that.
_OF_WHOLE_MODELS = ("gradient_checkpointing", "sharding", "evaluate_every", "patience")


def check_together(options: "Recover") -> None:
    """Refuse options that contradict each other.

    Raises:
        OptionError: OPTION-002.
    """
    defaults = {entry.name: entry.default for entry in fields(options)}
    given = {name for name, default in defaults.items() if getattr(options, name) != default}
    layerwise = options.by == "layer"
    if options.train != "lora":
        _refuse(given, _OF_LORA, f"train={options.train}", "choose train=lora")
    if layerwise:
        if options.train == "lora":
            raise refused("by=layer", "train=lora", "layers train their own weights.", "choose train=new or train=all.")
        _refuse(given, ON_LOGITS, "by=layer", "choose hidden and attention: a single layer gives no logits")
        _refuse(given, _OF_WHOLE_MODELS, "by=layer", "choose by=model")
    else:
        _refuse(given, ("layers_at_once",), "by=model", "choose by=layer")
    if options.tokens is not None and options.steps is not None:
        both = f"steps={options.steps}"
        raise refused(f"tokens={options.tokens}", both, "both say how long.", "give one of them.")
    if not options.merge and not options.adapter:
        raise OptionError(
            "OPTION-002",
            "recover.merge=false leaves the model as it was, and keeps nothing of what was learnt.",
            fix="name a folder for the adapter too: recover{train=lora,merge=false,adapter=my-adapter}.",
        )
    if options.merge and options.adapter:
        why = "laid around a model that it is merged into, the adapter would count twice."
        raise refused(f"adapter={options.adapter}", "merge=true", why, "add merge=false, or leave adapter out.")
    if "temperature" in given and not applies(options, "temperature"):
        why = "it is of the distributions that these compare."
        raise refused("temperature", "no kl, reverse_kl or js", why, "add kl=1, or leave temperature out.")
    if options.at and not any(options.losses()[name] for name in WITHIN):
        why = "it names places where these are compared."
        raise refused("at", "no hidden or attention", why, "add hidden=1, or leave at out.")
    if options.final is not None and options.schedule == "constant":
        raise refused("final", "schedule=constant", "a constant rate has one value.", "choose cosine or linear.")
    if options.patience and options.evaluate_every == 0:
        why = "it counts evaluations, and there are none."
        raise refused("patience", "evaluate_every=0", why, "give tokens between evaluations, or leave it out.")
    if options.micro_batch > options.batch:
        why = "it is a part of the batch."
        raise refused(f"micro_batch={options.micro_batch}", f"batch={options.batch}", why, "choose at most the batch.")


def applies(options: "Recover", name: str) -> bool:
    """Whether an option says anything, given the others."""
    layerwise = options.by == "layer"
    if name in _OF_LORA:
        return options.train == "lora" and (name != "adapter" or not options.merge)
    if name == "layers_at_once":
        return layerwise
    if name == "temperature":
        return bool(options.losses()["kl"] or options.losses()["reverse_kl"] or options.losses()["js"])
    return not layerwise or name not in _OF_WHOLE_MODELS


def refused(one: str, other: str, why: str, fix: str) -> OptionError:
    """An error for two options that do not go together."""
    return OptionError("OPTION-002", f"recover.{one} does not go with {other}.", why=why, fix=fix)


def _refuse(given: "set[str]", names: tuple[str, ...], other: str, fix: str) -> None:
    wrong: list[Any] = [name for name in names if name in given]
    if wrong:
        raise refused(wrong[0], other, f"{', '.join(wrong)} would change nothing.", f"{fix}, or leave {wrong[0]} out.")
