"""`Failure`: how a pipeline failed, in a form that another run can be compared with."""

from dataclasses import dataclass

from skink.errors import SkinkError
from skink.graph.verifier import first_line


@dataclass(frozen=True)
class Failure:
    """How a pipeline failed, as far as another run can be compared with it.

    Args:
        kind: name of the exception's type.
        code: of a SkinkError, else "".
        pass_name: the pass that ran or was verified, "" for none.
        text: the error in one line.
    """

    kind: str
    code: str
    pass_name: str
    text: str

    @classmethod
    def of(cls, error: Exception, pass_name: str) -> "Failure":
        """The failure that an exception stands for."""
        if isinstance(error, SkinkError):
            return cls(type(error).__name__, error.code, pass_name, f"[{error.code}] {error.what}")
        return cls(type(error).__name__, "", pass_name, first_line(error))

    def same(self, other: "Failure | None") -> bool:
        """Whether another failure is of the same kind, in the same pass."""
        return other is not None and (self.kind, self.code, self.pass_name) == (
            other.kind, other.code, other.pass_name,
        )  # fmt: skip
