"""What is public is documented: names, methods, and every option of a method."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import hf_continual
from hf_continual.methods.base import method_class, method_names

TESTS = Path(__file__).parent
PUBLIC = [name for name in hf_continual.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_of_its_own(name):
    assert (vars(getattr(hf_continual, name)).get("__doc__") or "").strip(), f"hf_continual.{name} has no docstring"


@pytest.mark.parametrize("name", method_names())
def test_method_states_its_equation_and_source(name):
    text = importlib.import_module(f"hf_continual.methods.{name}").__doc__ or ""
    equation = re.search(r"(?:\A|\n)[^\n]*\n\n((?: {4}[^\n]+\n)+)", text)
    assert equation and re.search(r"=|<-", equation.group(1)), f"methods/{name}.py: no indented equation on top"
    assert re.search(r"^Source: \S", text, re.M), f"methods/{name}.py: no line that begins with 'Source: '"


@pytest.mark.parametrize("name", method_names())
def test_method_documents_itself_and_every_option(name):
    cls = method_class(name)
    assert (vars(cls).get("__doc__") or "").strip(), f"{cls.__name__} has no docstring"
    config = cls.config_class
    assert dataclasses.is_dataclass(config) and config.__name__ == f"{cls.__name__}Config"
    assert config.__module__ == cls.__module__, f"{config.__name__} is not in methods/{name}.py"
    silent = [f.name for f in dataclasses.fields(config) if not str(f.metadata.get("help", "")).strip()]
    assert not silent, f"{config.__name__}: no help for {', '.join(silent)}"


@pytest.mark.parametrize("name", method_names())
def test_method_has_a_test_file(name):
    assert (TESTS / "methods" / f"test_{name}.py").is_file(), f"tests/methods/test_{name}.py is missing"
