"""The compiled part of the package. It is optional: without a C++ compiler everything else is installed."""

import sys

from setuptools import Extension, setup

SOURCES = "optimum_fista/packed/csrc"
NAMES = ["avx2", "avx512", "blocks", "matrix", "numbers", "portable", "threads", "yardsticks"]
HEADERS = [f"{name}.h" for name in NAMES] + ["rows.inl"]

setup(
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
    ]
)
