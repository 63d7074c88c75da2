"""Who need not be told how far work has come."""


def silent(*said: object, **named: object) -> None:
    """Takes whatever a callback for progress or status is told, and does nothing."""
