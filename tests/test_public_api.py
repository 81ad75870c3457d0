"""The names a user imports: all there, and none of them costs anything before its first use."""

import subprocess
import sys
from types import ModuleType

import pytest

import swamla
import swamla.data
import swamla.model
import swamla.ops


@pytest.mark.parametrize("module", [swamla, swamla.data, swamla.model, swamla.ops], ids=lambda module: module.__name__)
def test_every_public_name_is_there(module: ModuleType) -> None:
    for name in module.__all__:
        assert getattr(module, name) is not None, name


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
