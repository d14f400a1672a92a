"""The choice of quantizers, and the notes about it."""

import pytest

from qcompress.finetune.methods import Methods, ObservedSite
from qcompress.quantizers import LsqPlus, N2uqActivation, Pact, Tqt

NEGATIVE, SUM = ObservedSite("silu", 4, has_negative=True), ObservedSite("add", 8, has_negative=False)
PLAIN = ObservedSite("relu", 4, has_negative=False)


@pytest.mark.parametrize(
    ("method", "site", "kind"),
    [
        ("pact", PLAIN, Pact),
        ("pact", SUM, Pact),
        ("pact", NEGATIVE, LsqPlus),
        ("n2uq", PLAIN, N2uqActivation),
        ("n2uq", SUM, LsqPlus),
        ("tqt", NEGATIVE, Tqt),
    ],
)
def test_a_site_gets_the_method_or_its_fallback(method, site, kind):
    quantizer = Methods(activations=method).activation(site)
    assert type(quantizer) is kind
    assert quantizer.bits == site.bits
    assert (Methods(activations=method).notes([site]) == ()) == (kind is not LsqPlus)


def test_options_reach_the_method_and_not_its_fallback():
    methods = Methods(activations="pact", activation_options={"init": "min_max"})
    assert methods.activation(PLAIN).spec.init == "min_max"
    assert methods.activation(NEGATIVE).spec.init == "lsq_plus"


def test_notes_give_sites_reason_and_options():
    methods = Methods(activations="n2uq", activation_options={"init": "lsq"})
    unused = "activation_options (init) had no effect there."
    assert methods.notes([NEGATIVE, PLAIN, SUM]) == (
        f"lsq_plus quantizes the activations at silu, because n2uq has no codes for negative values; {unused}",
        f"lsq_plus quantizes the activations at add, because n2uq quantizes activations at 2 to 4 bits; {unused}",
    )
    assert methods.notes([]) == ("activation_options (init) had no effect: no activation is quantized.",)
    assert Methods(activations="n2uq").notes([]) == ()


def test_many_sites_are_counted():
    sites = [ObservedSite(f"silu_{i}", 4, has_negative=True) for i in range(9)]
    assert Methods(activations="pact").notes(sites) == (
        "lsq_plus quantizes the activations at 9 sites (silu_0, silu_1, silu_2, …), because pact has no codes for "
        "negative values.",
    )
