"""The build backend: scikit-build-core, and a package without the C++ kernels where those cannot be built.

Without a compiler, CMake or PyTorch's headers the installation succeeds and Skink runs on its reference kernels.
`SKINK_BUILD_KERNELS=required` makes a failure to build them an error instead, for continuous integration and packagers.
"""

import os
import sys
from collections.abc import Callable

from scikit_build_core import build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)
from scikit_build_core.errors import ScikitBuildError

Config = dict[str, list[str] | str] | None

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def build_wheel(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    return _with_or_without_kernels(build.build_wheel, wheel_directory, config_settings)


def build_editable(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    return _with_or_without_kernels(build.build_editable, wheel_directory, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Config = None) -> str:
    return build.prepare_metadata_for_build_wheel(metadata_directory, _without_kernels(config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Config = None) -> str:
    return build.prepare_metadata_for_build_editable(metadata_directory, _without_kernels(config_settings))


def _with_or_without_kernels(hook: Callable[[str, Config], str], wheel_directory: str, config_settings: Config) -> str:
    try:
        return hook(wheel_directory, config_settings)
    except (ScikitBuildError, SystemExit) as error:  # scikit-build-core leaves by SystemExit when CMake fails
        if os.environ.get("SKINK_BUILD_KERNELS") == "required":
            raise
        sys.stderr.write(f"\nskink: the C++ kernels were not built ({error or 'see above'}); going on without them.\n")
        return hook(wheel_directory, _without_kernels(config_settings))


def _without_kernels(config_settings: Config) -> Config:
    return {**(config_settings or {}), "wheel.cmake": "false"}
