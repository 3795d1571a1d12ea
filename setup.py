"""The compiled part of the package. It is optional: without a C++ compiler everything else is installed.

It is a library that is called through ctypes and knows nothing of Python, so that one wheel serves every version.
"""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "optimum_fista/packed/csrc"
NAMES = ["avx2", "avx512", "blocks", "matrix", "numbers", "portable", "threads", "yardsticks"]
HEADERS = [f"{name}.h" for name in NAMES] + ["rows.inl"]


class BuildLibrary(build_ext):
    """Names the library without the version of Python."""

    def get_ext_filename(self, fullname: str) -> str:  # noqa: D102
        return fullname.replace(".", os.sep) + ".so"


class BuildWheel(bdist_wheel):
    """Marks the wheel for the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:  # noqa: D102
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
    ext_modules=[
        Extension(
            "optimum_fista.packed._kernels",
            [f"{SOURCES}/packed_linear.cpp"],
            depends=[f"{SOURCES}/{name}" for name in HEADERS],
            extra_compile_args=[]
            if sys.platform == "win32"
            else ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread"],
            language="c++",
            optional=True,
        )
    ],
)
