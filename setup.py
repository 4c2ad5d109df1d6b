"""Names the packages; everything else is in setup.cfg."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["hf_continual", "hf_continual.*"]), "hf_continual.recipe_files"])
