"""Versions of what a program was made with, for reproducers."""

import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version

_PACKAGES = ("skink", "torch", "transformers", "safetensors", "numpy")


def versions(packages: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that count, and of others named."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in dict.fromkeys((*_PACKAGES, *(entry for entry in packages if entry not in found))):
        try:
            found[name] = version(name)
        except (PackageNotFoundError, ValueError):
            found[name] = "not installed"
    return found


def package_of(module: str) -> str:
    """The name of the package that a module comes from; that of its outermost module where it was not installed."""
    outermost = module.partition(".")[0]
    return (packages_distributions().get(outermost) or [outermost])[0]
