"""Random ragged session logs for the tests of this folder."""

import pytest
import random_logs


@pytest.fixture
def make_log():
    return random_logs.make_log


@pytest.fixture
def spec():
    return random_logs.SPEC
