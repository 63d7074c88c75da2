"""Versions, for reproducers."""

import platform

import torch

from skink.graph.versions import package_of, versions


def test_versions_of_what_counts_and_of_others() -> None:
    found = versions(("pytest", "no-such-package", "python", ""))
    assert found["python"] == platform.python_version()
    assert found["torch"] == str(torch.__version__)
    assert found["pytest"]
    assert found["no-such-package"] == found[""] == "not installed"


def test_the_package_of_a_module() -> None:
    assert package_of("yaml.loader") == "PyYAML"
    assert package_of("tests.sample_pass") == "tests"
