"""The list of families is one list."""

import pytest

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.model_spec import FAMILIES
from argosy.workers.models.registry import ARCHITECTURES, model_class


def test_every_family_that_the_spec_reads_has_a_class() -> None:
    """A row in one table and not in the other would be found by the first user of that model."""
    assert set(FAMILIES) <= set(ARCHITECTURES)
    for name in ARCHITECTURES:
        assert model_class(name).__name__ == name


def test_an_unknown_architecture_lists_what_there_is() -> None:
    """From a plan that was saved by a newer version."""
    with pytest.raises(UnsupportedModel, match="supported: LlamaForCausalLM"):
        model_class("NoSuchModel")
