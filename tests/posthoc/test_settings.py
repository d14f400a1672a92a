"""Settings are checked before any work, whoever makes them."""

import re
from dataclasses import FrozenInstanceError

import pytest

from qcompress.errors import ConfigError
from qcompress.posthoc.settings import DEFAULTS, PosthocSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"effort": "bets"}, "effort must be one of fast, balanced, best, got 'bets'. Did you mean best?"),
        (
            {"calibration_method": "msee"},
            "method must be one of minmax, percentile, entropy, mse, got 'msee'. Did you mean mse?",
        ),
        ({"percentile": 50}, "percentile must be above 50 and at most 100, got 50."),
        ({"seed": -1}, "seed must be at least 0 and below 2**63, got -1."),
        ({"seed": 1 << 63}, "seed must be at least 0 and below 2**63, got 9223372036854775808."),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        PosthocSettings(**settings)


def test_settings_never_change():
    with pytest.raises(FrozenInstanceError):
        DEFAULTS.seed = 1
