# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from hf_robust.comparison.runs import Runs
from hf_robust.errors import ConfigError


def test_calls_with_other_settings_at_the_same_time_do_not_share_a_folder(tmp_path):
    def other_call():
        (tmp_path / "settings.json").write_text(json.dumps({"config": {"shots": 2}}))
        return {}

    with pytest.raises(ConfigError, match="other settings.*'config.shots'"):
        Runs(tmp_path, {"config": {"shots": 4}}).get("zero-shot", other_call)
    assert not (tmp_path / "runs").exists()
