"""Splits by date."""

import numpy as np
import pytest

from mmrf_jax.data.splits import SplitDates


def test_every_day_has_one_split_and_the_days_between_have_none():
    dates = SplitDates(train_until=20220502, valid_until=20220503, test_from=20220505)
    days = np.array([20220401, 20220502, 20220503, 20220504, 20220505, 20230101])
    assert dates.split_of(days).tolist() == [0, 0, 1, -1, 2, 2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"valid_until": 20220502}, "valid_until=20220502 is not after train_until=20220502; set it"),
        ({"test_from": 20220503}, "test_from=20220503 is not after valid_until=20220503; set it"),
        ({"train_until": 20220601}, "valid_until=20220503 is not after train_until=20220601; set it"),
    ],
)
def test_wrong_order_is_refused_in_one_line(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        SplitDates(**kwargs)
    assert "\n" not in str(error.value)
