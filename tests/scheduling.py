"""Which tests run in one process, with `--dist loadscope`: those of a family, and otherwise those of a file.

What they share is then made once, and not once in each process. xdist's own marker for groups has no effect with
pytest 9: it is written into a name that nobody reads any more.
"""

from xdist.scheduler import LoadScopeScheduling

# As in tests/models.py, which loads transformers and so is not loaded here.
FAMILIES = ("llama", "gpt2", "qwen3", "gemma2", "mistral", "phi3", "gpt_neox", "olmo2", "opt", "mixtral")


class TogetherScheduling(LoadScopeScheduling):
    """Hands tests out in groups."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def group(nodeid: str) -> str:
    """The family that a test's parameters name, or else its file."""
    file, _, name = nodeid.partition("::")
    parameters = name.partition("[")[2].removesuffix("]").split("-")
    return next((family for family in FAMILIES if family in parameters), file)
