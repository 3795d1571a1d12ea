"""The compiled part of the package. It is optional: without a C++ compiler everything else is installed."""

import sys

from setuptools import Extension, setup

SOURCES = "optimum_fista/packed/csrc"
HEADERS = ["avx2.h", "avx512.h", "matrix.h", "numbers.h", "portable.h", "rows.inl", "threads.h", "yardsticks.h"]

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
