"""A callback that tells nobody, whatever it is told."""

from skink.graph.progress import silent


def test_it_takes_what_progress_and_status_are_told() -> None:
    for said, named in (((1, 2), {}), (("low-rank", 1, 2), {}), (("at work",), {}), ((), {"done": 1, "total": 2})):
        assert silent(*said, **named) is None
