"""The names a user imports: all there, and none of them costs anything before its first use."""

import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import swamla
import swamla.model
from swamla.exports import exported_names

ROOT = Path(swamla.__file__).parent.parent
PACKAGES = [
    ".".join(file.parent.relative_to(ROOT).parts)
    for file in sorted(ROOT.rglob("__init__.py"))
    if "__all__" in file.read_text(encoding="utf-8")
]
LAZY = [package for package in PACKAGES if "swamla.exports" in inspect.getsource(import_module(package))]


def test_packages_have_public_names() -> None:
    assert {"swamla", "swamla.model", "swamla.checkpoint", "swamla.data", "swamla.ops"} <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    module = import_module(package)
    assert all(getattr(module, name) is not None for name in module.__all__)


@pytest.mark.parametrize("package", LAZY)
def test_no_lazy_name_is_also_that_of_a_module_which_would_take_its_place(package: str) -> None:
    module = import_module(package)
    modules = {found.name for found in pkgutil.iter_modules(module.__path__)}
    assert all(isinstance(getattr(module, name), ModuleType) for name in modules.intersection(module.__all__))


def test_the_package_has_its_public_names_and_no_others() -> None:
    assert set(dir(swamla)) == set(swamla.__all__)
    assert not hasattr(swamla, "no_such_name")


def test_names_and_their_modules_are_read_from_the_imports_under_type_checking_alone() -> None:
    source = """
from typing import TYPE_CHECKING
from os import path
if TYPE_CHECKING:
    from a.b import C as C
    from a import (
        d as d,
        E as E,
    )
else:
    from a.f import G
"""
    assert exported_names(source) == {"C": "a.b", "d": "a", "E": "a"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LanguageModle'"):
        _ = swamla.model.LanguageModle


def test_importing_the_package_and_its_model_does_not_import_torch() -> None:
    code = "import sys, swamla, swamla.model, swamla.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_is_built_from_public_names_alone() -> None:
    from swamla.model import BlockConfig, GDNConfig, LanguageModelConfig, MLAConfig

    mla = MLAConfig(n_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
    blocks = {"gdn": BlockConfig(mixer=GDNConfig(n_heads=2)), "mla": BlockConfig(mixer=mla)}
    model = LanguageModelConfig(vocab_size=11, width=16, blocks=blocks, pattern=("gdn", "gdn", "mla")).build()
    tokens = swamla.Decoder(model).generate([[1, 2]], 3, sampling=swamla.Sampling(temperature=0))
    assert len(tokens[0]) == 3
