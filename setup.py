"""The part of clipkit that is compiled; all else about the package is in setup.cfg.

Without a C compiler the installation goes on, and training decodes its images another way (`train/loader/crop.py`).
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "clipkit.pixels.jpeg_crop",
            sources=[f"clipkit/pixels/csrc/{name}.c" for name in ("module", "headers", "kernel", "kernel_avx2")],
            depends=["clipkit/pixels/csrc/jpeg_crop.h", "clipkit/pixels/csrc/kernel.c"],
            # No flag may let the compiler change a sum: every machine is to give the same pixels (kernel.c).
            extra_compile_args=[
                *("-std=c11", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
                *("-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only"),
            ],
            libraries=["m"],
            py_limited_api=True,
            optional=True,
        )
    ]
)
