"""Whatever bytes come, decoding gives an envelope or ``DecodeError``, soon: some seconds of what ``make fuzz`` does."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzz


@settings(max_examples=600, deadline=None)
@given(st.randoms(use_true_random=False))
def test_bytes_near_valid_messages(chance):
    fuzz.check_case(chance)


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**64).map(fuzz.random.Random))
def test_more_of_them(chance):
    """Without hypothesis in the choice of what a case is made of: quicker, and further from the simple ones."""
    fuzz.check_case(chance)
