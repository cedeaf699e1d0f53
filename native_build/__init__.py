"""The build of the native library: setup.py's parts, which run from the source tree and are not installed.

Importing it ends the build if setuptools is too old to read pyproject.toml and to build wheels.
"""

from native_build.requirements import check_setuptools

check_setuptools()
