"""The environment: read in one place, with values checked."""

from collections.abc import Callable
from pathlib import Path

import pytest

import skink
from skink.errors import OptionError
from skink.settings import Settings, cache_folder, settings

PACKAGE = Path(skink.__file__).parent
VARIABLES = (
    "SKINK_VERIFY",
    "SKINK_DUMP",
    "SKINK_REWRITE_LIMIT",
    "SKINK_TRACE_MATCH",
    "SKINK_INSTRUCTION_SET",
    "SKINK_KERNELS",
    "SKINK_BREAK_EVEN",
    "SKINK_CACHE",
)


def test_defaults(monkeypatch: pytest.MonkeyPatch, set_environment: Callable[..., None]) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    set_environment()
    assert settings() == Settings()


def test_variables(set_environment: Callable[..., None]) -> None:
    set_environment(SKINK_VERIFY="1", SKINK_DUMP="a/b", SKINK_INSTRUCTION_SET="avx2", SKINK_KERNELS="reference")
    set_environment(SKINK_REWRITE_LIMIT="12", SKINK_TRACE_MATCH="raise-")
    found = settings()
    assert (found.verify, found.dump) == (1, Path("a/b"))
    assert (found.rewrite_limit, found.trace_match) == (12, "raise-")
    assert (found.instruction_set, found.kernels) == ("avx2", "reference")


def test_a_process_knows_its_place(set_environment: Callable[..., None]) -> None:
    set_environment(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4")
    found = settings()
    assert (found.process, found.local_process, found.processes, found.main_process) == (3, 1, 4, False)
    set_environment(RANK="0", LOCAL_RANK="", WORLD_SIZE="")
    assert settings().main_process
    assert settings().processes == 1


def test_empty_variables_are_unset(set_environment: Callable[..., None]) -> None:
    set_environment(**dict.fromkeys(VARIABLES, ""))
    assert settings() == Settings()


@pytest.mark.parametrize(
    ("variable", "value", "fix"),
    [
        ("SKINK_VERIFY", "4", "valid: 0, 1, 2, 3."),
        ("SKINK_VERIFY", "yes", "valid: 0, 1, 2, 3."),
        ("SKINK_REWRITE_LIMIT", "-1", "give digits."),
        ("SKINK_REWRITE_LIMIT", "ten", "give digits."),
        ("SKINK_BREAK_EVEN", "on", "valid: measure, off."),
        ("SKINK_KERNELS", "referense", "did you mean 'reference'? valid: auto, reference."),
    ],
)
def test_wrong_values_are_refused(set_environment: Callable[..., None], variable: str, value: str, fix: str) -> None:
    set_environment(**{variable: value})
    with pytest.raises(
        OptionError, match=rf"\[OPTION-002\] the environment variable {variable} is '{value}'"
    ) as caught:
        settings()
    assert caught.value.fix == fix


def test_the_environment_is_read_nowhere_else() -> None:
    readers = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "assets" not in path.parts
        and any(word in path.read_text() for word in ("os.environ", "getenv", "os.putenv"))
    ]
    assert readers == ["settings.py"]


def test_no_limit_and_a_limit_of_nothing_differ(set_environment: Callable[..., None]) -> None:
    set_environment(SKINK_REWRITE_LIMIT="0")
    assert settings().rewrite_limit == 0


def test_where_measured_times_are_kept(
    monkeypatch: pytest.MonkeyPatch, set_environment: Callable[..., None], tmp_path: Path
) -> None:
    set_environment(SKINK_CACHE=str(tmp_path))
    assert cache_folder() == tmp_path
    set_environment(SKINK_CACHE="", XDG_CACHE_HOME=str(tmp_path), LOCALAPPDATA=str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for system, folder in (
        ("linux", tmp_path / "skink"),
        ("win32", tmp_path / "skink"),
        ("darwin", tmp_path / "home" / "Library" / "Caches" / "skink"),
    ):
        monkeypatch.setattr("sys.platform", system)
        assert cache_folder() == folder
