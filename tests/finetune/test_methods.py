"""The choice of quantizers, and the notes about it."""

import re
from dataclasses import replace

import pytest
import torch

from qcompress.errors import ConfigError
from qcompress.finetune.attach import prepare
from qcompress.finetune.methods import Methods, ObservedSite
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.quantizers import Lsq, LsqPlus, N2uqActivation, N2uqWeight, Pact, Tqt

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


def test_site_options_go_by_name_and_the_last_pattern_wins():
    methods = Methods(
        activations="lsq_plus",
        activation_options={"init": "min_max"},
        site_options={"*": {"configuration": 2}, "block.*": {"configuration": 3}, "block.fc*": {"learn_offset": False}},
    )
    sites = {
        name: ObservedSite(name, 4, has_negative=True) for name in ("conv.weight", "block.conv", "block.fc.weight")
    }
    quantizers = {name: methods.activation(site) for name, site in sites.items()}
    assert [q.spec.init for q in quantizers.values()] == ["min_max"] * 3
    assert [(q.spec.has_negative, q.spec.has_offset) for q in quantizers.values()] == [
        (True, False),
        (True, True),
        (True, True),
    ]
    assert quantizers["block.conv"].offset.requires_grad
    assert not quantizers["block.fc.weight"].offset.requires_grad


def test_notes_name_the_options_of_the_sites_that_a_fallback_quantizes():
    methods = Methods(activations="pact", activation_options={"init": "lsq"}, site_options={"silu": {"decay": 0.1}})
    assert methods.notes([NEGATIVE, PLAIN]) == (
        "lsq_plus quantizes the activations at silu, because pact has no codes for negative values; "
        "activation_options (init) and site_options (decay) had no effect there.",
    )
    assert methods.notes([SUM]) == ()
    assert methods.activation(NEGATIVE).spec.init == "lsq_plus"


@pytest.mark.parametrize(
    ("pattern", "names", "message"),
    [
        ("rellu", ["relu", "add"], "'rellu' matches no activation that is quantized. Did you mean relu?"),
        ("layer9.*", ["x", "y"], "'layer9.*' matches no activation that is quantized. Legal names are x, y."),
        ("x", [], "'x' matches no activation that is quantized."),
    ],
)
def test_a_pattern_of_site_options_matches_a_site(pattern, names, message):
    methods = Methods(site_options={**{name: {} for name in names}, pattern: {"init": "lsq"}})
    with pytest.raises(ConfigError, match=f"^{re.escape(f'Methods.site_options: {message}')}$"):
        methods.check_sites(names)


def test_a_weight_gets_the_method_or_its_fallback():
    plan = Plan.from_flags(bits=2)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    ends = replace(plan, name={"2.weight": Settings(bits=8)})
    tuned = prepare(net, ends, example_inputs=(torch.ones(2, 4),), methods=Methods(weights="n2uq"))
    assert [type(q) for q in tuned.quantizers().values()] == [N2uqWeight, Lsq]
    assert "lsq quantizes the weights 2.weight, because n2uq quantizes weights at 1 to 4 bits." in tuned.notes
    with pytest.raises(ConfigError, match=r"^n2uq quantizes weights at 1 to 4 bits, got 8; lsq, .* work there\.$"):
        prepare(
            tuned.unwrap(), Plan.from_flags(bits=8), example_inputs=(torch.ones(2, 4),), methods=Methods(weights="n2uq")
        )


def test_many_sites_are_counted():
    sites = [ObservedSite(f"silu_{i}", 4, has_negative=True) for i in range(9)]
    assert Methods(activations="pact").notes(sites) == (
        "lsq_plus quantizes the activations at 9 sites (silu_0, silu_1, silu_2, …), because pact has no codes for "
        "negative values.",
    )


def test_settings_without_effect_are_named():
    site = ObservedSite("x", 4, has_negative=False)
    assert Methods(weights="n2uq", per_channel=False).notes([site]) == (
        "per_channel = False had no effect: n2uq has a scale for each output channel.",
    )
    assert Methods(weights="dkm", activation_options={"init": "lsq"}, per_channel=False).notes([]) == (
        "per_channel = False had no effect: dkm has palettes.",
        "activation_options (init) had no effect: no activation is quantized.",
    )
    assert Methods().notes([]) == Methods(per_channel=False).notes([]) == ()
    assert Methods(weights="tqt", bias_bits=8).bias_notes([]) == Methods().bias_notes(["fc.weight"]) == ()
