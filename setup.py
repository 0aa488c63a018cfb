"""Build entry point; the metadata lives in pyproject.toml.

The native libraries of csrc/ are built from here: plain shared objects on the LibTorch stable ABI, so that one
build serves many torch versions and no build needs a GPU.
"""

from setuptools import setup

setup()
