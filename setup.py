"""Which packages there are; all else is in pyproject.toml, whose lists cannot say "what is found, and kernels/"."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["fastgate", "fastgate.*"]), "fastgate.kernels"])
