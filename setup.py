"""Build entry point; the metadata lives in pyproject.toml, and native kernels will be built from here."""

from setuptools import setup

setup()
